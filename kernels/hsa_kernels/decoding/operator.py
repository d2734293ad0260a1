"""One new token against the whole memory: Eq. (1) and Eq. (2), spread over the whole GPU.

Three launches with fixed grids, so that a CUDA graph can hold them. None of them synchronises with
the CPU:
1. `decode_score_kernel`: the scores of all landmarks and their maxima; it reads the landmarks once;
2. `decode_attend_kernel`: one program per kept slot chooses, then attends to the slot's chunk;
3. `decode_sum_kernel`: the sum over slots, in order.

Dimensions: B batch, H query heads, J key/value heads, G = H/J, D head dimension, R retrieval
dimension, N chunks, S chunk size, K chunks kept (KP padded to a power of 2), NB blocks of chunks.
"""

import torch
import triton

from hsa_kernels.common.checks import check_kernel
from hsa_kernels.common.selection import MAX_KEYS
from hsa_kernels.common.tiles import HOPPER, capability, padded, precision, scaled, to_log2
from hsa_kernels.decoding.attend import decode_attend_kernel, decode_sum_kernel
from hsa_kernels.decoding.score import decode_score_kernel
from hsa_mini.reference.checks import check_decode, check_retrieve

# Chunks per tile, tiles per block: 64 of 262,144 chunks are found by looking at 2,048, then 512,
# then 1,024 numbers.
TILE = 16
TILES = 8


@torch.library.custom_op("hsa_kernels::decode", mutates_args=())
def _decode(
    retrieval_q: torch.Tensor, landmarks: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor | None, offset: int, top_k: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """The three launches; offset counts only where `offsets` is None."""
    B, _, H, D = q.shape
    N, S, J = k.shape[1:4]
    R = landmarks.shape[3]
    K = min(top_k, N)
    if 0 in (q.numel(), N):
        return torch.zeros_like(q)
    G = H // J
    NB = triton.cdiv(N, TILE * TILES)
    KP = triton.next_power_of_2(K)
    scores, tile_maxima, block_maxima = (
        torch.empty(B, J, NB * size, dtype=torch.uint32, device=q.device)
        for size in (TILE * TILES, TILES, 1)
    )
    scratch = torch.empty(B, J, K, 3, KP, dtype=torch.int32, device=q.device)
    parts = torch.empty(B, J, K, G, D, device=q.device)
    # From Hopper on, the third launch starts while the second runs: its programs are few, and they
    # wait on the GPU.
    overlap = q.is_cuda and capability(q) >= HOPPER
    launch_early = dict(launch_pdl=True) if overlap else {}
    position = (offset, N, S)
    sizes = dict(J=J, TILE=TILE, TILES=TILES, OFFSETS=offsets is not None)
    decode_score_kernel[NB, J, B](
        retrieval_q, landmarks, offsets, scores, tile_maxima, block_maxima, landmarks.stride(0),
        *position, R**-0.5,
        R=R, RP=padded(R), **sizes, num_warps=4,
    )  # fmt: skip
    decode_attend_kernel[K, J, B](
        q, k, v, offsets, scores, tile_maxima, block_maxima, parts, scratch, k.stride(0),
        v.stride(0), *position,
        to_log2(scale), G=G, D=D, S=S, K=K, GP=padded(G), DP=padded(D), SP=padded(S), KP=KP, NB=NB,
        NBP=triton.next_power_of_2(NB), OVERLAP=overlap, PRECISION=precision(q.dtype), **sizes,
        num_warps=8,
    )  # fmt: skip
    out = torch.empty_like(q)
    decode_sum_kernel[G, B * J](
        parts, out, G=G, D=D, K=K, DP=padded(D), KP=KP, OVERLAP=overlap, num_warps=4, **launch_early
    )
    return out


@_decode.register_fake
def _(retrieval_q, landmarks, q, k, v, offsets, offset, top_k, scale):
    return torch.empty_like(q)


def decode(
    retrieval_q: torch.Tensor,
    landmarks: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    chunk_size: int,
    top_k: int,
    offset: int | torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Retrieve and attend for one new token per sequence: the twin of `retrieve` followed by
    `chunk_attention`.

    retrieval_q [B, 1, J, R], landmarks [B, N, J, R], q [B, 1, H, D], k and v [B, N, S, J, D] in
    float16, bfloat16 or float32 -> [B, 1, H, D]. k and v may lie in pinned host memory. offset:
    position of the new token; as a tensor [B] it may change between replays of a CUDA graph. Chunks
    that are incomplete at that position are never read. No gradient.

    Raises ValueError for wrong shapes, dtypes, devices or layouts.
    """
    check_decode(retrieval_q, landmarks, q, k, v, chunk_size)
    check_retrieve(retrieval_q, landmarks, chunk_size, top_k, offset, "softmax", None, 0, 1)
    check_kernel(retrieval_q=retrieval_q, landmarks=landmarks, q=q, k=k, v=v)
    N = landmarks.shape[1]
    for name, what, got, limit in (
        ("landmarks", "N", N, MAX_KEYS * TILE * TILES),
        ("top_k", "K", min(top_k, N), MAX_KEYS // TILE),
    ):
        if got > limit:
            raise ValueError(f"{name}: got {what}={got}, accepted are up to {limit}")
    offsets, first = (offset, 0) if isinstance(offset, torch.Tensor) else (None, offset)
    q, scale = scaled(q, scale)
    return _decode(retrieval_q, landmarks, q, k, v, offsets, first, top_k, scale)
