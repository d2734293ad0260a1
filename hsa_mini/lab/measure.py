"""What a trained arm can do at each length: answer questions, predict text, copy. Works for any
`HSAModel`, in batches.

Dimensions: B texts read together, T tokens.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from hsa_mini.data.corpus import load_corpus
from hsa_mini.hsa_model import HSAModel
from hsa_mini.inference.prefill import prefill
from hsa_mini.lab.scales import Scale
from hsa_mini.tasks.forms import TASKS
from hsa_mini.tasks.placement import place, tile
from hsa_mini.tasks.sentences import EVALUATION

TOKENS_AT_ONCE = 1 << 19  # tokens of all texts in a batch together


@torch.no_grad()
def measure_arm(model: HSAModel, scale: Scale, *, seed: int = 1) -> dict[str, list[dict]]:
    """A row per length for every task, for "perplexity" and for "copy", and for "crowded" if the
    scale has distractors.

    Text and keys are held out, and the same for every model.
    """
    corpus = load_corpus("validation").tokens
    lengths = scale.lengths
    found = {
        task: [task_row(model, scale, task, tokens, corpus, seed) for tokens in lengths]
        for task in TASKS
    }
    found["perplexity"] = [perplexity_row(model, scale, tokens, corpus, seed) for tokens in lengths]
    found["copy"] = [copy_row(model, scale, tokens, corpus, seed) for tokens in lengths]
    if scale.distractors:
        crowded = [multiple * scale.stage.tokens for multiple in scale.crowded_multiples]
        options = {"distractors": scale.distractors}
        found["crowded"] = [
            task_row(model, scale, "s_niah", tokens, corpus, seed, **options) for tokens in crowded
        ]
    return found


def task_row(
    model: HSAModel,
    scale: Scale,
    task: str,
    tokens: int,
    corpus: np.ndarray,
    seed: int,
    *,
    distractors: int = 0,
) -> dict:
    """Questions of one task over texts of one length, at depths from 0 to 1.

    An answer is correct if every token of the greedy answer is.
    """
    rng = np.random.default_rng((EVALUATION, seed, tokens))
    samples = []
    for depth in np.linspace(0, 1, scale.questions):
        text = tile(corpus, tokens, int(rng.integers(len(corpus))))
        sample = place(
            rng,
            TASKS[task](rng, distractors=distractors),
            tokens=tokens,
            depth=float(depth),
            chunk_size=model.config.chunk_size,
            window=scale.config.window,  # not the arm's, so that all arms get the same questions
        )
        samples.append((sample.apply(text), sample))
    right: list[bool] = []
    for batch in batches(samples, tokens):
        ids = torch.from_numpy(np.stack([ids for ids, _ in batch]))
        ids = ids.to(model.norm.weight.device)
        right += right_answers(model, ids, [sample.answer for _, sample in batch])
    correct = sum(right)
    return {
        "tokens": tokens,
        "samples": len(samples),
        "correct": correct,
        "accuracy": correct / len(samples),
        "right": list(map(int, right)),  # every question has a text of its own
    }


def right_answers(model: HSAModel, ids: torch.Tensor, answers: list[np.ndarray]) -> list[bool]:
    """Whether the greedy answer to each of the prompts ids [B, T] is right."""
    wanted = torch.from_numpy(np.stack(answers).astype(np.int64)).to(ids.device)
    output = prefill(model, ids)
    made = []
    for _ in range(wanted.shape[1]):
        made.append(output.logits[:, -1:].argmax(dim=-1))
        output = model(made[-1], output.memory)
    return (torch.cat(made, dim=1) == wanted).all(dim=1).tolist()


def perplexity_row(
    model: HSAModel, scale: Scale, tokens: int, corpus: np.ndarray, seed: int
) -> dict:
    """Perplexity of the last `tail` tokens of texts of one length.

    They are the same tokens at every length, so that only the text in front of them differs.
    """
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
        # of every text, in nats per token; the texts end alike at every length
        "losses": [round(loss, 5) for loss in losses.double().mean(dim=1).tolist()],
    }


def copy_row(model: HSAModel, scale: Scale, tokens: int, corpus: np.ndarray, seed: int) -> dict:
    """The share of tokens predicted correctly in a passage that opens a text and is repeated at its
    end.
    """
    rng = np.random.default_rng((EVALUATION, seed, 1))
    texts = []
    for first in rng.integers(len(corpus), size=scale.texts):
        passage = tile(corpus, scale.tail, int(first))
        between = tile(corpus, tokens - 2 * scale.tail, int(rng.integers(len(corpus))))
        texts.append(np.concatenate((passage, between, passage)))
    correct = torch.cat(
        [logits.argmax(dim=-1) == targets for logits, targets in _tails(model, scale, texts)]
    )
    # Nothing announces the copy. Its first half, which is not scored, lets the model notice it.
    correct = correct[:, scale.tail // 2 :]
    accuracy = correct.double().mean().item()
    return {"tokens": tokens, "scored": correct.numel(), "accuracy": accuracy}


def _tails(
    model: HSAModel, scale: Scale, texts: list[np.ndarray]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits float32 [B, tail, vocabulary] and targets [B, tail] of the ends of the texts."""
    for batch in batches(texts, len(texts[0])):
        ids = torch.from_numpy(np.stack(batch).astype(np.int64)).to(model.norm.weight.device)
        yield prefill(model, ids[:, :-1], last=scale.tail).logits.float(), ids[:, -scale.tail :]


def batches(texts: list, tokens: int) -> Iterator[list]:
    """The texts in lists of at most `TOKENS_AT_ONCE` tokens, or of a single text."""
    size = max(TOKENS_AT_ONCE // tokens, 1)
    return (texts[i : i + size] for i in range(0, len(texts), size))
