"""The outputs of the experts, in launches that a CUDA graph can hold. Two schedules:

- for few tokens, every row of the dispatch reads the weights of its expert by itself. The first of
  two launches computes the hidden units: one program takes one row and some of the units. The
  second computes the output: one program takes one token and some of the columns, and sums over the
  token's experts;
- for more tokens, all rows of an expert share one read of its weights. PyTorch's grouped products
  do this, with one launch between them and one after them.

Dimensions: M tokens, C width, H hidden units, E experts (EP padded to a power of 2), A experts per
token; BC, BH, BN and BR are the parts of C, H, output columns and rows that one step reads.
"""

import torch
import triton
import triton.language as tl
from torch.nn.functional import grouped_mm

from hsa_kernels.common.checks import check_kernel

MAX_TOKENS_APART = 8  # with more tokens it pays to share one read of an expert's weights


@triton.jit
def _expert(expert_offsets, row, E: tl.constexpr, EP: tl.constexpr):
    """The expert of a row: the number of experts whose rows end before it."""
    o_e = tl.arange(0, EP)
    b_end = tl.load(expert_offsets + o_e, mask=o_e < E, other=2**31 - 1)  # [EP]
    return tl.sum((b_end <= row).to(tl.int32), 0).to(tl.int64)


@triton.jit
def _silu(b_x):
    """x * sigmoid(x)."""
    return b_x / (1.0 + tl.exp(-b_x))


