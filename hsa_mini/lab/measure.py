"""What a trained arm can do, by length: answers to the questions of every task, perplexity, copies. For any `HSAModel`, many at once.

Dimensions: B texts at once, T tokens.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from hsa_mini.data.corpus import load_corpus
from hsa_mini.hsa_model import HSAModel
from hsa_mini.inference.prefill import prefill
from hsa_mini.lab.arms import Scale
from hsa_mini.tasks.forms import TASKS
from hsa_mini.tasks.placement import Sample, place, tile
from hsa_mini.tasks.sentences import EVALUATION

TOKENS_AT_ONCE = 1 << 19  # of all texts that are read together


@torch.no_grad()
def measure(model: HSAModel, scale: Scale, *, seed: int = 1) -> dict[str, list[dict]]:
    """Rows by length for each task, and for "perplexity" and "copy"; held-out text and keys, the same for every model."""
    corpus = load_corpus("validation").tokens
    found = {
        task: [ask(model, scale, task, tokens, corpus, seed) for tokens in scale.lengths]
        for task in TASKS
    }
    found["perplexity"] = [
        perplexity(model, scale, tokens, corpus, seed) for tokens in scale.lengths
    ]
    found["copy"] = [copies(model, scale, tokens, corpus, seed) for tokens in scale.lengths]
    return found


def ask(
    model: HSAModel, scale: Scale, task: str, tokens: int, corpus: np.ndarray, seed: int
) -> dict:
    """Questions of one task over texts of one length, at depths from 0 to 1; right: the greedy answer is, to its last token."""
    rng = np.random.default_rng((EVALUATION, seed, tokens))
    config = model.config
    right = 0
    samples = []
    for depth in np.linspace(0, 1, scale.questions):
        text = tile(corpus, tokens, int(rng.integers(len(corpus))))
        # with the scale's window: all arms are asked the same
        sizes = dict(
            tokens=tokens,
            depth=float(depth),
            chunk_size=config.chunk_size,
            window=scale.config.window,
        )
        sample = place(rng, TASKS[task](rng), **sizes)
        samples.append((sample.apply(text), sample))
    for few in _at_once(samples, tokens):
        ids = torch.from_numpy(np.stack([ids for ids, _ in few]))
        right += _right(model, ids.to(model.norm.weight.device), [sample for _, sample in few])
    return {
        "tokens": tokens,
        "samples": len(samples),
        "correct": right,
        "accuracy": right / len(samples),
    }


def _right(model: HSAModel, ids: torch.Tensor, samples: list[Sample]) -> int:
    """How many of the answers to ids [B, T] are right."""
    wanted = torch.from_numpy(np.stack([sample.answer.astype(np.int64) for sample in samples])).to(
        ids.device
    )
    output = prefill(model, ids)
    made = []
    for _ in range(wanted.shape[1]):
        made.append(output.logits[:, -1:].argmax(dim=-1))
        output = model(made[-1], output.memory)
    return int((torch.cat(made, dim=1) == wanted).all(dim=1).sum())


def perplexity(model: HSAModel, scale: Scale, tokens: int, corpus: np.ndarray, seed: int) -> dict:
    """Of the last `tail` tokens of texts: the same ones at every length, so only what lies before them differs."""
    rng = np.random.default_rng((EVALUATION, seed, 0))
    texts = [
        tile(corpus, tokens, (int(end) - tokens) % len(corpus))
        for end in rng.integers(len(corpus), size=scale.texts)
    ]
    losses = torch.cat(
        [
            cross_entropy(logits.mT, targets, reduction="none")
            for logits, targets in _tails(model, scale, texts)
        ]
    )
    return {
        "tokens": tokens,
        "scored": losses.numel(),
        "perplexity": losses.double().mean().exp().item(),
    }


def copies(model: HSAModel, scale: Scale, tokens: int, corpus: np.ndarray, seed: int) -> dict:
    """The share of tokens that are predicted right in a passage that stands at the beginning of a text and again at its end."""
    rng = np.random.default_rng((EVALUATION, seed, 1))
    texts = []
    for first in rng.integers(len(corpus), size=scale.texts):
        passage = tile(corpus, scale.tail, int(first))
        between = tile(corpus, tokens - 2 * scale.tail, int(rng.integers(len(corpus))))
        texts.append(np.concatenate((passage, between, passage)))
    right = torch.cat(
        [logits.argmax(dim=-1) == targets for logits, targets in _tails(model, scale, texts)]
    )
    # nothing announces the copy: its first half tells the model that it is one
    right = right[:, scale.tail // 2 :]
    return {"tokens": tokens, "scored": right.numel(), "accuracy": right.double().mean().item()}


def _tails(
    model: HSAModel, scale: Scale, texts: list[np.ndarray]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits float32 [B, tail, vocabulary] and targets [B, tail] of the last tokens of texts of one length."""
    for few in _at_once(texts, len(texts[0])):
        ids = torch.from_numpy(np.stack(few).astype(np.int64)).to(model.norm.weight.device)
        yield prefill(model, ids[:, :-1], last=scale.tail).logits.float(), ids[:, -scale.tail :]


def _at_once(texts: list, tokens: int) -> Iterator[list]:
    """Lists of as many texts as are read together."""
    most = max(TOKENS_AT_ONCE // tokens, 1)
    return (texts[i : i + most] for i in range(0, len(texts), most))
