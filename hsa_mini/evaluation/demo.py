"""One needle in a text of any length: the question, the answer, and where the model looked."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from hsa_mini.config import MAX_TOKENS
from hsa_mini.data.encoder import TextEncoder, load_encoder
from hsa_mini.evaluation.retrievals import chunks_retrieved, retrieval_scores
from hsa_mini.hsa_model import HSAModel
from hsa_mini.inference.generate import continue_from
from hsa_mini.inference.prefill import prefill
from hsa_mini.memory.memory_budget import peak_memory_bytes
from hsa_mini.tasks.forms import s_niah
from hsa_mini.tasks.placement import Sample, place, tile
from hsa_mini.tasks.sentences import DEMO

MIN_TOKENS = 1024
MIN_HAYSTACK = 64  # tokens of text, which are repeated as often as needed


@dataclass(frozen=True)
class NeedleFinding:
    """What was asked, answered and retrieved.

    scores: float32 [HSA layers, N], the score of each chunk for the last prompt token; -inf where
    this token cannot see the chunk.
    ids: int64 [tokens], the whole prompt. encoder: the tokenizer of the model.
    """

    tokens: int
    depth: float
    seed: int
    device: str
    question: str
    expected: str
    answer: str
    correct: bool
    needle_chunks: list[int]
    retrieved_chunks: list[list[int]]
    retrieved: bool
    prefill_seconds: float
    decode_seconds: float
    peak_memory_bytes: int
    scores: np.ndarray
    ids: np.ndarray
    needle_text: str
    chunk_size: int
    encoder: TextEncoder

    def chunk_text(self, chunk: int, *, marks: tuple[str, str] = (">>>", "<<<")) -> str:
        """The text of a chunk, with the part that belongs to the needle between the marks."""
        decode = self.encoder.decode
        needle = self.encoder.encode(self.needle_text)
        ids = self.ids.tolist()
        first = chunk * self.chunk_size
        last = first + self.chunk_size
        # A needle that starts at one of these tokens reaches the chunk.
        starts = range(max(first - len(needle) + 1, 0), last)
        start = next((i for i in starts if ids[i : i + len(needle)] == needle), None)
        if start is None:
            return decode(ids[first:last])
        needle_first = max(start, first)
        needle_last = min(start + len(needle), last)
        before = decode(ids[first:needle_first])
        inside = decode(ids[needle_first:needle_last])
        after = decode(ids[needle_last:last])
        return f"{before}{marks[0]}{inside}{marks[1]}{after}"

    def to_json(self) -> dict:
        """What the command line writes as JSON."""
        left_out = ("scores", "ids", "needle_text", "chunk_size", "encoder")
        return {name: value for name, value in vars(self).items() if name not in left_out}


@dataclass(frozen=True)
class Reading:
    """The model's answer to a prompt, what it retrieved, and the time and memory it took."""

    answer: list[int]  # token ids
    retrieved_chunks: list[list[int]]  # one sorted list per HSA layer
    scores: np.ndarray
    prefill_seconds: float
    decode_seconds: float
    peak_memory_bytes: int


def find_needle(
    model: HSAModel,
    haystack: np.ndarray,
    *,
    tokens: int,
    depth: float = 0.5,
    seed: int = 0,
    first: int = 0,
    encoder: TextEncoder | None = None,
    progress: Callable[[int], object] | None = None,
) -> NeedleFinding:
    """Hide needles in a text of `tokens` tokens and ask for one of them.

    haystack: uint16 or uint32 [n], the text; it is read from token `first` on and repeated to
    the full length.
    depth: at 0 the needle opens the text; at 1 it stands at the end of the part outside the window.
    seed: decides keys, values and distractors. All keys are held-out ones that do not occur in the
    haystack. encoder: the model's own tokenizer (None: the course's).
    Raises ValueError if the haystack has fewer than 64 tokens, or if tokens, depth or seed is out
    of range.
    """
    _check_arguments(haystack, tokens, seed)
    encoder = encoder or load_encoder()
    text = tile(haystack, tokens, first)
    words = encoder.decode(text[: len(haystack)].tolist())
    options = {"tokens": tokens, "depth": depth, "seed": seed, "encoder": encoder}
    sample = draw_sample(model, words, **options)
    ids = sample.apply(text)
    reading = _read(model, torch.from_numpy(ids), len(sample.answer), progress)
    return report_finding(model, sample, ids, reading, seed=seed, encoder=encoder)


