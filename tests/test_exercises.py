"""The exercises of the notebooks: a check knows what is right, and names what is wrong."""

import importlib
import pkgutil

import pytest
import torch
from torch.nn.functional import pad

from hsa_mini import exercises, reference
from hsa_mini.exercises.check import Check
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
from hsa_mini.ops.rope import apply_rope, rope_table

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
    ],
)
def test_a_wrong_attempt_gets_its_hint(check, attempt, hint):
    verdict = check.verdict(attempt)
    assert verdict.startswith(f"✗ {check.name}: {hint}") and "\n" not in verdict


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
