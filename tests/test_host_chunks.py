"""Chunks in host memory: the same numbers as with all on the device, however few tokens fetch at a
time.

On a processor both are one memory: what is fetched, and under which new number it is found, is
tested here; the bus is not. Dimensions: B batch, T tokens, H query heads, J key/value heads, D head
dimension, N chunks, S chunk size, K kept.
"""

import pytest
import torch
from helpers import assert_close, random, random_choice
from hypothesis import given
from hypothesis import strategies as st
from material import build, every_dense_option, text

from hsa_mini import ChunkMemory, ops, reference
from hsa_mini.inference.generate import generate
from hsa_mini.inference.prefill import prefill
from hsa_mini.memory import host_chunks as offload


@given(
    B=st.integers(1, 3), T=st.integers(1, 20), J=st.integers(1, 3), K=st.integers(1, 5),
    N=st.integers(0, 9), spare=st.integers(0, 3), block=st.integers(1, 8), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_equals_the_reference_in_blocks_of_any_size(B, T, J, K, N, spare, block, seed):
    S, D = 3, 4
    q, (k, v) = (
        random(B, T, 2 * J, D, seed=seed),
        (random(B, N + spare, S, J, D, seed=seed + i)[:, :N] for i in (1, 2)),
    )
    indices, weights = random_choice(B, T, J, K, N, seed=seed)
    before, offload.FETCH_BYTES = offload.FETCH_BYTES, block * B * J * K * 2 * 8 * S * J * D
    try:
        got = offload.chunk_attention(q, k, v, indices, weights, scale=0.3)
    finally:
        offload.FETCH_BYTES = before
    assert_close(got, reference.chunk_attention(q, k, v, indices, weights, scale=0.3), 1e-12)


def test_no_block_fetches_more_than_it_may(monkeypatch):
    fetched = []
    monkeypatch.setattr(
        ops, "fetch", lambda store, rows: fetched.append(store[rows]) or fetched[-1]
    )
    monkeypatch.setattr(offload, "FETCH_BYTES", 40_000)
    q, k, v = random(2, 50, 4, 8), random(2, 40, 4, 2, 8), random(2, 40, 4, 2, 8)
    indices, weights = random_choice(2, 50, 2, 3, 40)
    offload.chunk_attention(q, k, v, indices, weights)
    assert (
        len(fetched) > 2
        and max(x.nbytes + y.nbytes for x, y in zip(fetched[::2], fetched[1::2])) <= 40_000
    )
    offload.chunk_attention(q, k, v, indices.fill_(5), weights)
    assert len(fetched[-1]) == 2  # chunks that all tokens chose are fetched once a sequence


@every_dense_option
@torch.no_grad()
def test_a_model_reads_and_writes_the_same_numbers(option, monkeypatch):
    # Several blocks, in the upper decoder's tail too.
    monkeypatch.setattr(offload, "FETCH_BYTES", 20_000)
    model, ids = build(option), text(90)
    want = model(ids).logits
    memory = ChunkMemory(model.config, offload=True)
    got = [model(part, memory).logits for part in ids.split(11, dim=1)]
    assert_close(torch.cat(got, dim=1), want, 1e-12)
    output = prefill(model, ids[:, :70], ChunkMemory(model.config, offload=True), segment=9)
    assert_close(model(ids[:, 70:], output.memory).logits, want[:, 70:], 1e-10)
    said = generate(model, ids, memory=ChunkMemory(model.config, offload=True), max_new_tokens=12)
    assert torch.equal(said.ids, generate(model, ids, max_new_tokens=12).ids)


@pytest.mark.parametrize("change", ["nothing", "saved", "selected", "replaced", "branched"])
@torch.no_grad()
def test_an_offloaded_memory_goes_on_after(change, tmp_path):
    model, ids = build(), text(60)
    memories = [ChunkMemory(model.config, offload=offloaded) for offloaded in (False, True)]
    for i, memory in enumerate(memories):
        prefill(model, ids[:, :41], memory)
        if change == "saved":
            memory.save(tmp_path / "memory")
            memories[i] = ChunkMemory.load(tmp_path / "memory", offload=memory.chunks.offload)
        elif change == "selected":
            memory.reorder(torch.tensor([1, 1]))
        elif change == "replaced":
            memory.chunks.replace(
                3,
                *(
                    store[:, :2] + 1
                    for store in (memory.chunks.k, memory.chunks.v, memory.chunks.landmarks)
                ),
            )
        elif change == "branched":
            memories[i] = memory.fork()
            model(text(30, seed=1), memories[i])
    want, got = (in_segments_on(model, ids[:, 41:], memory) for memory in memories)
    assert_close(got, want, 1e-12)


def in_segments_on(model, ids, memory):
    return torch.cat([model(part, memory).logits for part in ids.split(3, dim=1)], dim=1)


@torch.no_grad()
def test_only_k_and_v_leave_the_device():
    model, ids = build(), text(400)
    near, far = (
        prefill(model, ids, ChunkMemory(model.config, offload=offloaded)).memory
        for offloaded in (False, True)
    )
    assert near.device_bytes - far.device_bytes == sum(
        x.untyped_storage().nbytes() for x in (far.chunks.k, far.chunks.v)
    )
    caches = [x for cache in (*far.lower, *far.upper) for x in (cache.k, cache.v)]
    # of storages, not of tensors: no view keeps a whole segment alive
    assert far.device_bytes == sum(
        x.untyped_storage().nbytes() for x in (far.chunks.landmarks, *caches, far.tail)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are not interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_fetches_what_indexing_finds(dtype):
    store, rows = random(9, 5, 3, 200, dtype=dtype), torch.tensor([8, 0, 3, 3])
    with ops.backend("kernels"):
        assert torch.equal(ops.fetch(store, rows), store[rows])
        assert ops.fetch(store, rows[:0]).shape == (0, 5, 3, 200)
        with pytest.raises(ValueError, match="^rows: got .* accepted is int64"):
            ops.fetch(store, rows.int())
        with pytest.raises(ValueError, match="^store: got strides"):
            ops.fetch(store.transpose(1, 2), rows)
