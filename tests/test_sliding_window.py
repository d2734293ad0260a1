"""`reference.sliding_window_attention` against dense attention with a band mask.

Dimensions: B batch, T tokens, P cached keys, H query heads, J key/value heads, G = H/J, D head
dimension, W window.
"""

import pytest
import torch
from helpers import assert_close, random, results
from material import document_starts
from torch.nn.functional import scaled_dot_product_attention

from hsa_mini.reference import sliding_window_attention

SIZES = [  # T, P, W
    (1, 0, 1), (1, 9, 4), (13, 0, 1), (13, 0, 5), (13, 4, 5), (13, 2, 5), (13, 11, 5), (16, 0, 8),
    (5, 30, 64), (33, 0, 33),
]  # fmt: skip


def inputs(
    T: int, P: int = 0, J: int = 2, G: int = 2, dtype=torch.float64
) -> dict[str, torch.Tensor]:
    k, v = (random(2, P + T, J, 8, seed=seed, dtype=dtype) for seed in (1, 2))
    return dict(q=random(2, T, J * G, 8, dtype=dtype), k=k, v=v)


def banded(q, k, v, *, window):
    T, keys = q.shape[1], k.shape[1]
    band = torch.ones(T, keys, dtype=torch.bool).tril(keys - T).triu(keys - T - window + 1)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads, attn_mask=band, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("J, G", [(1, 1), (1, 16), (2, 4)])
@pytest.mark.parametrize("T, P, W", SIZES)
def test_equals_dense_attention_with_a_band_mask(T, P, W, J, G):
    case = inputs(T, P, J, G)
    got, want = (results(f, case, window=W) for f in (sliding_window_attention, banded))
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize("W", [1, 4, 7, 100])
def test_every_split_with_cached_keys_in_front_gives_the_same(W):
    case = inputs(20)
    whole = sliding_window_attention(**case, window=W)
    for split in range(1, 20):
        # Everything in front, or what the window still shows.
        for first in (0, max(split - W + 1, 0)):
            rest = dict(q=case["q"][:, split:], k=case["k"][:, first:], v=case["v"][:, first:])
            assert_close(sliding_window_attention(**rest, window=W), whole[:, split:], 1e-13)


@pytest.mark.parametrize("W", [1, 4, 100])
@pytest.mark.parametrize("P", [0, 2, 9])
def test_a_document_attends_as_if_it_stood_alone(P, W):
    """With every gradient. The first document of each row began before the cached keys."""
    firsts = [0, P + 5, P + 6], [0, P + 11]  # among the P+17 keys
    starts = document_starts(*firsts, tokens=P + 17)[:, P:]
    starts[starts == 0] = -4 if P else 0

    def each_alone(q, k, v):
        parts = []
        for b, row in enumerate(firsts):
            for first, end in zip(row, [*row[1:], P + 17]):
                own = q[b : b + 1, max(first - P, 0) : end - P]
                keys, values = (x[b : b + 1, first:end] for x in (k, v))
                parts.append(sliding_window_attention(own, keys, values, window=W))
        return torch.cat(parts, dim=1)[0].unflatten(0, (2, 17))

    case = inputs(17, P)
    got = results(sliding_window_attention, case, window=W, document_starts=starts)
    assert_close(got, results(each_alone, case), 1e-13)


def test_a_window_longer_than_everything_is_causal_attention():
    case = inputs(17)
    causal = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in case.values()), is_causal=True, enable_gqa=True
    )
    assert_close(sliding_window_attention(**case, window=1000), causal.transpose(1, 2), 1e-13)


def test_a_window_of_one_returns_the_token_s_own_value():
    case = inputs(9)
    assert_close(
        sliding_window_attention(**case, window=1), case["v"].repeat_interleave(2, dim=2), 0
    )


def test_gradients_equal_finite_differences():
    leaves = tuple(x[:1, :, :, :2].clone().requires_grad_() for x in inputs(4, 1, J=1).values())
    assert torch.autograd.gradcheck(
        lambda q, k, v: sliding_window_attention(q, k, v, window=2), leaves
    )


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 1e-6), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)]
)
def test_error_against_float64_is_the_rounding_of_the_result(dtype, bound):
    case = inputs(200, 3, dtype=dtype)
    want = results(
        sliding_window_attention, {name: x.double() for name, x in case.items()}, window=50
    )
    got = results(sliding_window_attention, case, window=50)
    assert all(x.dtype == dtype for x in got.values())
    assert_close({name: x.double() for name, x in got.items()}, want, bound)
