"""What the model reads for a question, and where its answer ends.

The shipped models were trained on three forms of questions (`tasks.needles`, `tasks.chains`). For
these, the prompt also begins the sentence that the answer completes. Any other question is read as
it is, and what the model says then is the text that it finds likely.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

from hsa_mini.data.tokenizer import end_of_text, load_tokenizer
from hsa_mini.inference.generate import Generation
from hsa_mini.tasks.chains import Chain
from hsa_mini.tasks.needles import VALUE_DIGITS, Needle, ask
from hsa_mini.tasks.sentences import encode

MAX_ANSWER = 64  # tokens
CODES = re.compile(
    r"(?i:what (?:is|are) the secret codes?) of ([A-Z]{4}(?:(?:, | and )[A-Z]{4})*)\s*\?*"
)
NAMES = re.compile(r"(?i:which names are given the number) ([0-9]{8})\s*\?*")


@dataclass(frozen=True)
class Prompt:
    """text: what the model reads. end: the character that ends the answer, or "" if the answer has
    `max_new_tokens` tokens. trained: whether the question has a form of the training.
    """

    text: str
    trained: bool = False
    end: str = "\n"
    max_new_tokens: int = MAX_ANSWER

    @property
    def stop(self) -> tuple[int, ...]:
        """The tokens that end the answer."""
        return _tokens_with(self.end) if self.end else ()

    def answer(self, generate: Callable[..., Generation]) -> str:
        """The answer that `generate(max_new_tokens=, stop=)` makes."""
        made = generate(max_new_tokens=self.max_new_tokens, stop=self.stop)
        return self.in_words(made.ids[0].tolist())

    def in_words(self, ids: list[int]) -> str:
        """The answer in these generated tokens."""
        tokenizer = load_tokenizer()
        text = tokenizer.decode([i for i in ids if i != end_of_text(tokenizer)])
        return (text.partition(self.end)[0] if self.end else text).strip().removesuffix(".")


def make_prompt(question: str) -> Prompt:
    """The prompt for a question, in its trained form if it has one."""
    question = question.strip()
    if found := CODES.fullmatch(question):
        keys = re.findall("[A-Z]{4}", found[1])
        asked = ask([Needle(key, "0" * VALUE_DIGITS) for key in keys])
        # One value, or a sentence for each further key: always as many tokens.
        return Prompt(asked.text, True, "", len(encode(asked.answer)))
    if found := NAMES.fullmatch(question):
        return Prompt(Chain(found[1], ("",)).question.text, True, ".")
    return Prompt(f"\n{question}\n")


def right_answer(question: str, text: str) -> str | None:
    """What `text` answers to a question in a trained form, in the words of `Prompt.in_words`; None
    if the text does not say it, or the question has no such form.
    """
    question = question.strip()
    if found := CODES.fullmatch(question):
        keys = re.findall("[A-Z]{4}", found[1])
        said = [re.search(rf"secret code of {key} is ([^\s.]+)", text) for key in keys]
        needles = [Needle(key, value[1]) for key, value in zip(keys, said) if value]
        return ask(needles).answer.removesuffix(".") if len(needles) == len(keys) else None
    names = []
    if found := NAMES.fullmatch(question):
        given = f"The number {found[1]}"
        while said := re.search(rf"{given} is given to ([A-Z]{{4}})\b", text):
            if said[1] in names:
                break
            names.append(said[1])
            given = f"The number of {said[1]}"
    return ", ".join(names) or None


@functools.cache
def _tokens_with(end: str) -> tuple[int, ...]:
    """The tokens that hold `end`, and the end-of-text token."""
    tokenizer = load_tokenizer()
    ids = (i for i in range(tokenizer.n_vocab) if end in tokenizer.decode([i]))
    return (*ids, end_of_text(tokenizer))
