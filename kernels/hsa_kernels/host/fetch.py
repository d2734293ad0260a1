"""Rows of a store in pinned host memory, read by the GPU itself: only the requested rows cross the
bus.

The CPU starts the launch and does not wait.

Dimensions: N rows stored, M rows fetched.
"""

import torch
import triton
import triton.language as tl

BLOCK = 2048  # numbers per program


@triton.jit
def fetch_kernel(store, rows, out, size, BLOCK: tl.constexpr):
    """One program: BLOCK numbers of one fetched row.

    Grid: (M, ceil(size / BLOCK)), where size is the numbers of a row.
    """
    i_row = tl.program_id(0)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + i_row).to(tl.int64)
    mask = o < size  # the last block of a row may be shorter
    # [BLOCK]
    b_part = tl.load(store + row * size + o, mask=mask)
    tl.store(out + i_row.to(tl.int64) * size + o, b_part, mask=mask)


def fetch(store: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """store [N, ...], contiguous, in pinned host memory or on the GPU; rows int64 [M] on the GPU ->
    [M, ...] there.

    The row numbers are not checked: a number beyond the store reads whatever lies there. Raises
    ValueError for wrong dtypes or layouts.
    """
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise ValueError(f"rows: got {list(rows.shape)} {rows.dtype}, accepted is int64 [M]")
    if not store.is_contiguous():
        raise ValueError(
            f"store: got strides {store.stride()} for shape {list(store.shape)}, "
            "accepted is a contiguous tensor"
        )
    out = torch.empty(len(rows), *store.shape[1:], dtype=store.dtype, device=rows.device)
    size = store.shape[1:].numel()
    if out.numel():
        fetch_kernel[len(rows), triton.cdiv(size, BLOCK)](store, rows, out, size, BLOCK=BLOCK)
    return out
