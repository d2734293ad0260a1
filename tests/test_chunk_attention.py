"""`reference.chunk_attention`, Eq. (2), against loops and dense attention; `decode` against the two
it fuses.

Dimensions: B batch, T tokens, H query heads, J key/value heads, G = H/J, D head dimension, N
chunks, S chunk size, K kept.
"""

import pytest
import torch
from helpers import assert_close, random, random_choice, results
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from hsa_mini.reference import chunk_attention, decode, retrieve


def inputs(B=2, T=7, J=2, G=2, D=8, N=4, S=16, K=3, dtype=torch.float64) -> dict[str, torch.Tensor]:
    q, k, v = (
        random(B, T, J * G, D, dtype=dtype),
        *(random(B, N, S, J, D, seed=s, dtype=dtype) for s in (1, 2)),
    )
    indices, weights = random_choice(B, T, J, K, N, dtype=torch.promote_types(dtype, torch.float32))
    return dict(q=q, k=k, v=v, indices=indices, weights=weights)


def loop_attention(q, k, v, indices, weights, *, scale=None):
    """One token, one head, one slot at a time."""
    (B, T, H, D), J, K = q.shape, k.shape[3], indices.shape[3]
    rows = []
    for b, t, h in ((b, t, h) for b in range(B) for t in range(T) for h in range(H)):
        j, row = h // (H // J), torch.zeros(D, dtype=q.dtype)
        for slot in range(K):
            chunk = indices[b, t, j, slot].item()
            if chunk >= 0:
                scores = k[b, chunk, :, j] @ q[b, t, h] * (D**-0.5 if scale is None else scale)
                row = row + weights[b, t, j, slot] * (scores.softmax(0) @ v[b, chunk, :, j])
        rows.append(row)
    return torch.stack(rows).reshape(B, T, H, D)


@given(
    T=st.integers(1, 6), J=st.sampled_from([1, 2, 3]), G=st.sampled_from([1, 4, 16]),
    N=st.sampled_from([0, 1, 3, 8]),
    S=st.sampled_from([16, 32, 64]), K=st.integers(1, 5), scale=st.sampled_from([None, 0.7]),
)  # fmt: skip
def test_equals_a_loop_over_tokens_heads_and_slots(T, J, G, N, S, K, scale):
    given_inputs = inputs(T=T, J=J, G=G, N=N, S=S, K=K)
    got, want = (results(f, given_inputs, scale=scale) for f in (chunk_attention, loop_attention))
    assert_close(got, want, 1e-13)


def test_one_chunk_kept_with_weight_one_is_dense_attention_over_it():
    B, T, H, J, D, N, S = 2, 9, 4, 2, 8, 3, 16
    q, k, v = random(B, T, H, D), random(B, N, S, J, D, seed=1), random(B, N, S, J, D, seed=2)
    for chunk in range(N):
        indices = torch.full((B, T, J, 1), chunk, dtype=torch.int32)

        def sparse(q, k, v, indices=indices):
            return chunk_attention(q, k, v, indices, torch.ones(B, T, J, 1, dtype=q.dtype))

        def dense(q, k, v, chunk=chunk):
            rows = (q, k[:, chunk], v[:, chunk])
            return scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in rows), enable_gqa=True
            ).transpose(1, 2)

        assert_close(
            results(sparse, dict(q=q, k=k, v=v)), results(dense, dict(q=q, k=k, v=v)), 1e-13
        )


def test_a_single_chunk_of_all_tokens_is_dense_attention_over_everything():
    B, T, H, D, S = 1, 5, 3, 8, 200
    q, k, v = random(B, T, H, D), random(B, 1, S, 1, D, seed=1), random(B, 1, S, 1, D, seed=2)
    one = torch.ones(B, T, 1, 1, dtype=torch.float64)
    dense = scaled_dot_product_attention(
        q.transpose(1, 2), *(x[:, 0].transpose(1, 2) for x in (k, v)), enable_gqa=True
    )
    assert_close(chunk_attention(q, k, v, (one - 1).int(), one), dense.transpose(1, 2), 1e-13)


def test_linear_in_the_weights_and_in_v():
    case = inputs()
    q, k, v, indices, first = (case[name] for name in ("q", "k", "v", "indices", "weights"))
    second, other = random(*first.shape, seed=5), random(*v.shape, seed=6)
    mixed = chunk_attention(q, k, v, indices, 2 * first - 3 * second)
    assert_close(
        mixed,
        2 * chunk_attention(q, k, v, indices, first)
        - 3 * chunk_attention(q, k, v, indices, second),
        1e-13,
    )
    mixed = chunk_attention(q, k, 2 * v - 3 * other, indices, first)
    assert_close(
        mixed,
        2 * chunk_attention(q, k, v, indices, first)
        - 3 * chunk_attention(q, k, other, indices, first),
        1e-13,
    )


