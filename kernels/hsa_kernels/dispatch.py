"""Which experts a few tokens ask, and in which order they are handed over, in one launch. `reference.dispatch` takes fifteen.

Dimensions: M tokens (MP padded to a power of 2), E experts (EP padded), A experts active.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _dispatch(
    scores, bias, ends, tokens, places, gates, M,
    E: tl.constexpr, A: tl.constexpr, MP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    # there is one program
    o_m = tl.program_id(0) * MP + tl.arange(0, MP)
    o_e = tl.arange(0, EP)
    m = (o_m < M)[:, None] & (o_e < E)[None, :]
    b_s = tl.load(scores + o_m[:, None] * E + o_e[None, :], mask=m, other=0.0).to(
        tl.float32
    )  # [MP, EP]
    b_affinity = 1.0 / (1.0 + tl.exp(-b_s))
    b_choice = tl.where(
        m,
        b_affinity + tl.load(bias + o_e, mask=o_e < E, other=0.0).to(tl.float32)[None, :],
        float("-inf"),
    )
    b_chosen = tl.zeros([MP, EP], tl.int32)
    for _ in tl.static_range(A):
        hit = m & (o_e[None, :] == tl.argmax(b_choice, 1)[:, None])
        b_chosen += hit.to(tl.int32)
        b_choice = tl.where(hit, float("-inf"), b_choice)
    b_count = tl.sum(b_chosen, 0)
    b_end = tl.cumsum(b_count, 0)
    b_place = (
        (b_end - b_count)[None, :] + tl.cumsum(b_chosen, 0) - 1
    )  # behind all other experts' and earlier tokens'
    b_gate = (
        b_chosen * b_affinity
    )  # not by `where`: Triton 3.6 fails to compile a comparison that is a mask below as well
    b_gate /= tl.where(o_m < M, tl.sum(b_gate, 1), 1.0)[:, None]
    m_chosen = b_chosen > 0
    o_slot = o_m[:, None] * A + tl.cumsum(b_chosen, 1) - 1
    tl.store(ends + o_e, b_end, mask=o_e < E)
    tl.store(tokens + b_place, tl.broadcast_to(o_m[:, None], [MP, EP]).to(tl.int64), mask=m_chosen)
    tl.store(places + o_slot, b_place.to(tl.int64), mask=m_chosen)
    tl.store(gates + o_slot, b_gate, mask=m_chosen)


def dispatch(
    scores: torch.Tensor, bias: torch.Tensor, active: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The twin of `reference.dispatch` for few tokens; a token's experts are in the order of their numbers. No gradient."""
    M, E = scores.shape
    ends = torch.empty(E, dtype=torch.int32, device=scores.device)
    tokens, places = (
        torch.empty(*shape, dtype=torch.int64, device=scores.device)
        for shape in ((M * active,), (M, active))
    )
    gates = torch.empty(M, active, device=scores.device)
    _dispatch[1,](
        scores.contiguous(), bias, ends, tokens, places, gates, M, E=E, A=active, MP=triton.next_power_of_2(M),
        EP=triton.next_power_of_2(E), num_warps=4,
    )  # fmt: skip
    return ends, tokens, places, gates
