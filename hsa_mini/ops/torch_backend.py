"""The operations in plain PyTorch, in bounded memory, on any device.

Signatures and numbers are those of `hsa_mini.reference`.

Dimensions: B batch, T tokens, H query heads, J key/value heads, G = H/J, D head dimension, N
chunks, S chunk size, K chunks kept, P cached keys, W window, L queries per block, M tokens and E
experts of a mixture, C width.
"""

import torch
from torch.nn.functional import grouped_mm, pad, rms_norm, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

from hsa_mini import reference
from hsa_mini.ops.rope import apply_rope
from hsa_mini.reference.checks import (
    check_chunk_attention,
    check_retrieve,
    check_sliding_window,
    check_update_window_cache,
    check_window_decode,
)

# numbers that a block of tokens may hold at once
BLOCK_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 28}
# Queries of a block of the sliding window. In smaller blocks, too few queries share the keys; in
# larger ones, too many of the keys are masked.
MIN_WINDOW_BLOCK = 32
MAX_WINDOW_BLOCK = 256


def retrieve(
    retrieval_q,
    landmarks,
    *,
    chunk_size,
    top_k,
    offset: int | torch.Tensor = 0,
    weighting="softmax",
    gumbel_seed=None,
    exclude_window=0,
    query_block=1,
    document_starts=None,
):
    """`reference.retrieve`, a block of tokens at a time: scores [T, N] are never held at once."""
    check_retrieve(
        retrieval_q,
        landmarks,
        chunk_size,
        top_k,
        offset,
        weighting,
        gumbel_seed,
        exclude_window,
        query_block,
        document_starts,
    )
    B, T, J, _ = retrieval_q.shape
    block = _tokens_per_block(retrieval_q, B * J * landmarks.shape[1], query_block)
    parts = [
        reference.retrieve(
            retrieval_q[:, start : start + block],
            landmarks,
            chunk_size=chunk_size,
            top_k=top_k,
            offset=offset + start,
            weighting=weighting,
            gumbel_seed=gumbel_seed,
            exclude_window=exclude_window,
            query_block=query_block,
            document_starts=None
            if document_starts is None
            else document_starts[:, start : start + block],
        )
        for start in range(0, max(T, 1), block)
    ]
    return parts[0] if len(parts) == 1 else tuple(torch.cat(x, dim=1) for x in zip(*parts))


def chunk_attention(q, k, v, indices, weights, *, scale=None):
    """`reference.chunk_attention`, which never holds [T, K, S, D] of all tokens at once.

    Matrix products are in q's dtype.

    With few chunks, every token attends to all of them, and the weights of those it did not choose
    are 0. With many, the chosen chunks are gathered, a block of tokens at a time. The backward pass
    gathers them once more instead of keeping them.
    """
    check_chunk_attention(q, k, v, indices, weights)
    B, T, H, D = q.shape
    N, S, J = k.shape[1:4]
    K = indices.shape[-1]
    scale = D**-0.5 if scale is None else scale
    if N == 0:
        return torch.zeros_like(q)
    # The schedule that holds fewer numbers per token: the scores of all chunks, or the chunks kept.
    dense = H * N <= 2 * J * K * D
    wide = torch.promote_types(q.dtype, torch.float32)
    if not dense and q.dtype != wide and (k.requires_grad or v.requires_grad):
        # The gradients of k and v are sums over blocks of tokens, which 16 bits would round too
        # often.
        return chunk_attention(
            q.to(wide), k.to(wide), v.to(wide), indices, weights, scale=scale
        ).to(q.dtype)
    attend = _attend_all if dense else reference.chunk_attention
    block = _tokens_per_block(q, B * (H * N * S if dense else 2 * J * K * S * D))
    if block >= T:
        return attend(q, k, v, indices, weights, scale=scale)
    parts = []
    for start in range(0, T, block):
        t = slice(start, start + block)
        part = checkpoint(
            attend, q[:, t], k, v, indices[:, t], weights[:, t], scale=scale, use_reentrant=False
        )
        parts.append(part)
    return torch.cat(parts, dim=1)


