"""Attention inside each kept chunk, and the weighted sum of the results: Eq. (2), §2.2. A block of M neighbouring tokens
passes once over the chunks that any of them chose.

Dimensions: B batch, T tokens, H query heads, J key/value heads, G = H/J (GP padded to a power of 2), D head dimension (DP
padded), N chunks, S chunk size (SP padded), K slots, M tokens a block, R = M*GP rows a tile, L = M*K list entries.
"""

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from hsa_mini.reference.checks import check_chunk_attention

from .checks import check_indices, check_kernel
from .chunk_attention_backward import backward
from .merge import merge
from .tiles import LOG2_E, chunk_tile, padded, precision, softmax_inside


@triton.jit
def _rows(
    i_block, i_j, i_b, T, J: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """Offsets and mask of a tile [R, DP] of q: row m*GP + g is head g of the block's token m."""
    o_r, o_d = tl.arange(0, M * GP), tl.arange(0, DP)
    o_t, o_g = i_block * M + o_r // GP, o_r % GP
    m_r = (o_t < T) & (o_g < G)  # tokens beyond the sequence, and rows that pad G to a power of 2
    o_row = ((i_b * T + o_t).to(tl.int64) * J + i_j) * G + o_g
    return o_row[:, None] * D + o_d[None, :], m_r[:, None] & (o_d < D)[None, :]


@triton.jit
def _forward(
    q, k, v, counts, chunks, weights, out, stride_k, stride_v, scale_log2, T,
    J: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
    M: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_block, i_j, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_q, m_q = _rows(i_block, i_j, i_b, T, J, G, D, M, GP, DP)
    b_q = tl.load(q + o_q, mask=m_q, other=0.0)  # [R, DP]
    list_row = (i_b * tl.num_programs(0) + i_block).to(tl.int64) * J + i_j
    k += i_b.to(tl.int64) * stride_k
    v += i_b.to(tl.int64) * stride_v
    count = tl.load(counts + list_row)
    chunks += list_row * L
    weights += list_row * L * M
    o_m = tl.arange(0, M * GP) // GP
    b_out = tl.zeros([M * GP, DP], tl.float32)
    # a chunk's number is read one place ahead: its tiles can then be on their way in time
    next_chunk = tl.load(chunks)
    for place in range(count):
        chunk = next_chunk
        next_chunk = tl.load(chunks + tl.minimum(place + 1, count - 1))
        b_w = tl.load(weights + place * M + o_m)  # [R]
        o_k, m_k = chunk_tile(chunk, i_j, J, S, D, SP, DP)
        b_k, b_v = tl.load(k + o_k, mask=m_k, other=0.0), tl.load(v + o_k, mask=m_k, other=0.0)  # [SP, DP]
        b_p, b_sum = softmax_inside(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2, S, SP)
        # every chunk has its own softmax: no maximum to carry, no rescaling of what was summed
        b_p = b_p * (b_w / b_sum)[:, None]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)
    tl.store(out + o_q, b_out.to(out.dtype.element_ty), mask=m_q)


def _sizes(q: torch.Tensor, k: torch.Tensor, tokens: int) -> dict:
    """The compile-time constants that all kernels share."""
    (H, D), (S, J) = q.shape[2:], k.shape[2:4]
    sizes = dict(J=J, G=H // J, D=D, S=S, M=tokens, GP=triton.next_power_of_2(H // J))
    return sizes | dict(DP=padded(D), SP=padded(S), PRECISION=precision(q.dtype))


def _tokens(q: torch.Tensor, J: int) -> int:
    """M: enough tokens for a tile of 64 rows, which fills a tensor core; of 16 in float32, which no tensor core multiplies."""
    rows = 16 if q.dtype == torch.float32 else 64
    return max(rows // triton.next_power_of_2(q.shape[2] // J), 1)


def _tokens_merged(q: torch.Tensor, indices: torch.Tensor) -> int:
    """The same for merged lists, fewer where the list to sort would be long, but never below 16 rows."""
    J, K = indices.shape[2:]
    heads, tokens = triton.next_power_of_2(q.shape[2] // J), min(_tokens(q, J), 16)
    while tokens * heads > 16 and tokens * K > 1024:
        tokens //= 2
    return tokens


def _launch(q: torch.Tensor, sizes: dict, num_warps: int) -> dict:
    """Warps and pipeline stages: two tiles of k and of v in flight where they fit into shared memory beside q and do."""
    tile = sizes["SP"] * sizes["DP"] * q.element_size()
    return dict(num_warps=num_warps if tile <= 1 << 14 else 8, num_stages=2 if tile <= 1 << 15 else 1)


@torch.library.custom_op("hsa_kernels::chunk_attention", mutates_args=())
def _chunk_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, scale: float
) -> torch.Tensor:
    out = torch.empty_like(q)
    if 0 in (q.numel(), k.numel(), indices.numel()):
        return out.zero_()
    (B, T), K, tokens = q.shape[:2], indices.shape[3], _tokens_merged(q, indices)
    lists = merge(indices, weights, k.shape[1], tokens)
    sizes = _sizes(q, k, tokens)
    _forward[triton.cdiv(T, tokens), sizes["J"], B](
        q, k, v, lists.counts, lists.chunks, lists.weights, out, k.stride(0), v.stride(0), scale * LOG2_E, T,
        L=tokens * K, **sizes, **_launch(q, sizes, 4),
    )  # fmt: skip
    return out


@torch.library.custom_op("hsa_kernels::chunk_attention_backward", mutates_args=())
def _chunk_attention_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, grad_out: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    if 0 in (q.numel(), k.numel(), indices.numel()):
        return tuple(x.new_zeros(x.shape) for x in (q, k, v, weights))
    sizes = _sizes(q, k, _tokens(q, k.shape[3]))
    return backward(q, k, v, indices, weights, grad_out, scale, sizes, _launch(q, sizes, 8))


@_chunk_attention.register_fake
def _(q, k, v, indices, weights, scale):
    return torch.empty_like(q)


@_chunk_attention_backward.register_fake
def _(q, k, v, indices, weights, grad_out, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, weights))


def _setup(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_out):
    grad_q, grad_k, grad_v, grad_weights = _chunk_attention_backward(*ctx.saved_tensors, grad_out.contiguous(), ctx.scale)
    return grad_q, grad_k, grad_v, None, grad_weights, None


_chunk_attention.register_autograd(_backward, setup_context=_setup)


def _flop(q_shape, k_shape, v_shape, indices_shape, *_, **__) -> int:
    (B, T, H, D), S, K = q_shape, k_shape[2], indices_shape[3]
    return 4 * B * T * H * K * S * D


register_flop_formula(torch.ops.hsa_kernels.chunk_attention)(_flop)
register_flop_formula(torch.ops.hsa_kernels.chunk_attention_backward)(lambda *shapes, **_: _flop(*shapes) * 5 // 2)


def chunk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention over the tokens of each kept chunk alone, then the sum by weight. Eq. (2).

    q [B, T, H, D], k and v [B, N, S, J, D] in float16, bfloat16 or float32; indices int32 or int64 [B, T, J, K] (-1: empty
    slot, never computed); weights float32 [B, T, J, K] -> [B, T, H, D]. D of 16 to 256, S of 16 to 128, H/J of 1 to 64; k and
    v may have room between batch entries. Products in the dtype of q, sums in float32. Every gradient is the same from run
    to run: each sum belongs to one program, or is added in a fixed order.

    Raises ValueError for wrong shapes, dtypes, devices or layouts, and with `HSA_KERNELS_DEBUG=1` for indices that name no
    chunk, which count as empty otherwise.
    """
    check_chunk_attention(q, k, v, indices, weights)
    check_kernel(q=q, k=k, v=v, indices=indices, weights=weights)
    check_indices(indices, k.shape[1])
    return _chunk_attention(q, k, v, indices.int(), weights, q.shape[3] ** -0.5 if scale is None else scale)
