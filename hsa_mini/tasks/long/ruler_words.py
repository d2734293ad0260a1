"""The words of RULER's tasks, which lm-eval takes from the package wonderwords (extra: eval)."""

from bisect import bisect
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from random import Random


class Compounds(Sequence[str]):
    """The sorted words ADJECTIVE-NOUN: six million, made only when they are asked for."""

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self.nouns = sorted(set(nouns))
        groups: list[list[str]] = []  # as blue and blue-eyed, whose words interleave
        for adjective in sorted(set(adjectives), key="{}-".format):
            if groups and adjective.startswith(f"{groups[-1][0]}-"):
                groups[-1].append(adjective)
            else:
                groups.append([adjective])
        self.heads = [f"{group[0]}-" for group in groups]
        self.mixed = {  # the words of the groups of several adjectives
            i: sorted({f"{adjective}-{noun}" for adjective in group for noun in self.nouns})
            for i, group in enumerate(groups)
            if len(group) > 1
        }
        sizes = (len(self.mixed.get(i, self.nouns)) for i in range(len(groups)))
        self.starts = [0, *accumulate(sizes)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index):
        group = bisect(self.starts, index) - 1
        place = index - self.starts[group]
        if group in self.mixed:
            return self.mixed[group][place]
        return self.heads[group] + self.nouns[place]


@cache
def compounds() -> Compounds:
    """The keys and values of RULER's needles."""
    return Compounds(_of_kind("adjectives"), _of_kind("nouns"))


@cache
def listed() -> list[str]:
    """The words of RULER's lists (`cwe`), in lm-eval's order."""
    words = sorted({word for kind in ("nouns", "adjectives", "verbs") for word in _of_kind(kind)})
    Random(42).shuffle(words)
    return words


@cache
def _of_kind(kind: str) -> list[str]:
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise ImportError(
            f"wonderwords: {error}; accepted is an environment with `pip install 'hsa-mini[eval]'`"
        ) from None
    return RandomWord().filter(include_parts_of_speech=[kind])