def _tokens_per_block(tensor, elements_per_token: int, multiple: int = 1) -> int:
    """As many tokens as `BLOCK_ELEMENTS` allow, in multiples of `multiple`, and at least one."""
    budget = BLOCK_ELEMENTS.get(tensor.device.type, BLOCK_ELEMENTS["cpu"])
    return max(budget // max(elements_per_token, 1) // multiple, 1) * multiple


def _attend_all(q, k, v, indices, weights, *, scale):
    """Attention inside all N chunks.

    The weights of the K slots are spread over N chunks: 0 for a chunk that was not kept.
    """
    B = q.shape[0]
    T, H = q.shape[1:3]
    N, S, J = k.shape[1:4]
    # [B, T, J, K] -> [B, T, J, N]
    spread = weights.new_zeros(B, T, J, N).scatter_add(
        3, indices.clamp(min=0).long(), weights.masked_fill(indices < 0, 0.0)
    )
    # [B, T, H, D] -> [B, J, T*G, D]
    q_rows = q.unflatten(2, (J, H // J)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    # [B, N, S, J, D] -> [B, J, N*S, D]
    k_rows, v_rows = (x.flatten(1, 2).transpose(1, 2) for x in (k, v))
    # [B, J, T*G, D] @ [B, J, D, N*S] -> [B, J, T*G, N, S]
    scores = ((q_rows * scale) @ k_rows.transpose(-1, -2)).unflatten(-1, (N, S))
    # [B, J, T*G, N, S] -> [B, J, T, G, N, S]
    inside = scores.softmax(dim=-1, dtype=weights.dtype).unflatten(2, (T, H // J))
    mixed = (inside * spread.transpose(1, 2)[:, :, :, None, :, None]).to(q.dtype)
    # [B, J, T*G, N*S] @ [B, J, N*S, D] -> [B, J, T*G, D] -> [B, T, H, D]
    out = mixed.flatten(4, 5).flatten(2, 3) @ v_rows
    return out.unflatten(2, (T, H // J)).permute(0, 2, 1, 3, 4).flatten(2, 3)


def sliding_window_attention(q, k, v, *, window, document_starts=None):
    """`reference.sliding_window_attention`, linear in T: L queries see their own W + L keys."""
    check_sliding_window(q, k, v, window, document_starts)
    B, T, H, D = q.shape
    J = k.shape[2]
    if T == 0:
        return q
    cached = min(k.shape[1] - T, window)
    dropped = k.shape[1] - T - cached  # keys that no query sees
    k, v = (x[:, dropped:] for x in (k, v))
    L = min(max(window // 4, MIN_WINDOW_BLOCK), MAX_WINDOW_BLOCK, window, T)
    blocks = -(-T // L)
    late = blocks * L - T  # queries that fill the last block
    # The G query heads of a key/value head act as G queries, so that no key is repeated.
    # [B, blocks*L, H, D] -> [B, blocks, L, J, G, D] -> [B*blocks, J, L*G, D]
    rows = pad(q, (0, 0, 0, 0, 0, late)).view(B, blocks, L, J, H // J, D)
    rows = rows.transpose(2, 3).reshape(B * blocks, J, -1, D)
    # W keys in front of the first block (zeros where the cache holds fewer), then every block takes
    # W + L keys in a row.
    # [B, P+T, J, D] -> [B, blocks, J, D, W+L] -> [B*blocks, J, W+L, D]
    keys, values = (
        pad(x, (0, 0, 0, 0, window - cached, late))
        .unfold(1, window + L, L)
        .transpose(3, 4)
        .flatten(0, 1)
        for x in (k, v)
    )
    i = torch.arange(L, device=q.device)[:, None]
    j = torch.arange(window + L, device=q.device)
    band = (j > i) & (j <= i + window)  # the `window` keys that end at the query's own
    bands = band if cached == window else _without_padding(band, j, window - cached, blocks, L)
    if document_starts is not None:
        # Counted in the padded keys, as j + start of the block: [B, T] -> [B, blocks, L, 1]
        firsts = pad(document_starts, (0, late)) - dropped + window - cached
        blocks_of_keys = j + torch.arange(blocks, device=j.device)[:, None, None] * L
        bands = bands & (blocks_of_keys >= firsts.unflatten(1, (blocks, L, 1)))
        bands = bands.flatten(0, 1)[:, None]  # [B, blocks, L, W+L] -> [B*blocks, 1, L, W+L]
    elif bands.dim() == 3:
        bands = bands[:, None].repeat(B, 1, 1, 1)
    mask = bands.repeat_interleave(H // J, dim=-2)
    out = scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
    # [B*blocks, J, L*G, D] -> [B*blocks, L, J, G, D] -> [B, blocks*L, H, D]
    return out.unflatten(2, (L, -1)).transpose(1, 2).reshape(B, blocks * L, H, D)[:, :T]


def _without_padding(band, j, padding, blocks, length):
    """One band per block [blocks, L, W+L], without the zeros in front of the sequence."""
    start = torch.arange(blocks, device=j.device)[:, None, None] * length
    return band & (j + start >= padding)


def update_window_cache(q, k, v, cache_k, cache_v, slots, q_gain, k_gain, table, *, eps):
    """One new token of every sequence enters its window.

    q [B, 1, H, D], k and v [B, 1, J, D] are the projections of the token. q and k are normed
    (`q_gain`, `k_gain` [D], `eps`), unless the gain is None, and rotated by the table of their
    positions (`ops.rope`). k and v are written into slots int64 [B] of cache_k and cache_v [B, W,
    J, D], in place. Returns q.
    Raises ValueError for wrong shapes or dtypes.
    """
    check_update_window_cache(q, k, v, cache_k, cache_v, slots)
    q, k = (
        apply_rope(x if gain is None else rms_norm(x, x.shape[-1:], gain.to(x.dtype), eps), table)
        for x, gain in ((q, q_gain), (k, k_gain))
    )
    slot = slots[:, None, None, None].expand_as(k)
    cache_k.scatter_(1, slot, k)
    cache_v.scatter_(1, slot, v)
    return q


def window_decode_attention(q, k, v, positions):
    """One new token of every sequence against its window; position p lies in slot p % W.

    q [B, 1, H, D], k and v [B, W, J, D] with the new token's own key and value, positions int64 [B]
    of the new tokens -> [B, 1, H, D]: the result of `sliding_window_attention` over the same keys
    in order. Raises ValueError for wrong shapes, dtypes or devices.
    """
    check_window_decode(q, k, v, positions)
    # [B, W]: before the cache is full, slots behind the position hold nothing
    seen = torch.arange(k.shape[1], device=q.device) <= positions[:, None]
    # [B, 1, H, D] -> [B, J, G, D]: the G query heads of a key/value head act as G queries
    groups = q[:, 0].unflatten(1, (k.shape[2], -1))
    out = scaled_dot_product_attention(
        groups, k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen[:, None, None]
    )
    return out.flatten(1, 2)[:, None]


def grouped_experts(
    x, expert_offsets, token_indices, inverse_order, topk_scores, up_and_gate, down
):
    """x [M, C] through the experts that `reference.dispatch` chose for every token -> [M, C].

    expert_offsets, token_indices, inverse_order, topk_scores: the results of `dispatch`.
    up_and_gate [E, C, 2*H] and down [E, H, C] in x's dtype: experts of H gated units each. Any
    number of tokens; none is dropped.
    """
    # [M, C] -> [M*A, C] -> twice [M*A, H] -> [M*A, C]
    up, gate = _grouped_product(x[token_indices], up_and_gate, expert_offsets).chunk(2, dim=-1)
    results = _grouped_product(up * silu(gate), down, expert_offsets)
    # Gather, then sum: on a GPU, adding rows by index would be slower and not deterministic.
    # [M, A, C] -> [M, C]
    return torch.einsum("mac,ma->mc", results[inverse_order], topk_scores.to(results.dtype))


def _grouped_product(rows, matrices, ends):
    """rows [n, C], sorted by expert, @ matrices [E, C, X] -> [n, X].

    ends int32 [E]: where each expert's rows end.

    `grouped_mm` takes no float64, and only rows of whole 16 bytes. For other sizes every expert
    multiplies all rows, because to read `ends` would wait for the GPU, which no CUDA graph allows.
    """
    if rows.dtype != torch.float64 and not any(
        size * rows.itemsize % 16 for size in matrices.shape[1:]
    ):
        return grouped_mm(rows, matrices, offs=ends)
    numbers = torch.arange(len(rows), dtype=ends.dtype, device=ends.device)
    expert = torch.searchsorted(ends, numbers, right=True)[:, None]  # [n, 1]
    out = rows.new_zeros(len(rows), matrices.shape[2])
    for e, matrix in enumerate(matrices):
        out = torch.where(expert == e, rows @ matrix, out)
    return out