def draw_sample(
    model: HSAModel, words: str, *, tokens: int, depth: float, seed: int, encoder: TextEncoder
) -> Sample:
    """One needle to ask for and its five distractors, placed in a text of `tokens` tokens.

    words: a text in which none of the keys occurs. depth, seed, encoder: as in `find_needle`.
    """
    rng = np.random.default_rng((DEMO, seed))
    problem = s_niah(rng, absent_from=words)
    config = model.config
    return place(
        rng,
        problem,
        tokens=tokens,
        depth=depth,
        chunk_size=config.chunk_size,
        window=config.window,
        encode=encoder.array,
    )


def report_finding(
    model: HSAModel,
    sample: Sample,
    ids: np.ndarray,
    reading: Reading,
    *,
    seed: int,
    encoder: TextEncoder,
) -> NeedleFinding:
    """What the model made of a sample; ids: int64 [tokens], the text with the sample in it."""
    config = model.config
    needle_chunks = sample.first_chunks(config.chunk_size, encode=encoder.array)
    return NeedleFinding(
        tokens=sample.tokens,
        depth=sample.depth,
        seed=seed,
        device=str(next(model.parameters()).device),
        question=sample.problem.question.text.split("\n")[1],
        expected=sample.problem.question.answer,
        answer=encoder.decode(reading.answer),
        correct=reading.answer == sample.answer.tolist(),
        needle_chunks=needle_chunks,
        retrieved_chunks=reading.retrieved_chunks,
        retrieved=any(set(needle_chunks) & set(chunks) for chunks in reading.retrieved_chunks),
        prefill_seconds=reading.prefill_seconds,
        decode_seconds=reading.decode_seconds,
        peak_memory_bytes=reading.peak_memory_bytes,
        scores=reading.scores,
        ids=ids,
        needle_text=sample.problem.sentences[0],
        chunk_size=config.chunk_size,
        encoder=encoder,
    )


def _check_arguments(haystack: np.ndarray, tokens: int, seed: int) -> None:
    """Raise ValueError for what is out of range; `place` checks the depth."""
    if len(haystack) < MIN_HAYSTACK:
        raise ValueError(
            f"haystack: got {len(haystack)} tokens of text, accepted are at least {MIN_HAYSTACK}"
        )
    if not MIN_TOKENS <= tokens <= MAX_TOKENS:
        raise ValueError(f"tokens: got {tokens}, accepted are {MIN_TOKENS} to {MAX_TOKENS}")
    if seed < 0:
        raise ValueError(f"seed: got {seed}, accepted is 0 or more")


def _read(
    model: HSAModel,
    ids: torch.Tensor,
    answer_tokens: int,
    progress: Callable[[int], object] | None,
) -> Reading:
    """Read the prompt ids int64 [tokens] and answer it greedily, measuring time and memory."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    output = prefill(model, ids[None].to(device), progress=progress)
    scores = retrieval_scores(model, output)  # copies to the CPU, so it waits for the GPU
    prefilled = time.perf_counter()
    generation = continue_from(model, output, max_new_tokens=answer_tokens)
    answer = generation.ids[0].tolist()
    decoded = time.perf_counter()
    return Reading(
        answer=answer,
        retrieved_chunks=[sorted(chunks) for chunks in chunks_retrieved(generation.first)],
        scores=scores,
        prefill_seconds=round(prefilled - began, 3),
        decode_seconds=round(decoded - prefilled, 3),
        peak_memory_bytes=peak_memory_bytes(device),
    )
