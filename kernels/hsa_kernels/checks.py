"""What the kernels ask for beyond the reference: dtypes, sizes and layouts.

Values are read only if the environment says `HSA_KERNELS_DEBUG=1`: on a GPU that waits for all work before it.
"""

import os

import torch

from .tiles import padded

DEBUG = os.environ.get("HSA_KERNELS_DEBUG") == "1"

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_kernel(**tensors: torch.Tensor) -> None:
    """Check the arguments of an operation by name, after the reference's own checks."""
    for name, tensor in tensors.items():
        if name == "weights" and tensor.dtype != torch.float32:
            raise ValueError(f"weights: got {tensor.dtype}, accepted is float32")
        if tensor.is_floating_point() and tensor.dtype not in FLOATS:
            raise ValueError(
                f"{name}: got {tensor.dtype}, accepted are float16, bfloat16 and float32"
            )
        # a memory has room behind the chunks of every batch entry: entries need not follow each other
        rows = tensor[:1] if name in ("k", "v", "landmarks") else tensor
        if not rows.is_contiguous():
            raise ValueError(
                f"{name}: got strides {tensor.stride()} for shape {list(tensor.shape)}, accepted is a contiguous tensor"
            )
    if "q" in tensors and tensors["k"].dim() == 5:  # chunks
        H, D = tensors["q"].shape[2:]
        S, J = tensors["k"].shape[2:4]
        for name, what, got, least, most in (
            ("q", "D", D, 16, 256),
            ("k", "S", S, 16, 128),
            ("q", "H/J", H // J, 1, 64),
        ):
            if not least <= got <= most:
                raise ValueError(f"{name}: got {what}={got}, accepted are {least} to {most}")
        numbers = (
            1 << 14 if H // J <= 16 else 1 << 13
        )  # of a tile, at most, so that what backward holds fits into shared memory
        if (
            tensors["k"].is_cuda
            and tensors["k"].dtype == torch.float32
            and padded(S) * padded(D) > numbers
        ):
            raise ValueError(
                f"k: got S={S} and D={D} in float32, accepted is S*D up to {numbers} for H/J={H // J} (or 16 bits)"
            )


def check_indices(indices: torch.Tensor, chunks: int) -> None:
    """In debugging, that every index names a chunk or is -1; otherwise one beyond the memory counts as empty."""
    if DEBUG and indices.numel() and not -1 <= int(indices.min()) <= int(indices.max()) < chunks:
        raise ValueError(
            f"indices: got {int(indices.min())} to {int(indices.max())}, accepted are -1 (empty) to {chunks - 1}"
        )
