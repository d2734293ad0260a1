"""Rows of several documents: nothing attends to or retrieves from another document."""

from functools import partial

import pytest
import torch
from helpers import assert_close
from material import (
    build,
    document_starts,
    every_dense_option,
    every_option,
    in_segments,
    text,
    tiny,
)

from hsa_mini import ChunkMemory
from hsa_mini.training.cross_batch import ChunkQueue, CrossBatchChunks
from hsa_mini.training.loss import mixture_loss
from hsa_mini.training.mixture import NONE, TEXT
from hsa_mini.training.optimizers.factory import make_optimizer
from hsa_mini.training.recipes import Recipe, Stage
from hsa_mini.training.step import train_step

# Two rows of 60 tokens: documents (first token, end without padding). Chunks have 4 tokens.
ROWS = [(0, 21), (24, 28), (28, 59)], [(0, 40), (40, 60)]
STARTS = document_starts(*([first for first, _ in row] for row in ROWS), tokens=60)
PIECES = [(b, first, end) for b, row in enumerate(ROWS) for first, end in row]


def each_alone(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """The logits [T, V] of every document, read by itself."""
    return [model(ids[b : b + 1, first:end]).logits[0] for b, first, end in PIECES]


@every_option
def test_a_document_in_a_row_is_read_as_if_it_stood_alone(option):
    """With the gradient of every parameter. RoPE's float32 table alone differs by the shift."""
    dtype, bound = (torch.float32, 1e-5) if option == "experts" else (torch.float64, 1e-6)
    model = build(option, dtype)
    ids = text(60)

    def gradients(logits: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        loss = torch.cat(logits).square().sum()
        found = torch.autograd.grad(loss, list(model.parameters()))
        return dict(zip((name for name, _ in model.named_parameters()), found))

    packed = model(ids, document_starts=STARTS).logits
    got = [packed[b, first:end] for b, first, end in PIECES]
    want = each_alone(model, ids)
    for ours, theirs in zip(got, want):
        assert_close(ours, theirs, bound)
    assert_close(gradients(got), gradients(want), bound)
    assert (model(ids).logits - packed)[0, 24:].abs().max() > 1e-3  # the borders matter


@every_dense_option
def test_no_number_and_no_gradient_crosses_a_border(option):
    """To the last bit: in the logits, in the gradient of every token's embedding."""
    model = build(option)
    ids = text(60)
    embedded = []
    model.embedding.register_forward_hook(lambda *args: embedded.append(args[2]))
    logits = model(ids, document_starts=STARTS).logits
    for b, first, end in PIECES:
        loss = logits[b, first:end].square().sum()
        (gradient,) = torch.autograd.grad(loss, embedded[0], retain_graph=True)
        assert gradient[b, first:end].any(dim=-1).all()
        gradient[b, first:end] = 0
        assert not gradient.any()
        changed = (ids + 1) % 512
        changed[b, first:end] = ids[b, first:end]
        others = model(changed, document_starts=STARTS).logits
        assert torch.equal(others[b, first:end], logits[b, first:end])


@pytest.mark.parametrize("option", ["default", "query block"])
@pytest.mark.parametrize("size", [1, 3, 16, 59])
@torch.no_grad()
def test_segments_give_what_the_whole_row_gives(option, size):
    model = build(option)
    ids = text(60)
    memory = ChunkMemory(model.config)
    parts = [
        model(part, memory, document_starts=starts).logits
        for part, starts in zip(ids.split(size, dim=1), STARTS.split(size, dim=1))
    ]
    assert_close(torch.cat(parts, dim=1), model(ids, document_starts=STARTS).logits, 1e-12)
    one = torch.zeros_like(STARTS)
    assert torch.equal(model(ids, document_starts=one).logits, model(ids).logits)
    assert_close(in_segments(model, ids, size), model(ids, document_starts=one).logits, 1e-12)


def test_isolated_sequences_keep_their_borders_and_others_see_the_whole_crowd():
    """In the crowd, the earlier documents of a row are other texts like those of the other rows."""
    model = tiny(torch.float64, top_k=100)
    ids = torch.randint(4096, (2, 60), generator=torch.Generator().manual_seed(1))
    queue = ChunkQueue(8)
    queue.push(model.train()(ids + 0, gumbel_noise=False).aux.encoded, torch.arange(2))
    model.eval()
    source = partial(CrossBatchChunks, encoder=model.encoder, queue=queue, isolated=1)
    got = model(ids, document_starts=STARTS, chunk_source=source)
    assert_close(got.logits[0], model(ids, document_starts=STARTS).logits[0], 1e-12)
    indices = got.aux.retrievals[0].indices[1, 40]  # the first token of its document
    assert sorted(indices[0][indices[0] >= 0].tolist()) == list(range(8 + 15 + 10))


def test_a_step_on_rows_is_a_step_on_the_documents():
    """The loss and the gradient's norm: the mean over all tokens but the first of each document."""
    ids = torch.randint(4096, (2, 60), generator=torch.Generator().manual_seed(1))
    parts = torch.full((2, 60), NONE, dtype=torch.int8)
    for b, first, end in PIECES:
        parts[b, first + 1 : end] = TEXT
    model = tiny(torch.float64).train()
    alone = [model(ids[b : b + 1, first : end - 1], gumbel_noise=False) for b, first, end in PIECES]
    logits = torch.cat([output.logits for output in alone], dim=1)
    targets = torch.cat([ids[b, first + 1 : end] for b, first, end in PIECES])[None]
    loss, _, _ = mixture_loss(logits, targets, torch.full_like(targets, TEXT))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    stage = Stage(steps=1, batch=2, tokens=59, gumbel_noise=False)
    recipe = Recipe((stage,))
    optimizer = make_optimizer(model, recipe)
    tensors = ids, parts, torch.tensor(0.0), torch.tensor(0), STARTS
    figures = train_step(model, optimizer, recipe, stage, ChunkQueue(0), *tensors)
    norm = torch.stack([x.norm() for x in gradients]).norm()
    assert figures.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert figures.gradient_norm.item() == pytest.approx(norm.item(), rel=1e-6)


@pytest.mark.parametrize(
    "starts, message",
    [
        (STARTS[:, 1:], r"got shape \[2, 59\], accepted is \[B, T\] with T=60"),
        (STARTS.float(), "got torch.float32, accepted are int32, int64"),
        (document_starts([6], [], tokens=60), "got 6 for the token at position 6 of row 0, "),
        (STARTS * (torch.arange(60) != 50), "got 0 for the token at position 50 of row 0, "),
        (STARTS + 4, "got 4 for the token at position 0 of row 0, "),
        (STARTS - 4, "got -4 for the token at position 0 of row 0, "),
    ],
)
def test_wrong_document_starts_are_refused(starts, message):
    with pytest.raises(ValueError, match=f"^document_starts: {message}") as caught:
        build()(text(60), document_starts=starts)
    assert "\n" not in str(caught.value)
