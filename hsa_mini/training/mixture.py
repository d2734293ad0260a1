"""Training batches: plain text, self-copy, questions about needles and about chains; a function of (seed, step) alone.

Every token has a part in the loss: none, text, copy (the second half of a self-copy) or answer.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from hsa_mini.data.corpus import load_corpus
from hsa_mini.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from hsa_mini.tasks.chains import draw_chains
from hsa_mini.tasks.needles import Needle, ask, draw_needles
from hsa_mini.tasks.sentences import TRAINING, Question, encode, is_held_out

NONE, TEXT, COPY, ANSWER = range(4)
PARTS = ("none", "text", "copy", "answer")


@dataclass(frozen=True)
class Mixture:
    """Shares of the four kinds of sequence, of questions, and of the text that sentences are hidden in."""

    self_copy: float = 0.35
    needles: float = 0.5
    chains: float = 0.0  # the rest is plain text
    two_codes: float = (
        0.25  # of the questions about needles: for two at once, if two are left to ask for
    )
    made_up: float = 0.25  # of the haystacks: random tokens, few symbols, repetition, other needles, instead of real text
    needles_most: int = (
        20  # their number is drawn log-uniformly: mostly few, so that most chunks are text
    )
    chains_most: int = 4  # of 2 to 3 names
    questions_most: int = 4
    copy_least: int = 256  # tokens copied; above the window, or the window would do it


class TrainingBatches(Dataset):
    """Item `step` is a batch: ids int64 [B, T+1] and parts int8 [B, T+1] (the part of each token as a target)."""

    def __init__(
        self,
        mixture: Mixture,
        *,
        batch: int,
        tokens: int,
        steps: int,
        seed: int,
        text: np.ndarray | None = None,
    ) -> None:
        """`text`: tokens to draw real text from, instead of the training corpus."""
        self.mixture = mixture
        self.batch = batch
        self.tokens = tokens
        self.steps = steps
        self.seed = seed
        self.text = load_corpus("train").tokens if text is None else text
        self.ordinary = load_tokenizer().n_vocab - len(SPECIAL_TOKENS)
        self.needle_tokens = len(encode(Needle("BBBB", "000000").sentence))  # of any needle

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng((TRAINING, self.seed, step))
        rows = [self.sequence(rng) for _ in range(self.batch)]
        ids, parts = (np.stack(column) for column in zip(*rows))
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(parts.astype(np.int8))

    def sequence(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One sequence: ids [T+1] and the part of each token."""
        mixture = self.mixture
        kind = rng.random()
        if kind < mixture.self_copy:
            return self.self_copy(rng)
        if kind < mixture.self_copy + mixture.needles:
            return self.needle_questions(rng)
        if kind < mixture.self_copy + mixture.needles + mixture.chains:
            return self.chain_questions(rng)
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
        """Needles among text, and questions about some of them."""
        mixture = self.mixture
        most = min(mixture.needles_most, self.most_hidden // self.needle_tokens)
        needles = draw_needles(rng, int(np.exp(rng.uniform(0, np.log(most + 1)))), held_out=False)
        if rng.random() < 0.3:
            needles = self.alike(rng, needles)
        wanted = int(rng.integers(1, mixture.questions_most + 1))
        questions = []
        left = [needles[i] for i in rng.permutation(len(needles))]
        while left and len(questions) < wanted:
            asked = 2 if len(left) > 1 and rng.random() < mixture.two_codes else 1
            questions.append(ask(left[:asked]))
            left = left[asked:]
        return self.hide(rng, [needle.sentence for needle in needles], questions)

    def chain_questions(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Chains among text, their links in any order, and questions about some of them."""
        lengths = rng.integers(2, 4, int(rng.integers(1, self.mixture.chains_most + 1))).tolist()
        chains = draw_chains(rng, lengths, held_out=False)
        while (
            len(chains) > 1
            and sum(len(encode(s)) for chain in chains for s in chain.sentences) > self.most_hidden
        ):
            chains.pop()
        sentences = [sentence for chain in chains for sentence in chain.sentences]
        asked = rng.permutation(len(chains))[
            : int(rng.integers(1, self.mixture.questions_most + 1))
        ]
        return self.hide(
            rng,
            [sentences[i] for i in rng.permutation(len(sentences))],
            [chains[i].question for i in asked],
        )

    @property
    def most_hidden(self) -> int:
        """Tokens of hidden sentences: at least half of a sequence is text and questions."""
        return (self.tokens + 1) // 2

    def hide(
        self, rng: np.random.Generator, sentences: list[str], questions: list[Question]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The sentences, in this order, among text; every question after all that it needs, the first one at the end.

        The others are left out where questions would take more than half of the room that the sentences leave.
        """
        total = self.tokens + 1
        last, *others = questions
        room = (total - sum(len(encode(sentence)) for sentence in sentences)) // 2 - tokens_of(last)
        order: list[str | Question] = list(sentences)
        for question in others:
            if (room := room - tokens_of(question)) < 0:
                break
            after = max(order.index(sentence) for sentence in question.needed) + 1
            order.insert(int(rng.integers(after, len(order) + 1)), question)
        pieces = [pieces_of(item) for item in [*order, last]]

        made_up = rng.random() < self.mixture.made_up
        spare = total - sum(len(ids) for piece in pieces for ids, _ in piece)
        text = self.made_up(rng, spare) if made_up else self.real_text(rng, spare)
        gaps = np.split(text, np.sort(rng.integers(0, spare + 1, len(pieces) - 1)))
        row = [
            pair
            for gap, piece in zip(gaps, pieces)
            for pair in ((gap, NONE if made_up else TEXT), *piece)
        ]
        return np.concatenate([ids for ids, _ in row]), np.repeat(
            [part for _, part in row], [len(ids) for ids, _ in row]
        )

    def alike(self, rng: np.random.Generator, needles: list[Needle]) -> list[Needle]:
        """Half of the needles get a key that differs from another's in one letter: the whole key must count."""
        keys = {needle.key: needle.value for needle in needles}
        for donor, needle in zip(needles[::2], needles[1::2]):
            place = int(rng.integers(len(donor.key)))
            key = donor.key[:place] + needle.key[place] + donor.key[place + 1 :]
            if key not in keys and not is_held_out(key):
                del keys[needle.key]
                keys[key] = needle.value
        return [Needle(key, value) for key, value in keys.items()]

    def real_text(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        first = int(rng.integers(0, len(self.text) - tokens))
        return np.asarray(self.text[first : first + tokens])

    def made_up(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        """Text such as no corpus holds: any tokens, a handful of symbols, nothing but needles, or one passage over and over."""
        kind = rng.integers(5)
        if kind == 0:
            return rng.integers(0, self.ordinary, tokens)
        if kind == 1:
            return self.few_symbols(rng, tokens)
        if kind == 4:
            needles = draw_needles(rng, tokens // self.needle_tokens + 1, held_out=False)
            return np.concatenate([encode(needle.sentence) for needle in needles])[:tokens]
        length = int(np.exp(rng.uniform(0, np.log(200))))
        passage = self.real_text(rng, length) if kind == 2 else self.few_symbols(rng, length)
        return np.resize(passage, tokens)

    def few_symbols(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        """Independent draws from 2 to 64 symbols: digits, single bytes (any script is made of them) or any tokens."""
        pools = (encode("0123456789,. \n"), np.arange(256), np.arange(self.ordinary))
        pool = pools[rng.integers(3)]
        return rng.choice(rng.choice(pool, int(rng.integers(2, 65))), tokens)


def pieces_of(item: str | Question) -> list[tuple[np.ndarray, int]]:
    """Ids of a sentence, or of a question and of its answer, and the part that they have in the loss."""
    if isinstance(item, str):
        return [(encode(item), NONE)]
    return [(encode(item.text), NONE), (encode(item.answer), ANSWER)]


def tokens_of(question: Question) -> int:
    return sum(len(ids) for ids, _ in pieces_of(question))
