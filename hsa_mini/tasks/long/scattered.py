"""Problems whose sentences are scattered in a long text: at random places, in a given order, and
over the text's own tokens, so that the text can be read once for many problems.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

import numpy as np

from hsa_mini.tasks.long import ruler
from hsa_mini.tasks.long.series import tell_notes, tell_threads
from hsa_mini.tasks.long.stories import tell_story
from hsa_mini.tasks.sentences import encode
from hsa_mini.tasks.tellings import Told

ENDS = '.\n"};,'  # what may end an answer


@dataclass(frozen=True)
class Scattered:
    """Sentences in the order of the text, and one question.

    needed: those sentences that the answer follows from. answers: what the model has to say; in
    this order and at once if `exact`, otherwise anywhere in what it says (RULER's rule). opening:
    what stands at the beginning of the text.
    """

    sentences: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    needed: tuple[str, ...]
    exact: bool = True
    opening: str = ""


@dataclass(frozen=True)
class Placed:
    """A problem in a text. patches: (first token, ids) of all that overwrites the text, the
    question last. first: the first and the last token of the first needed sentence.
    """

    problem: Scattered
    patches: tuple[tuple[int, np.ndarray], ...]
    first: tuple[int, int]


def told(made: Told) -> Scattered:
    """A problem with one question, whose answer the model has to begin with."""
    (question,) = made.questions
    answer = question.answer.strip().rstrip(ENDS)
    return Scattered(made.sentences, question.text, (answer,), question.needed)


def in_text(task: str, rng: Random) -> Scattered:
    """One of RULER's tasks whose needles stand in real text."""
    niah = ruler.IN_TEXT[task]
    needles, values = ruler.draw_needles(rng, niah)
    asked = ruler.ask_some(rng, niah, values)
    return Scattered(
        sentences=tuple(f" {needle}" for needle in needles),
        question=asked.question + asked.prefix,
        answers=asked.answers,
        needed=tuple(f" {x}" for x in needles if any(f" {a}." in x for a in asked.answers)),
        exact=False,
        opening=ruler.opening(niah),
    )


def story(kind: str, rng: Random) -> Scattered:
    return told(tell_story(rng, kind, 1, held_out=True))


def thread(steps: int, rng: Random) -> Scattered:
    return told(tell_threads(rng, steps, 1, held_out=True))


def note(times: int, rng: Random) -> Scattered:
    return told(tell_notes(rng, times, 1, held_out=True))


# The number in the name: links of the thread; notes of the kind that is asked for.
SCATTERED: dict[str, Callable[[Random], Scattered]] = {
    **{task: partial(in_text, task) for task in ruler.IN_TEXT},
    **{kind: partial(story, kind) for kind in ("qa1", "qa2", "qa3")},
    **{f"thread_{steps}": partial(thread, steps) for steps in (2, 4, 8)},
    **{f"note_{times}": partial(note, times) for times in (2, 4, 8)},
}


def scatter(rng: Random, problem: Scattered, tokens: int, *, absent: bool = False) -> Placed:
    """Places for the problem in a text of `tokens` tokens: the question at the end, the sentences
    anywhere before it, each place as likely as any other.

    absent: without the needed sentences. Raises ValueError for a text that is too short.
    """
    opening = encode(problem.opening)
    question = encode(problem.question)
    sentences = [encode(sentence) for sentence in problem.sentences]
    space = tokens - len(opening) - len(question) - sum(map(len, sentences))
    if space < 0:
        raise ValueError(f"tokens: got {tokens}, accepted are at least {tokens - space}")
    patches = [(0, opening)] if len(opening) else []
    places = {}
    start = len(opening)
    for cut, text, ids in zip(
        sorted(rng.randint(0, space) for _ in sentences), problem.sentences, sentences
    ):
        places[text] = (start + cut, start + cut + len(ids) - 1)
        if not (absent and text in problem.needed):
            patches.append((start + cut, ids))
        start += len(ids)
    patches.append((tokens - len(question), question))
    return Placed(problem, tuple(patches), places[problem.needed[0]])
