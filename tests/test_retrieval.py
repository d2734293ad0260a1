"""`reference.retrieve`, Eq. (1): against a loop over tokens and chunks, and one test for each
promise of its docstring.

Dimensions: B batch, T tokens, J retrieval heads, R retrieval dimension, N chunks, S chunk size, K
chunks kept.
"""

import math

import pytest
import torch
from helpers import assert_close, error, random, results, with_special_scores
from hypothesis import example, given, settings
from hypothesis import strategies as st
from material import document_starts

from hsa_mini.ops import torch_backend
from hsa_mini.reference import retrieve
from hsa_mini.reference.noise import gumbel_noise

R = 4  # sqrt(R) is exact, so that integer scores tie exactly
WEIGHTINGS = ("softmax", "stick_breaking")


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """-1, 0 or 1: their scores are exact in every summation order, and often equal."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).double()


def loop_retrieve(
    retrieval_q, landmarks, S, K, offsets, weighting, seed, exclude_window, query_block
):
    """Python numbers only.

    [(chunk, weight), ...] of each (b, t, j), best first or, for stick-breaking, newest first.
    """
    (B, T, J, _), N = retrieval_q.shape, landmarks.shape[1]
    kept = {}
    for b, t, j in ((b, t, j) for b in range(B) for t in range(T) for j in range(J)):
        chooser = t - t % query_block
        position = offsets[b] + chooser
        noise = torch.zeros(N)
        if seed is not None:
            noise = gumbel_noise(seed, torch.tensor([[position]] * B), J, N)[b, 0, j]
        candidates = []
        for i in range(N):
            if (i + 1) * S > position or i * S > position - exclude_window:
                continue
            score = sum(
                x * y
                for x, y in zip(retrieval_q[b, chooser, j].tolist(), landmarks[b, i, j].tolist())
            ) / math.sqrt(R)
            candidates.append((score + noise[i].item(), i, score))
        best = sorted(candidates, reverse=True)[:K]
        if weighting == "softmax":
            total = sum(math.exp(score) for _, _, score in best)
            kept[b, t, j] = [(i, math.exp(score) / total) for _, i, score in best]
        else:
            best, rest, rows = sorted(best, key=lambda c: -c[1]), 0.0, []
            for _, i, score in best:
                rest += math.log1p(math.exp(score))
                rows.append((i, math.exp(score - rest)))
            kept[b, t, j] = rows
    return kept


@st.composite
def cases(draw):
    S = draw(st.sampled_from([16, 32, 64]))
    query_block = draw(st.sampled_from([1, 1, 4, 8]))
    N = draw(st.sampled_from([0, 1, 2, 5, 12]))
    offset = st.integers(0, S * N // query_block + 2).map(lambda blocks: blocks * query_block)
    return dict(
        B=2, T=draw(st.integers(1, 40)), J=draw(st.integers(1, 3)), N=N, S=S, K=draw(st.integers(1,
        N + 3)),
        offsets=[draw(offset), draw(offset)], weighting=draw(st.sampled_from(WEIGHTINGS)),
        seed=draw(st.sampled_from([None, None, 7])), exclude_window=draw(st.sampled_from([0, 0,
        S // 2, 2 * S + 8])),
        query_block=query_block, ties=draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=100)
@given(cases())
@example(
    dict(B=1, T=3, J=1, N=300, S=16, K=16, offsets=[4801], weighting="softmax", seed=None,
    exclude_window=0,
         query_block=1, ties=True)
)  # fmt: skip
def test_equals_a_loop_over_tokens_and_chunks(case):
    B, T, J, N, S, K = (case[name] for name in "BTJNSK")
    make = integers if case["ties"] else random
    retrieval_q, landmarks = make(B, T, J, R, seed=1), make(B, N, J, R, seed=2)
    options = {name: case[name] for name in ("weighting", "exclude_window", "query_block")}
    indices, weights = retrieve(
        retrieval_q,
        landmarks,
        chunk_size=S,
        top_k=K,
        offset=torch.tensor(case["offsets"]),
        gumbel_seed=case["seed"],
        **options,
    )
    assert indices.shape == weights.shape == (B, T, J, K)
    want = loop_retrieve(
        retrieval_q, landmarks, S, K, case["offsets"], seed=case["seed"], **options
    )
    for (b, t, j), row in want.items():
        got = [
            (i, w) for i, w in zip(indices[b, t, j].tolist(), weights[b, t, j].tolist()) if i >= 0
        ]
        if case["weighting"] == "softmax":
            got, row = sorted(got), sorted(row)  # the order of slots is open
        assert [i for i, _ in got] == [i for i, _ in row], (b, t, j)
        assert [w for _, w in got] == pytest.approx([w for _, w in row], rel=1e-12), (b, t, j)
        assert all(
            w == 0.0 for i, w in zip(indices[b, t, j].tolist(), weights[b, t, j].tolist()) if i < 0
        )


@pytest.mark.parametrize("S", [1, 16, 64])
@pytest.mark.parametrize(
    "offset", [0, 5, 128, torch.tensor([0, 131]), torch.tensor([64, 7], dtype=torch.int32)]
)
def test_a_chunk_is_visible_from_the_token_after_its_last(S, offset):
    T, N = 140, 5
    indices, _ = retrieve(
        random(2, T, 1, R), random(2, N, 1, R), chunk_size=S, top_k=N, offset=offset
    )
    for b in range(2):
        start = int(offset[b]) if isinstance(offset, torch.Tensor) else offset
        for t in range(T):
            visible = {i for i in range(N) if (i + 1) * S <= start + t}
            assert set(indices[b, t, 0].tolist()) - {-1} == visible
            assert (indices[b, t, 0] == -1).sum() == N - len(visible)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_equal_scores_the_newest_chunks_are_kept(dtype):
    landmarks = torch.ones(1, 9, 1, R, dtype=dtype)
    for visible in range(10):
        indices, _ = retrieve(
            torch.ones(1, 1, 1, R, dtype=dtype),
            landmarks,
            chunk_size=16,
            top_k=3,
            offset=16 * visible,
        )
        assert set(indices.flatten().tolist()) - {-1} == set(range(max(visible - 3, 0), visible))


def test_a_tie_at_the_last_kept_place_is_settled_by_age():
    scores = torch.tensor([3.0, 1.0, 1.0, 1.0, 2.0])  # three chunks compete for the third place
    indices, _ = retrieve(
        torch.ones(1, 1, 1, 1), scores.reshape(1, 5, 1, 1), chunk_size=16, top_k=3, offset=80
    )
    assert set(indices.flatten().tolist()) == {0, 4, 3}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_empty_slots_are_minus_one_with_weight_exactly_zero(weighting):
    indices, weights = retrieve(
        random(2, 70, 2, R), random(2, 3, 2, R, seed=1), chunk_size=16, top_k=5, weighting=weighting
    )
    visible = torch.clamp(torch.arange(70) // 16, max=3)
    assert torch.equal((indices >= 0).sum(-1), visible[None, :, None].expand(2, 70, 2))
    assert (weights[indices < 0] == 0).all() and (weights[indices >= 0] > 0).all()


def test_softmax_weights_sum_to_one_where_a_chunk_is_visible():
    for K in (1, 2, 20):
        _, weights = retrieve(
            random(2, 70, 2, R), random(2, 4, 2, R, seed=1), chunk_size=16, top_k=K
        )
        assert (weights[:, :16] == 0).all()
        assert_close(weights[:, 16:].sum(-1), torch.ones(2, 54, 2, dtype=torch.float64), 1e-14)


def test_stick_breaking_goes_from_the_newest_and_follows_its_formula():
    retrieval_q, landmarks = random(1, 1, 1, R), random(1, 7, 1, R, seed=1)
    indices, weights = retrieve(
        retrieval_q, landmarks, chunk_size=16, top_k=4, offset=112, weighting="stick_breaking"
    )
    kept = indices.flatten().tolist()
    assert kept == sorted(kept, reverse=True)
    scores = [(retrieval_q.flatten() @ landmarks[0, i, 0]).item() / 2 for i in kept]
    # Its share, sigmoid(s), of what every newer chunk left over.
    for slot, score in enumerate(scores):
        share = math.prod(1 - 1 / (1 + math.exp(-newer)) for newer in scores[:slot]) / (
            1 + math.exp(-score)
        )
        assert weights[0, 0, 0, slot].item() == pytest.approx(share, rel=1e-12)
    assert weights.sum() < 1


def test_gumbel_noise_changes_the_choice_and_never_the_weights():
    retrieval_q, landmarks = random(1, 50, 2, R), random(1, 40, 2, R, seed=1)
    options = dict(chunk_size=16, top_k=4, offset=650)
    indices, weights = retrieve(retrieval_q, landmarks, gumbel_seed=3, **options)
    clean = torch.einsum("btjr,bnjr->btjn", retrieval_q, landmarks) / 2
    assert_close(weights, clean.gather(-1, indices.long()).softmax(-1), 1e-14)
    noisy = clean + gumbel_noise(3, torch.arange(650, 700)[None], 2, 40)
    want = noisy.topk(4, dim=-1).indices.int()
    # The noise of the absolute position.
    assert torch.equal(indices.sort(-1).values, want.sort(-1).values)
    plain, _ = retrieve(retrieval_q, landmarks, **options)
    other, _ = retrieve(retrieval_q, landmarks, gumbel_seed=4, **options)
    again, _ = retrieve(retrieval_q, landmarks, gumbel_seed=3, **options)
    assert torch.equal(indices, again)
    for different in (plain, other):
        assert not torch.equal(indices.sort(-1).values, different.sort(-1).values)


@pytest.mark.parametrize("gumbel_seed", [None, 11])
@pytest.mark.parametrize("query_block", [1, 4])
def test_segments_with_their_offset_give_what_the_whole_gives(gumbel_seed, query_block):
    retrieval_q, landmarks = random(2, 90, 2, R), random(2, 5, 2, R, seed=1)
    options = dict(chunk_size=16, top_k=2, gumbel_seed=gumbel_seed, query_block=query_block)
    whole = retrieve(retrieval_q, landmarks, **options)
    parts = [
        retrieve(retrieval_q[:, a:b], landmarks, offset=a, **options)
        for a, b in ((0, 20), (20, 24), (24, 90))
    ]
    assert_close(torch.cat([p[0] for p in parts], dim=1), whole[0], 0)
    assert_close(torch.cat([p[1] for p in parts], dim=1), whole[1], 1e-14)


@pytest.mark.parametrize("window", [1, 15, 16, 17, 40, 1000])
def test_a_chunk_wholly_inside_the_window_is_not_chosen(window):
    indices, _ = retrieve(
        random(1, 100, 1, R), random(1, 6, 1, R), chunk_size=16, top_k=6, exclude_window=window
    )
    for t in range(100):
        near = range(t - window + 1, t + 1)  # the keys that a window of this length shows
        want = {i for i in range(t // 16) if not all(s in near for s in range(i * 16, i * 16 + 16))}
        assert set(indices[0, t, 0].tolist()) - {-1} == want


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_first_token_of_a_query_block_chooses_for_all(weighting):
    retrieval_q, landmarks = random(2, 45, 2, R), random(2, 6, 2, R, seed=1)
    options = dict(chunk_size=8, top_k=3, weighting=weighting)
    each = retrieve(retrieval_q, landmarks, **options)
    blocks = retrieve(retrieval_q, landmarks, query_block=4, **options)
    first = torch.arange(45) // 4 * 4
    for got, want in zip(blocks, each):
        assert_close(got, want[:, first], 1e-14)


@pytest.mark.parametrize(
    "options",
    [{}, dict(query_block=4), dict(exclude_window=24), dict(weighting="stick_breaking")],
    ids=str,
)
def test_a_document_in_a_row_retrieves_what_it_retrieves_alone(options):
    """With every gradient. The second document has an unfinished chunk, which nobody retrieves."""
    options |= dict(chunk_size=8, top_k=3)
    inputs = dict(retrieval_q=random(2, 90, 2, R), landmarks=random(2, 11, 2, R, seed=1))

    def each_alone(retrieval_q, landmarks):
        parts = []
        for a, b in ((0, 32), (32, 56), (56, 90)):
            indices, weights = retrieve(
                retrieval_q[:, a:b], landmarks[:, a // 8 : b // 8], **options
            )
            parts.append((torch.where(indices < 0, indices, indices + a // 8), weights))
        return tuple(torch.cat(part, dim=1) for part in zip(*parts))

    starts = document_starts(*2 * [[32, 56]], tokens=90)
    got = results(retrieve, inputs, document_starts=starts, **options)
    assert_close(got, results(each_alone, inputs), 1e-13)


@pytest.mark.parametrize(
    "options", [{}, dict(query_block=4), dict(gumbel_seed=5), dict(exclude_window=24)], ids=str
)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradients_of_the_weights_equal_finite_differences(weighting, options):
    retrieval_q, landmarks = (
        random(1, 5, 2, 1).requires_grad_(),
        random(1, 5, 2, 1, seed=1).requires_grad_(),
    )

    def weights(retrieval_q, landmarks):
        return retrieve(
            retrieval_q,
            landmarks,
            chunk_size=16,
            top_k=3,
            offset=77,
            weighting=weighting,
            **options,
        )[1]

    assert torch.autograd.gradcheck(weights, (retrieval_q, landmarks))


def test_empty_slots_and_tokens_without_chunks_have_finite_gradients():
    retrieval_q, landmarks = (
        random(1, 40, 1, R).requires_grad_(),
        random(1, 2, 1, R).requires_grad_(),
    )
    for weighting in WEIGHTINGS:
        _, weights = retrieve(retrieval_q, landmarks, chunk_size=16, top_k=4, weighting=weighting)
        gradients = torch.autograd.grad(weights.square().sum(), (retrieval_q, landmarks))
        assert all(g.isfinite().all() for g in gradients)
        assert (gradients[0][:, :16] == 0).all() and (gradients[0][:, 32:] != 0).all()


@pytest.mark.parametrize(
    "options",
    [{}, dict(query_block=4), dict(gumbel_seed=5), dict(weighting="stick_breaking")],
    ids=str,
)
def test_nothing_reaches_a_token_from_a_chunk_that_is_not_complete(options):
    retrieval_q, landmarks = random(1, 80, 1, R), random(1, 5, 1, R, seed=1).requires_grad_()
    _, weights = retrieve(retrieval_q, landmarks, chunk_size=16, top_k=3, **options)
    for i in range(5):
        early = weights[:, : (i + 1) * 16]
        (gradient,) = torch.autograd.grad(early.square().sum(), landmarks, retain_graph=True)
        assert (gradient[:, i:] == 0).all()
        changed = landmarks.detach().clone()
        changed[:, i:] = 1e4
        assert torch.equal(
            retrieve(retrieval_q, changed, chunk_size=16, top_k=3, **options)[1][:, : (i + 1) * 16],
            early,
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_float64_for_float64_and_float32_for_the_rest(dtype):
    retrieval_q, landmarks = (
        random(1, 40, 1, 64, dtype=dtype),
        random(1, 3, 1, 64, seed=1, dtype=dtype),
    )
    indices, weights = retrieve(retrieval_q, landmarks, chunk_size=8, top_k=8)
    exact, exact_weights = retrieve(retrieval_q.double(), landmarks.double(), chunk_size=8, top_k=8)
    assert indices.dtype == torch.int32
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(indices, exact)
    # 16-bit inputs, exact products.
    assert error(weights, exact_weights) <= (0 if dtype == torch.float64 else 1e-6)


@settings(max_examples=60)
@given(
    K=st.integers(1, 9), seed=st.integers(0, 99), weighting=st.sampled_from(WEIGHTINGS),
    gumbel_seed=st.sampled_from([None, 5]), query_block=st.sampled_from([1, 4]),
    budget=st.sampled_from([1, 1 << 26]),
)  # fmt: skip
def test_nan_and_infinite_scores_show_and_no_chunk_is_kept_twice(K, seed, budget, **options):
    """NaN counts as the largest score, a score of -inf is never kept; in both backends."""
    N = 7
    q, landmarks, scores = with_special_scores(2, 12, 2, R, N, seed=seed)
    scores = scores[:, torch.arange(12) // options["query_block"] * options["query_block"]]
    found = []
    for operation in (retrieve, torch_backend.retrieve):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_backend, "BLOCK_ELEMENTS", {"cpu": budget})
            found.append(operation(q, landmarks, chunk_size=1, top_k=K, offset=N, **options))
    (indices, weights), (same_indices, same_weights) = found
    assert torch.equal(indices, same_indices)
    torch.testing.assert_close(weights, same_weights, equal_nan=True)
    kept = torch.zeros(2, 12, 2, N, dtype=torch.int64)
    kept.scatter_add_(-1, indices.clamp(min=0).long(), (indices >= 0).long())
    assert kept.max() == 1
    assert not kept[scores == -math.inf].any()
    number = scores.isnan().sum(-1)  # every NaN is kept, as far as there are slots
    assert torch.equal((kept.bool() & scores.isnan()).sum(-1), number.clamp(max=K))
    shown = (kept.bool() & (scores.isnan() | (scores == math.inf))).any(-1)
    assert torch.equal(weights.isnan().any(-1), shown) and not weights[indices < 0].any()
    if options["weighting"] == "softmax":
        assert weights[shown][indices[shown] >= 0].isnan().all()
