"""Decoding on a GPU.

Captured steps equal eager ones, K and V in host memory equal K and V on the device, bytes are
bounded.
"""

import dataclasses

import pytest
import torch
from gpu_helpers import draw, relative_error

import hsa_kernels
from hsa_mini import PRESETS, ChunkMemory, HSAModel, ops
from hsa_mini.inference.decode_step import DecodeStep
from hsa_mini.inference.prefill import prefill
from hsa_mini.memory import host_chunks
from hsa_mini.memory.origin import fingerprint
from hsa_mini.ops import torch_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
MINI = PRESETS["mini"]
CHANGES = {
    "mini": {},
    "query block": dict(query_block=4),
    "stick breaking": dict(weighting="stick_breaking", exclude_window=True),
    "experts": dict(experts=8, experts_active=2, expert_width=192),
}
every_change = pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)


def build(dtype=torch.bfloat16, **changes) -> HSAModel:
    torch.manual_seed(0)
    return HSAModel(dataclasses.replace(MINI, **changes), device="cuda", dtype=dtype).eval()


def text(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        4096, (B, T), generator=torch.Generator("cuda").manual_seed(seed), device="cuda"
    )


def spoken(model, memory, ids, *, graph: bool) -> torch.Tensor:
    steps = DecodeStep(model, memory, graph=graph)
    return torch.stack([steps(token).clone() for token in ids.split(1, dim=1)], dim=1)


@every_change
@pytest.mark.parametrize("far", [False, True], ids=["on the device", "offloaded"])
@torch.no_grad()
def test_a_captured_step_equals_an_eager_one(changes, far):
    """Texts of different lengths, past several chunks.

    Launches and numbers are the same, except for the capacity of the buffers.
    """
    model, ids, after = build(**changes), text(3, 3000), text(3, 200, seed=1)
    lengths = torch.tensor([3000, 100, 1234])
    want, got = (
        spoken(
            model,
            prefill(model, ids, ChunkMemory(model.config, offload=far), lengths=lengths).memory,
            after,
            graph=graph,
        )
        for graph in (False, True)
    )
    assert relative_error(got, want.double()) < 2e-2


@torch.no_grad()
def test_a_graph_is_captured_anew_when_the_memory_moves():
    model, ids, after = build(top_k=32), text(2, 1000), text(2, 300, seed=1)
    memory = ChunkMemory(model.config)
    model(ids, memory)
    assert memory.chunks.buffers[0].shape[1] == len(
        memory.chunks
    )  # no room: the first chunk that completes moves everything
    got = spoken(model, memory, after, graph=True)
    want = model(torch.cat((ids, after), dim=1)).logits[:, 1000:]
    assert relative_error(got, want.double()) < 5e-2


@pytest.mark.parametrize("changes", [{}, dict(query_block=4)], ids=str)
@torch.no_grad()
def test_steps_equal_the_forward_pass_in_float32(changes):
    model, ids = build(torch.float32, **changes), text(2, 1500)
    want = model(ids).logits[:, 1399:]
    for far in (False, True):
        output = prefill(model, ids[:, :1400], ChunkMemory(model.config, offload=far), segment=333)
        got = torch.cat(
            (output.logits, spoken(model, output.memory, ids[:, 1400:], graph=False)), dim=1
        )
        assert (got - want).abs().max() < 1e-3


@torch.no_grad()
def test_it_makes_no_difference_where_k_and_v_lie():
    model, ids, after = build(top_k=160), text(1, 10_000), text(1, 100, seed=1)
    outputs = [prefill(model, ids, ChunkMemory(model.config, offload=far)) for far in (False, True)]
    near, far = (output.memory for output in outputs)
    assert far.chunks.k.is_pinned() and near.chunks.k.is_cuda and far.chunks.landmarks.is_cuda
    assert torch.equal(far.chunks.k.cuda(), near.chunks.k) and torch.equal(
        far.chunks.landmarks, near.chunks.landmarks
    )
    want, got = (
        torch.cat((o.logits, spoken(model, o.memory, after, graph=True)), dim=1) for o in outputs
    )
    assert relative_error(got, want.double()) < 2e-2