@triton.jit
def grouped_experts_hidden_kernel(
    x, expert_offsets, token_indices, up_and_gate, hidden, C: tl.constexpr, H: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr,
    BC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """One program: BH hidden units of one row, up * silu(gate) of its token and expert.

    Grid: (ceil(H / BH), M*A).
    """
    i_h = tl.program_id(0)
    row = tl.program_id(1)
    o_c = tl.arange(0, BC)
    o_h = i_h * BH + tl.arange(0, BH)
    x += tl.load(token_indices + row) * C
    up_and_gate += _expert(expert_offsets, row, E, EP) * C * (2 * H)
    # [BC, BH]: the sum over C is taken once, at the end
    b_up = tl.zeros([BC, BH], tl.float32)
    b_gate = tl.zeros([BC, BH], tl.float32)
    for c in range(0, C, BC):
        m = (c + o_c < C)[:, None] & (o_h < H)[None, :]
        # [BC, 1] * [BC, BH]
        b_x = tl.load(x + c + o_c, mask=c + o_c < C, other=0.0).to(tl.float32)[:, None]
        p_w = up_and_gate + (c + o_c)[:, None] * (2 * H) + o_h[None, :]
        b_up += b_x * tl.load(p_w, mask=m, other=0.0)
        b_gate += b_x * tl.load(p_w + H, mask=m, other=0.0)
    tl.store(hidden + row * H + o_h, tl.sum(b_up, 0) * _silu(tl.sum(b_gate, 0)), mask=o_h < H)


@triton.jit
def grouped_experts_output_kernel(
    hidden, expert_offsets, inverse_order, topk_scores, down, out, C: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, A: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program: BN output columns of one token, summed over its A experts.

    Grid: (ceil(C / BN), M).
    """
    i_n = tl.program_id(0)
    i_m = tl.program_id(1)
    o_h = tl.arange(0, BH)
    o_n = i_n * BN + tl.arange(0, BN)
    # [BH, BN]: the sum over H is taken once, at the end
    b_out = tl.zeros([BH, BN], tl.float32)
    for a in range(A):
        row = tl.load(inverse_order + i_m * A + a)
        score = tl.load(topk_scores + i_m * A + a)
        p_expert = down + _expert(expert_offsets, row, E, EP) * H * C
        for h in range(0, H, BH):
            m_h = h + o_h < H
            # [BH, 1] * [BH, BN]
            b_h = tl.load(hidden + row * H + h + o_h, mask=m_h, other=0.0) * score
            p_w = p_expert + (h + o_h)[:, None] * C + o_n[None, :]
            b_out += b_h[:, None] * tl.load(p_w, mask=m_h[:, None] & (o_n < C)[None, :], other=0.0)
    tl.store(out + i_m * C + o_n, tl.sum(b_out, 0).to(out.dtype.element_ty), mask=o_n < C)


@triton.jit
def grouped_experts_gate_kernel(both, hidden, rows, H: tl.constexpr, BR: tl.constexpr,
BH: tl.constexpr):  # fmt: skip
    """One program: both [BR rows, 2*H] -> hidden = up * silu(gate) [BR, H].

    Grid: (ceil(rows / BR),).
    """
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    o_h = tl.arange(0, BH)[None, :]
    m = (o_r < rows) & (o_h < H)
    # [BR, BH] each
    b_up = tl.load(both + o_r * (2 * H) + o_h, mask=m, other=0.0).to(tl.float32)
    b_gate = tl.load(both + o_r * (2 * H) + H + o_h, mask=m, other=0.0).to(tl.float32)
    tl.store(hidden + o_r * H + o_h, (b_up * _silu(b_gate)).to(hidden.dtype.element_ty), mask=m)


@triton.jit
def grouped_experts_combine_kernel(
    results, inverse_order, topk_scores, out, C: tl.constexpr, A: tl.constexpr, BN: tl.constexpr
):
    """One program: BN output columns of one token, the weighted sum of its A rows of results.

    Grid: (M, ceil(C / BN)).
    """
    i_m = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    b_out = tl.zeros([BN], tl.float32)
    for a in tl.static_range(A):
        row = tl.load(inverse_order + i_m * A + a)
        score = tl.load(topk_scores + i_m * A + a)
        b_out += score * tl.load(results + row * C + o_n, mask=o_n < C, other=0.0)
    tl.store(out + i_m * C + o_n, b_out.to(out.dtype.element_ty), mask=o_n < C)


def _apart(
    x, expert_offsets, token_indices, inverse_order, topk_scores, up_and_gate, down, out
) -> None:
    """The schedule for few tokens; arguments as in `grouped_experts`, the result goes into out [M,
    C].
    """
    M, C = x.shape
    E, H, _ = down.shape
    A = inverse_order.shape[1]
    BC = min(128, triton.next_power_of_2(C))
    BH = min(64, triton.next_power_of_2(H))
    sizes = dict(C=C, H=H, E=E, EP=triton.next_power_of_2(E), num_warps=16)
    hidden = torch.empty(M * A, H, device=x.device)
    grouped_experts_hidden_kernel[triton.cdiv(H, 16), M * A](
        x, expert_offsets, token_indices, up_and_gate, hidden, BC=BC, BH=16, **sizes
    )
    grouped_experts_output_kernel[triton.cdiv(C, 16), M](
        hidden, expert_offsets, inverse_order, topk_scores, down, out, A=A, BH=BH, BN=16, **sizes
    )


def _together(
    x, expert_offsets, token_indices, inverse_order, topk_scores, up_and_gate, down, out
) -> None:
    """The schedule for many tokens; arguments as in `grouped_experts`, the result goes into out [M,
    C].
    """
    M, C = x.shape
    H = down.shape[1]
    A = inverse_order.shape[1]
    BR = 4
    BH = triton.next_power_of_2(H)
    BN = min(1024, triton.next_power_of_2(C))
    # [M, C] -> [M*A, C] -> [M*A, 2*H]
    both = grouped_mm(x[token_indices], up_and_gate, offs=expert_offsets)
    hidden = torch.empty(M * A, H, dtype=x.dtype, device=x.device)
    grouped_experts_gate_kernel[triton.cdiv(M * A, BR),](
        both, hidden, M * A, H=H, BR=BR, BH=BH, num_warps=8
    )
    # [M*A, H] -> [M*A, C]
    results = grouped_mm(hidden, down, offs=expert_offsets)
    grouped_experts_combine_kernel[M, triton.cdiv(C, BN)](
        results, inverse_order, topk_scores, out, C=C, A=A, BN=BN, num_warps=4
    )


def grouped_experts(
    x: torch.Tensor,
    expert_offsets: torch.Tensor,
    token_indices: torch.Tensor,
    inverse_order: torch.Tensor,
    topk_scores: torch.Tensor,
    up_and_gate: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """The twin of `torch_backend.grouped_experts`, in float16, bfloat16 or float32; topk_scores
    float32. No gradient.

    x [M, C]; expert_offsets, token_indices, inverse_order and topk_scores from `dispatch`;
    up_and_gate [E, C, 2*H], down [E, H, C] -> [M, C]. Raises ValueError for wrong dtypes or
    layouts, and for more than `MAX_TOKENS_APART` tokens if C or H numbers are no whole 16 bytes.
    """
    arguments = dict(
        x=x,
        expert_offsets=expert_offsets,
        token_indices=token_indices,
        inverse_order=inverse_order,
        topk_scores=topk_scores,
        up_and_gate=up_and_gate,
        down=down,
    )
    check_kernel(**arguments)
    multiple = 16 // x.itemsize
    if len(x) > MAX_TOKENS_APART and any(size % multiple for size in down.shape[1:]):
        raise ValueError(
            f"down: got H={down.shape[1]} and C={down.shape[2]} with {len(x)} tokens, "
            f"accepted are multiples of {multiple} in {x.dtype}, or up to {MAX_TOKENS_APART} tokens"
        )
    out = torch.empty_like(x)
    (_apart if len(x) <= MAX_TOKENS_APART else _together)(**arguments, out=out)
    return out
