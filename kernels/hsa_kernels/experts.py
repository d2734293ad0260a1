"""What the experts say. Two ways, both of launches that a CUDA graph can hold:

- of few tokens every row of the dispatch reads its expert alone, and computes as it reads: up and gate, a program a row and some
  hidden units; then down, a program a token and some outputs, over the token's experts, by their gates;
- of more, rows share what is read: PyTorch's grouped products, with what lies between and behind them in a launch each.

Dimensions: M tokens, C width, H hidden units, E experts (EP padded to a power of 2), A experts active; BC, BH, BN and BR of C, H,
outputs and rows are read at a time.
"""

import torch
import triton
import triton.language as tl
from torch.nn.functional import grouped_mm

from .checks import check_kernel

MOST_APART = 8  # tokens; with more, what they share is worth more


@triton.jit
def _expert(ends, row, E: tl.constexpr, EP: tl.constexpr):
    """Whose row it is: as many experts end before it, or at it."""
    o_e = tl.arange(0, EP)
    return tl.sum((tl.load(ends + o_e, mask=o_e < E, other=2**31 - 1) <= row).to(tl.int32), 0).to(
        tl.int64
    )


@triton.jit
def _silu(b_x):
    return b_x / (1.0 + tl.exp(-b_x))


@triton.jit
def _hidden(
    x, ends, tokens, up_and_gate, hidden, C: tl.constexpr, H: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    BC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(0)
    row = tl.program_id(1)
    o_c = tl.arange(0, BC)
    o_h = i_h * BH + tl.arange(0, BH)
    x += tl.load(tokens + row) * C
    up_and_gate += _expert(ends, row, E, EP) * C * (2 * H)
    b_up = tl.zeros([BC, BH], tl.float32)
    b_gate = tl.zeros([BC, BH], tl.float32)
    for c in range(0, C, BC):
        m = (c + o_c < C)[:, None] & (o_h < H)[None, :]
        b_x = tl.load(x + c + o_c, mask=c + o_c < C, other=0.0).to(tl.float32)[:, None]
        p_w = up_and_gate + (c + o_c)[:, None] * (2 * H) + o_h[None, :]
        b_up += b_x * tl.load(p_w, mask=m, other=0.0)  # summed over C at the end, once
        b_gate += b_x * tl.load(p_w + H, mask=m, other=0.0)
    tl.store(hidden + row * H + o_h, tl.sum(b_up, 0) * _silu(tl.sum(b_gate, 0)), mask=o_h < H)


@triton.jit
def _mixed(
    hidden, ends, places, gates, down, out, C: tl.constexpr, H: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    A: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0)
    i_m = tl.program_id(1)
    o_h = tl.arange(0, BH)
    o_n = i_n * BN + tl.arange(0, BN)
    b_out = tl.zeros([BH, BN], tl.float32)
    for a in range(A):
        row = tl.load(places + i_m * A + a)
        gate = tl.load(gates + i_m * A + a)
        p_expert = down + _expert(ends, row, E, EP) * H * C
        for h in range(0, H, BH):
            m_h = h + o_h < H
            b_h = tl.load(hidden + row * H + h + o_h, mask=m_h, other=0.0) * gate
            p_w = p_expert + (h + o_h)[:, None] * C + o_n[None, :]
            b_out += b_h[:, None] * tl.load(p_w, mask=m_h[:, None] & (o_n < C)[None, :], other=0.0)
    tl.store(out + i_m * C + o_n, tl.sum(b_out, 0).to(out.dtype.element_ty), mask=o_n < C)


@triton.jit
def _gated(both, hidden, rows, H: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    o_h = tl.arange(0, BH)[None, :]
    m = (o_r < rows) & (o_h < H)
    b_up = tl.load(both + o_r * (2 * H) + o_h, mask=m, other=0.0).to(tl.float32)
    b_gate = tl.load(both + o_r * (2 * H) + H + o_h, mask=m, other=0.0).to(tl.float32)
    tl.store(hidden + o_r * H + o_h, (b_up * _silu(b_gate)).to(hidden.dtype.element_ty), mask=m)


@triton.jit
def _gathered(results, places, gates, out, C: tl.constexpr, A: tl.constexpr, BN: tl.constexpr):
    i_m = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    b_out = tl.zeros([BN], tl.float32)
    for a in tl.static_range(A):
        row = tl.load(places + i_m * A + a)
        gate = tl.load(gates + i_m * A + a)
        b_out += gate * tl.load(results + row * C + o_n, mask=o_n < C, other=0.0)
    tl.store(out + i_m * C + o_n, b_out.to(out.dtype.element_ty), mask=o_n < C)


def _apart(x, ends, tokens, places, gates, up_and_gate, down, out) -> None:
    M, C = x.shape
    E, H, _ = down.shape
    A = places.shape[1]
    BC = min(128, triton.next_power_of_2(C))
    BH = min(64, triton.next_power_of_2(H))
    sizes = dict(C=C, H=H, E=E, EP=triton.next_power_of_2(E), num_warps=16)
    hidden = torch.empty(M * A, H, device=x.device)
    _hidden[triton.cdiv(H, 16), M * A](x, ends, tokens, up_and_gate, hidden, BC=BC, BH=16, **sizes)
    _mixed[triton.cdiv(C, 16), M](
        hidden, ends, places, gates, down, out, A=A, BH=BH, BN=16, **sizes
    )


def _together(x, ends, tokens, places, gates, up_and_gate, down, out) -> None:
    M, C = x.shape
    H = down.shape[1]
    A = places.shape[1]
    BR = 4
    BH = triton.next_power_of_2(H)
    BN = min(1024, triton.next_power_of_2(C))
    both = grouped_mm(x[tokens], up_and_gate, offs=ends)
    hidden = torch.empty(M * A, H, dtype=x.dtype, device=x.device)
    _gated[triton.cdiv(M * A, BR),](both, hidden, M * A, H=H, BR=BR, BH=BH, num_warps=8)
    results = grouped_mm(hidden, down, offs=ends)
    _gathered[M, triton.cdiv(C, BN)](results, places, gates, out, C=C, A=A, BN=BN, num_warps=4)


def experts(
    x: torch.Tensor, ends: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor, gates: torch.Tensor,
    up_and_gate: torch.Tensor, down: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The twin of `blockwise.experts`, in float16, bfloat16 or float32; gates float32. No gradient.

    Raises ValueError for wrong dtypes or layouts.
    """
    given = dict(
        x=x,
        ends=ends,
        tokens=tokens,
        places=places,
        gates=gates,
        up_and_gate=up_and_gate,
        down=down,
    )
    check_kernel(**given)
    out = torch.empty_like(x)
    (_apart if len(x) <= MOST_APART else _together)(**given, out=out)
    return out
