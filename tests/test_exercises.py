"""The exercises of the notebooks: a check knows what is right, and names what is wrong."""

import importlib
import itertools
import math
import pkgutil

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils import clip_grad_norm_

from hsa_mini import exercises, reference
from hsa_mini.evaluation.runner import ask_one
from hsa_mini.evaluation.statistics import wilson_interval
from hsa_mini.exercises.check import Check
from hsa_mini.exercises.evaluation.laboratory import check_luck, check_one_chunk, check_seeds_needed
from hsa_mini.exercises.evaluation.needles import (
    CHUNK_SIZE,
    WINDOW,
    PlannedHaystack,
    check_evaluate_needles,
    check_questions_needed,
)
from hsa_mini.exercises.kernels.backward import (
    check_count_programs,
    check_invert,
    check_softmax_backward,
)
from hsa_mini.exercises.kernels.forward import check_merged_chunks, check_run_norm
from hsa_mini.exercises.kernels.retrieval import check_merge
from hsa_mini.exercises.mechanism.chunks import check_mean_of_keys, check_turn
from hsa_mini.exercises.mechanism.fusion import check_blend, check_score_gradient
from hsa_mini.exercises.mechanism.layer import check_score_at_distance, check_shuffle_tokens
from hsa_mini.exercises.mechanism.retrieval import check_retrieval_weights, check_visible_outside
from hsa_mini.exercises.mechanism.why import check_layers_needed, check_window_attention
from hsa_mini.exercises.memory.experts import check_by_expert, check_cut_finer
from hsa_mini.exercises.memory.kept import check_changed_chunks, check_oldest_first
from hsa_mini.exercises.training.parts import (
    check_margin_for,
    check_queue_after,
    check_weight_of_answers,
)
from hsa_mini.exercises.training.step import check_training_step
from hsa_mini.lab.arms import Arm
from hsa_mini.memory.rolling_cache import RollingKVCache
from hsa_mini.model.chunk_encoder import EncodedChunks
from hsa_mini.ops.rope import apply_rope, rope_table
from hsa_mini.tasks.forms import TASKS
from hsa_mini.tasks.placement import place
from hsa_mini.training.cross_batch import ChunkQueue, CrossBatchChunks
from hsa_mini.training.loss import mixture_loss
from hsa_mini.training.mixture import ANSWER
from hsa_mini.training.recipes import Recipe, Stage
from hsa_mini.training.step import train_step

CHECKS = {
    check.name: check
    for found in pkgutil.walk_packages(exercises.__path__, "hsa_mini.exercises.")
    for check in vars(importlib.import_module(found.name)).values()
    if isinstance(check, Check)
}
MISTAKES = [(check, hint) for check in CHECKS.values() for hint in check.usual_mistakes]


@pytest.mark.parametrize(
    "check, hint", MISTAKES, ids=[f"{check.name}-{hint[:30]}" for check, hint in MISTAKES]
)
def test_every_usual_mistake_gets_its_own_hint(check, hint):
    """The examples tell it from the right answer and from all other mistakes."""
    assert check.verdict(check.usual_mistakes[hint]) == f"✗ {check.name}: {hint}"


# ---- What the package computes is right


def _retrieval_weights(queries, landmarks, chunk_size, top_k):
    heads = queries[None, :, None], landmarks[None, :, None]
    indices, weights = reference.retrieve(*heads, chunk_size=chunk_size, top_k=top_k)
    spread = weights.new_zeros(len(queries), len(landmarks))
    return spread.scatter_add(1, indices[0, :, 0].long().clamp(min=0), weights[0, :, 0])


def _blend(q, k, v, weights, scale):
    kept = torch.arange(len(k), dtype=torch.int32)[None, None, None]
    inputs = q[None, None, None], k[None, :, :, None], v[None, :, :, None]
    return reference.chunk_attention(
        *inputs, kept, weights[None, None, None], scale=scale
    ).flatten()


def _window_attention(q, k, v, window):
    heads = (x[None, :, None] for x in (q, k, v))
    return reference.sliding_window_attention(*heads, window=window)[0, :, 0]


def _turn(x, position, base):
    return apply_rope(x[None, None], rope_table(torch.tensor([position]), len(x), base))[0, 0]


