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
from hsa_mini.lab.mechanisms import choosing, dash, hils, joint, landmarks
from hsa_mini.lab.mechanisms.entmax import entmax15
from hsa_mini.lab.reading import concatenated, grouped_gates
from hsa_mini.lab.run import PackedBatches, run_arm
from hsa_mini.lab.scales import SCALES, Scale
from hsa_mini.lab.settled.arms import SETTLED_ARMS
from hsa_mini.lab.states import RunStates
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
EVERY_ARM = ARMS | SETTLED_ARMS
VARIED = {arm.model: arm for arm in EVERY_ARM.values() if arm.model is not HSAModel}
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


@pytest.mark.parametrize("scale", [SCALES["lab"], TINY], ids=["lab", "tiny"])
def test_arms_have_equal_parameters_and_see_equally_many_tokens(scale):
    base = ARMS["hsa"]
    for arm in EVERY_ARM.values():
        if arm.counted == "mlp_width":
            assert arm.config(scale).mlp_width == scale.config.mlp_width
        else:
            mine = arm.parameters(scale)[arm.counted]
            others = arm.share * base.parameters(scale)[arm.counted]
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
    others = {arm.name: arm.counted for arm in EVERY_ARM.values() if arm.counted != "parameters"}
    assert others == {"moe_chains": "active", "text_full_rope_same_mlp": "mlp_width"}
    assert [a.name for a in EVERY_ARM.values() if a.share != 1] == ["text_full_rope_paper"]


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
    settings = {json.dumps(arm.settings(lab) | {"arm": ""}) for arm in EVERY_ARM.values()}
    assert len(settings) == len(EVERY_ARM)
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
    for arm in EVERY_ARM.values():
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
                if arm.name in ("text_crowd", "cross_batch") and share == 1
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
        path.relative_to(root).parts[0]
        for path in root.rglob("*.py")
        if re.search(r"\blab\b.* import", path.read_text())
    } - {"lab", "viz"}
    assert users == {"cli", "course.py", "exercises"}


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
    sizes = {name: x.shape for name, x in twin.state_dict().items()}
    same = {name: x for name, x in model.state_dict().items() if sizes.get(name) == x.shape}
    twin.load_state_dict(same, strict=False)
    assert error(model(ids).logits, twin(ids).logits) > 1e-4
    if any(block.hsa for block in model.upper):
        with pytest.raises(NotImplementedError):
            model.generate(ids, max_new_tokens=3)


@pytest.mark.parametrize("arm", EVERY_ARM.values(), ids=EVERY_ARM)
def test_every_arm_learns_a_batch_by_heart(arm):
    model = made(arm, torch.float32).train()
    recipe = arm.recipe(SMALL)
    recipe = dataclasses.replace(recipe, learning_rate=1e-2, warmup=3)
    trainer = Trainer(model, recipe)
    batch = some_ids(49), torch.ones(2, 49, dtype=torch.int8)
    losses = [float(trainer.train_step(batch).loss) for _ in range(recipe.steps)]
    assert losses[-1] < 0.6 * losses[0]


# Other mechanisms


def naive_entmax(scores: torch.Tensor) -> torch.Tensor:
    """1.5-entmax of one row, its threshold found by halving."""
    low = scores.max() / 2 - 1
    high = scores.max() / 2
    for _ in range(100):
        middle = (low + high) / 2
        if (scores / 2 - middle).clamp(min=0).square().sum() > 1:
            low = middle
        else:
            high = middle
    return (scores / 2 - low).clamp(min=0).square()


def test_entmax_is_sparse_sums_to_1_and_has_its_gradient():
    scores = 2 * random(5, 9)
    scores[0] = 3.0  # ties
    scores[1, 2:] = float("-inf")
    scores[2] = float("-inf")
    weights = entmax15(scores)
    for row in (0, 1, 3, 4):
        assert_close(weights[row], naive_entmax(scores[row]), 1e-12)
    assert (weights[2] == 0).all() and (weights[3:] == 0).any()
    assert torch.equal(entmax15(scores[:, :0]), scores[:, :0])
    assert_close(entmax15(torch.tensor([-2.0, 0.0, 0.5])), torch.tensor([0.0, 0.326, 0.674]), 1e-3)
    assert torch.autograd.gradcheck(entmax15, random(3, 6, seed=1).mul(3).requires_grad_())
    scores.requires_grad_()
    entmax15(scores)[:, 0].sum().backward()
    assert scores.grad.isfinite().all() and (scores.grad[2] == 0).all()


