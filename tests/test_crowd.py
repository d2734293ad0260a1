"""Training in a crowd equals a memory that holds the others' chunks already."""

import pytest
import torch
from material import TINY, tiny

from hsa_mini import ChunkMemory
from hsa_mini.crowd import Past

IDS = torch.randint(4000, (4, 50), generator=torch.Generator().manual_seed(1))
EARLIER = torch.randint(4000, (2, 40), generator=torch.Generator().manual_seed(2))


def filled(model, size: int) -> Past:
    past = Past(size)
    with torch.no_grad():
        past.push(model(EARLIER).memory, torch.arange(2))
    return past


@pytest.mark.parametrize("changes", [{}, dict(query_block=2), dict(exclude_window=True), dict(top_k=100)], ids=str)
@pytest.mark.parametrize("size", [0, 3, 30])
def test_a_crowd_is_what_was_read_before(size, changes):
    """The same as a memory that holds all others' chunks; only RoPE's float32 table differs by the shift."""
    model = tiny(torch.float64, **changes)
    past = filled(model, size)
    got = model(IDS, past=past)
    with torch.no_grad():
        own = model(IDS).memory
    for b in range(4):
        memory = ChunkMemory(model.config)
        memory.append(*(store[None] for store in past.stores))
        for i in (1, 2, 3):
            other = (b + i) % 4
            memory.append(*(part[other : other + 1] for part in (own.k, own.v, own.landmarks)))
        memory.position = memory.chunks * TINY.chunk_size
        assert memory.chunks == size + 3 * own.chunks
        want = model(IDS[b : b + 1], memory)
        assert (got.logits[b] - want.logits[0]).abs().max() < 1e-6
        for ours, theirs in zip(got.aux.retrievals, want.aux.retrievals):
            assert torch.equal(ours.indices[b], theirs.indices[0])
    assert (got.logits - model(IDS).logits).abs().max() > 1e-3
    assert got.memory.chunks == own.chunks  # what is kept is one's own


def test_gradients_reach_the_batch_and_not_the_past():
    model = tiny(torch.float64, top_k=100, tied=False)
    past = filled(model, 16)
    loss = model(IDS, past=past).logits[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, model.embedding.weight)
    neighbours, earlier = ([i for i in ids.flatten().tolist() if i not in IDS[0]] for ids in (IDS[1:], EARLIER))
    assert gradient[neighbours].any() and not gradient[[i for i in earlier if i not in neighbours]].any()
    assert not any(store.requires_grad for store in past.stores)


def test_a_crowd_never_brings_a_sequence_its_own_future():
    model = tiny(torch.float64, top_k=100)
    changed = IDS.clone()
    changed[0, 30:] = (changed[0, 30:] + 1) % 4096
    past = filled(model, 5)
    with torch.no_grad():
        got, want = (model(x, past=past).logits for x in (changed, IDS))
    assert torch.equal(got[0, :30], want[0, :30]) and not torch.equal(got[1], want[1])


def test_the_past_is_the_newest_chunks():
    model = tiny()
    with torch.no_grad():
        memories = [model(IDS + i).memory for i in range(3)]
    rows = torch.tensor([3, 1])
    past = Past(2 * memories[0].chunks + 3)
    for memory in memories:
        past.push(memory, rows)
    for store, new, before in zip(past.stores, *((m.k, m.v, m.landmarks) for m in (memories[2], memories[1]))):
        assert torch.equal(store, torch.cat((before[1, -3:], new[3], new[1])))
    small = Past(3)
    small.push(memories[2], rows)
    assert torch.equal(small.stores[0], memories[2].k[1, -3:])
    for size in (-1, 2.0, None):
        with pytest.raises(ValueError, match="^size: got .*, accepted is an integer of at least 0"):
            Past(size)
