"""The exercises of notebook 02: landmarks without `[CLS]`, chunk sizes, and one turn of RoPE.

Dimensions: N chunks, S tokens per chunk, D numbers per key.
"""

from functools import partial

import torch

from hsa_mini.exercises.check import Check, normal

check_mean_of_keys = Check(
    name="mean_of_keys",
    answer=lambda k: k.mean(dim=1),
    examples=((normal(3, 4, 5),), (normal(4, 4, 4, seed=1),)),
    usual_mistakes={
        "you averaged over the chunks. Each chunk needs a landmark of its own: average over its S "
        "tokens.": lambda k: k.mean(dim=0),
        "you averaged over the numbers of a key. Average over the S tokens of a chunk.": (
            lambda k: k.mean(dim=2)
        ),
        "this is the sum over the tokens. The mean divides it by S.": lambda k: k.sum(dim=1),
        "you averaged over everything. Each chunk needs a landmark of its own.": lambda k: k.mean(),
    },
)


def _sizes(test):
    """A function that lists the sizes S from 1 to `sizes` that pass `test(first, last, S)`."""
    return lambda first, last, sizes: [S for S in range(1, sizes + 1) if test(first, last, S)]


check_sizes_that_keep_whole = Check(
    name="sizes_that_keep_whole",
    answer=_sizes(lambda first, last, S: first // S == last // S),
    examples=((1, 3, 6), (3, 4, 9), (5, 9, 20)),
    usual_mistakes={
        "a distance below S is not enough: chunks begin at the multiples of S, and the two tokens "
        "may lie on two sides of such a border.": _sizes(lambda first, last, S: last - first < S),
        "tokens are counted from 0: token t lies in chunk t // S.": _sizes(
            lambda first, last, S: (first - 1) // S == (last - 1) // S
        ),
        "`%` gives the place inside a chunk. Which operator gives the number of the chunk?": _sizes(
            lambda first, last, S: first % S == last % S
        ),
        "these are the sizes that cut the fact in two.": _sizes(
            lambda first, last, S: first // S != last // S
        ),
        "`sizes` itself is one of the sizes to try.": (
            lambda first, last, sizes: [S for S in range(1, sizes) if first // S == last // S]
        ),
    },
)


def _turn(x, position, base, *, factor=2, neighbours=False):
    D = len(x)
    pair = torch.arange(D // 2, dtype=x.dtype)
    angle = position * base ** (-factor * pair / D)
    first, second = x.unflatten(0, (-1, 2)).T if neighbours else x.chunk(2)
    turned = (
        first * angle.cos() - second * angle.sin(),
        second * angle.cos() + first * angle.sin(),
    )
    return torch.stack(turned, dim=1).flatten() if neighbours else torch.cat(turned)


check_turn = Check(
    name="turn",
    answer=_turn,
    examples=((normal(4), 1, 100.0), (normal(8, seed=1), 5, 10_000.0)),
    usual_mistakes={
        "the pairs turn the other way round. Where is the minus sign?": (
            lambda x, position, base: _turn(x, -position, base)
        ),
        "pair p is made of numbers p and p + D/2, not of neighbours.": partial(
            _turn, neighbours=True
        ),
        "the pairs turn too fast or too slowly: the exponent is -2p/D.": partial(_turn, factor=1),
        "the angle must fall with the pair: the exponent -2p/D has a minus sign.": partial(
            _turn, factor=-2
        ),
        "the angle has to grow with the position.": lambda x, position, base: _turn(x, 1, base),
        "nothing was turned.": lambda x, position, base: x,
    },
)
