"""What the kernels require beyond the reference: dtypes, sizes and layouts.

Values are read only if the environment variable `HSA_KERNELS_DEBUG` is 1, because on a GPU reading
a value waits for all work in front of it.
"""

import os

import torch

from hsa_kernels.common.tiles import HOPPER, SHARED_MEMORY, capability, padded, shared_memory

DEBUG = os.environ.get("HSA_KERNELS_DEBUG") == "1"

MIN_CAPABILITY = (8, 0)  # Ampere: the first GPUs with bfloat16
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_kernel(**tensors: torch.Tensor) -> None:
    """Check the arguments of an operation by name, after the reference's own checks.

    Raises ValueError.
    """
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    name, tensor = next(iter(tensors.items()))  # all lie on the same GPU
    if (got := capability(tensor)) < MIN_CAPABILITY:
        raise ValueError(
            f"{name}: got a GPU of capability {got}, accepted is {MIN_CAPABILITY} or later"
        )
    if "q" in tensors and tensors["k"].dim() == 5:
        _check_chunks(tensors["q"], tensors["k"])


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    """The dtype and the layout of one argument."""
    if name == "weights" and tensor.dtype != torch.float32:
        raise ValueError(f"weights: got {tensor.dtype}, accepted is float32")
    if tensor.is_floating_point() and tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: got {tensor.dtype}, accepted are float16, bfloat16 and float32")
    # A memory reserves capacity behind the chunks of every batch entry, so the entries need not be
    # adjacent.
    rows = tensor[:1] if name in ("k", "v", "landmarks") else tensor
    if not rows.is_contiguous():
        raise ValueError(
            f"{name}: got strides {tensor.stride()} for shape {list(tensor.shape)}, "
            "accepted is a contiguous tensor"
        )


def _check_chunks(q: torch.Tensor, k: torch.Tensor) -> None:
    """The sizes of q [B, T, H, D] and of chunks k [B, N, S, J, D]."""
    H, D = q.shape[2:]
    S, J = k.shape[2:4]
    G = H // J
    for name, what, got, low, high in (
        ("q", "D", D, 16, 256),
        ("k", "S", S, 16, 128),
        ("q", "H/J", G, 1, 64),
    ):
        if not low <= got <= high:
            raise ValueError(f"{name}: got {what}={got}, accepted are {low} to {high}")
    if q.is_cuda and not tile_fits(q, k):
        raise ValueError(
            f"k: got S={S} and D={D} in {str(k.dtype).removeprefix('torch.')}, "
            f"accepted is S*D up to {_max_tile(q, G)} for H/J={G} on this GPU"
        )


def tile_fits(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the shared memory of q's GPU holds the tiles of chunks k [B, N, S, J, D] of queries
    q [B, T, H, D], in every kernel.
    """
    S, J, D = k.shape[2:]
    return padded(S) * padded(D) <= _max_tile(q, q.shape[2] // J)


def _max_tile(q: torch.Tensor, G: int) -> int:
    """The most numbers of a chunk's tile. The backward pass of chunk attention decides, because it
    keeps several tiles of this many numbers in shared memory; `tests/test_compile.py` tries it.
    """
    shared = shared_memory(q)
    hopper = SHARED_MEMORY[HOPPER]
    a100 = SHARED_MEMORY[8, 0]
    numbers = {hopper: 1 << 15, a100: 1 << 14}.get(shared, 1 << 13)
    if q.dtype == torch.float32:
        return numbers // (2 if G <= 16 else 4)
    return numbers // 2 if G > 32 and shared == a100 else numbers


def check_indices(indices: torch.Tensor, chunks: int) -> None:
    """In debugging, check that every index names a chunk or is -1.

    Otherwise an index beyond the memory counts as empty.
    """
    if DEBUG and indices.numel() and not -1 <= int(indices.min()) <= int(indices.max()) < chunks:
        raise ValueError(
            f"indices: got {int(indices.min())} to {int(indices.max())}, "
            f"accepted are -1 (empty) to {chunks - 1}"
        )
