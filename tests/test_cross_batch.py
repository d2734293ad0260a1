"""Training among the chunks of other sequences equals a memory that holds those chunks already."""

from functools import partial

import pytest
import torch
from material import TINY, tiny

from hsa_mini import ChunkMemory, Output
from hsa_mini.model.chunk_encoder import EncodedChunks
from hsa_mini.training.cross_batch import ChunkQueue, CrossBatchChunks
from hsa_mini.training.step import fill_queue

IDS = torch.randint(4000, (4, 50), generator=torch.Generator().manual_seed(1))
EARLIER = torch.randint(4000, (2, 40), generator=torch.Generator().manual_seed(2))


def encoded(model, ids: torch.Tensor) -> EncodedChunks:
    """The chunks of ids, as a pass in training mode returns them."""
    chunks = model.train()(ids, gumbel_noise=False).aux.encoded
    model.eval()
    return chunks


def among_others(model, ids: torch.Tensor, queue: ChunkQueue, isolated: int = 0) -> Output:
    """ids read among the chunks of the whole batch and of the queue."""
    source = partial(CrossBatchChunks, encoder=model.encoder, queue=queue, isolated=isolated)
    return model(ids, chunk_source=source)


def filled(model, size: int) -> ChunkQueue:
    queue = ChunkQueue(size)
    with torch.no_grad():
        queue.push(model.train()(EARLIER).aux.encoded, torch.arange(2))
    model.eval()
    return queue


@pytest.mark.parametrize(
    "changes", [{}, dict(query_block=2), dict(exclude_window=True), dict(top_k=100)], ids=str
)
@pytest.mark.parametrize("size", [0, 3, 30])
def test_a_crowd_is_what_was_read_before(size, changes):
    """The same as a memory that holds all others' chunks; only RoPE's float32 table differs by the
    shift.
    """
    model = tiny(torch.float64, **changes)
    queue = filled(model, size)
    got = among_others(model, IDS, queue)
    with torch.no_grad():
        own = model(IDS).memory
    for b in range(4):
        memory = ChunkMemory(model.config)
        k, v, summaries = (store[None] for store in queue.stores)
        memory.chunks.append(k, v, model.encoder.landmarks(summaries))
        for i in (1, 2, 3):
            other = (b + i) % 4
            memory.chunks.append(
                *(
                    part[other : other + 1]
                    for part in (own.chunks.k, own.chunks.v, own.chunks.landmarks)
                )
            )
        memory.lengths = (len(memory.chunks) * TINY.chunk_size,)
        assert len(memory.chunks) == size + 3 * len(own.chunks)
        want = model(IDS[b : b + 1], memory)
        assert (got.logits[b] - want.logits[0]).abs().max() < 1e-6
        for ours, theirs in zip(got.aux.retrievals, want.aux.retrievals):
            assert torch.equal(ours.indices[b], theirs.indices[0])
    assert (got.logits - model(IDS).logits).abs().max() > 1e-3
    assert len(got.memory.chunks) == len(own.chunks)  # what is kept is one's own


@pytest.mark.parametrize("size", [0, 7])
def test_who_is_alone_in_a_crowd_is_as_without_one(size):
    """And nothing changes for all other sequences."""
    model = tiny(torch.float64)
    queue = filled(model, size)
    none, all_of_them = model(IDS), among_others(model, IDS, queue)
    for alone in range(5):
        got = among_others(model, IDS, queue, alone)
        want = torch.cat((none.logits[:alone], all_of_them.logits[alone:]))
        assert (got.logits - want).abs().max() < 1e-12


def test_gradients_reach_the_batch_and_not_what_was_encoded_before():
    model = tiny(torch.float64, top_k=100, tied=False)
    queue = filled(model, 16)
    loss = among_others(model, IDS, queue).logits[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, model.embedding.weight)
    neighbours, earlier = (
        [i for i in ids.flatten().tolist() if i not in IDS[0]] for ids in (IDS[1:], EARLIER)
    )
    assert (
        gradient[neighbours].any()
        and not gradient[[i for i in earlier if i not in neighbours]].any()
    )
    assert not any(store.requires_grad for store in queue.stores)


def test_landmarks_of_the_past_are_those_of_the_projection_of_now():
    """A larger projection makes old and new landmarks larger by the same factor."""
    model = tiny(torch.float64)
    queue = filled(model, 16)
    before = CrossBatchChunks(encoded(model, IDS), model.encoder, queue).landmarks
    with torch.no_grad():
        model.encoder.landmark.weight *= 2
    assert torch.equal(
        CrossBatchChunks(encoded(model, IDS), model.encoder, queue).landmarks, 2 * before
    )


def test_a_crowd_never_brings_a_sequence_its_own_future():
    model = tiny(torch.float64, top_k=100)
    changed = IDS.clone()
    changed[0, 30:] = (changed[0, 30:] + 1) % 4096
    queue = filled(model, 5)
    with torch.no_grad():
        got, want = (among_others(model, x, queue).logits for x in (changed, IDS))
    assert torch.equal(got[0, :30], want[0, :30]) and not torch.equal(got[1], want[1])


def test_the_past_is_the_newest_chunks():
    model = tiny()
    with torch.no_grad():
        n = len(model(IDS).memory.chunks)
        queue, small, rows = ChunkQueue(2 * n + 3), ChunkQueue(3), torch.tensor([3, 1])
        seen = []
        for i in range(3):
            chunks = encoded(model, IDS + i)
            seen.append((chunks.k, chunks.v, chunks.cls_states, chunks.landmarks))
            for kept in (queue, small):
                kept.push(chunks, rows)
        for store, tail, new, before in zip(queue.stores, small.stores, seen[2], seen[1]):
            assert torch.equal(store, torch.cat((before[1, -3:], new[3], new[1]))) and torch.equal(
                tail, new[1, -3:]
            )
        assert torch.equal(
            model.encoder.landmarks(queue.stores[2][None])[0, 3 : n + 3], seen[2][3][3]
        )
    for size in (-1, 2.0, None):
        with pytest.raises(ValueError, match="^size: got .*, accepted is an integer of at least 0"):
            ChunkQueue(size)


def test_the_queue_takes_rows_of_every_kind():
    """The first third of a batch, whatever stands in it: rows with questions too."""
    model = tiny().train()
    ids = torch.randint(4000, (6, 48), generator=torch.Generator().manual_seed(3))
    output = model(ids, gumbel_noise=False)
    queue = ChunkQueue(6)
    fill_queue(queue, output)
    kept = output.aux.encoded.k[:2].flatten(0, 1)
    assert torch.equal(queue.stores[0], kept[-6:]) and len(kept) >= 6
