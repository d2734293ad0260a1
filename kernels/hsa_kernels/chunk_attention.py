"""Attention inside each kept chunk, and the weighted sum of the results: Eq. (2), §2.2. The operator, and which way it goes.

Dimensions: B batch, T tokens, H query heads, J key/value heads, G = H/J, D head dimension, N chunks, S chunk size, K slots.
"""

from types import ModuleType

import torch
from torch.utils.flop_counter import register_flop_formula

from hsa_mini.reference.checks import check_chunk_attention

from . import backward, by_chunk, by_token
from .checks import check_indices, check_kernel
from .slots import CHOICES
from .tiles import Sizes, scaled

CACHE_TO_MEMORY = 1.5  # how much faster a byte comes from the L2 cache than from memory
SORTING = (
    4 / 3
)  # by chunk, all choices are sorted first: how much cheaper it has to look before some go there


def _worth(q: torch.Tensor, k: torch.Tensor) -> float:
    """How many chunks (k and v, from the cache) a block of tokens reads for what a choice costs by chunk (q, a result, twice)."""
    return CACHE_TO_MEMORY * 3 * (q.shape[2] // k.shape[3]) / (2 * k.shape[2])


def _ways(q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor) -> set[ModuleType]:
    """Which ways can pay: by token not if it costs more even when all of a block choose alike, by chunk only where there are
    many choices of a chunk and it costs less if they are independent, by a token halfway."""
    T, _, K = indices.shape[1:]
    N = k.shape[1]
    worth = _worth(q, k)
    M = by_token.tokens_of_block(Sizes.of(q, k), K)
    halfway = max(N // 2, K)
    merged = halfway * (1 - (1 - K / halfway) ** M)  # chunks that a block of M tokens reads
    if T * K < CHOICES * N or merged <= SORTING * worth * M * K:
        return {by_token}
    return {by_chunk} if worth * M < 1 else {by_token, by_chunk}


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
    ways = _ways(q, k, indices)
    if len(ways) == 1:
        return ways.pop().forward(q, k, v, indices, weights, scale)
    # every block of tokens goes the way that is cheaper for it: neighbours that choose alike by token, others by chunk
    lists = by_token.merge_blocks(q, k, indices, weights)
    apart = lists.counts > lists.choices * _worth(q, k)  # [B, blocks, J]
    apart_tokens = apart.repeat_interleave(lists.weights.shape[-1], 1)[
        :, : indices.shape[1], :, None
    ]  # [B, T, J, 1]
    out = by_chunk.forward(q, k, v, indices.where(apart_tokens, -1), weights, scale)
    return by_token.pass_over(
        q, k, v, lists._replace(counts=lists.counts.where(~apart, -1)), out, scale
    )


@torch.library.custom_op("hsa_kernels::chunk_attention_backward", mutates_args=())
def _chunk_attention_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, grad_out: torch.Tensor,
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
    B, T, H, D = q_shape
    S = k_shape[2]
    K = indices_shape[3]
    return 4 * B * T * H * K * S * D


register_flop_formula(torch.ops.hsa_kernels.chunk_attention)(_flop)
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
    q, scale = scaled(q, scale)
    return _chunk_attention(q, k, v, indices.int(), weights, scale)