def _visible_outside(T, N, chunk_size, window):
    return reference.retrieval.visible_chunks(torch.arange(T), N, chunk_size, window)


def _score_gradient(weights, results, g):
    scores = weights.log().requires_grad_()
    return torch.autograd.grad(scores.softmax(0) @ results @ g, scores)[0]


def _score_at_distance(q, k, distance, base):
    return _turn(q, distance + 7, base) @ _turn(k, 7, base)


def _softmax_backward(p, dp):
    scores = p.log().requires_grad_()
    return torch.autograd.grad(scores.softmax(1), scores, dp)[0]


def _oldest_first(cache, position):
    rows = cache[None, :, None]
    return RollingKVCache(rows, rows).in_order(position)[0][0, :, 0]


def _queue_after(queue, chunks, parts):
    kept = ChunkQueue(len(queue))
    kept.stores = (queue.clone(), queue.clone(), queue.clone())
    rows = (parts != ANSWER).all(dim=1).nonzero()[:, 0]
    kept.push(EncodedChunks(chunks, chunks, chunks, chunks), rows)
    return kept.stores[2]


def _training_step(model, optimizer, queue, ids, parts, text_weight, clip):
    """The package's step. Of each batch it puts a third, one sequence, into the queue."""
    (group,) = optimizer.param_groups
    rate = torch.tensor(group["lr"])
    group["lr"] = rate.clone()
    stage = Stage(1, 3, 12, queue_chunks=queue.size, text_weight=text_weight)
    step = train_step(
        model, optimizer, Recipe((stage,), clip=clip), stage, queue, ids, parts, rate, rate.long()
    )
    group["lr"] = rate.item()
    return step.loss


def _evaluate_needles(haystack, depths, questions):
    rng = np.random.default_rng(7)
    counts = [
        sum(ask_one(haystack, rng, "s_niah", depth).correct for _ in range(questions))
        for depth in depths
    ]
    return [(right, *wilson_interval(right, questions)) for right in counts]


