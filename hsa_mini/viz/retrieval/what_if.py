"""What the model would answer if its layers kept other chunks, or weighed or read them otherwise.

The text stays as it was read. Only the tokens of the question and its answer are read anew, by the
model itself; the change is made in its layers while they read.

Dimensions: T tokens of a question and its answer, A of the answer, N chunks, K chunks kept, J
key/value heads, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from hsa_mini.checks import check_integer, check_number, quoted
from hsa_mini.hsa_model import HSAModel
from hsa_mini.index.prompts import make_prompt
from hsa_mini.lab.reading import concatenated
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.model.hsa import HSA, Retrieval
from hsa_mini.model.recency import prefer_newer
from hsa_mini.reference.retrieval import newest_top_k, weigh
from hsa_mini.viz.retrieval.asking import Asked, judge
from hsa_mini.viz.retrieval.picture import shown
from hsa_mini.viz.retrieval.trace import landmark_scores, trace


@dataclass(frozen=True)
class Change:
    """What is different while the model reads a question and its answer.

    layer: the HSA layer that changes; None: all of them. In every token of such a layer, in this
    order:

    1. top_k (K; None: the model's own) chunks are chosen by their scores, those of `pin` first.
    2. The chunks of `drop` are taken away. The layer weighs the others as if it had kept no more:
       with softmax weights these are the weights that were there, divided by their sum. So if one
       chunk is left its weight is 1, and if none is left HSA adds 0.
    3. shares[chunk], from 0 to 1, becomes the weight of a kept chunk, and the others share the rest
       in proportion to their weights. If there are no others, the rest is lost.
    4. Of two chunks in `swap`, each is read in the place and with the weight of the other.

    concatenated: the kept chunks are read with one softmax over all their tokens, which uses no
    weights. hsa=False: the layer adds 0. window=False: the window attention of all blocks adds 0.
    """

    layer: int | None = None
    top_k: int | None = None
    pin: tuple[int, ...] = ()
    drop: tuple[int, ...] = ()
    shares: Mapping[int, float] = field(default_factory=dict)
    swap: tuple[tuple[int, int], ...] = ()
    concatenated: bool = False
    hsa: bool = True
    window: bool = True

    @classmethod
    def of(cls, sent: dict) -> "Change":
        """The change in a message of the browser: lists for tuples, and pairs for a dict."""
        tuples = {name: tuple(sent[name]) for name in ("pin", "drop")}
        swap = tuple((first, second) for first, second in sent["swap"])
        return cls(**{**sent, **tuples, "shares": dict(map(tuple, sent["shares"])), "swap": swap})


@dataclass(frozen=True)
class Effect:
    """Of each of the A tokens that the model has answered, its probability before and after the
    change, behind the tokens that it has answered before it. answer, correct: what the model
    answers after the change; see `Asked`.
    """

    before: list[float]
    after: list[float]
    answer: str
    correct: bool | None

    @property
    def line(self) -> str:
        """The effect in words."""
        before, after = (math.prod(shares) for shares in (self.before, self.after))
        sign = {True: " (✓ right)", False: " (✗ wrong)", None: ""}[self.correct]
        return (
            f"The probability of the answer was {before:.3f} and is {after:.3f}. "
            f"The model answers “{shown(self.answer)}”{sign}."
        )


def what_if(model: HSAModel, asked: Asked, change: Change) -> Effect:
    """The effect of a change on the answer to a question.

    Raises ValueError for a layer or a chunk that is not there, for more pinned chunks than K, and
    for shares that are no shares.
    """
    check_change(change, model, asked)
    question = asked.ids[: -asked.answer_tokens]
    said = asked.ids[len(question) :]
    with changed(model, change):
        logits = _read(model, asked.text.memory.fork(), asked.ids)
        after = logits[len(question) - 1 : -1]  # [A, V]
        likeliest = after.argmax(axis=-1).tolist()
        same = next((i for i, (a, b) in enumerate(zip(likeliest, said)) if a != b), len(said))
        made = [*said[:same], *likeliest[same : same + 1]]
        if same < len(said):
            prompt = make_prompt(asked.question)
            memory = asked.text.memory.fork()
            logits = _read(model, memory, [*question, *made])
            while len(made) < prompt.max_new_tokens and made[-1] not in prompt.stop:
                made.append(int(logits[-1].argmax()))
                logits = _read(model, memory, made[-1:])
    answer = make_prompt(asked.question).in_words(made)
    correct, _, _ = judge(asked.question, answer, made, asked.text)
    before = asked.trace.logits[len(question) - 1 : -1]
    return Effect(_shares(before, said), _shares(after, said), answer, correct)


@contextmanager
def changed(model: HSAModel, change: Change) -> Iterator[None]:
    """Inside, the model's layers compute with a change, if their chunks come from `trace`. Only one
    thread may use the model meanwhile.
    """
    layers = [block.hsa for block in model.upper if block.hsa is not None]
    here = layers if change.layer is None else layers[change.layer : change.layer + 1]
    with ExitStack() as hooks:
        if change != Change(layer=change.layer):
            for layer in here:
                hooks.enter_context(
                    _hooked(layer, lambda *call: _changed_hsa(change, *call), with_kwargs=True)
                )
        if not change.window:
            for block in (*model.lower, *model.upper):
                hooks.enter_context(_hooked(block.swa, _without_output))
        yield


def rechosen(
    scores: torch.Tensor,
    indices: torch.Tensor,
    change: Change,
    weighting: str,
    recency: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunks that a layer keeps after a change, and their weights: int64 and float32 [T, J, K].

    scores [T, J, N]: of all chunks, -inf where a token cannot see them. indices [T, J, K]: the
    chunks that the layer has kept. recency [T, J]: see `prefer_newer`.
    """
    N = scores.shape[-1]
    indices = indices.long()
    if change.top_k is not None or change.pin:
        choice = scores.clone()
        choice[..., [i for i in change.pin if i < N]] += float(
            "inf"
        )  # what a token cannot see becomes NaN
        choice = choice.nan_to_num(float("-inf"), posinf=float("inf"), neginf=float("-inf"))
        indices = newest_top_k(choice, min(change.top_k or indices.shape[-1], N))
        if weighting == "stick_breaking":
            indices = indices.sort(dim=-1, descending=True).values
    indices = indices.masked_fill(_among(indices, change.drop), -1)
    kept = scores.gather(-1, indices.clamp(min=0)) if N else indices.float()
    weights = weigh(kept, indices < 0, weighting)
    if recency is not None:
        weights = prefer_newer(indices, weights, recency)
    if change.shares:
        all_of_it = weights.sum(dim=-1, keepdim=True)
        given = torch.zeros_like(weights)
        for chunk, share in change.shares.items():
            given = torch.where(indices == chunk, share * all_of_it, given)
        others = weights.masked_fill(_among(indices, tuple(change.shares)), 0.0)
        rest = (all_of_it - given.sum(dim=-1, keepdim=True)) / others.sum(dim=-1, keepdim=True)
        weights = given + others * rest.nan_to_num(0.0, posinf=0.0, neginf=0.0)
    for pair in change.swap:
        first, second = (indices == chunk for chunk in pair)
        indices = indices.masked_fill(first, pair[1]).masked_fill(second, pair[0])
    return indices, weights


def check_change(change: Change, model: HSAModel, asked: Asked) -> None:
    """Raise ValueError for a change that a model cannot make for this question. Chunks that the
    question has completed cannot be swapped, because not all of its tokens may see them.
    """
    S = model.config.chunk_size
    before = len(asked.text.ids) // S
    chunks = (len(asked.text.ids) + len(asked.ids)) // S
    if change.layer is not None:
        check_integer("layer", change.layer, 0, model.config.groups - 1)
    if change.top_k is not None:
        check_integer("top_k", change.top_k, 1, chunks)
    for name, most in (("pin", chunks), ("drop", chunks), ("shares", chunks), ("swap", before)):
        for chunk in np.ravel(list(getattr(change, name))).tolist():
            check_integer(name, chunk, 0, most - 1)
    for pair in change.swap:
        if len(set(pair)) != 2:
            raise ValueError(f"swap: got {quoted(list(pair))}, accepted are two different chunks")
    K = change.top_k or model.config.top_k
    if len(change.pin) > K:
        raise ValueError(f"pin: got {len(change.pin)} chunks, accepted are at most K ({K})")
    for share in (*change.shares.values(), sum(change.shares.values())):
        check_number("shares", float(share), 0.0, 1.0)


def _changed_hsa(change: Change, hsa: HSA, args: tuple, kwargs: dict, output: tuple) -> tuple:
    """The output of an HSA layer that has read the chunks of a `trace`, made anew with a change."""
    source = args[1]
    retrieval: Retrieval = output[1]
    position = kwargs["position"]
    scores = landmark_scores(
        hsa.config, retrieval.queries, kwargs["block_query"], source.landmarks, position
    )
    recency = None if hsa.recency is None else hsa.recency(args[0])[0]
    indices, weights = rechosen(scores, retrieval.indices[0], change, hsa.config.weighting, recency)
    indices = indices[None].int()
    weights = weights[None].to(retrieval.weights.dtype)
    q = source.queries.pop()  # what was read is read anew
    source.blends.pop()
    if not change.hsa:
        indices = torch.full_like(indices, -1)
        weights = torch.zeros_like(weights)
    if change.concatenated:
        names, local = indices.clamp(min=0).unique(return_inverse=True)
        k, v = (part[:, names.to(part.device)].to(q) for part in source.chunks[:2])
        blend = concatenated(q, k, v, local.masked_fill(indices < 0, -1))
        source.queries.append(q)
        source.blends.append(blend)
    else:
        blend = source.attend(q, indices, weights)
    return hsa.out(blend.flatten(-2)), Retrieval(retrieval.queries, indices, weights), output[2]


def _without_output(_layer, _args, output: tuple) -> tuple:
    return torch.zeros_like(output[0]), *output[1:]


@contextmanager
def _hooked(layer: torch.nn.Module, hook, **options) -> Iterator[None]:
    handle = layer.register_forward_hook(hook, **options)
    try:
        yield
    finally:
        handle.remove()


def _among(indices: torch.Tensor, chunks: tuple[int, ...]) -> torch.Tensor:
    return torch.isin(indices, torch.tensor(chunks, dtype=indices.dtype, device=indices.device))


def _read(model: HSAModel, memory: ChunkMemory, ids: list[int]) -> np.ndarray:
    """The logits [T, V] behind each of the tokens, which the memory has then read."""
    return trace(model, memory, torch.tensor([ids], device=model.embedding.weight.device)).logits


def _shares(logits: np.ndarray, ids: list[int]) -> list[float]:
    """The probability of each token: logits [A, V] -> A numbers."""
    shares = torch.from_numpy(logits).double().softmax(dim=-1)
    return shares[range(len(ids)), ids].tolist()
