"""`torch_backend.*` gives what `reference.*` gives: outputs and every gradient, however small its
blocks.

Dimensions: B batch, T tokens, H query heads, J key/value heads, G = H/J, D head dimension, R
retrieval dimension, N chunks, S chunk size, K kept, P cached keys, W window.
"""

import contextlib

import pytest
import torch
from helpers import assert_close, random, random_choice, results
from hypothesis import example, given, settings
from hypothesis import strategies as st
from material import document_starts

from hsa_mini import reference
from hsa_mini.ops import torch_backend

BUDGETS = st.sampled_from([1, 3000, 1 << 26])  # one token a block, a few, all at once


@contextlib.contextmanager
def blocks_of(budget: int, attend=None):
    """Blocks of tokens that hold `budget` numbers, each attended by `attend` whatever the backend
    itself would choose.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_backend, "BLOCK_ELEMENTS", {"cpu": budget})
        if attend is not None:
            patch.setattr(torch_backend, "_attend_all", attend)
            patch.setattr(reference, "chunk_attention", attend)
        yield


@settings(max_examples=100)
@given(
    T=st.integers(0, 70), J=st.sampled_from([1, 3]), N=st.sampled_from([0, 1, 4, 9]),
    S=st.sampled_from([16, 32, 64]),
    K=st.integers(1, 11), offset=st.sampled_from([0, 64, 137, torch.tensor([16, 300])]),
    weighting=st.sampled_from(["softmax", "stick_breaking"]), gumbel_seed=st.sampled_from([None,
    5]),
    exclude_window=st.sampled_from([0, 40]), query_block=st.sampled_from([1, 3, 8]), budget=BUDGETS,
    documents=st.booleans(),
)  # fmt: skip
def test_retrieve(T, J, N, S, K, budget, documents, **options):
    if documents:
        options["document_starts"] = document_starts([3, 16, 64], [48], tokens=T)
    inputs = dict(retrieval_q=random(2, T, J, 4), landmarks=random(2, N, J, 4, seed=1))
    want = results(reference.retrieve, inputs, chunk_size=S, top_k=K, **options)
    with blocks_of(budget):
        got = results(torch_backend.retrieve, inputs, chunk_size=S, top_k=K, **options)
    assert_close(got, want, 1e-12)


@settings(max_examples=100)
@given(
    T=st.integers(0, 20), J=st.sampled_from([1, 2]), G=st.sampled_from([1, 4, 16]),
    S=st.sampled_from([16, 32, 64]),
    N=st.sampled_from([0, 1, 4, 9]), K=st.integers(1, 11), scale=st.sampled_from([None, 0.5]),
    budget=st.sampled_from([1, 60_000, 1 << 26]),
    attend=st.sampled_from([None, torch_backend._attend_all, reference.chunk_attention]),
)  # fmt: skip
def test_chunk_attention(T, J, G, S, N, K, scale, budget, attend):
    q, k, v = random(2, T, J * G, 8), random(2, N, S, J, 8, seed=1), random(2, N, S, J, 8, seed=2)
    indices, weights = random_choice(2, T, J, K, N)
    inputs = dict(q=q, k=k, v=v, indices=indices, weights=weights)
    want = results(reference.chunk_attention, inputs, scale=scale)
    with blocks_of(budget, attend):
        got = results(torch_backend.chunk_attention, inputs, scale=scale)
    assert_close(got, want, 1e-12)


@settings(max_examples=100)
@given(
    T=st.integers(0, 40), P=st.integers(0, 30), W=st.sampled_from([1, 2, 7, 16, 25, 100]),
    J=st.sampled_from([1, 2]),
    G=st.sampled_from([1, 4, 16]), documents=st.booleans(),
)  # fmt: skip
@example(T=300, P=9, W=1100, J=2, G=2, documents=True)  # the longest blocks
def test_sliding_window_attention(T, P, W, J, G, documents):
    shape = (2, P + T, J, 8)
    inputs = dict(q=random(2, T, J * G, 8), k=random(*shape, seed=1), v=random(*shape, seed=2))
    options = dict(window=W)
    if documents:
        options["document_starts"] = document_starts([3, P, P + 9], [P + 1], tokens=P + T)[:, P:]
    got, want = (
        results(f.sliding_window_attention, inputs, **options) for f in (torch_backend, reference)
    )
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize(
    "N, budget", [(3, 1 << 16), (40, 1 << 10)], ids=["every chunk", "kept chunks"]
)
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 2e-6), (torch.float16, 2**-10), (torch.bfloat16, 2**-7)]
)
def test_chunk_attention_in_other_dtypes_is_as_exact_as_their_rounding(dtype, bound, N, budget):
    """Also over many blocks of tokens that chose the same three chunks.

    The sums for the gradients of k and v are then long.
    """
    q, k, v = (
        random(*shape, dtype=dtype)
        for shape in ((1, 400, 4, 8), (1, N, 16, 1, 8), (1, N, 16, 1, 8))
    )
    indices, weights = random_choice(1, 400, 1, 2, 3, dtype=torch.float32)
    inputs = dict(q=q, k=k, v=v, indices=indices, weights=weights)
    want = results(
        reference.chunk_attention,
        {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()},
    )
    with blocks_of(budget):
        got = results(torch_backend.chunk_attention, inputs)
    for name, value in got.items():
        assert value.dtype == (torch.float32 if name == "gradient of weights" else dtype), name
    assert_close({name: x.double() for name, x in got.items()}, want, bound)


@pytest.mark.parametrize("name", ["q", "k", "v", "weights"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("attend", [torch_backend._attend_all, reference.chunk_attention])
def test_chunk_attention_never_hides_what_is_not_a_number(attend, value, name):
    """A token whose result is not finite in the reference is not finite in any schedule."""
    T, N, K = 20, 9, 3
    inputs = dict(q=random(1, T, 2, 8), k=random(1, N, 16, 1, 8), v=random(1, N, 16, 1, 8))
    inputs["indices"], inputs["weights"] = random_choice(1, T, 1, K, N)
    inputs[name].view(-1)[:: inputs[name].numel() // 3 - 1] = value
    inputs["weights"].masked_fill_(inputs["indices"] < 0, 0.0)
    want = reference.chunk_attention(**inputs)
    with blocks_of(1 << 26, attend):
        got = torch_backend.chunk_attention(**inputs)
    assert (~want.isfinite()).any() and not (got.isfinite() & ~want.isfinite()).any()
