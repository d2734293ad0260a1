"""Questions to an index, and the chunks that a phrase finds.

`ask`: the model reads the question behind the text, on a fork of the memory, which stays as it is,
and answers. The score of a chunk is its share of the retrieval weights of the last token of the
prompt: the mean over HSA layers and key/value heads.

`find`: the model reads the phrase alone, so that no other text stands in its windows. All tokens of
the phrase are compared with all landmarks, in the lowest HSA layer. The score of a chunk is its
share of the softmax over all pairs of a token and a chunk.

Dimensions: T tokens, J key/value heads, J_r retrieval heads, R retrieval dimension, K chunks kept,
N chunks.
"""

import time
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch

from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.hsa_model import HSAModel
from hsa_mini.index.prompts import make_prompt
from hsa_mini.index.stored import Index
from hsa_mini.inference.generate import continue_from
from hsa_mini.inference.prefill import prefill
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.model.core import Output

MAX_CHARACTERS = 4096  # of a question
# The scores of `find` are multiplied by this before the softmax. With `mini` and passages of 32 to
# 192 tokens, 2 and 4 found more of them than 1 and 8.
SHARPNESS = 2.0
BLOCK = 4096  # chunks that are compared at once


@dataclass(frozen=True)
class FoundChunk:
    """A chunk of the text: its number, file, first and last line, score and text."""

    chunk: int
    file: str
    line: int
    last_line: int
    score: float
    text: str


@dataclass(frozen=True)
class Reply:
    """What the model answers (None from `find`), and chunks, the best one first.

    trained: whether the question has a form that the shipped models were trained on.
    """

    question: str
    answer: str | None
    trained: bool
    chunks: list[FoundChunk]
    seconds: float

    def to_json(self) -> dict:
        """What the command line writes as JSON."""
        return asdict(self)


def check_question(question: str) -> None:
    """Raise ValueError for a question that is empty, too long, or not UTF-8."""
    accepted = f"accepted is a text of 1 to {MAX_CHARACTERS:,} characters"
    if not question.strip() or len(question) > MAX_CHARACTERS:
        got = f"{len(question):,}" if len(question) <= MAX_CHARACTERS else "too many"
        raise ValueError(f"QUESTION: got {got} characters, {accepted}")
    if any("\ud800" <= character <= "\udfff" for character in question):
        raise ValueError(f"QUESTION: got bytes that are not UTF-8, {accepted}")


def ask(model: HSAModel, index: Index, question: str, *, chunks: int = 3) -> Reply:
    """The model's answer, and the best of the chunks that it has retrieved for it.

    Raises ValueError as `check_question`.
    """
    check_question(question)
    began = time.perf_counter()
    prompt = make_prompt(question)
    unread = index.text.tokens[index.memory.position :].tolist()
    ids = torch.tensor([unread + load_tokenizer().encode_ordinary(prompt.text)])
    output = prefill(model, ids.to(index.memory.chunks.landmarks.device), index.memory.fork())
    found = _best(index, _weights(output), chunks)
    answer = prompt.answer(partial(continue_from, model, output))
    seconds = round(time.perf_counter() - began, 3)
    return Reply(question, answer, prompt.trained, found, seconds)


def find(model: HSAModel, index: Index, phrase: str, *, chunks: int = 3) -> Reply:
    """The chunks that a phrase finds. Raises ValueError as `check_question`."""
    check_question(phrase)
    began = time.perf_counter()
    landmarks = index.memory.chunks.landmarks
    ids = torch.tensor([load_tokenizer().encode_ordinary(phrase)], device=landmarks.device)
    output = prefill(model, ids, ChunkMemory(model.config), last=ids.shape[1])
    queries = output.aux.retrievals[0].queries[0].transpose(0, 1).float()  # [J_r, T, R]
    scale = SHARPNESS / queries.shape[-1] ** 0.5
    found = [
        (scale * queries @ block.permute(1, 2, 0).float()).logsumexp(dim=(0, 1))
        for block in landmarks[0].split(BLOCK)
    ]
    scores = torch.cat([*found, landmarks.new_empty(0)]).double().softmax(dim=0).cpu().numpy()
    seconds = round(time.perf_counter() - began, 3)
    return Reply(phrase, None, False, _best(index, scores, chunks), seconds)


def _weights(output: Output) -> np.ndarray:
    """The share of every chunk in the retrieval weights of the last token, float64 [N]."""
    retrievals = output.aux.retrievals
    N = len(output.memory.chunks)
    total = np.zeros(N)
    for retrieval in retrievals:
        indices, weights = (x[0, -1].flatten().cpu() for x in retrieval[1:])  # [J, K] -> [J*K]
        chosen = indices >= 0
        total += np.bincount(indices[chosen], weights[chosen].double(), minlength=N)
    return total / (len(retrievals) * retrievals[0].weights.shape[2])


def _best(index: Index, scores: np.ndarray, count: int) -> list[FoundChunk]:
    """The chunks of the text with the highest scores above 0, the highest first."""
    S = index.memory.config.chunk_size
    text = index.text
    scores = scores[: -(-len(text) // S)]  # the chunks behind these hold the question
    best = [int(i) for i in np.argsort(-scores, kind="stable")[:count] if scores[i] > 0]
    found = []
    for chunk in best:
        first = chunk * S
        last = min(first + S, len(text))
        content = load_tokenizer().decode(text.tokens[first:last].tolist())
        score = round(float(scores[chunk]), 4)
        found.append(FoundChunk(chunk, *text.lines(first, last), score, content))
    return found