def test_a_surrogate_is_the_tangent_of_the_log_mass_at_the_reference_query():
    k = random(2, 3, 4, 2, 8, seed=1)
    reference = random(2, 3, 2, 8, seed=2)
    found = hils.surrogate(reference, k)
    for b, n, j in np.ndindex(2, 3, 2):

        def mass(q, keys=k[b, n, :, j]):
            return (keys @ q / 8**0.5).logsumexp(0)

        at = reference[b, n, j].clone().requires_grad_()
        (slope,) = torch.autograd.grad(mass(at), at)
        assert_close(found[b, n, j, :-1] / 8**0.5, slope, 1e-12)
        line = found[b, n, j, -1] + at.detach() @ slope
        assert line.item() == pytest.approx(mass(at).item())
        # The log mass is convex, so its tangent lies below it everywhere.
        for seed in range(5):
            q = 3 * random(8, seed=seed)
            assert found[b, n, j, -1] + q @ slope <= mass(q) + 1e-12


def test_masses_and_windows_are_what_loops_say():
    q = random(2, 5, 4, 8)
    k = random(2, 3, 4, 2, 8, seed=1)
    masses = choosing.log_masses(q, k)
    near_k = random(2, 8, 2, 8, seed=2)  # three keys of the window came before the queries
    near_v = random(2, 8, 2, 8, seed=3)
    inside, near_masses = joint.window_attention(q, near_k, near_v, 3)
    want = reference.sliding_window_attention(q, near_k, near_v, window=3)
    assert_close(inside, want, 1e-12)
    for b, t, h in np.ndindex(2, 5, 4):
        for n in range(3):
            exact = (k[b, n, :, h // 2] @ q[b, t, h] / 8**0.5).logsumexp(0)
            assert masses[b, t, h, n].item() == pytest.approx(exact.item())
        exact = (near_k[b, t + 1 : t + 4, h // 2] @ q[b, t, h] / 8**0.5).logsumexp(0)
        assert near_masses[b, t, h].item() == pytest.approx(exact.item())


def joint_parts(name: str, chunks: int = 5, tokens: int = 3, position: int = 22):
    """A layer with near keys, its inputs, and all that a loop over its tokens needs."""
    model = made(ARMS.get(name) or SETTLED_ARMS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * random(*parameter.shape, seed=parameter.numel()))
    layer = model.upper[0].hsa
    with torch.no_grad():
        layer.q_norm.weight.mul_(4)  # scores so far apart that entmax leaves chunks out
    hidden = random(2, chunks, 4, model.config.width, seed=1)
    k, v, marks, _ = model.encoder(hidden)
    memory = ChunkMemory(model.config)
    memory.chunks.append(k, v, marks)
    x = random(2, tokens, model.config.width)
    before = random(2, 3, 2, 8, seed=7)
    near = tuple(torch.cat((before, new), dim=1) for new in layer.near(x, position))
    out, retrieval, _ = layer(x, memory.chunks.source(), near=near, position=position)
    q = layer.q_norm(layer.q(x).unflatten(-1, (4, 8)))
    turned = apply_rope(q, rope_table(torch.arange(position, position + tokens), 8, 10_000.0))
    return model, x, (k, v, marks), near, (q, turned), out, retrieval


def one_softmax(layer, near, queries, chunks, choose) -> torch.Tensor:
    """A joint layer by loops; choose(b, t, h) -> {chunk: log mass}."""
    q, turned = queries
    k, v, _ = chunks
    want = torch.zeros_like(q)
    for b, t, h in np.ndindex(2, q.shape[1], 4):
        j = h // 2
        keys, values = (part[b, t : t + 4, j] for part in near)
        logits = keys @ turned[b, t, h] / 8**0.5
        parts = [(logits.logsumexp(0), logits.softmax(0) @ values)]
        for n, mass in choose(b, t, h).items():
            inside = (k[b, n, :, j] @ q[b, t, h] / 8**0.5).softmax(0) @ v[b, n, :, j]
            parts.append((mass, inside))
        shares = torch.stack([mass for mass, _ in parts]).softmax(0)
        want[b, t, h] = sum(share * inside for share, (_, inside) in zip(shares, parts))
    return layer.out(want.flatten(-2))


def test_hils_is_one_softmax_of_the_window_and_the_chunks_by_estimated_masses():
    model, x, chunks, near, queries, out, retrieval = joint_parts("hils")
    layer = model.upper[0].hsa
    marks = chunks[2]
    q = queries[0] + layer.widen(layer.narrow(x)).unflatten(-1, (4, 8))
    masses = torch.einsum("bthd,bnhd->bthn", q, marks[..., :8].repeat_interleave(2, 2)) / 8**0.5
    masses = masses + marks[..., 8].repeat_interleave(2, 2).transpose(1, 2)[:, None]
    shares = masses.softmax(-1)

    def choose(b, t, h):
        best = torch.maximum(shares[b, t, h // 2 * 2], shares[b, t, h // 2 * 2 + 1])
        chosen = best.topk(2).indices.tolist()
        assert sorted(chosen) == sorted(retrieval.indices[b, t, h // 2].tolist())
        return {n: masses[b, t, h, n] for n in chosen}

    assert_close(out, one_softmax(layer, near, queries, chunks, choose), 1e-10)


def test_the_landmarks_of_hils_are_surrogates_at_the_query_of_the_last_token():
    encoder = made(SETTLED_ARMS["hils"]).encoder
    hidden = random(2, 3, 4, SMALL.config.width)
    k, _, marks, _ = encoder(hidden)
    asked = encoder.reference(encoder.norm(hidden[:, :, -1])).unflatten(-1, (2, 8))
    assert_close(marks, hils.surrogate(encoder.reference_norm(asked), k), 1e-12)
    assert_close(k[:, :, 1], encoder(hidden[:, :, 1:2])[0][:, :, 0], 1e-12)  # no token sees others
    assert not model_parameters_named("hils", "cls", "landmark", "encoder.blocks", "retrieval_q")


def model_parameters_named(arm: str, *words: str) -> list[str]:
    names = [name for name, _ in made(SETTLED_ARMS[arm]).named_parameters()]
    return [name for name in names if any(word in name for word in words)]


def test_dash_attention_chooses_by_entmax_and_weighs_tokens_by_the_prior():
    model, _, chunks, near, queries, out, retrieval = joint_parts("dash_attention")
    k, _, marks = chunks
    layer = model.upper[0].hsa
    q = queries[0]
    scores = torch.einsum("bthd,bnhd->bthn", q, marks.repeat_interleave(2, 2)) / 8**0.5
    counts = set()

    def choose(b, t, h):
        j = h // 2
        weights = (naive_entmax(scores[b, t, 2 * j]) + naive_entmax(scores[b, t, 2 * j + 1])) / 2
        chosen = weights.nonzero()[:, 0].tolist()
        counts.add(len(chosen))
        assert sorted(chosen) == sorted(i for i in retrieval.indices[b, t, j].tolist() if i >= 0)
        exact = {n: (k[b, n, :, j] @ q[b, t, h] / 8**0.5).logsumexp(0) for n in chosen}
        return {n: mass + (weights[n] / weights.max()).log() for n, mass in exact.items()}

    assert_close(out, one_softmax(layer, near, queries, chunks, choose), 1e-10)
    assert len(counts) > 1 and max(counts) > model.config.top_k  # as many as a query needs


def test_with_an_even_prior_dash_attention_is_dense_attention(monkeypatch):
    monkeypatch.setattr(
        dash.DashLayer,
        "weights",
        lambda self, q, marks, position: q.new_full((*q.shape[:2], 2, marks.shape[1]), 0.2),
    )
    model, _, (k, v, _), near, (q, turned), out, _ = joint_parts("dash_attention")
    want = torch.zeros_like(q)
    for b, t, h in np.ndindex(2, 3, 4):
        j = h // 2
        close = near[0][b, t : t + 4, j] @ turned[b, t, h]
        far = k[b, :, :, j].flatten(0, 1) @ q[b, t, h]
        values = torch.cat((near[1][b, t : t + 4, j], v[b, :, :, j].flatten(0, 1)))
        want[b, t, h] = (torch.cat((close, far)) / 8**0.5).softmax(0) @ values
    assert_close(out, model.upper[0].hsa.out(want.flatten(-2)), 1e-10)


def test_a_landmark_of_dash_attention_begins_as_the_mean_key():
    k, _, marks, _ = made(SETTLED_ARMS["dash_attention"]).encoder(
        random(2, 3, 4, SMALL.config.width)
    )
    assert_close(marks, k.mean(dim=2), 1e-12)


def test_choosing_gets_a_gradient_in_both():
    for name, parts in (("hils", ("reference", "narrow")), ("dash_attention", ("summary_query",))):
        model = made(SETTLED_ARMS[name]).train()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "widen" in key:
                    parameter.normal_()
        model(some_ids(48), gumbel_seed=1).logits.square().sum().backward()
        found = {key: p.grad for key, p in model.named_parameters()}
        assert all(grad.isfinite().all() for grad in found.values())
        for part in parts:
            assert all(grad.abs().sum() > 0 for key, grad in found.items() if part in key)


def test_one_of_many_landmarks_is_the_baseline_and_the_best_of_several_counts(monkeypatch):
    base = made(ARMS["hsa"])
    monkeypatch.setattr(landmarks.TwoLandmarks, "count", 1)
    one = landmarks.TwoLandmarks(SMALL.config, dtype=torch.float64)
    one.load_state_dict(
        {k: x[None] if k == "encoder.cls" else x for k, x in base.state_dict().items()}
    )
    assert_close(one.eval()(some_ids(30)).logits, base.eval()(some_ids(30)).logits, 1e-12)
    monkeypatch.undo()
    model = made(SETTLED_ARMS["four_landmarks"])
    hsa = model.upper[0].hsa
    memory = filled(model.config, 5)
    x = random(2, 3, model.config.width)
    _, retrieval, _ = hsa(x, memory.chunks.source(), position=22)
    each = memory.chunks.landmarks.unflatten(-1, (4, 16))[:, :, 0]  # [B, N, M, R]
    scores = torch.einsum("btr,bnmr->btnm", hsa.retrieval_q(x), each).amax(-1) / 16**0.5
    best = scores.topk(2)
    assert torch.equal(
        retrieval.indices[:, :, 0].sort(-1).values.long(), best.indices.sort(-1).values
    )
    weights = retrieval.weights[:, :, 0].sort(-1, descending=True).values
    assert_close(weights, best.values.softmax(-1), 1e-12)


def test_an_overlapping_chunk_is_encoded_and_read_with_the_one_in_front():
    model = made(SETTLED_ARMS["overlapping"]).eval()
    S = model.config.chunk_size
    memory = ChunkMemory(model.config)
    hidden = random(2, 3 * S + 1, model.config.width)
    model.append_chunks(hidden[:, : S + 1], memory)  # in two segments
    model.append_chunks(hidden[:, S + 1 :], memory)
    for n in range(3):
        front = hidden[:, (n - 1) * S : n * S] if n else torch.zeros_like(hidden[:, :S])
        pair = torch.cat((front, hidden[:, n * S : (n + 1) * S]), dim=1)
        k, v, marks, _ = model.encoder(pair[:, None])
        assert_close(memory.chunks.landmarks[:, n], marks[:, 0], 1e-12)
        assert_close(memory.chunks.k[:, n], k[:, 0, S:], 1e-12)
        assert_close(memory.chunks.v[:, n], v[:, 0, S:], 1e-12)
    q = random(2, 2, 4, 8, seed=5)
    indices = torch.tensor([2, 0]).int().expand(2, 2, 2, 2)
    weights = torch.tensor([0.7, 0.3], dtype=torch.float64).expand(2, 2, 2, 2)
    got = model.attend(memory, 40, q, indices, weights)
    for b, t, h in np.ndindex(2, 2, 4):
        keys, values = (x[b, ..., h // 2, :] for x in (memory.chunks.k, memory.chunks.v))

        def inside(chunks, asked=q[b, t, h], keys=keys, values=values):
            return (keys[chunks].flatten(0, 1) @ asked / 8**0.5).softmax(0) @ values[
                chunks
            ].flatten(0, 1)

        assert_close(got[b, t, h], 0.7 * inside([1, 2]) + 0.3 * inside([0]), 1e-12)


def test_a_tempered_score_is_a_cosine_times_the_temperature():
    model = made(SETTLED_ARMS["landmark_temperature"])
    hsa = model.upper[0].hsa
    with torch.no_grad():
        hsa.temperature.fill_(2.5)
    hidden = random(2, 5, 4, model.config.width, seed=1)
    k, v, marks, states = model.encoder(hidden)
    memory = ChunkMemory(model.config)
    memory.chunks.append(k, v, marks)
    x = random(2, 3, model.config.width)
    _, retrieval, _ = hsa(x, memory.chunks.source(), position=22)
    cosines = torch.nn.functional.cosine_similarity(
        hsa.retrieval_q(x)[:, :, None], model.encoder.landmark(states)[:, None], dim=-1
    )
    best = (2.5 * 16**0.5 * cosines).topk(2)
    assert torch.equal(
        retrieval.indices[:, :, 0].sort(-1).values.long(), best.indices.sort(-1).values
    )
    weights = retrieval.weights[:, :, 0].sort(-1, descending=True).values
    assert_close(weights, best.values.softmax(-1), 1e-5)  # eps of the norm


@pytest.mark.parametrize(
    "arm",
    {arm.model: arm for arm in SETTLED_ARMS.values() if arm.model is not HSAModel}.values(),
    ids=lambda arm: arm.name,
)
def test_other_mechanisms_run_in_16_bits_as_on_a_gpu(arm):
    ids = some_ids(48)
    exact = made(arm, torch.float32).train()
    want = exact(ids, gumbel_noise=False).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = exact(ids, gumbel_noise=False).logits
    got.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in exact.parameters())
    half = exact.bfloat16().eval()
    with torch.no_grad():
        memory = ChunkMemory(half.config)
        parts = [half(part, memory).logits for part in ids.split(20, dim=1)]
    for found in (got, torch.cat(parts, dim=1)):
        assert error(found, want) < 0.1  # a chunk may be chosen otherwise


# Measuring


def test_an_answer_is_right_if_all_its_tokens_are_what_the_model_says():
    model = made(ARMS["hsa"], torch.float32).eval()
    ids = some_ids(30)
    said = model.generate(ids, max_new_tokens=5).ids
    wrong = said.clone()
    wrong[1, 4] += 1
    with torch.no_grad():
        assert measuring.right_answers(model, ids, list(said.numpy())) == [True, True]
        assert measuring.right_answers(model, ids, list(wrong.numpy())) == [True, False]


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


def made_up_corpora(monkeypatch) -> None:
    for module in ("training.mixture", "lab.measure", "lab.run", "lab.capacity.measure"):
        monkeypatch.setattr(f"hsa_mini.{module}.load_corpus", word_corpus)


def without_seconds(record: dict) -> dict:
    return {key: value for key, value in record.items() if key != "seconds"}


def test_a_run_that_is_cut_off_goes_on_as_if_it_had_not_been(monkeypatch, tmp_path):
    made_up_corpora(monkeypatch)
    scale = dataclasses.replace(TINY, multiples=(1,), questions=1, points=2, curve_multiples=(1,))
    arm = ARMS["hsa"]
    options = {"device": CPU, "steps": 6}
    whole = run_arm(arm, scale, 5, **options)
    states = RunStates(tmp_path / "lab.jsonl", arm, scale, 5, 6)

    class Late:
        """The time after three steps is after the deadline."""

        steps = 0

        def monotonic(self) -> float:
            return float(self.steps > 3)

        def count(self, steps: int) -> None:
            self.steps += steps

    late = Late()
    monkeypatch.setattr("hsa_mini.lab.run.time", late)
    late_options = {"states": states, "deadline": 0.5, "progress": late.count}
    assert run_arm(arm, scale, 5, **late_options, **options) is None
    monkeypatch.undo()
    made_up_corpora(monkeypatch)
    (saved,) = states.folder.iterdir()
    assert saved.name == "step-4"
    done = []
    again = run_arm(arm, scale, 5, states=states, progress=done.append, **options)
    assert done == [4, 1, 1]
    assert without_seconds(again) == without_seconds(whole)
    assert RunStates(tmp_path / "lab.jsonl", arm, scale, 5, 7).folder != states.folder
    states.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_state_is_left_out_with_a_warning(monkeypatch, tmp_path, caplog):
    made_up_corpora(monkeypatch)
    scale = dataclasses.replace(TINY, multiples=(1,), questions=1)
    states = RunStates(tmp_path / "lab.jsonl", ARMS["hsa"], scale, 5, 2)
    first = run_arm(ARMS["hsa"], scale, 5, device=CPU, steps=2, states=states)
    (state,) = states.folder.glob("step-2/state.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    again = run_arm(ARMS["hsa"], scale, 5, device=CPU, steps=2, states=states)
    assert "the run begins anew" in caplog.text and without_seconds(again) == without_seconds(first)


def test_the_curve_holds_the_loss_of_every_text_and_ends_as_perplexity_is_measured(monkeypatch):
    made_up_corpora(monkeypatch)
    scale = dataclasses.replace(
        TINY, multiples=(1,), questions=1, points=2, curve_multiples=(1, 2), distractors=2,
        crowded_multiples=(1,),
    )  # fmt: skip
    record = run_arm(ARMS["text_full_rope"], scale, 5, device=CPU, steps=4)
    recipe = ARMS["text_full_rope"].recipe(scale, 4)
    assert [point["step"] for point in record["learning"]] == [3, 4]  # the last stage is 3 and 4
    every = [stage.steps * stage.batch * stage.tokens for stage in recipe.stages]
    assert record["learning"][1]["seen"] == sum(every)
    row, longer = record["learning"][1]["rows"]
    assert row == record["found"]["perplexity"][0] and longer["tokens"] == 2 * row["tokens"]
    assert len(row["losses"]) == scale.texts
    assert np.exp(np.mean(row["losses"])) == pytest.approx(row["perplexity"], rel=1e-4)
    (crowded,) = record["found"]["crowded"]
    assert sum(crowded["right"]) == crowded["correct"] and len(crowded["right"]) == 1
