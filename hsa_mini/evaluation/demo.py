"""One needle in a haystack of any length: the question, the answer, and where the model looked."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from hsa_mini.config import MAX_TOKENS
from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.evaluation.haystack import chunks_retrieved
from hsa_mini.hsa_model import HSAModel
from hsa_mini.inference.generate import continue_from
from hsa_mini.inference.prefill import prefill
from hsa_mini.tasks.forms import place, s_niah, tile
from hsa_mini.tasks.sentences import DEMO

MIN_TOKENS = 1024
MIN_HAYSTACK = 64


@dataclass(frozen=True)
class Finding:
    """What was asked, answered and retrieved. scores: float32 [HSA layers, N], of the last prompt token; -inf: not visible."""

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

    def chunk_text(self, chunk: int, *, marks: tuple[str, str] = (">>>", "<<<")) -> str:
        """The text of a chunk; what belongs to the needle stands between the marks."""
        tokenizer = load_tokenizer()
        needle = tokenizer.encode_ordinary(self.needle_text)
        rows = self.ids.tolist()
        first = chunk * self.chunk_size
        last = (chunk + 1) * self.chunk_size
        start = next(
            (
                i
                for i in range(first - len(needle) + 1, last)
                if i >= 0 and rows[i : i + len(needle)] == needle
            ),
            None,
        )
        if start is None:
            return tokenizer.decode(rows[first:last])
        cuts = (first, max(start, first), min(start + len(needle), last), last)
        before, inside, after = (tokenizer.decode(rows[a:b]) for a, b in zip(cuts, cuts[1:]))
        return f"{before}{marks[0]}{inside}{marks[1]}{after}"

    def to_json(self) -> dict:
        """What the command line's JSON holds."""
        left_out = ("scores", "ids", "needle_text", "chunk_size")
        return {name: value for name, value in vars(self).items() if name not in left_out}


def find_needle(
    model: HSAModel,
    haystack: np.ndarray,
    *,
    tokens: int,
    depth: float = 0.5,
    seed: int = 0,
    first: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Finding:
    """Hide needles in `tokens` tokens of `haystack` (from token `first` on, repeated to length) and ask for one.

    depth: 0 puts the needle first, 1 last of what lies outside the window. seed: of keys (held-out ones, none of which
    stands in the haystack), values and distractors. Raises ValueError for a haystack of fewer than 64 tokens, or tokens,
    depth or seed out of range.
    """
    if len(haystack) < MIN_HAYSTACK:
        raise ValueError(
            f"haystack: got {len(haystack)} tokens of text, accepted are at least {MIN_HAYSTACK}"
        )
    if not MIN_TOKENS <= tokens <= MAX_TOKENS:
        raise ValueError(f"tokens: got {tokens}, accepted are {MIN_TOKENS} to {MAX_TOKENS}")
    if seed < 0:
        raise ValueError(f"seed: got {seed}, accepted is 0 or more")
    config = model.config
    device = next(model.parameters()).device
    tokenizer = load_tokenizer()
    text = tile(haystack, tokens, first)
    rng = np.random.default_rng((DEMO, seed))
    problem = s_niah(rng, absent_from=tokenizer.decode(text[: len(haystack)].tolist()))
    sample = place(
        rng, problem, tokens=tokens, depth=depth, chunk_size=config.chunk_size, window=config.window
    )
    ids = torch.from_numpy(sample.apply(text))

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    output = prefill(model, ids[None].to(device), progress=progress)
    scores = retrieval_scores(model, output)  # reads the result, and so waits for the GPU
    prefilled = time.perf_counter()
    generation = continue_from(model, output, max_new_tokens=len(sample.answer))
    answer = generation.ids[0].tolist()
    decoded = time.perf_counter()

    needle_chunks = sample.first_chunks(config.chunk_size)
    retrieved_chunks = [sorted(chunks) for chunks in chunks_retrieved(generation.first)]
    return Finding(
        tokens=tokens,
        depth=depth,
        seed=seed,
        device=str(device),
        question=problem.question.text.split("\n")[1],
        expected=problem.question.answer,
        answer=tokenizer.decode(answer),
        correct=answer == sample.answer.tolist(),
        needle_chunks=needle_chunks,
        retrieved_chunks=retrieved_chunks,
        retrieved=any(set(needle_chunks) & set(chunks) for chunks in retrieved_chunks),
        prefill_seconds=round(prefilled - began, 3),
        decode_seconds=round(decoded - prefilled, 3),
        peak_memory_bytes=peak_memory_bytes(device),
        scores=scores,
        ids=ids.numpy(),
        needle_text=problem.sentences[0],
        chunk_size=config.chunk_size,
    )


@torch.no_grad()
def retrieval_scores(model: HSAModel, output) -> np.ndarray:
    """Scores of the last token read over all chunks, the best of its retrieval heads: float32 [HSA layers, N]."""
    memory = output.memory
    rows = []
    for retrieval in output.aux.retrievals:
        query = retrieval.queries[0, -1].float()  # [J_r, R]
        scores = torch.stack(
            [memory.landmarks[0, :, j].float() @ query[j] for j in range(len(query))]
        ).amax(dim=0)
        rows.append(scores / query.shape[-1] ** 0.5)
    visible = (
        torch.arange(1, memory.chunks + 1, device=rows[0].device) * model.config.chunk_size
        < memory.position
    )
    return torch.stack(rows).masked_fill(~visible, float("-inf")).cpu().numpy()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used: of the GPU's by tensors, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
