"""Which experts a few tokens choose, and the order of the rows for the experts, in one launch.

`reference.dispatch` needs fifteen launches for the same.

Dimensions: M tokens (MP padded to a power of 2), E experts (EP padded), A experts chosen per token.
"""

import torch
import triton
import triton.language as tl

from hsa_kernels.common.selection import NOTHING, keyed


@triton.jit
def dispatch_kernel(
    scores, bias, expert_offsets, token_indices, inverse_order, topk_scores, M,
    E: tl.constexpr, A: tl.constexpr, MP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """One program does everything: it chooses A experts per token and sorts the M*A rows by expert.

    Grid: (1,). Inputs: scores [M, E], bias [E]. Outputs: expert_offsets [E], token_indices [M*A],
    inverse_order and topk_scores [M, A], as in `reference.dispatch`.
    """
    # 1. Affinities: [MP, EP].
    o_m = tl.program_id(0) * MP + tl.arange(0, MP)
    o_e = tl.arange(0, EP)
    m = (o_m < M)[:, None] & (o_e < E)[None, :]
    b_s = tl.load(scores + o_m[:, None] * E + o_e[None, :], mask=m, other=0.0).to(tl.float32)
    b_affinity = 1.0 / (1.0 + tl.exp(-b_s))

    # 2. Choose the best expert of every token A times; the bias affects the choice alone. The keys
    #    of numbers are above `NOTHING`, so no expert is chosen twice, even among NaN.
    #    [MP, EP]
    b_bias = tl.load(bias + o_e, mask=o_e < E, other=0.0).to(tl.float32)
    b_choice = tl.where(m, keyed(b_affinity + b_bias[None, :]), NOTHING)
    b_chosen = tl.zeros([MP, EP], tl.int32)
    for _ in tl.static_range(A):
        hit = m & (o_e[None, :] == tl.argmax(b_choice, 1)[:, None])
        b_chosen += hit.to(tl.int32)
        b_choice = tl.where(hit, NOTHING, b_choice)

    # 3. Number the rows: behind the rows of all earlier experts and of the same expert's earlier
    #    tokens.
    b_count = tl.sum(b_chosen, 0)  # [EP]
    b_end = tl.cumsum(b_count, 0)  # [EP]
    # [MP, EP]
    b_row = (b_end - b_count)[None, :] + tl.cumsum(b_chosen, 0) - 1

    # 4. Scores of the chosen experts, which add up to 1 for every token. [MP, EP] A product, not
    #    `tl.where`: Triton 3.6 fails to compile a comparison that also serves as a mask below.
    b_topk = b_chosen * b_affinity
    b_topk /= tl.where(o_m < M, tl.sum(b_topk, 1), 1.0)[:, None]

    # 5. Write.
    m_chosen = b_chosen > 0
    o_slot = o_m[:, None] * A + tl.cumsum(b_chosen, 1) - 1
    b_token = tl.broadcast_to(o_m[:, None], [MP, EP]).to(tl.int64)
    tl.store(expert_offsets + o_e, b_end, mask=o_e < E)
    tl.store(token_indices + b_row, b_token, mask=m_chosen)
    tl.store(inverse_order + o_slot, b_row.to(tl.int64), mask=m_chosen)
    tl.store(topk_scores + o_slot, b_topk, mask=m_chosen)


def dispatch(
    scores: torch.Tensor, bias: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The twin of `reference.dispatch` for few tokens. A token's experts are in the order of their
    numbers. No gradient.

    scores [M, E], bias [E] -> expert_offsets int32 [E], token_indices int64 [M*A], inverse_order
    int64 [M, A], topk_scores float32 [M, A], with A = top_k.
    """
    M, E = scores.shape
    device = scores.device
    expert_offsets = torch.empty(E, dtype=torch.int32, device=device)
    token_indices = torch.empty(M * top_k, dtype=torch.int64, device=device)
    inverse_order = torch.empty(M, top_k, dtype=torch.int64, device=device)
    topk_scores = torch.empty(M, top_k, device=device)
    dispatch_kernel[1,](
        scores.contiguous(), bias, expert_offsets, token_indices, inverse_order, topk_scores, M,
        E=E, A=top_k,
        MP=triton.next_power_of_2(M), EP=triton.next_power_of_2(E), num_warps=4,
    )  # fmt: skip
    return expert_offsets, token_indices, inverse_order, topk_scores
