"""Training batches: plain text, self-copies, questions about needles, chains, facts and spans.

A batch is a function of (seed, step). Every token belongs to one part of the loss: none, text, copy
(the second half of a self-copy) or answer.

Dimensions: B batch, T tokens; a sequence has T+1 (inputs and targets overlap).
"""

from dataclasses import dataclass
from functools import partial
from random import Random

import numpy as np
import torch
from torch.utils.data import Dataset

from hsa_mini.checks import check_integer, check_number, check_step
from hsa_mini.data.corpus import load_corpus
from hsa_mini.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from hsa_mini.tasks.chains import draw_chains
from hsa_mini.tasks.long.rows import TOLD, ruler_row
from hsa_mini.tasks.needles import Needle, ask, draw_needles
from hsa_mini.tasks.rows import (
    ANSWER,
    COPY,
    NONE,
    TEXT,
    draw_told,
    min_tokens,
    pieces_of,
    question_tokens,
    row,
    span_row,
    told_items,
)
from hsa_mini.tasks.sentences import MAX_KEYS, TRAINING, Question, encode, is_held_out

PARTS = {NONE: "none", TEXT: "text", COPY: "copy", ANSWER: "answer"}  # names
LONG = ("ruler", *TOLD)  # the kinds for the tasks in long texts (see `tasks/long/rows.py`)
SHARES = ("self_copy", "needles", "chains", "facts", "spans", *LONG)  # of all kinds but text
SIMILAR_KEYS = 0.3  # share of the needle sequences in which some keys differ in one letter only

TrainingSequence = tuple[np.ndarray, np.ndarray]  # ids [T+1] and the part of each token [T+1]


@dataclass(frozen=True)
class Mixture:
    """How sequences are drawn: the share of each kind, and the limits of each kind.

    SHARES are shares of the sequences; the remaining sequences are plain text.
    """

    self_copy: float = 0.35
    needles: float = 0.5
    chains: float = 0.0
    facts: float = 0.0  # facts in many forms (see `tasks/rows.py`)
    spans: float = 0.0  # real text, and questions about what follows some of its spans
    ruler: float = 0.0
    stories: float = 0.0
    threads: float = 0.0
    notes: float = 0.0
    two_codes: float = 0.25  # share of the needle questions that ask for two needles at once
    # Share of the haystacks that are generated instead of drawn from a real text: random tokens,
    # few symbols, one passage over and over, or needles only.
    made_up: float = 0.25
    max_needles: int = 20  # the number is drawn log-uniformly: mostly few, so most chunks are text
    max_chains: int = 4  # each of 2 to 3 names
    max_questions: int = 4
    min_copy: int = 256  # tokens; longer than the window, or the window alone could copy

    def __post_init__(self) -> None:
        """Raise ValueError for shares outside 0 to 1, or together above 1, and limits below 1."""
        for name in (*SHARES, "two_codes", "made_up"):
            check_number(name, getattr(self, name), 0, 1)
        for name in ("max_needles", "max_chains", "max_questions", "min_copy"):
            check_integer(name, getattr(self, name), 1)
        check_number(" + ".join(SHARES), sum(getattr(self, name) for name in SHARES), 0, 1 + 1e-9)


