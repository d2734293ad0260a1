"""Attention inside each kept chunk, and the weighted sum of the results: Eq. (2), §2.2.

This module holds the operator and chooses between two schedules of the forward pass:

- by token block (`by_token_block.py`): M neighbouring tokens share one read of every chunk that any
  of them chose. It is cheap where neighbours choose the same chunks;
- by chunk (`by_chunk.py`): a chunk is read once for all tokens that chose it. It is cheap where
  choices are independent.

Dimensions: B batch, T tokens, H query heads, J key/value heads, G = H/J, D head dimension, N
chunks, S chunk size, K chunks kept per token, M tokens per block.
"""

from types import ModuleType

import torch
from torch.utils.flop_counter import register_flop_formula

from hsa_kernels.attention import backward, by_chunk, by_token_block
from hsa_kernels.attention.partial_results import MIN_CHOICES
from hsa_kernels.common.checks import check_indices, check_kernel
from hsa_kernels.common.tiles import Sizes, scaled
from hsa_mini.reference.checks import check_chunk_attention

CACHE_SPEEDUP = 1.5  # how much faster a byte comes from the L2 cache than from memory
# Chunk order first sorts all choices. It has to be cheaper by this factor before any block is
# computed that way.
SORTING_COST = 4 / 3


def _break_even(q: torch.Tensor, k: torch.Tensor) -> float:
    """How many chunks a token block may read for one choice in chunk order, at the same cost.

    A token block reads k and v of a chunk, 2*S rows, from the cache. A choice in chunk order moves
    G rows three times: it reads q, writes the partial result and reads it again.
    """
    return CACHE_SPEEDUP * 3 * (q.shape[2] // k.shape[3]) / (2 * k.shape[2])


def _schedules(q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor) -> set[ModuleType]:
    """The schedules that can pay off, judged by sizes alone.

    Token blocks are left out if they cost more even where all tokens of a block choose the same
    chunks. Chunk order is kept only if a chunk has many choices, and if it is cheaper for
    independent choices of a token in the middle of the sequence.
    """
    T, _, K = indices.shape[1:]
    N = k.shape[1]
    ratio = _break_even(q, k)
    M = by_token_block.tokens_per_block(Sizes.of(q, k), K)
    visible = max(N // 2, K)  # chunks that a token in the middle sees
    merged = visible * (1 - (1 - K / visible) ** M)  # different chunks that M such tokens choose
    if T * K < MIN_CHOICES * N or merged <= SORTING_COST * ratio * M * K:
        return {by_token_block}
    return {by_chunk} if ratio * M < 1 else {by_token_block, by_chunk}


@torch.library.custom_op("hsa_kernels::chunk_attention", mutates_args=())
def _chunk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    if 0 in (q.numel(), k.numel(), indices.numel()):
        return torch.zeros_like(q)
    schedules = _schedules(q, k, indices)
    if len(schedules) == 1:
        return schedules.pop().forward(q, k, v, indices, weights, scale)
    # Each block of tokens gets the schedule that is cheaper for it: a long merged list means that
    # its tokens chose different chunks.
    lists = by_token_block.merge_blocks(q, k, indices, weights)
    # [B, blocks, J]
    in_chunk_order = lists.counts > lists.choices * _break_even(q, k)
    # [B, T, J, 1]
    tokens = in_chunk_order.repeat_interleave(lists.weights.shape[-1], 1)
    tokens = tokens[:, : indices.shape[1], :, None]
    out = by_chunk.forward(q, k, v, indices.where(tokens, -1), weights, scale)
    rest = lists._replace(counts=lists.counts.where(~in_chunk_order, -1))
    return by_token_block.attend_blocks(q, k, v, rest, out, scale)


@torch.library.custom_op("hsa_kernels::chunk_attention_backward", mutates_args=())
def _chunk_attention_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor,
    weights: torch.Tensor, grad_out: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    if 0 in (q.numel(), k.numel(), indices.numel()):
        return tuple(x.new_zeros(x.shape) for x in (q, k, v, weights))
    return backward.backward(q, k, v, indices, weights, grad_out, scale)


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
    grad_q, grad_k, grad_v, grad_weights = _chunk_attention_backward(
        *ctx.saved_tensors, grad_out.contiguous(), ctx.scale
    )
    return grad_q, grad_k, grad_v, None, grad_weights, None


_chunk_attention.register_autograd(_backward, setup_context=_setup)


def _flop(q_shape, k_shape, v_shape, indices_shape, *_, **__) -> int:
    """Two products of K chunks for every token and query head."""
    B, T, H, D = q_shape
    S = k_shape[2]
    K = indices_shape[3]
    return 4 * B * T * H * K * S * D


register_flop_formula(torch.ops.hsa_kernels.chunk_attention)(_flop)
# five products in place of two
register_flop_formula(torch.ops.hsa_kernels.chunk_attention_backward)(
    lambda *shapes, **_: _flop(*shapes) * 5 // 2
)


def chunk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention over the tokens of each kept chunk alone, then the weighted sum. Eq. (2).

    q [B, T, H, D], k and v [B, N, S, J, D] in float16, bfloat16 or float32; indices int32 or int64
    [B, T, J, K] (-1: empty slot, never computed); weights float32 [B, T, J, K] -> [B, T, H, D]. D
    of 16 to 256, S of 16 to 128, H/J of 1 to 64. k and v may have unused capacity between batch
    entries. Products are in the dtype of q, sums in float32. Every gradient is the same from run to
    run: each sum belongs to one program, or is added in a fixed order.

    Raises ValueError for wrong shapes, dtypes, devices or layouts, and with `HSA_KERNELS_DEBUG=1`
    for indices that name no chunk; without it they count as empty.
    """
    check_chunk_attention(q, k, v, indices, weights)
    check_kernel(q=q, k=k, v=v, indices=indices, weights=weights)
    check_indices(indices, k.shape[1])
    q, scale = scaled(q, scale)
    return _chunk_attention(q, k, v, indices.int(), weights, scale)
