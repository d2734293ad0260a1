"""The audit: questions of many forms, in held-out text of any length, at random places.

A text holds the question and its answer; one pass predicts every token of the answer. All are
predicted right exactly if greedy generation writes this answer.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch

from hsa_mini.data.corpus import load_corpus
from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.evaluation.audit_forms import FORMS
from hsa_mini.hsa_model import HSAModel
from hsa_mini.inference.prefill import prefill
from hsa_mini.tasks.placement import tile
from hsa_mini.tasks.sentences import EVALUATION, encode
from hsa_mini.tasks.tellings import Told

BATCH_TOKENS = 1 << 17  # read at once
MAX_BATCH = 32  # texts
ENDS = '.\n"};,'  # what may end an answer; another end is as right


@dataclass(frozen=True)
class AuditRow:
    """Counts of the questions of one form in texts of `tokens` tokens.

    whole: those whose first needed sentence lies in a single chunk. retrieved: an HSA layer chose
    a chunk of this sentence for the first token of the answer.
    """

    form: str
    tokens: int
    samples: int
    correct: int
    whole: int
    whole_correct: int
    retrieved: int
    seed: int


@dataclass(frozen=True)
class Written:
    """A problem in a text: ids int64 [tokens], the last of which are the answer.

    value_tokens: those of the answer without its end. place: first and last token of the first
    sentence that the question needs.
    """

    ids: np.ndarray
    answer_tokens: int
    value_tokens: int
    place: tuple[int, int]


def size(told: Told) -> int:
    """The tokens of all sentences, of the question and of its answer."""
    (question,) = told.questions
    return sum(len(encode(text)) for text in (*told.sentences, question.text, question.answer))


def write(rng: Random, told: Told, text: np.ndarray) -> Written:
    """The sentences at random places of `text` [tokens], in their order; the question and its
    answer at the end. The result is as long as `text`.

    Raises ValueError if the text is too short.
    """
    (question,) = told.questions
    sentences = [encode(sentence) for sentence in told.sentences]
    tail = [encode(question.text), encode(question.answer)]
    space = len(text) - size(told)  # tokens of text that remain
    if space < 0:
        raise ValueError(f"text: got {len(text)} tokens, accepted are at least {size(told)}")
    cuts = sorted(rng.randint(0, space) for _ in sentences)
    pieces = []
    starts = []
    before = 0
    length = 0
    for cut, sentence in zip(cuts, sentences):
        pieces += [text[before:cut], sentence]
        starts.append(cut + length)
        before = cut
        length += len(sentence)
    needed = told.sentences.index(question.needed[0])
    return Written(
        ids=np.concatenate([*pieces, text[before:space], *tail]).astype(np.int64),
        answer_tokens=len(tail[1]),
        value_tokens=len(encode(question.answer.rstrip(ENDS))),
        place=(starts[needed], starts[needed] + len(sentences[needed]) - 1),
    )


@torch.no_grad()
def read(model: HSAModel, texts: list[Written]) -> Iterator[tuple[bool, bool]]:
    """(correct, retrieved) of each of several texts of one length, in one batch."""
    device = next(model.parameters()).device
    ids = torch.from_numpy(np.stack([text.ids for text in texts])).to(device)
    output = prefill(model, ids[:, :-1], last=max(text.answer_tokens for text in texts))
    predictions = output.logits.argmax(dim=-1).cpu()
    for b, text in enumerate(texts):
        predicted = predictions[b, -text.answer_tokens :].tolist()
        answer = text.ids[-text.answer_tokens :].tolist()
        correct = predicted[: text.value_tokens] == answer[: text.value_tokens]
        if correct and text.value_tokens < text.answer_tokens:
            following = load_tokenizer().decode([predicted[text.value_tokens]])
            correct = not following[:1].isalnum()  # the value ends here
        first, last = (token // model.config.chunk_size for token in text.place)
        wanted = set(range(first, last + 1))
        chosen = (r.indices[b, -text.answer_tokens].flatten() for r in output.aux.retrievals)
        yield correct, any(wanted & set(chunks.tolist()) for chunks in chosen)


def audit(
    model: HSAModel,
    *,
    forms: Iterable[str] = tuple(FORMS),
    lengths: Iterable[int] = (1 << 12, 1 << 16, 1 << 20),
    questions: int = 50,
    seed: int = 1,
    report: Callable[[AuditRow], None] | None = None,
) -> list[AuditRow]:
    """One row per form and length. Every question has a text of its own, which starts at a random
    place of the validation split.

    report: called with each row once it is complete. A form that does not fit into a length is left
    out. Raises ValueError for an unknown form.
    """
    corpus = load_corpus("validation").tokens
    rows = []
    for form in forms:
        if form not in FORMS:
            raise ValueError(f"forms: got {form!r}, accepted are {', '.join(FORMS)}")
        for tokens in lengths:
            rng = Random(zlib.crc32(f"{EVALUATION} {seed} {form} {tokens}".encode()))
            drawn = [FORMS[form](rng) for _ in range(questions)]
            if max(map(size, drawn)) > tokens:
                continue
            texts = [
                write(rng, told, tile(corpus, tokens, rng.randrange(len(corpus)))) for told in drawn
            ]
            row = _row(model, texts, form, seed)
            rows.append(row)
            if report:
                report(row)
    return rows


def _row(model: HSAModel, texts: list[Written], form: str, seed: int) -> AuditRow:
    tokens = len(texts[0].ids)
    batch = min(max(BATCH_TOKENS // tokens, 1), MAX_BATCH)
    found = [
        result
        for first in range(0, len(texts), batch)
        for result in read(model, texts[first : first + batch])
    ]
    S = model.config.chunk_size
    whole = [text.place[0] // S == text.place[1] // S for text in texts]
    return AuditRow(
        form=form,
        tokens=tokens,
        samples=len(texts),
        correct=sum(correct for correct, _ in found),
        whole=sum(whole),
        whole_correct=sum(is_whole and correct for is_whole, (correct, _) in zip(whole, found)),
        retrieved=sum(retrieved for _, retrieved in found),
        seed=seed,
    )
