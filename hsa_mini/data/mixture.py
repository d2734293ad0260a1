"""Training batches: plain text, self-copy and needle questions, each a function of (seed, step) alone.

Every token has a part in the loss: none, text, copy (the second half of a self-copy) or answer.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from .corpus import load_corpus
from .tasks import Needle, NeedleTask
from .tokenizer import SPECIAL_TOKENS, load_tokenizer

NONE, TEXT, COPY, ANSWER = range(4)
PARTS = ("none", "text", "copy", "answer")


@dataclass(frozen=True)
class Mixture:
    """Shares of the three kinds of sequence, and of the text that needles are hidden in."""

    self_copy: float = 0.35
    needles: float = 0.5  # the rest is plain text
    made_up: float = 0.2  # of the haystacks: random tokens, few symbols, repetition, instead of real text
    needles_most: int = 20  # their number is drawn log-uniformly: mostly few, so that most chunks are text
    questions_most: int = 4
    copy_least: int = 256  # tokens copied; above the window, or the window would do it


class TrainingBatches(Dataset):
    """Item `step` is a batch: ids int64 [B, T+1] and parts int8 [B, T+1] (the part of each token as a target)."""

    def __init__(
        self, mixture: Mixture, *, batch: int, tokens: int, steps: int, seed: int, text: np.ndarray | None = None
    ) -> None:
        """`text`: tokens to draw real text from, instead of the training corpus."""
        self.mixture, self.batch, self.tokens, self.steps, self.seed = mixture, batch, tokens, steps, seed
        self.text = load_corpus("train").tokens if text is None else text
        tokenizer = load_tokenizer()
        self.task = NeedleTask(tokenizer)
        self.ordinary = tokenizer.n_vocab - len(SPECIAL_TOKENS)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng((self.seed, step))
        rows = [self.sequence(rng) for _ in range(self.batch)]
        ids, parts = (np.stack(column) for column in zip(*rows))
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(parts.astype(np.int8))

    def sequence(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One sequence: ids [T+1] and the part of each token."""
        kind = rng.random()
        if kind < self.mixture.self_copy:
            return self.self_copy(rng)
        if kind < self.mixture.self_copy + self.mixture.needles:
            return self.needle_questions(rng)
        return self.real_text(rng, self.tokens + 1), np.full(self.tokens + 1, TEXT)

    def self_copy(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A passage, then the same passage again (§2.4): only what lies beyond the window helps to predict the copy."""
        total = self.tokens + 1
        length = int(rng.integers(min(self.mixture.copy_least, total // 2), total // 2 + 1))
        made_up = rng.random() < self.mixture.made_up / 2
        passage = self.few_symbols(rng, length) if made_up else self.real_text(rng, length)
        first = NONE if made_up else TEXT
        before = total - 2 * length
        ids = np.concatenate((self.real_text(rng, before), passage, passage))
        return ids, np.repeat((TEXT, first, COPY), (before, length, length))

    def needle_questions(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Needles among text, and questions about some of them, each after its needle, the last at the end."""
        mixture, task, total = self.mixture, self.task, self.tokens + 1
        pair = task.question_tokens + len(task.answer(Needle("BBBB", "000000")))
        most = min(mixture.needles_most, total // 2 // task.sentence_tokens)  # at least half is text
        needles = task.needles(rng, int(np.exp(rng.uniform(0, np.log(most + 1)))))
        if rng.random() < 0.3:
            needles = self.alike(rng, needles)
        room = (total - len(needles) * task.sentence_tokens) // (2 * pair)
        asked = rng.permutation(len(needles))[: int(rng.integers(1, max(min(mixture.questions_most, room), 1) + 1))]
        order = [("needle", needle) for needle in needles]
        for i in asked[1:]:
            after = order.index(("needle", needles[i])) + 1
            order.insert(int(rng.integers(after, len(order) + 1)), ("question", needles[i]))
        order.append(("question", needles[asked[0]]))

        made_up = rng.random() < mixture.made_up
        spare = total - sum(task.sentence_tokens if kind == "needle" else pair for kind, _ in order)
        text = self.made_up(rng, spare) if made_up else self.real_text(rng, spare)
        gaps = np.diff(np.sort(rng.integers(0, spare + 1, len(order) - 1)), prepend=0, append=spare)
        ids, parts, used = [], [], 0
        for gap, (kind, needle) in zip(gaps, order):
            ids.append(text[used : used + gap])
            parts.append(np.full(gap, NONE if made_up else TEXT))
            used += gap
            if kind == "needle":
                ids.append(task.sentence(needle))
                parts.append(np.full(task.sentence_tokens, NONE))
            else:
                ids += [task.question(needle), task.answer(needle)]
                parts.append(np.repeat((NONE, ANSWER), (task.question_tokens, pair - task.question_tokens)))
        return np.concatenate(ids), np.concatenate(parts)

    def alike(self, rng: np.random.Generator, needles: list[Needle]) -> list[Needle]:
        """Half of the needles get a key that differs from another's in one letter: the whole key must count."""
        keys = {needle.key: needle.value for needle in needles}
        for donor, needle in zip(needles[::2], needles[1::2]):
            place = int(rng.integers(len(donor.key)))
            key = donor.key[:place] + needle.key[place] + donor.key[place + 1 :]
            if key not in keys:
                del keys[needle.key]
                keys[key] = needle.value
        return [Needle(key, value) for key, value in keys.items()]

    def real_text(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        first = int(rng.integers(0, len(self.text) - tokens))
        return np.asarray(self.text[first : first + tokens])

    def made_up(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        """Text such as no corpus holds: any tokens, a handful of symbols, or one passage over and over."""
        kind = rng.integers(4)
        if kind == 0:
            return rng.integers(0, self.ordinary, tokens)
        if kind == 1:
            return self.few_symbols(rng, tokens)
        length = int(np.exp(rng.uniform(0, np.log(200))))
        passage = self.real_text(rng, length) if kind == 2 else self.few_symbols(rng, length)
        return np.resize(passage, tokens)

    def few_symbols(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        """Independent draws from 2 to 64 symbols: digits, single bytes (any script is made of them) or any tokens."""
        pools = (np.array(self.task.tokenizer.encode_ordinary("0123456789,. \n")), np.arange(256), np.arange(self.ordinary))
        pool = pools[rng.integers(3)]
        return rng.choice(rng.choice(pool, int(rng.integers(2, 65))), tokens)
