"""A needle hidden in a text, both read once, and questions about it.

Questions are asked from forks of the memory, so that the text is read again only if it, the needle
or its place changes.

Dimensions: T tokens of a question and its answer.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.files.reading import read_bytes
from hsa_mini.hsa_model import HSAModel
from hsa_mini.index.prompts import make_prompt, right_answer
from hsa_mini.inference.generate import continue_from
from hsa_mini.inference.prefill import prefill
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.viz.retrieval.trace import Trace, trace

MAX_BYTES = 4 << 20  # of a haystack as UTF-8; about a million tokens
MAX_NEEDLE_TOKENS = 256
MAX_QUESTION_TOKENS = 128
MAX_WORD = 100  # characters within which a word ends, so that the needle stands between two words


@dataclass(frozen=True)
class ReadText:
    """A haystack with its needle, and the memory that has read both.

    ids: all tokens. needle_tokens: where the needle stands among them. stored: whether the text
    comes from an index. It is then the haystack alone, which may hold the needle or not; one that
    it does not hold is empty here.
    """

    haystack: str
    needle: str
    depth: float
    ids: list[int]
    needle_tokens: range
    memory: ChunkMemory
    stored: bool = False


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and what the HSA layers did with their tokens.

    ids [T]: what the model read for the question, then `answer_tokens` tokens of its answer. marks:
    of each token of the answer, whether it is right, or None where nothing says so. verdict: one
    sentence on the answer. correct: None if it cannot be judged.
    """

    text: ReadText
    question: str
    ids: list[int]
    answer_tokens: int
    answer: str
    correct: bool | None
    verdict: str
    marks: list[bool | None]
    trace: Trace


def haystack_of(text: str | Path) -> str:
    """The text itself, or the content of a UTF-8 file; checked as `read_text` does."""
    if isinstance(text, Path):
        try:
            text = read_bytes(text, max_bytes=MAX_BYTES).decode()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "too large, not a file, or not UTF-8"
            raise ValueError(
                f"haystack: {text} cannot be read ({reason}), accepted is a UTF-8 text file of at "
                f"most {MAX_BYTES >> 20} MiB"
            ) from None
    _check("haystack", text)
    if (size := len(text.encode())) > MAX_BYTES:
        raise ValueError(
            f"haystack: got {size:,} bytes of UTF-8, accepted are at most {MAX_BYTES:,}"
        )
    return text


def read_text(
    model: HSAModel,
    haystack: str,
    needle: str,
    depth: float,
    progress: Callable[[int, int], object] | None = None,
) -> ReadText:
    """Hide the needle in the haystack and read both. depth: 0 is the beginning, 1 the end; the
    needle stands at the next end of a word. progress(read, all): called as tokens are read.

    Raises ValueError, before anything is read, for what cannot be asked about: an empty haystack or
    needle, too long ones, less than one chunk in all, or a vocabulary that is not the tokenizer's.
    """
    tokenizer = load_tokenizer()
    if model.config.vocab_size < tokenizer.n_vocab:
        raise ValueError(
            f"model: got a vocabulary of {model.config.vocab_size:,}, "
            f"accepted is the tokenizer's {tokenizer.n_vocab:,}"
        )
    haystack = haystack_of(haystack)
    sentence = _encoded("needle", f" {needle.strip()}", MAX_NEEDLE_TOKENS)
    if not 0 <= depth <= 1:
        raise ValueError(f"depth: got {depth}, accepted is a number from 0 to 1")
    at = round(depth * len(haystack))
    if word := re.match(r"\S+", haystack[at : at + MAX_WORD]):
        at += word.end() * (at > 0)
    before = tokenizer.encode_ordinary(haystack[:at])
    ids = [*before, *sentence, *tokenizer.encode_ordinary(haystack[at:])]
    if len(ids) < model.config.chunk_size:
        raise ValueError(
            f"haystack: got {len(ids)} tokens with the needle, accepted are at least "
            f"{model.config.chunk_size} (one chunk), or there is nothing to retrieve"
        )
    read = 0

    def count(tokens: int) -> None:
        nonlocal read
        read += tokens
        if progress:
            progress(read, len(ids))

    device = model.embedding.weight.device
    memory = ChunkMemory(model.config)
    prefill(model, torch.tensor([ids], device=device), memory, progress=count)
    place = range(len(before), len(before) + len(sentence))
    return ReadText(haystack, needle, depth, ids, place, memory)


def check_question(question: str) -> None:
    """Raise ValueError for an empty or too long question."""
    _encoded("question", question, MAX_QUESTION_TOKENS)


def ask(model: HSAModel, text: ReadText, question: str) -> Asked:
    """The model's answer, and what led to each of its tokens.

    Raises ValueError as `check_question`.
    """
    check_question(question)
    prompt = make_prompt(question)
    asked = load_tokenizer().encode_ordinary(prompt.text)
    device = model.embedding.weight.device
    begun = prefill(model, torch.tensor([asked], device=device), text.memory.fork())
    options = dict(max_new_tokens=prompt.max_new_tokens, stop=prompt.stop)
    made = continue_from(model, begun, **options).ids[0].tolist()
    answer = prompt.in_words(made)
    ids = [*asked, *made]
    # The answer is read once more, on a second fork: now every HSA layer is recorded.
    traced = trace(model, text.memory.fork(), torch.tensor([ids], device=device))
    correct, verdict, marks = judge(question, answer, made, text)
    return Asked(text, question, ids, len(made), answer, correct, verdict, marks, traced)


def judge(
    question: str, answer: str, made: list[int], text: ReadText
) -> tuple[bool | None, str, list[bool | None]]:
    """Whether the answer is right, a sentence that says why, and a mark for each of its tokens.

    A question in a trained form has a right answer, which the text says or not. To any other, an
    answer that the needle does not hold is wrong, and one that it holds is not judged.
    """
    tokenizer = load_tokenizer()
    prompt = make_prompt(question)
    right = right_answer(question, f"{text.needle}\n{text.haystack}")
    if prompt.trained and right is None:
        return False, "Wrong: the text does not say it, so this is made up.", [False] * len(made)
    if right is not None:
        want = tokenizer.encode_ordinary(right)
        marks = [None if i >= len(want) else got == want[i] for i, got in enumerate(made)]
        if answer == right:
            return True, "Right.", marks
        return False, f"Wrong: the text says {right}.", marks
    if answer and answer in text.needle:
        said = "Words of the needle: whether they answer the question, you must judge."
        return None, said, [None] * len(made)
    said = "Wrong: the needle does not say this. The shipped models learned only questions such as"
    return False, f"{said} `What is the secret code of QXZB?`", [False] * len(made)


def _check(name: str, text: str) -> None:
    """Raise ValueError for text that is empty or cannot be UTF-8."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name}: got no text, accepted is at least one word")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name}: got half a character, accepted is text that UTF-8 can hold")


def _encoded(name: str, text: str, most: int) -> list[int]:
    """The tokens of a text. Raises ValueError unless they are 1 to `most`."""
    _check(name, text)
    # No token has more than 1,000 characters, so what is longer need not be encoded.
    ids = load_tokenizer().encode_ordinary(text[: 1000 * (most + 1)])
    if len(ids) > most:
        raise ValueError(f"{name}: got {len(ids):,} tokens or more, accepted are at most {most}")
    return ids
