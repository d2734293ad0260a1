"""The third exercise of notebook 11: a whole training step, on a model of ten thousand parameters.

The check takes two steps with it and compares losses, weights and the queue. Its batches hold a
copy, a question and plain text; the second one has no copy.

Dimensions: B sequences, T tokens; ids and parts [B, T+1].
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from hsa_mini.config import HSAConfig
from hsa_mini.exercises.check import Check
from hsa_mini.hsa_model import HSAModel
from hsa_mini.training.cross_batch import ChunkQueue, CrossBatchChunks
from hsa_mini.training.mixture import ANSWER, COPY, NONE, TEXT

STEPS = 2
TOKENS = 12
QUEUE_CHUNKS = 7
CONFIG = HSAConfig(
    vocab_size=40, width=16, lower_layers=1, groups=1, layers_per_group=1, mlp_width=24,
    window=4, heads=2, kv_heads=1, head_dim=8,
    chunk_size=4, top_k=2, hsa_heads=2, hsa_kv_heads=1, hsa_head_dim=8,
    retrieval_dim=8, exploration=False, embedding_std=0.1,
)  # fmt: skip


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and parts [3, T+1]; the first of the sequences has no question."""
    random = torch.Generator().manual_seed(number)
    ids = torch.randint(CONFIG.vocab_size, (3, TOKENS + 1), generator=random)
    question = [TEXT] * 7 + [NONE] * 3 + [ANSWER] * 3
    other = [TEXT] * 13 if number else [TEXT] * 7 + [COPY] * 6
    return ids, torch.tensor([other, question, [*question[1:], TEXT]])