def test_where_a_chunk_lies_and_in_which_slot_changes_nothing():
    case, order, slots = (
        inputs(N=6, K=4),
        torch.tensor([3, 5, 0, 1, 4, 2]),
        torch.tensor([2, 0, 3, 1]),
    )
    want = results(chunk_attention, case)
    place = order.argsort().int()  # where each chunk went; -1 stays -1
    moved = torch.where(case["indices"] >= 0, place[case["indices"].clamp(min=0).long()], -1)[
        ..., slots
    ]
    shuffled = dict(
        case,
        k=case["k"][:, order],
        v=case["v"][:, order],
        indices=moved,
        weights=case["weights"][..., slots],
    )
    got = results(chunk_attention, shuffled)
    assert_close(got["output 0"], want["output 0"], 1e-13)
    assert_close(got["gradient of q"], want["gradient of q"], 1e-13)
    for name in ("k", "v"):
        assert_close(got[f"gradient of {name}"], want[f"gradient of {name}"][:, order], 1e-13)
    assert_close(got["gradient of weights"], want["gradient of weights"][..., slots], 1e-13)


def test_the_order_of_tokens_inside_a_chunk_changes_nothing():
    """No positions: a chunk is a set."""
    case, order = inputs(), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = dict(case, k=case["k"][:, :, order], v=case["v"][:, :, order])
    assert_close(chunk_attention(**shuffled), chunk_attention(**case), 1e-13)


def test_empty_slots_add_nothing_whatever_chunk_zero_and_their_weights_hold():
    case = inputs()
    # Nobody asks for chunk 0.
    case["indices"] = torch.where(case["indices"] == 0, 1, case["indices"])
    assert (case["indices"] < 0).any()
    want = chunk_attention(**case)
    case["k"][:, 0] = case["v"][:, 0] = float("nan")
    assert torch.equal(chunk_attention(**case), want)
    case["weights"] = case["weights"].masked_fill(case["indices"] < 0, 5.0)
    assert torch.equal(chunk_attention(**case), want)
    gradients = results(chunk_attention, case)
    assert (gradients["gradient of weights"][case["indices"] < 0] == 0).all()


@pytest.mark.parametrize("N", [0, 4])
def test_a_token_without_chunks_gets_exactly_zero(N):
    case = inputs(N=N)
    case["indices"][:, 2:5] = -1
    case["weights"][:, 2:5] = 0
    got = results(chunk_attention, case)
    assert (got["output 0"][:, 2:5] == 0).all() and (got["gradient of q"][:, 2:5] == 0).all()
    assert N == 0 or (got["output 0"][:, :2] != 0).any()


def test_gradients_equal_finite_differences():
    case = inputs(B=1, T=2, J=2, G=2, D=2, N=3, S=3, K=3)
    leaves = tuple(case[name].requires_grad_() for name in ("q", "k", "v", "weights"))
    assert torch.autograd.gradcheck(
        lambda q, k, v, weights: chunk_attention(q, k, v, case["indices"], weights), leaves
    )


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 1e-6), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)]
)
def test_error_against_float64_is_the_rounding_of_the_result(dtype, bound):
    """Everything is computed in float32.

    Outputs and gradients of 16-bit inputs lose their last rounding alone.
    """
    case = inputs(T=300, N=4, K=3, dtype=dtype)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in case.items()}
    got, want = results(chunk_attention, case), results(chunk_attention, exact)
    for name, value in got.items():
        assert value.dtype == (torch.float32 if name == "gradient of weights" else dtype), name
    assert_close({name: x.double() for name, x in got.items()}, want, bound)


@pytest.mark.parametrize("tensor_offset", [False, True])
@pytest.mark.parametrize("S, K, J, G", [(16, 2, 1, 16), (32, 3, 2, 4), (16, 9, 3, 1)])
def test_decode_is_the_last_token_of_retrieve_and_chunk_attention(S, K, J, G, tensor_offset):
    B, T, N, D, R = 2, 21, 5, 8, 4
    retrieval_q, landmarks = random(B, T, J, R), random(B, N, J, R, seed=1)
    q, k, v = (
        random(B, T, J * G, D, seed=2),
        random(B, N, S, J, D, seed=3),
        random(B, N, S, J, D, seed=4),
    )
    for offset in (0, S - 5, 3 * S, N * S):
        offset = torch.tensor([offset, offset // 2]) if tensor_offset else offset
        choice = retrieve(retrieval_q, landmarks, chunk_size=S, top_k=K, offset=offset)
        want = chunk_attention(q, k, v, *choice, scale=0.3)[:, -1:]
        last = dict(retrieval_q=retrieval_q[:, -1:], landmarks=landmarks, q=q[:, -1:], k=k, v=v)
        assert_close(
            decode(**last, chunk_size=S, top_k=K, offset=offset + T - 1, scale=0.3), want, 1e-13
        )
