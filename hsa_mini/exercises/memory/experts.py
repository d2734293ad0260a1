"""The exercises of notebook 10: experts that many tokens use, finer experts, and a loop over them.

Dimensions: M tokens, C width, E experts, A of them per token.
"""

import math
from functools import partial

import torch

from hsa_mini.exercises.check import Check, normal

check_share_used = Check(
    name="share_used",
    answer=lambda n, E, A: 1 - (1 - A / E) ** n,
    examples=((1, 64, 4), (16, 64, 4), (3, 8, 2), (72, 64, 4)),
    usual_mistakes={
        "two tokens may use the same expert, so the shares do not simply add up.": (
            lambda n, E, A: n * A / E
        ),
        "even if it is cut off at 1, a sum counts an expert twice that two tokens use.": (
            lambda n, E, A: min(n * A / E, 1)
        ),
        "this is the share of experts that no token uses.": lambda n, E, A: (1 - A / E) ** n,
        "a token draws A experts, not one.": lambda n, E, A: 1 - (1 - 1 / E) ** n,
        "this is the share of experts that all n tokens use.": lambda n, E, A: (A / E) ** n,
        "this is the number of experts. The share divides it by E.": (
            lambda n, E, A: E * (1 - (1 - A / E) ** n)
        ),
        "the A experts of a token are different ones, so it leaves one out with probability "
        "1 - A/E, not (1 - 1/E)^A.": lambda n, E, A: 1 - (1 - 1 / E) ** (n * A),
    },
)


def _finer(C, E, A, hidden, factor, *, matrices=3, router=True, shared=1, rows=None):
    hidden = hidden // factor
    E = E * factor
    A = A * factor
    expert = matrices * C * hidden
    scores = C * E * router
    used = scores if rows is None else C * rows * A
    ways = math.comb(E, A)
    return scores + (shared + E) * expert, used + (shared + A) * expert, math.log10(ways)


def _coarse_choice(C, E, A, hidden, factor):
    total, _, _ = _finer(C, E, A, hidden, factor)
    used = C * E * factor + 3 * C * (hidden // factor) * (1 + A)
    return total, used, math.log10(math.comb(E * factor, A))


check_cut_finer = Check(
    name="cut_finer",
    answer=_finer,
    examples=((2048, 64, 4, 672, 1), (2048, 64, 4, 672, 2), (256, 8, 2, 192, 4)),
    usual_mistakes={
        "an expert of SwiGLU has three matrices: two projections up and one down.": partial(
            _finer, matrices=2
        ),
        "the router has parameters too: one row of C numbers for each expert.": partial(
            _finer, router=False
        ),
        "the shared expert is missing. Every token uses it.": partial(_finer, shared=0),
        "to choose A experts, a token is compared with the router's rows of all experts.": partial(
            _finer, rows=1
        ),
        "an expert that is cut into pieces becomes narrower: divide `hidden` by `factor`.": (
            lambda C, E, A, hidden, factor: _finer(C, E, A, hidden * factor, factor)
        ),
        "a token must use `factor` times as many of the smaller experts, or it uses less.": (
            _coarse_choice
        ),
        "the experts of a token have no order. Count choices, not sequences: `math.comb`.": (
            lambda C, E, A, hidden, factor: (
                *_finer(C, E, A, hidden, factor)[:2],
                math.log10(math.perm(E * factor, A * factor)),
            )
        ),
        "return the logarithm of the number of ways, with base 10.": (
            lambda C, E, A, hidden, factor: (
                *_finer(C, E, A, hidden, factor)[:2],
                float(math.comb(E * factor, A * factor)),
            )
        ),
    },
)


def _mixture(x, chosen, gates, experts, *, weigh=None, number=None):
    out = torch.zeros_like(x)
    for t, row in enumerate(chosen.tolist()):
        for a, e in enumerate(row):
            gate = gates[t, a] if weigh is None else weigh(gates[t], a)
            out[t] += gate * (x[t] @ experts[e if number is None else number(t, a)])
    return out


def _overwritten(x, chosen, gates, experts):
    out = torch.zeros_like(x)
    for e in range(len(experts)):
        t, a = (chosen == e).nonzero(as_tuple=True)
        out[t] = gates[t, a, None] * (x[t] @ experts[e])
    return out


def _squeezed(x, chosen, gates, experts):
    """The rows of an expert's tokens stand at the beginning, where other tokens belong."""
    out = torch.zeros_like(x)
    for e in range(len(experts)):
        t, a = (chosen == e).nonzero(as_tuple=True)
        out[: len(t)] += gates[t, a, None] * (x[t] @ experts[e])
    return out


def _routed(M: int, C: int, E: int, A: int) -> tuple[torch.Tensor, ...]:
    scores = normal(M, E, seed=1).sigmoid()
    gates, chosen = scores.topk(A)
    return normal(M, C), chosen, gates / gates.sum(1, keepdim=True), normal(E, C, C, seed=2)


check_by_expert = Check(
    name="by_expert",
    answer=_mixture,
    examples=(_routed(2, 3, 4, 2), _routed(6, 3, 5, 2), _routed(7, 4, 6, 3)),
    usual_mistakes={
        "each token's later expert overwrites the earlier one. Add to what is there.": _overwritten,
        "the gates are missing.": partial(_mixture, weigh=lambda gates, a: 1.0),
        "the mean is not the answer: each expert's output counts with its own gate.": partial(
            _mixture, weigh=lambda gates, a: 1 / len(gates)
        ),
        "all experts of a token got its first gate. The gate belongs to the slot of the expert.": (
            partial(_mixture, weigh=lambda gates, a: gates[0])
        ),
        "`chosen` holds the numbers of experts. You used the number of the slot.": partial(
            _mixture, number=lambda t, a: a
        ),
        "only the first expert of each token counts. A token uses A experts.": (
            lambda x, chosen, gates, experts: _mixture(x, chosen[:, :1], gates[:, :1], experts)
        ),
        "the outputs of an expert must go back to the rows of its tokens.": _squeezed,
        "experts [E, C, C] multiply a token from the right: `x[t] @ experts[e]`.": (
            lambda x, chosen, gates, experts: _mixture(x, chosen, gates, experts.mT)
        ),
    },
)
