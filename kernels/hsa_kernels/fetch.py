"""Rows of a store in pinned host memory, read by the GPU itself: only what is asked for crosses the bus, and nobody waits.

Dimensions: N rows stored, M rows fetched.
"""

import torch
import triton
import triton.language as tl

BLOCK = 2048  # numbers a program


@triton.jit
def _fetch(store, rows, out, size, BLOCK: tl.constexpr):
    i_row = tl.program_id(0)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + i_row).to(tl.int64)
    mask = o < size  # the last block of a row
    tl.store(
        out + i_row.to(tl.int64) * size + o, tl.load(store + row * size + o, mask=mask), mask=mask
    )


def fetch(store: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """store [N, ...], contiguous, in pinned host memory or on the GPU; rows int64 [M] on the GPU -> [M, ...] there.

    Rows are not checked: one that the store lacks reads whatever lies there. Raises ValueError for wrong dtypes or layouts.
    """
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise ValueError(f"rows: got {list(rows.shape)} {rows.dtype}, accepted is int64 [M]")
    if not store.is_contiguous():
        raise ValueError(
            f"store: got strides {store.stride()} for shape {list(store.shape)}, accepted is a contiguous tensor"
        )
    out = torch.empty(len(rows), *store.shape[1:], dtype=store.dtype, device=rows.device)
    size = store.shape[1:].numel()
    if out.numel():
        _fetch[len(rows), triton.cdiv(size, BLOCK)](store, rows, out, size, BLOCK=BLOCK)
    return out
