"""The laboratory: what makes two arms comparable, the identities of every variant, measuring, runs.

Dimensions: B=2 batch, T tokens, H=4 query heads, J=2 key/value heads, G=2, D=8 head dimension,
N chunks, S=4 chunk size, K=2.
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close, error, random, random_choice, results
from material import word_corpus, word_tokens

from hsa_mini import ChunkMemory, HSAModel, reference
from hsa_mini.data.corpus import SPLITS
from hsa_mini.inference.prefill import prefill
from hsa_mini.lab import measure as measuring
from hsa_mini.lab import variants
from hsa_mini.lab.arms import ARMS
from hsa_mini.lab.reading import concatenated, grouped_gates
from hsa_mini.lab.run import PackedBatches, run_arm
from hsa_mini.lab.scales import SCALES, Scale
from hsa_mini.ops.rope import apply_rope, rope_table
from hsa_mini.training.mixture import ANSWER, NONE, TrainingBatches
from hsa_mini.training.recipes import Stage
from hsa_mini.training.trainer import Trainer

CPU = torch.device("cpu")
TINY = SCALES["tiny"]
# The sizes of `debug`, on sequences of 12 chunks of 4 tokens: what a test can afford.
SMALL = Scale(
    "small",
    dataclasses.replace(
        TINY.config,
        vocab_size=64,
        chunk_size=4,
        window=4,
        top_k=2,
        hsa_heads=4,
        hsa_kv_heads=2,
        hsa_head_dim=8,
    ),
    Stage(steps=30, batch=2, tokens=48),
    multiples=(1, 2),
)
VARIED = {arm.model: arm for arm in ARMS.values() if arm.model is not HSAModel}
ids_of_models = pytest.mark.parametrize("arm", VARIED.values(), ids=lambda arm: arm.name)


def made(arm, dtype=torch.float64, scale=SMALL) -> HSAModel:
    torch.manual_seed(0)
    return arm.model(arm.config(scale), dtype=dtype)


def some_ids(tokens: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(
        SMALL.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed)
    )


def filled(config, chunks: int) -> ChunkMemory:
    """A memory of random chunks."""
    memory = ChunkMemory(config)
    J = config.hsa_kv_heads
    D = config.hsa_head_dim
    S = config.chunk_size
    landmarks = random(2, chunks, config.retrieval_heads, config.retrieval_dim, seed=5)
    memory.chunks.append(
        random(2, chunks, S, J, D, seed=3), random(2, chunks, S, J, D, seed=4), landmarks
    )
    return memory


# What makes arms comparable


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_arms_have_equal_parameters_and_see_equally_many_tokens(scale):
    base = ARMS["hsa"]
    for arm in ARMS.values():
        mine, others = arm.parameters(scale)[arm.counted], base.parameters(scale)[arm.counted]
        assert abs(mine / others - 1) < 0.01, (arm.name, mine, others)
        stages, usual = (
            [(s.steps, s.batch, s.tokens, s.text_weight) for s in a.recipe(scale).stages]
            for a in (arm, base)
        )
        assert stages == usual and stages[-1][2] == scale.stage.tokens, arm.name
        assert (arm.recipe(scale).learning_rate, arm.recipe(scale).warmup) == (
            scale.learning_rate,
            scale.warmup,
        )
    assert [arm.name for arm in ARMS.values() if arm.counted == "active"] == ["moe_chains"]


def test_an_arm_changes_what_it_says_and_widths_of_mlps():
    lab = SCALES["lab"]
    base = ARMS["hsa"].config(lab)
    usual = ARMS["hsa"].recipe(lab)
    assert base == lab.config
    changed = {}
    for arm in ARMS.values():
        config = arm.config(lab)
        recipe = arm.recipe(lab)
        names = {
            f.name
            for f in dataclasses.fields(config)
            if getattr(config, f.name) != getattr(base, f.name)
        } - {"mlp_width"}
        changed[arm.name] = (names, recipe != usual, arm.packed, arm.model)
    sizes = {"hsa_heads", "hsa_head_dim", "retrieval_dim"}  # of the HSA that is missing
    assert changed["window"][0] == sizes and changed["full_rope"][0] == sizes | {"window"}
    assert all(
        not names
        for name, (names, *_) in changed.items()
        if name in ("hsa_rope", "mean_landmark", "concatenated", "full_k")
    )
    assert changed["mean_key"][0] == changed["grouped_softmax"][0] == {"retrieval_dim"}
    assert changed["no_noise"][0] == {"exploration"} and all(
        changed[f"window_{n}x"][0] == {"window"} for n in (4, 8, 16)
    )
    # All arms differ.
    assert len({json.dumps(arm.settings(lab) | {"arm": ""}) for arm in ARMS.values()}) == len(ARMS)
    assert (
        lab.config.window * 8
        == lab.stage.tokens // 2
        >= lab.stage.mixture.min_copy
        > lab.config.window
    )


def test_contexts_grow_and_with_them_windows_and_distances_of_copies():
    lab = SCALES["lab"]
    tokens = [stage.tokens for stage in ARMS["hsa"].recipe(lab).stages]
    assert tokens == sorted(tokens) and tokens[0] < tokens[-1] == lab.stage.tokens
    for arm in ARMS.values():
        for stage in arm.recipe(lab).stages:
            share = stage.tokens / lab.stage.tokens
            assert stage.mixture.min_copy == share * lab.stage.mixture.min_copy
            warms = arm.name == "warmup_short_window" and share < 1
            window = lab.config.window if warms else arm.config(lab).window
            assert stage.window == (stage.tokens if "full_rope" in arm.name else share * window), (
                arm.name
            )
            assert stage.queue_chunks == (
                lab.lengths[-1] // lab.config.chunk_size
                if arm.name == "text_crowd" and share == 1
                else None
            )
    for stage in ARMS["hsa"].recipe(lab).stages:
        assert stage.window < stage.mixture.min_copy


@pytest.mark.parametrize(
    "arm",
    [ARMS["hsa"], ARMS["moe_chains"], ARMS["warmup_none"], ARMS["data_short"]],
    ids=lambda arm: arm.name,
)
def test_sequences_of_every_stage_hold_what_they_are_asked(arm, monkeypatch):
    monkeypatch.setattr("hsa_mini.training.mixture.load_corpus", word_corpus)
    recipe = arm.recipe(SCALES["lab"], 24)
    batches = PackedBatches(recipe, 0, arm.packed)
    for step in range(24):
        stage = recipe.stage(step)
        ids, parts = batches[step]
        assert (
            ids.shape == parts.shape == (stage.batch, stage.tokens + 1) and (parts == ANSWER).any()
        )


def test_short_data_are_whole_sequences_in_a_row(monkeypatch):
    monkeypatch.setattr("hsa_mini.training.mixture.load_corpus", word_corpus)
    recipe = ARMS["data_short"].recipe(TINY)
    short = TINY.stage.tokens // 4
    step = recipe.steps - 1
    ids, parts = PackedBatches(recipe, 3, 4)[step]
    options = dict(steps=recipe.steps, seed=3)
    source = TrainingBatches(TINY.stage.mixture, batch=8, tokens=short, **options)
    alone, its_parts = source[step]
    assert ids.shape == parts.shape == (2, TINY.stage.tokens + 1)
    for row in range(2):
        for place in range(1, 4):
            # The first sequence lacks three tokens.
            here = slice((place - 1) * (short + 1) + short - 2, None)
            stretch = slice(here.start, here.start + short + 1)
            assert torch.equal(ids[row, stretch], alone[4 * row + place])
            assert parts[row, stretch][0] == NONE and torch.equal(
                parts[row, stretch][1:], its_parts[4 * row + place, 1:]
            )
    plain = PackedBatches(recipe, 3, 1)
    assert torch.equal(
        plain[step][0],
        TrainingBatches(TINY.stage.mixture, batch=2, tokens=512, **options)[step][0],
    )
    first = PackedBatches(recipe, 3, 4)[0]  # this stage is short already
    assert first[0].shape == (4, short + 1) and torch.equal(
        first[0], PackedBatches(recipe, 3, 1)[0][0]
    )


def test_the_core_knows_nothing_of_the_laboratory():
    root = Path(variants.__file__).resolve().parents[1]
    users = {
        path.parent.name
        for path in root.rglob("*.py")
        if path.parent.name not in ("lab", "viz")
        and re.search(r"\blab\b.* import", path.read_text())
    }
    assert users == {"cli"}


# Reading


def naive_concatenated(q, k, v, indices):
    out = torch.zeros_like(q)
    B, T, H, D = q.shape
    for b, t, h in np.ndindex(B, T, H):
        j = h // (H // k.shape[3])
        kept = [i for i in indices[b, t, j].tolist() if i >= 0]
        if kept:
            keys, values = (torch.cat([x[b, i, :, j] for i in kept]) for x in (k, v))
            out[b, t, h] = (keys @ q[b, t, h] / D**0.5).softmax(0) @ values
    return out


@pytest.mark.parametrize("J", [1, 2])
@pytest.mark.parametrize("N", [0, 5])
def test_concatenated_is_dense_softmax_over_the_tokens_of_the_chosen_chunks(J, N):
    indices, _ = random_choice(2, 6, J, 3, N)
    inputs = dict(
        q=random(2, 6, 4, 8), k=random(2, N, 4, J, 8, seed=1), v=random(2, N, 4, J, 8, seed=2)
    )
    indices[0, 1] = -1  # a token without chunks
    got = results(lambda **x: concatenated(**x, indices=indices), inputs)
    assert_close(got, results(lambda **x: naive_concatenated(**x, indices=indices), inputs), 1e-10)


def test_concatenated_of_one_chunk_is_chunk_attention_and_of_several_is_not():
    q = random(2, 6, 4, 8)
    k = random(2, 5, 4, 2, 8, seed=1)
    v = random(2, 5, 4, 2, 8, seed=2)
    one, _ = random_choice(2, 6, 2, 1, 5)
    assert_close(
        concatenated(q, k, v, one),
        reference.chunk_attention(q, k, v, one, (one >= 0).double()),
        1e-10,
    )
    several, _ = random_choice(2, 6, 2, 3, 5)
    even = (several >= 0) / (several >= 0).sum(-1, keepdim=True).clamp(min=1).double()
    assert (
        error(concatenated(q, k, v, several), reference.chunk_attention(q, k, v, several, even))
        > 0.05
    )


def test_gates_are_one_softmax_of_landmarks_and_own_key():
    indices, _ = random_choice(2, 6, 2, 3, 5)
    query = random(2, 6, 2, 8)
    landmarks = random(2, 5, 2, 8, seed=1)
    own = random(2, 6, 2, 8, seed=2)
    near, far = grouped_gates(query, landmarks, own, indices)
    for b, t, j in np.ndindex(2, 6, 2):

        def exp(key, q=query[b, t, j]):
            return float(((q @ key) / 8**0.5).exp())

        kept = [exp(landmarks[b, i, j]) if i >= 0 else 0.0 for i in indices[b, t, j].tolist()]
        total = exp(own[b, t, j]) + sum(kept)
        assert near[b, t, j].item() == pytest.approx(exp(own[b, t, j]) / total)
        assert far[b, t, j].tolist() == pytest.approx([x / total for x in kept])


# Layers


def test_the_grouped_layer_reads_chunks_through_their_landmarks_gates():
    model = made(ARMS["grouped_softmax"])
    hsa = model.upper[0].hsa
    memory = filled(model.config, 5)
    x = random(2, 3, model.config.width)
    out, retrieval, _ = hsa(x, memory.chunks.source(), position=22)
    q = hsa.q_norm(hsa.q(x).unflatten(-1, (4, 8)))
    own_k = hsa.own_norm(hsa.own_k(x).unflatten(-1, (2, 8)))
    own_v = hsa.own_v(x).unflatten(-1, (2, 8))
    want = torch.zeros(2, 3, 4, 8, dtype=torch.float64)
    for b, t, h in np.ndindex(2, 3, 4):
        j = h // 2
        shared = q[b, t, 2 * j : 2 * j + 2].mean(0)
        scores = memory.chunks.landmarks[b, :, j] @ shared / 8**0.5
        kept = scores.topk(2).indices.tolist()
        assert sorted(kept) == sorted(retrieval.indices[b, t, j].tolist())
        gates = torch.stack([shared @ own_k[b, t, j] / 8**0.5, *scores[kept]]).softmax(0)
        inside = [
            (memory.chunks.k[b, i, :, j] @ q[b, t, h] / 8**0.5).softmax(0)
            @ memory.chunks.v[b, i, :, j]
            for i in kept
        ]
        want[b, t, h] = gates[0] * own_v[b, t, j] + gates[1] * inside[0] + gates[2] * inside[1]
    assert_close(out, hsa.out(want.flatten(-2)), 1e-10)


def test_mean_keys_choose_with_the_queries_of_attention():
    model = made(ARMS["mean_key"])
    hsa = model.upper[0].hsa
    x = random(2, 3, model.config.width)
    k, v, landmarks, _ = model.encoder(random(2, 5, 4, model.config.width, seed=1))
    assert torch.equal(landmarks, k.mean(dim=2))
    memory = ChunkMemory(model.config)
    memory.chunks.append(k, v, landmarks)
    _, retrieval, _ = hsa(x, memory.chunks.source(), position=22)
    q = hsa.q_norm(hsa.q(x).unflatten(-1, (4, 8))).unflatten(2, (2, 2)).sum(3)
    best = torch.einsum("btjd,bnjd->btjn", q, landmarks).topk(2).indices
    assert torch.equal(retrieval.indices.sort(-1).values.long(), best.sort(-1).values)
    assert not any(
        name.startswith(("encoder.cls", "encoder.landmark")) for name, _ in model.named_parameters()
    )


def test_a_mean_landmark_is_that_of_the_mean_and_knows_no_order():
    hidden = random(2, 3, 4, SMALL.config.width)
    shuffled = hidden[:, :, [2, 0, 3, 1]]
    encoder = made(ARMS["mean_landmark"]).encoder
    k, _, landmarks, _ = encoder(hidden)
    assert_close(
        landmarks, encoder.landmark(encoder.norm(hidden).mean(2)).unflatten(-1, (1, -1)), 1e-12
    )
    assert_close(encoder(shuffled)[2], landmarks, 1e-12)
    assert_close(k[:, :, 1], encoder(hidden[:, :, 1:2])[0][:, :, 0], 1e-12)  # of one token alone
    whole = made(ARMS["hsa"]).encoder
    assert error(whole(shuffled)[2], whole(hidden)[2]) > 0.01


def test_with_rope_inside_a_chunk_reads_otherwise_from_further_away_and_without_it_does_not():
    model = made(ARMS["hsa_rope"])
    memory = filled(model.config, 3)
    q = random(2, 5, 4, 8)
    indices, weights = random_choice(2, 5, 2, 2, 3)
    near, far = (model.attend(memory, position, q, indices, weights) for position in (12, 400))
    assert error(far, near) > 0.1
    shifted = ChunkMemory(model.config)  # query and chunks move together, by 5 chunks
    shifted.chunks.append(
        *(
            torch.cat((random(2, 5, *x.shape[2:], seed=9), x), dim=1)
            for x in (memory.chunks.k, memory.chunks.v, memory.chunks.landmarks)
        )
    )
    moved = torch.where(indices < 0, indices, indices + 5)
    # The angles of RoPE are float32.
    assert_close(model.attend(shifted, 12 + 20, q, moved, weights), near, 1e-6)
    # The baseline has no positions.
    assert_close(
        memory.chunks.source().attend(q, indices, weights),
        shifted.chunks.source().attend(q, moved, weights),
        1e-12,
    )


def test_rope_inside_turns_queries_and_keys_by_their_places():
    model = made(ARMS["hsa_rope"])
    memory = filled(model.config, 3)
    q = random(2, 5, 4, 8)
    indices, weights = random_choice(2, 5, 2, 2, 3)
    turned = random(2, 3, 4, 2, 8)
    for n, s in np.ndindex(3, 4):
        turned[:, n, s] = apply_rope(
            memory.chunks.k[:, n, s], rope_table(torch.tensor(4 * n + s), 8, 10_000.0)
        )
    q_turned = torch.stack(
        [apply_rope(q[:, t], rope_table(torch.tensor(13 + t), 8, 10_000.0)) for t in range(5)],
        dim=1,
    )
    want = reference.chunk_attention(q_turned, turned, memory.chunks.v, indices, weights)
    assert_close(model.attend(memory, 13, q, indices, weights), want, 1e-6)


def test_a_score_that_only_selects_has_no_gradient_and_one_that_weighs_has():
    ids = some_ids(48)

    def gradients(name: str) -> dict[str, float]:
        model = made(ARMS[name]).train()
        model(ids, gumbel_seed=1).logits.square().sum().backward()
        return {
            n: 0.0 if p.grad is None else float(p.grad.abs().sum())
            for n, p in model.named_parameters()
        }

    choosing = (
        "encoder.landmark.weight",
        "upper.0.hsa.retrieval_q.weight",
        "upper.1.hsa.retrieval_q.weight",
    )
    fused = gradients("hsa")
    selected = gradients("concatenated")
    assert all(fused[name] > 0 for name in choosing)
    assert all(selected[name] == 0 for name in choosing) and selected["encoder.k.weight"] > 0
    assert gradients("grouped_softmax")["encoder.landmark.weight"] > 0


def test_without_hsa_nothing_beyond_the_windows_is_seen_and_a_long_window_sees_all():
    ids = some_ids(48)
    other = some_ids(48)
    other[:, 0] = (ids[:, 0] + 1) % 64
    narrow = made(ARMS["window"])
    full = made(ARMS["full_rope"])
    reach = (SMALL.config.lower_layers + SMALL.config.upper_layers) * (SMALL.config.window - 1)
    assert torch.equal(narrow(ids).logits[:, reach + 1 :], narrow(other).logits[:, reach + 1 :])
    assert not torch.equal(narrow(ids).logits[:, reach], narrow(other).logits[:, reach])
    assert not torch.equal(full(ids).logits[:, -1], full(other).logits[:, -1])
    assert not narrow(ids).aux.retrievals and not any(
        "hsa" in name or "encoder" in name for name, _ in narrow.named_parameters()
    )


def test_without_qk_norm_no_attention_has_one():
    names = [name for name, _ in made(ARMS["no_qk_norm"]).named_parameters()]
    assert not [name for name in names if "q_norm" in name or "k_norm" in name]
    assert (
        len(
            [
                name
                for name, _ in made(ARMS["hsa"]).named_parameters()
                if "q_norm" in name or "k_norm" in name
            ]
        )
        == 11
    )


@pytest.mark.parametrize("arm", [ARMS["hsa"], *VARIED.values()], ids=lambda arm: arm.name)
def test_training_is_streaming_is_token_by_token(arm):
    model = made(arm).eval()
    ids = some_ids(30)
    whole = model(ids).logits
    for segment in (1, 7, 16):
        memory = ChunkMemory(model.config)
        parts = []
        for part in ids.split(segment, dim=1):
            parts.append(model(part, memory).logits)
        assert_close(torch.cat(parts, dim=1), whole, 1e-9)
    output = prefill(model, ids[:, :25], segment=6)  # the upper decoder reads only what it must
    assert_close(output.logits[:, -1], whole[:, 24], 1e-9)
    for t in range(25, 30):
        output = model(ids[:, t : t + 1], output.memory)
        assert_close(output.logits[:, -1], whole[:, t], 1e-9)


@ids_of_models
def test_a_variant_refuses_single_steps_and_every_forward_is_its_own(arm):
    model = made(arm).eval()
    ids = some_ids(30)
    twin = made(ARMS["hsa"], scale=dataclasses.replace(SMALL, config=arm.config(SMALL))).eval()
    twin.load_state_dict(model.state_dict(), strict=False)
    assert error(model(ids).logits, twin(ids).logits) > 1e-4
    if any(block.hsa for block in model.upper):
        with pytest.raises(NotImplementedError):
            model.generate(ids, max_new_tokens=3)


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_every_arm_learns_a_batch_by_heart(arm):
    model = made(arm, torch.float32).train()
    recipe = arm.recipe(SMALL)
    recipe = dataclasses.replace(recipe, learning_rate=1e-2, warmup=3)
    trainer = Trainer(model, recipe)
    batch = some_ids(49), torch.ones(2, 49, dtype=torch.int8)
    losses = [float(trainer.train_step(batch).loss) for _ in range(recipe.steps)]
    assert losses[-1] < 0.6 * losses[0]


# Measuring


class Answers:
    """Stands in for a sample."""

    def __init__(self, answer: torch.Tensor) -> None:
        self.answer = answer.numpy()


def test_an_answer_is_right_if_all_its_tokens_are_what_the_model_says():
    model = made(ARMS["hsa"], torch.float32).eval()
    ids = some_ids(30)
    said = model.generate(ids, max_new_tokens=5).ids
    wrong = said.clone()
    wrong[1, 4] += 1
    with torch.no_grad():
        assert measuring._count_correct(model, ids, [Answers(row) for row in said]) == 2
        assert measuring._count_correct(model, ids, [Answers(row) for row in wrong]) == 1


def test_the_same_tokens_are_scored_at_every_length_and_copies_end_as_they_begin(monkeypatch):
    corpus = word_tokens()
    seen = {}

    def watched(model, scale, texts):
        seen.setdefault(len(texts[0]), []).append(np.stack(texts))
        yield (
            torch.zeros(len(texts), scale.tail, 4096),
            torch.zeros(len(texts), scale.tail, dtype=torch.int64),
        )

    monkeypatch.setattr(measuring, "_tails", watched)
    scale = TINY
    tail = TINY.tail
    for tokens in scale.lengths:
        measuring.perplexity_row(None, scale, tokens, corpus, 1)
        measuring.copy_row(None, scale, tokens, corpus, 1)
    (short, short_copies), (long, long_copies) = (seen[tokens] for tokens in scale.lengths)
    assert (long[:, -scale.lengths[0] :] == short).all() and len(short) == scale.texts
    for copies in (short_copies, long_copies):
        assert (copies[:, :tail] == copies[:, -tail:]).all() and (
            copies[:, tail : 2 * tail] != copies[:, -tail:]
        ).any()


def test_what_is_measured_is_what_the_whole_forward_pass_says(monkeypatch):
    monkeypatch.setattr(measuring, "load_corpus", word_corpus)
    model = made(ARMS["concatenated"], torch.float32, scale=TINY).eval()
    found = measuring.measure_arm(model, TINY)
    assert set(found) == {"s_niah", "mq_niah", "vt", "perplexity", "copy"}
    assert all([row["tokens"] for row in rows] == [512, 2048] for rows in found.values())
    texts = []
    tails = measuring._tails
    monkeypatch.setattr(
        measuring, "_tails", lambda model, scale, few: texts.extend(few) or tails(model, scale, few)
    )
    with torch.no_grad():
        measuring.perplexity_row(model, TINY, 512, word_corpus("validation").tokens, 1)
    ids = torch.from_numpy(np.stack(texts).astype(np.int64))
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")[
        :, -TINY.tail :
    ]
    assert found["perplexity"][0]["perplexity"] == pytest.approx(
        losses.mean().exp().item(), rel=1e-4
    )
    assert found["perplexity"][0]["scored"] == losses.numel()
    monkeypatch.undo()
    monkeypatch.setattr(measuring, "load_corpus", word_corpus)
    monkeypatch.setattr(measuring, "TOKENS_AT_ONCE", 512)  # one text at a time
    again = measuring.measure_arm(model, TINY)
    assert again["perplexity"][1]["perplexity"] == pytest.approx(
        found["perplexity"][1]["perplexity"], rel=1e-5
    )
    assert again["s_niah"] == found["s_niah"]


def test_a_run_is_a_function_of_arm_and_seed(monkeypatch):
    monkeypatch.setattr("hsa_mini.training.mixture.load_corpus", word_corpus)
    monkeypatch.setattr(measuring, "load_corpus", word_corpus)
    monkeypatch.setattr("hsa_mini.lab.run.load_corpus", word_corpus)
    scale = dataclasses.replace(TINY, multiples=(1,), questions=1)
    done = []
    one, two, other = (
        run_arm(ARMS["hsa"], scale, seed, device=CPU, steps=3, progress=done.append)
        for seed in (5, 5, 6)
    )
    assert sum(done) == 9 and one["curve"]["step"] == [1, 2, 3]
    assert sum(stage["steps"] for stage in one["settings"]["recipe"]["stages"]) == 3
    for record in (one, two, other):
        assert record.pop("seconds").keys() == {"training", "evaluation"}
    assert one["corpora"] == [word_corpus(split).identity for split in SPLITS]
    assert one == two and one["curve"] != other["curve"]
    assert one["parameters"] == sum(p.numel() for p in made(ARMS["hsa"], scale=TINY).parameters())