class TrainingBatches(Dataset):
    """Item `step` is a batch: ids int64 [B, T+1] and parts int8 [B, T+1]."""

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
        """text: tokens that real text is drawn from; None: the training corpus.

        Raises ValueError for sizes below 1, for sequences too short for the questions of the
        mixture, and for a text shorter than a sequence.
        """
        sizes = (("batch", batch, 1), ("tokens", tokens, 1), ("steps", steps, 0), ("seed", seed, 0))
        for name, value, minimum in sizes:
            check_integer(name, value, minimum)
        kinds = [name for name in SHARES if getattr(mixture, name)]
        if tokens < (fewest := min_tokens(kinds)):
            raise ValueError(
                f"tokens: got {tokens}, accepted are at least {fewest} for the mixture's questions"
            )
        self.mixture = mixture
        self.batch = batch
        self.tokens = tokens
        self.steps = steps
        self.seed = seed
        self.text = load_corpus("train").tokens if text is None else text
        if len(self.text) <= tokens:
            raise ValueError(
                f"text: got {len(self.text)} tokens, accepted are at least {tokens + 1}"
            )
        self.ordinary = load_tokenizer().n_vocab - len(SPECIAL_TOKENS)
        self.needle_tokens = len(encode(Needle("BBBB", "000000").sentence))  # the same for any key

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        check_step(step, self.steps)
        rng = np.random.default_rng((TRAINING, self.seed, step))
        rows = [self.sequence(rng) for _ in range(self.batch)]
        ids, parts = (np.stack(column) for column in zip(*rows))
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(parts.astype(np.int8))

    # ---- the kinds of sequence

    def sequence(self, rng: np.random.Generator) -> TrainingSequence:
        """One sequence of a kind drawn by the shares of the mixture."""
        kinds = {
            "self_copy": self.self_copy,
            "needles": self.needle_questions,
            "chains": self.chain_questions,
            "facts": self.fact_questions,
            "spans": self.span_questions,
            "ruler": partial(self.span_questions, rewrite=ruler_row),
            **{name: partial(self.fact_questions, draw=draw) for name, draw in TOLD.items()},
        }
        kind = rng.random()
        up_to = 0.0
        for name in SHARES:
            up_to += getattr(self.mixture, name)
            if kind < up_to:
                return kinds[name](rng)
        return self.real_text(rng, self.tokens + 1), np.full(self.tokens + 1, TEXT)

    def self_copy(self, rng: np.random.Generator) -> TrainingSequence:
        """Some text, a passage, and the same passage again (§2.4).

        The passage is longer than the window, so only retrieval helps to predict its copy.
        """
        total = self.tokens + 1
        length = int(rng.integers(min(self.mixture.min_copy, total // 2), total // 2 + 1))
        made_up = rng.random() < self.mixture.made_up / 2
        passage = self.few_symbols(rng, length) if made_up else self.real_text(rng, length)
        part_of_passage = NONE if made_up else TEXT
        before = total - 2 * length
        ids = np.concatenate((self.real_text(rng, before), passage, passage))
        return ids, np.repeat((TEXT, part_of_passage, COPY), (before, length, length))

    def needle_questions(self, rng: np.random.Generator) -> TrainingSequence:
        """Needles hidden in text, and questions about some of them."""
        mixture = self.mixture
        limit = min(mixture.max_needles, self.max_hidden_tokens // self.needle_tokens)
        count = int(np.exp(rng.uniform(0, np.log(limit + 1))))
        needles = draw_needles(rng, count, held_out=False)
        if rng.random() < SIMILAR_KEYS:
            needles = self.with_similar_keys(rng, needles)
        wanted = int(rng.integers(1, mixture.max_questions + 1))
        questions = []
        beside_needles = self.tokens + 1 - count * self.needle_tokens
        left = [needles[i] for i in rng.permutation(len(needles))]
        while left and len(questions) < wanted:
            codes = 2 if len(left) > 1 and rng.random() < mixture.two_codes else 1
            if question_tokens(ask(left[:codes])) > beside_needles:
                codes = 1
            questions.append(ask(left[:codes]))
            left = left[codes:]
        return self.hide(rng, [needle.sentence for needle in needles], questions)

    def chain_questions(self, rng: np.random.Generator) -> TrainingSequence:
        """Chains hidden in text, their links in random order, and questions about some of them."""
        count = int(rng.integers(1, self.mixture.max_chains + 1))
        chains = draw_chains(rng, rng.integers(2, 4, count).tolist(), held_out=False)
        while (
            len(chains) > 1
            and sum(len(encode(s)) for chain in chains for s in chain.sentences)
            > self.max_hidden_tokens
        ):
            chains.pop()
        sentences = [sentence for chain in chains for sentence in chain.sentences]
        order = rng.permutation(len(chains))
        asked = order[: int(rng.integers(1, self.mixture.max_questions + 1))]
        shuffled = [sentences[i] for i in rng.permutation(len(sentences))]
        return self.hide(rng, shuffled, [chains[i].question for i in asked])

    def fact_questions(self, rng: np.random.Generator, draw=draw_told) -> TrainingSequence:
        """Facts in one of many forms, and questions about them."""
        draws = Random(int(rng.integers(1 << 62)))
        total = self.tokens + 1
        items = told_items(draws, int(total * draws.choice((0.4, 0.6, 0.8, 0.95))), draw)
        count = total - sum(len(ids) for item in items for ids, _ in item)
        made_up = rng.random() < self.mixture.made_up / 2
        text = self.made_up(rng, count) if made_up else self.real_text(rng, count)
        return row(draws, items, text.tolist(), NONE if made_up else TEXT)

    def span_questions(self, rng: np.random.Generator, rewrite=span_row) -> TrainingSequence:
        """Real text, and questions about what follows some of its spans."""
        draws = Random(int(rng.integers(1 << 62)))
        return rewrite(draws, self.real_text(rng, self.tokens + 1).tolist())

    # ---- sentences and questions among text

    @property
    def max_hidden_tokens(self) -> int:
        """Hidden sentences take at most half of a sequence; text and questions take the rest."""
        return (self.tokens + 1) // 2

    def hide(
        self, rng: np.random.Generator, sentences: list[str], questions: list[Question]
    ) -> TrainingSequence:
        """Sentences and questions at random places in a text.

        The sentences keep their order. The first question stands at the end of the sequence. Each
        further question stands somewhere after all sentences that it needs. The first one that no
        longer fits, and those after it, are left out: questions take at most half of what the
        sentences leave.
        """
        total = self.tokens + 1
        last, *others = questions
        spare = (total - sum(len(encode(sentence)) for sentence in sentences)) // 2
        spare -= question_tokens(last)
        order: list[str | Question] = list(sentences)
        for question in others:
            spare -= question_tokens(question)
            if spare < 0:
                break
            after = max(order.index(sentence) for sentence in question.needed) + 1
            order.insert(int(rng.integers(after, len(order) + 1)), question)
        return self.fill_gaps(rng, [pieces_of(item) for item in [*order, last]])

    def fill_gaps(
        self, rng: np.random.Generator, items: list[list[tuple[np.ndarray, int]]]
    ) -> TrainingSequence:
        """A whole sequence: the items, each a list of (ids, part), with text before each."""
        made_up = rng.random() < self.mixture.made_up
        count = self.tokens + 1 - sum(len(ids) for item in items for ids, _ in item)
        text = self.made_up(rng, count) if made_up else self.real_text(rng, count)
        gaps = np.split(text, np.sort(rng.integers(0, count + 1, len(items) - 1)))
        part_of_text = NONE if made_up else TEXT
        row = []
        for gap, item in zip(gaps, items):
            row += [(gap, part_of_text), *item]
        ids = np.concatenate([ids for ids, _ in row])
        return ids, np.repeat([part for _, part in row], [len(ids) for ids, _ in row])

    def with_similar_keys(self, rng: np.random.Generator, needles: list[Needle]) -> list[Needle]:
        """Half of the needles get a key that differs from another needle's key in one letter.

        So the model has to compare the whole key.
        """
        values = {needle.key: needle.value for needle in needles}
        for donor, needle in zip(needles[::2], needles[1::2]):
            i = int(rng.integers(len(donor.key)))
            key = donor.key[:i] + needle.key[i] + donor.key[i + 1 :]
            if key not in values and not is_held_out(key):
                del values[needle.key]
                values[key] = needle.value
        return [Needle(key, value) for key, value in values.items()]

    # ---- text

    def real_text(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        """A random stretch of the corpus."""
        first = int(rng.integers(0, max(len(self.text) - tokens, 1)))
        return np.asarray(self.text[first : first + tokens])

    def made_up(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        """Random tokens, few symbols, one passage over and over, or needles only."""
        kind = rng.integers(5)
        if kind == 0:
            return rng.integers(0, self.ordinary, tokens)
        if kind == 1:
            return self.few_symbols(rng, tokens)
        if kind == 4:
            count = min(tokens // self.needle_tokens + 1, MAX_KEYS[False])
            needles = draw_needles(rng, count, held_out=False)
            return np.resize([encode(needle.sentence) for needle in needles], tokens)
        length = min(int(np.exp(rng.uniform(0, np.log(200)))), len(self.text))
        passage = self.real_text(rng, length) if kind == 2 else self.few_symbols(rng, length)
        return np.resize(passage, tokens)

    def few_symbols(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        """Independent draws from 2 to 64 symbols: digits, single bytes or any tokens."""
        pools = (encode("0123456789,. \n"), np.arange(256), np.arange(self.ordinary))
        pool = pools[rng.integers(3)]
        return rng.choice(rng.choice(pool, int(rng.integers(2, 65))), tokens)