def take_steps(step: Callable, text_weight: float, clip: float) -> tuple | None:
    """Two steps -> for each: the loss, all weights, and the [CLS] states of the queue.

    None if `step` does nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HSAModel(CONFIG, dtype=torch.float64).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    queue = ChunkQueue(QUEUE_CHUNKS)
    first = _weights(model)
    found = []
    for number in range(STEPS):
        try:
            loss = step(model, optimizer, queue, *batch(number), text_weight, clip)
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                raise RuntimeError(
                    "fill the queue after backward(), which still needs it"
                ) from None
            raise
        states = (
            torch.zeros(QUEUE_CHUNKS, CONFIG.width) if queue.stores is None else queue.stores[2]
        )
        found += [torch.nan if loss is None else loss, _weights(model), states.clone()]
        if loss is None and queue.stores is None and torch.equal(first, _weights(model)):
            return None
    return tuple(found)


def _weights(model: HSAModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _sum_of_means(each, parts, text_weight):
    masks = [parts == part for part in (TEXT, COPY, ANSWER)]
    text, copy, answer = (each[mask].mean() if mask.any() else each.sum() * 0 for mask in masks)
    return text_weight * text + copy + answer


def _means_without_a_check(each, parts, text_weight):
    text, copy, answer = (each[parts == part].mean() for part in (TEXT, COPY, ANSWER))
    return text_weight * text + copy + answer


def _one_mean(each, parts, text_weight):
    weights = torch.where(parts == TEXT, text_weight, 1.0)
    return (weights * each)[parts != NONE].mean()


def _clip(model, clip):
    clip_grad_norm_(model.parameters(), clip)


def _clip_each(model, clip):
    for parameter in model.parameters():
        clip_grad_norm_([parameter], clip)


def _always_scale(model, clip):
    norm = clip_grad_norm_(model.parameters(), torch.inf)
    for parameter in model.parameters():
        parameter.grad *= clip / norm


def _step(
    model, optimizer, queue, ids, parts, text_weight, clip, *,
    shift=1, parts_shift=1, loss_of=_sum_of_means, own_only=False, keep_gradients=False,
    shorten=_clip, update=True, rows=lambda has_answer: (~has_answer).nonzero()[:, 0],
    returns=True,
):  # fmt: skip
    source = partial(CrossBatchChunks, encoder=model.encoder, queue=queue)
    output = model(ids[:, :-1], chunk_source=None if own_only else source)
    targets = ids[:, shift : shift + TOKENS]
    each = cross_entropy(output.logits.mT, targets, reduction="none")
    loss = loss_of(each, parts[:, parts_shift : parts_shift + TOKENS], text_weight)
    if not keep_gradients:
        optimizer.zero_grad()
    loss.backward()
    shorten(model, clip)
    if update:
        optimizer.step()
    chosen = rows((parts == ANSWER).any(dim=1))
    if len(chosen):
        queue.push(output.aux.encoded, chosen)
    return loss.item() if returns else None


check_training_step = Check(
    name="training_step",
    answer=_step,
    examples=((1.0, 100.0), (0.25, 0.5)),
    run=take_steps,
    parts=tuple(
        f"{what} {step} of {STEPS}"
        for step in range(1, STEPS + 1)
        for what in ("the loss of step", "a weight after step", "a state in the queue after step")
    ),
    usual_mistakes={
        "every token must predict the next one: the targets are `ids[:, 1:]`.": partial(
            _step, shift=0
        ),
        "a part belongs to the token that is predicted: `parts[:, 1:]`.": partial(
            _step, parts_shift=0
        ),
        "this is the mean over all tokens, also those of the part NONE.": partial(
            _step, loss_of=lambda each, parts, text_weight: each.mean()
        ),
        "this is one mean over all tokens that count. Text, copies and answers each have a mean of "
        "their own, and the loss is their weighted sum.": partial(_step, loss_of=_one_mean),
        "the text must weigh `text_weight`.": partial(
            _step, loss_of=lambda each, parts, _: _sum_of_means(each, parts, 1.0)
        ),
        "the weight belongs to the text only, not to copies and answers.": partial(
            _step, loss_of=lambda each, parts, weight: weight * _sum_of_means(each, parts, 1.0)
        ),
        "copies are missing in the loss.": partial(
            _step, loss_of=lambda each, parts, weight: (
                _sum_of_means(each, parts.masked_fill(parts == COPY, NONE), weight)
            ),
        ),
        "the mean of no tokens is NaN. A part that the batch does not have counts as 0.": partial(
            _step, loss_of=_means_without_a_check
        ),
        "each sequence saw only its own chunks: pass `chunk_source` to the model.": partial(
            _step, own_only=True
        ),
        "the gradient was not shortened before the optimizer's step, or only later.": partial(
            _step, shorten=lambda model, clip: None
        ),
        "each number was cut off by itself, which turns the gradient. Shorten it as a whole.": (
            partial(_step, shorten=lambda model, clip: clip_grad_value_(model.parameters(), clip))
        ),
        "each parameter's gradient was shortened by itself. One length belongs to all of them.": (
            partial(_step, shorten=_clip_each)
        ),
        "a gradient that is shorter than `clip` must stay as it is. You stretched it.": partial(
            _step, shorten=_always_scale
        ),
        "the weights did not change: the optimizer has to take its step.": partial(
            _step, update=False
        ),
        "gradients of the step before were added: set them to zero before backward().": partial(
            _step, keep_gradients=True
        ),
        "nothing came into the queue: push the encoded chunks.": partial(
            _step, rows=lambda has_answer: ()
        ),
        "sequences with a question came into the queue. Their chunks may hold a needle.": partial(
            _step, rows=lambda has_answer: torch.arange(len(has_answer))
        ),
        "only sequences with a question came into the queue. It is the other way round.": partial(
            _step, rows=lambda has_answer: has_answer.nonzero()[:, 0]
        ),
        "always the same row came into the queue. Look which row of this batch has no answer.": (
            partial(_step, rows=lambda has_answer: torch.tensor([1]))
        ),
        "return the loss of the step.": partial(_step, returns=False),
    },
)  # fmt: skip