@pytest.mark.parametrize(
    "check, right",
    [
        (check_retrieval_weights, _retrieval_weights),
        (check_blend, _blend),
        (check_window_attention, _window_attention),
        (check_turn, _turn),
        (check_visible_outside, _visible_outside),
        (check_score_gradient, _score_gradient),
        (check_score_at_distance, _score_at_distance),
        (check_softmax_backward, _softmax_backward),
        (check_oldest_first, _oldest_first),
        (check_queue_after, _queue_after),
        (check_training_step, _training_step),
        (check_evaluate_needles, _evaluate_needles),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_the_package_or_autograd_computes_is_right(check, right):
    assert check.verdict(right).startswith(f"✓ {check.name} is right")


# ---- Wrong attempts, as readers write them


def _sees_its_own_chunk(queries, landmarks, chunk_size, top_k):
    weights = torch.zeros(len(queries), len(landmarks), dtype=queries.dtype)
    for t, query in enumerate(queries):
        visible = min(t // chunk_size + 1, len(landmarks))
        scores = landmarks[:visible] @ query / len(query) ** 0.5
        best = scores.topk(min(top_k, visible)).indices
        weights[t, best] = scores[best].softmax(0)
    return weights


def _no_scale(queries, landmarks, chunk_size, top_k):
    return _retrieval_weights(queries * queries.shape[1] ** 0.5, landmarks, chunk_size, top_k)


def _nan_for_early_tokens(queries, landmarks, chunk_size, top_k):
    visible = _visible_outside(len(queries), len(landmarks), chunk_size, 0)
    scores = (queries @ landmarks.T / queries.shape[1] ** 0.5).masked_fill(~visible, -torch.inf)
    floor = scores.sort(dim=1, descending=True).values[:, top_k - 1 :][:, :1]
    return scores.masked_fill(scores < floor, -torch.inf).softmax(1)


def _masked_after(q, k, v, window):
    p = (q @ k.T / q.shape[1] ** 0.5).softmax(-1)
    return torch.stack(
        [
            p[t, max(t + 1 - window, 0) : t + 1] @ v[max(t + 1 - window, 0) : t + 1]
            for t in range(len(q))
        ]
    )


def _laid_end_to_end(q, k, v, weights, scale):
    shares = torch.exp(torch.einsum("ksd,d->ks", k, q) * scale)
    return torch.einsum("ks,ksd->d", shares / shares.sum(), v)


def _across_chunks(q, k, v, weights, scale):
    shares = torch.softmax(torch.einsum("ksd,d->ks", k, q) * scale, 0)
    return torch.einsum("k,ks,ksd->d", weights, shares, v)


def _mean_over_the_tile(x):
    tile = pad(x, (0, (1 << (x.shape[1] - 1).bit_length()) - x.shape[1]))
    return x / tile.square().mean(dim=1, keepdim=True).sqrt()


def _lists_of_tokens(indices, chunks):
    found = [(int(i), t) for t, row in enumerate(indices) for i in row]
    found.sort(key=lambda pair: (pair[0] < 0, pair[0]))
    lengths = torch.tensor([0] + [sum(i == n for i, _ in found) for n in range(chunks)])
    return torch.tensor([t for _, t in found]), lengths.cumsum(0)


def _slots_in_order(cache, position):
    return torch.stack([cache[(position + i) % len(cache)] for i in range(1, len(cache))])


def _index_assignment(x, chosen, gates, experts):
    out = torch.zeros_like(x)
    for e, matrix in enumerate(experts):
        for a in range(chosen.shape[1]):
            rows = chosen[:, a] == e
            out[rows] = (x[rows] @ matrix) * gates[rows, a : a + 1]
    return out


def _extend_and_cut(queue, chunks, parts):
    M = len(queue)
    for states, own in zip(chunks, parts):
        if ANSWER not in own:
            queue = torch.cat((queue, states))
    return queue[:M]


def _written_step(
    model, optimizer, queue, ids, parts, text_weight, clip, *,
    clip_late=False, early_queue=False, whole=False, forget=False,
):  # fmt: skip
    """A training step as a reader writes it, with one or more mistakes."""
    output = model(
        ids[:, :-1],
        chunk_source=lambda chunks: CrossBatchChunks(chunks, model.encoder, queue),
    )
    loss, *_ = mixture_loss(output.logits, ids[:, 1:], parts[:, 1:], text_weight=text_weight)
    if whole:
        loss = cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten())
    rows = torch.tensor([i for i, row in enumerate(parts) if ANSWER not in row])
    if early_queue:
        queue.push(output.aux.encoded, rows)
    loss.backward()
    if not clip_late:
        clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    if clip_late:
        clip_grad_norm_(model.parameters(), clip)
    if not forget:
        optimizer.zero_grad()
    if not early_queue:
        queue.push(output.aux.encoded, rows)
    return loss


def _step_with(**mistakes):
    return lambda *arguments: _written_step(*arguments, **mistakes)


def _evaluation_with(right, *, seed_inside=False, window=WINDOW, answer_tokens=7):
    """A needle evaluation as a reader writes it; right(given, answer): how it compares tokens."""

    def evaluate(haystack, depths, questions):
        rows = []
        rng = np.random.default_rng(3)
        for depth in depths:
            found = 0
            for _ in range(questions):
                rng = np.random.default_rng(3) if seed_inside else rng
                problem = TASKS["s_niah"](rng)
                sizes = {"tokens": len(haystack.text), "chunk_size": CHUNK_SIZE, "window": window}
                sample = place(rng, problem, depth=depth, **sizes)
                given = haystack.ask(sample, answer_tokens=answer_tokens).ids[0].tolist()
                found += right(given, sample.answer.tolist())
            rows.append([found, *wilson_interval(found, questions)])
        return rows

    return evaluate


def _larger_gaps(better, worse):
    splits = [*itertools.combinations(better + worse, len(better))]
    return sum(sum(split) > sum(better) for split in splits) / len(splits)


def _returns_an_arm(**options):
    return lambda: Arm("mine", "keeps one chunk", **options)


@pytest.mark.parametrize(
    "check, attempt, hint",
    [
        (check_retrieval_weights, _sees_its_own_chunk, "a token sees its own chunk"),
        (check_retrieval_weights, _no_scale, "the scale is missing"),
        (check_retrieval_weights, _nan_for_early_tokens, "a token that sees no chunk gets NaN"),
        (check_window_attention, _masked_after, "you removed shares after the softmax"),
        (
            check_window_attention,
            lambda q, k, v, window: torch.softmax(q @ k.T / q.shape[1] ** 0.5, -1).tril() @ v,
            "at [0, 0] the result is",
        ),
        (check_blend, _laid_end_to_end, "one softmax runs over all tokens"),
        (check_blend, _across_chunks, "softmax over the wrong axis"),
        (check_mean_of_keys, lambda k: sum(k) / len(k), "you averaged over the chunks"),
        (check_mean_of_keys, lambda k: k[:, 0].tolist(), "at [0, 0] the result is"),
        (
            check_mean_of_keys,
            lambda k: k.mean(1, keepdim=True),
            "the shape is [3, 1, 5], not [3, 5]",
        ),
        (check_layers_needed, lambda distance, window: -(-distance // window), "the token itself"),
        (check_layers_needed, lambda distance, window: "three", "it should return one result"),
        (
            check_shuffle_tokens,
            lambda k, v, order: k[:, order],
            "it should return 2 results, not one",
        ),
        (check_shuffle_tokens, lambda k, v, order: (k[:, order], v[order]), "at [0, 0, 0]"),
        (
            check_merged_chunks,
            lambda x, M: sum(len(set(b.flatten().tolist())) for b in x.split(M)),
            "-1 is",
        ),
        (check_run_norm, _mean_over_the_tile, "you divided by the width of the tile"),
        (check_invert, _lists_of_tokens, "an entry is t·K + slot"),
        (
            check_merge,
            lambda s, c, tile, first: torch.cat((s, tile)).topk(len(s)),
            "these are places in the joined list",
        ),
        (
            check_changed_chunks,
            lambda i, S, W, L: (i // S, (i + W - 1) // S),
            "a stack reaches further than one block",
        ),
        (check_oldest_first, _slots_in_order, "a slot that no token has filled yet"),
        (check_by_expert, _index_assignment, "each token's later expert overwrites"),
        (
            check_cut_finer,
            lambda C, E, A, hidden, factor: (
                (1 + E * factor) * 3 * C * hidden // factor,
                (1 + A * factor) * 3 * C * hidden // factor,
                math.log10(math.comb(E * factor, A * factor)),
            ),
            "the router has parameters too",
        ),
        (
            check_weight_of_answers,
            lambda parts, w: ((parts == ANSWER).double().mean(), 1 / (2 + w)),
            "tokens of the part NONE do not count",
        ),
        (check_queue_after, _extend_and_cut, "nothing new came in"),
        (
            check_margin_for,
            lambda share, N, K: torch.special.ndtri(torch.tensor(1 - K / (N - 1))),
            "with this margin K rivals beat the needle on average",
        ),
        (check_training_step, _step_with(forget=True), "gradients of the step before"),
        (check_training_step, _step_with(clip_late=True), "the gradient was not shortened"),
        (check_training_step, _step_with(whole=True), "this is the mean over all tokens"),
        (
            check_training_step,
            _step_with(whole=True, forget=True, clip_late=True),
            "this is the mean over all tokens",
        ),
        (
            check_training_step,
            _step_with(forget=True, clip_late=True),
            "gradients of the step before",
        ),
        (
            check_questions_needed,
            lambda share, bound: next(
                n
                for n in range(50, 5001, 50)
                if wilson_interval(int(share * n + 0.5), n)[1] > bound
            ),
            "the lower end of the interval",
        ),
        (
            check_evaluate_needles,
            _evaluation_with(lambda a, b: sum(map(int.__eq__, a, b)) / 7),
            "a right digit earns nothing",
        ),
        (
            check_evaluate_needles,
            _evaluation_with(lambda a, b: a == b[:6], answer_tokens=6),
            "the full stop belongs to the answer",
        ),
        (
            check_evaluate_needles,
            _evaluation_with(list.__eq__, answer_tokens=20),
            "ask for as many tokens as the answer has",
        ),
        (
            check_evaluate_needles,
            _evaluation_with(list.__eq__, seed_inside=True),
            "the same question was asked again",
        ),
        (
            check_seeds_needed,
            lambda chance: next(n for n in range(1, 20) if 2 / math.comb(2 * n, n) < chance),
            "the claim says which arm is better",
        ),
        (
            check_luck,
            _larger_gaps,
            "the split that was seen is one of the splits",
        ),
        (
            check_one_chunk,
            _returns_an_arm(training=lambda scale, stage: {"top_k": 1}),
            "only the training keeps one chunk",
        ),
        (
            check_one_chunk,
            _returns_an_arm(changes=lambda scale: {"top_k": 2}),
            "the number of chunks that the model keeps is 2, not 1.",
        ),
    ],
)
def test_a_wrong_attempt_gets_its_hint(check, attempt, hint):
    verdict = check.verdict(attempt)
    assert verdict.startswith(f"✗ {check.name}: {hint}") and "\n" not in verdict


@pytest.mark.parametrize(
    "check, attempt, stopped",
    [
        (check_training_step, _step_with(early_queue=True), "fill the queue after backward()"),
        (
            check_evaluate_needles,
            _evaluation_with(list.__eq__, window=1),
            "the needle stands in it",
        ),
        (check_one_chunk, _returns_an_arm(changes={"top_k": 1}), "`changes` is a function"),
        (check_one_chunk, lambda: {"top_k": 1}, "it returned a dict, not an Arm"),
    ],
)
def test_an_attempt_that_stops_hears_why(check, attempt, stopped):
    verdict = check.verdict(attempt)
    assert verdict.startswith(f"{check.name} stopped with ") and stopped in verdict


def _one_question_at_every_depth(haystack, depths, questions):
    rng = np.random.default_rng(5)
    right = [0] * len(depths)
    for _ in range(questions):
        for i, depth in enumerate(depths):
            right[i] += ask_one(haystack, rng, "s_niah", depth)[0]
    return torch.tensor([(k, *wilson_interval(k, questions)) for k in right])


def test_what_is_written_in_another_way_is_right():
    assert check_training_step.verdict(_written_step).startswith("✓")
    assert check_evaluate_needles.verdict(_one_question_at_every_depth).startswith("✓")
    assert check_evaluate_needles.verdict(_evaluation_with(list.__eq__)).startswith("✓")


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_a_blank_function_is_blank(check):
    assert "still blank" in check.verdict(lambda *arguments: None)


def test_a_planned_haystack_refuses_a_text_of_another_length():
    rng = np.random.default_rng(0)
    sizes = {"tokens": 700, "chunk_size": CHUNK_SIZE, "window": WINDOW}
    sample = place(rng, TASKS["s_niah"](rng), depth=0.5, **sizes)
    with pytest.raises(ValueError, match="tokens: the sample has 700"):
        PlannedHaystack().ask(sample, answer_tokens=7)


# ---- What no exercise expects


def _changes_its_argument(k):
    k /= k.shape[1]
    return k.sum(dim=1)


def _stops(k):
    raise ValueError("one line\nand another" + "." * 200)


@pytest.mark.parametrize(
    "attempt, verdict",
    [
        (lambda k: None, "is still blank"),
        (lambda k: torch.full((3, 5), torch.nan), "is still blank"),
        (_changes_its_argument, "changed one of its arguments"),
        (_stops, "stopped with ValueError: 'one line"),
        (lambda: 0, "stopped with TypeError"),
        (torch.zeros(3, 5), "give the function itself"),
        (lambda k: k.mean(1) if len(k) == 3 else None, "it should return one result, not nothing"),
        (lambda k: k.mean(1) / (k.mean(1) > 0), "the result is -inf"),
    ],
)
def test_any_attempt_gets_one_line(attempt, verdict, capsys):
    check_mean_of_keys(attempt)
    said = capsys.readouterr().out
    assert verdict in said and said.count("\n") == 1 and len(said) < 250 and "✓" not in said


def test_the_arguments_of_one_call_are_those_of_the_next():
    """An attempt that changes its arguments spoils neither the examples nor the next attempt."""
    assert "changed" in check_mean_of_keys.verdict(_changes_its_argument)
    assert "✓" in check_mean_of_keys.verdict(lambda k: k.mean(dim=1))
    examples = [list(lengths) for lengths, _ in check_count_programs.examples]
    assert "changed" in check_count_programs.verdict(lambda lengths, size: lengths.sort())
    assert [lengths for lengths, _ in check_count_programs.examples] == examples
