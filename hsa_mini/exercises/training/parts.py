"""The first, second and fourth exercise of notebook 11: what an answer weighs, which chunks the
queue keeps, and the margin that a needle needs.

Dimensions: B sequences, T tokens, N chunks of a sequence, M chunks in the queue, C width.
"""

import math
from functools import partial

import torch

from hsa_mini.exercises.check import Check, normal
from hsa_mini.training.mixture import ANSWER, COPY, NONE, TEXT


def _weights(parts, text_weight, *, counted=(TEXT, COPY, ANSWER), factor=None):
    """factor: of the text in the second result."""
    answers = (parts == ANSWER).sum().item()
    all_counted = sum((parts == part).sum().item() for part in counted)
    return answers / all_counted, 1 / ((text_weight if factor is None else factor) + 2)


def _by_counts(parts, text_weight):
    text, copy, answer = ((parts == part).sum().item() for part in (TEXT, COPY, ANSWER))
    return answer / (text + copy + answer), answer / (text_weight * text + copy + answer)


_PARTS = (
    torch.tensor([[TEXT] * 4 + [NONE] * 2 + [ANSWER], [TEXT] * 3 + [COPY] * 4]),
    torch.tensor([[TEXT] * 8 + [NONE] * 3 + [ANSWER] * 5, [COPY] * 15 + [NONE]]),
)

check_weight_of_answers = Check(
    name="weight_of_answers",
    answer=_weights,
    examples=((_PARTS[0], 1.0), (_PARTS[0], 0.25), (_PARTS[1], 0.1)),
    usual_mistakes={
        "tokens of the part NONE do not count in the loss, so they are in no mean.": partial(
            _weights, counted=(NONE, TEXT, COPY, ANSWER)
        ),
        "our loss is text_weight · text + copy + answer. You left out text_weight.": partial(
            _weights, factor=1.0
        ),
        "copies count in the loss too. Its three parts are text, copies and answers.": (
            lambda parts, text_weight: (
                _weights(parts, text_weight, counted=(TEXT, ANSWER))[0],
                1 / (text_weight + 1),
            )
        ),
        "in our loss the number of tokens does not matter: each part has a mean of its own.": (
            _by_counts
        ),
        "the order is: in one mean first, in our loss second.": (
            lambda parts, text_weight: _weights(parts, text_weight)[::-1]
        ),
        "this is the share of sequences with an answer. Count tokens.": (
            lambda parts, text_weight: (
                (parts == ANSWER).any(dim=1).double().mean(),
                _weights(parts, text_weight)[1],
            )
        ),
    },
)


def _queue_after(queue, chunks, parts, *, rows=None, oldest=False, in_front=False):
    without = ~(parts == ANSWER).any(dim=1)
    fresh = chunks[without if rows is None else rows(without)].flatten(0, 1)
    both = torch.cat((fresh, queue) if in_front else (queue, fresh))
    return both[: len(queue)] if oldest or in_front else both[len(both) - len(queue) :]


def _parts(*with_answer: bool) -> torch.Tensor:
    return torch.tensor([[TEXT] * 5 + [NONE, ANSWER if x else TEXT] for x in with_answer])


check_queue_after = Check(
    name="queue_after",
    answer=_queue_after,
    examples=tuple(
        (normal(M, 2), normal(len(answers), 2, 2, seed=1), _parts(*answers))
        for M, answers in (
            (5, (True, False)),
            (6, (False, True, False)),
            (3, (False, True, False, True)),
            (4, (True, True)),
        )
    ),
    usual_mistakes={
        "chunks of sequences with a question came in. Such a chunk may hold a needle.": partial(
            _queue_after, rows=torch.ones_like
        ),
        "only chunks of sequences with a question came in. It is the other way round.": partial(
            _queue_after, rows=torch.logical_not
        ),
        "nothing new came in. The last M chunks stay, so the oldest ones leave.": partial(
            _queue_after, oldest=True
        ),
        "new chunks are appended at the end. You put them in front.": partial(
            _queue_after, in_front=True
        ),
        "the queue became longer. It keeps its length M.": lambda queue, chunks, parts: torch.cat(
            (queue, chunks[~(parts == ANSWER).any(dim=1)].flatten(0, 1))
        ),
        "the earlier chunks are lost. Append the new ones to them.": lambda queue, chunks, parts: (
            chunks[~(parts == ANSWER).any(dim=1)].flatten(0, 1)[-len(queue) :]
        ),
    },
)


def _found(margin: float, N: float, K: int) -> float:
    rivals = (N - 1) * torch.special.ndtr(torch.tensor(-margin, dtype=torch.float64))
    return torch.special.gammaincc(torch.tensor(K, dtype=torch.float64), rivals).item()


def _margin_for(share: float, N: float, K: int) -> float:
    low = -10.0
    high = 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _found(middle, N, K) > share else (middle, high)
    return high


def _normal_quantile(share: float) -> float:
    return torch.special.ndtri(torch.tensor(share, dtype=torch.float64)).item()


check_margin_for = Check(
    name="margin_for",
    answer=_margin_for,
    examples=((0.99, 512, 1), (0.5, 262_144, 8), (0.9, 4096, 8), (0.99, 16, 8)),
    usual_mistakes={
        "a step of 0.1 is too coarse. Halve an interval until it is short.": (
            lambda share, N, K: math.ceil(10 * _margin_for(share, N, K)) / 10
        ),
        "this margin misses the needle with probability `share`. It must find it.": (
            lambda share, N, K: _margin_for(1 - share, N, K)
        ),
        "this margin beats one rival with probability `share`. There are N - 1 rivals.": (
            lambda share, N, K: _normal_quantile(share)
        ),
        "with this margin K rivals beat the needle on average. `share` asks for more than that.": (
            lambda share, N, K: -_normal_quantile(K / (N - 1))
        ),
        "K chunks are kept, not one.": lambda share, N, K: _margin_for(share, N, 1),
    },
)