@torch.no_grad()
def test_an_offloaded_memory_is_saved_selected_and_loaded(tmp_path):
    model, ids, after = build(), text(2, 2000), text(2, 100, seed=1)
    memory = prefill(model, ids, ChunkMemory(MINI, offload=True)).memory
    memory.save(tmp_path / "memory")
    want = spoken(model, memory, after, graph=True)
    loaded = ChunkMemory.load(tmp_path / "memory", device="cuda", offload=True)
    assert loaded.chunks.k.is_pinned()
    loaded.reorder(torch.tensor([1, 0]))
    assert not loaded.chunks.k.is_cuda and loaded.chunks.landmarks.is_cuda
    assert loaded.origin == fingerprint(model) == fingerprint(model.cpu())
    model.cuda()
    assert (
        relative_error(spoken(model, loaded, after[[1, 0]], graph=True)[[1, 0]], want.double())
        < 2e-2
    )


@torch.no_grad()
def test_device_bytes_are_bounded(monkeypatch):
    """Prefill of 256K tokens.

    In addition to landmarks and caches, the device holds two blocks of fetched chunks and what a
    segment needs; K and V are 67 MB.
    """
    monkeypatch.setattr(host_chunks, "FETCH_BYTES", 1 << 22)
    model, ids = build(), text(1, 1 << 18)
    prefill(
        model, ids, ChunkMemory(MINI, offload=True)
    )  # compiled, workspaces, kept masks of windows
    peaks = []
    for offloaded in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        memory = prefill(model, ids, ChunkMemory(MINI, offload=offloaded)).memory
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert torch.cuda.memory_allocated() - before <= memory.device_bytes + (1 << 22)
        del memory
    kv = 2 * (1 << 18) * MINI.hsa_kv_heads * MINI.hsa_head_dim * 2
    assert peaks[0] - peaks[1] > kv - 4 * host_chunks.FETCH_BYTES - (1 << 23)


def test_chunks_are_fetched_from_host_memory_beyond_31_bits():
    store = torch.zeros(1 << 11, 1 << 20, dtype=torch.bfloat16).pin_memory()  # 4 GB
    store[-1], store[3] = 7, 3
    got = ops.fetch(store, torch.tensor([2047, 3, 0], device="cuda"))
    assert got.is_cuda and got[:, [0, -1]].tolist() == [[7, 7], [3, 3], [0, 0]]


@pytest.mark.parametrize("T", [1, 700])
def test_attention_over_fetched_chunks_equals_attention_over_all(T, monkeypatch):
    monkeypatch.setattr(host_chunks, "FETCH_BYTES", 1 << 20)
    q = draw(2, T, 16, 128, dtype=torch.bfloat16)
    k, v = (draw(2, 90, 64, 1, 128, seed=i, dtype=torch.bfloat16) for i in (1, 2))
    indices = torch.rand(2, T, 1, 90, device="cuda").argsort(-1)[..., :16].int()
    indices[:, ::3, :, 5:] = -1
    weights = torch.rand(2, T, 1, 16, device="cuda").masked_fill(indices < 0, 0)
    far = k.cpu().pin_memory(), v.cpu().pin_memory()
    got = host_chunks.chunk_attention(q, *far, indices, weights)
    assert (
        relative_error(got, hsa_kernels.chunk_attention(q, k, v, indices, weights).double()) < 5e-3
    )


def test_window_decode_attention_is_as_precise_as_pytorch():
    q, k, v = (
        draw(*shape, seed=i, dtype=torch.bfloat16)
        for i, shape in enumerate(((3, 1, 16, 128), *((3, 4096, 4, 128),) * 2))
    )
    positions = torch.tensor([0, 3000, 1 << 24], device="cuda")
    got = hsa_kernels.window_decode_attention(q, k, v, positions)
    exact = torch_backend.window_decode_attention(q.double(), k.double(), v.double(), positions)
    assert relative_error(got, exact) < 5e-3


def test_the_decode_kernel_reads_host_memory():
    asked, q = (draw(2, 1, heads, 128, seed=heads, dtype=torch.bfloat16) for heads in (1, 16))
    landmarks = draw(2, 90, 1, 128, dtype=torch.bfloat16)
    k, v = (draw(2, 90, 64, 1, 128, seed=i, dtype=torch.bfloat16) for i in (3, 4))
    options = dict(chunk_size=64, top_k=16, offset=torch.tensor([5760, 900], device="cuda"))
    chunks = host_chunks.HostChunks(k.cpu().pin_memory(), v.cpu().pin_memory(), landmarks)
    got = chunks.decode(asked, q, **options)
    assert torch.equal(got, hsa_kernels.decode(asked, landmarks, q, k, v, **options))
