"""The chunk memory: on disk and back, its sequences in another order, its growth, and what does not
fit.

Dimensions: T tokens.
"""

import json

import pytest
import torch
from helpers import living_bytes
from material import tiny

from hsa_mini import ChunkMemory
from hsa_mini.inference.prefill import prefill

T = 37  # 9 chunks of 4 tokens, and one token that waits


def read(model, rows: int = 2, tokens: int = T) -> tuple[torch.Tensor, ChunkMemory]:
    """Ids int64 [rows, tokens + 10], and the memory of the first `tokens`."""
    ids = torch.randint(4096, (rows, tokens + 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return ids, model(ids[:, :tokens]).memory


@torch.no_grad()
def rest(model, ids: torch.Tensor, memory: ChunkMemory) -> torch.Tensor:
    """Logits of the ten tokens that follow."""
    return model(ids[:, -10:], memory).logits


@pytest.mark.parametrize("changes", [{}, dict(query_block=4), dict(tied=False)], ids=str)
@pytest.mark.parametrize("tokens", [1, 36, T])
def test_a_memory_from_disk_goes_on_like_the_one_that_was_saved(tmp_path, changes, tokens):
    model = tiny(**changes)
    ids, memory = read(model, tokens=tokens)
    memory.save(tmp_path / "memory")
    loaded = ChunkMemory.load(tmp_path / "memory")
    assert (loaded.position, len(loaded.chunks), loaded.batch) == (
        memory.position,
        len(memory.chunks),
        memory.batch,
    )
    assert torch.equal(rest(model, ids, loaded), rest(model, ids, memory))


def test_what_is_written_into_a_loaded_memory_stays_out_of_the_file(tmp_path):
    model = tiny()
    ids, memory = read(model)
    memory.save(tmp_path / "memory")
    before = (tmp_path / "memory" / "memory.safetensors").read_bytes()
    loaded = ChunkMemory.load(tmp_path / "memory")
    loaded.chunks.replace(
        0,
        *(
            torch.zeros_like(store[:, :2])
            for store in (loaded.chunks.k, loaded.chunks.v, loaded.chunks.landmarks)
        ),
    )
    rest(model, ids, loaded)
    assert not loaded.chunks.k[:, :2].any()
    assert (tmp_path / "memory" / "memory.safetensors").read_bytes() == before


def test_room_behind_the_chunks_is_not_written(tmp_path):
    model = tiny()
    roomy = ChunkMemory(model.config, reserve_tokens=100_000)
    with torch.no_grad():
        model(torch.randint(4096, (1, T)), roomy)
    roomy.save(tmp_path / "memory")
    assert (tmp_path / "memory" / "memory.safetensors").stat().st_size < 100_000


def test_an_empty_or_altered_memory_is_refused(tmp_path):
    model = tiny()
    with pytest.raises(ValueError, match="^memory: got an empty one"):
        ChunkMemory(model.config).save(tmp_path / "memory")
    assert not any(tmp_path.iterdir())
    with pytest.raises(
        ValueError, match="^path: got .*memory .*; accepted is the folder of a checkpoint"
    ):
        ChunkMemory.load(tmp_path / "memory")
    read(model)[1].save(tmp_path / "memory")
    (tmp_path / "memory" / "position.json").write_text(json.dumps({"position": T + 4}))
    with pytest.raises(ValueError, match="position.json does not match its manifest.json"):
        ChunkMemory.load(tmp_path / "memory")


def test_a_memory_of_another_configuration_is_refused_by_the_model(tmp_path):
    read(tiny())[1].save(tmp_path / "memory")
    with pytest.raises(ValueError, match="^memory: got one of another configuration"):
        tiny(top_k=3)(torch.zeros(2, 1, dtype=torch.int64), ChunkMemory.load(tmp_path / "memory"))


@pytest.mark.parametrize("rows", [[1, 0, 2], [2, 2], [0, 1, 2, 0, 1]])
@pytest.mark.parametrize("changes", [{}, dict(query_block=4)], ids=str)
def test_selected_sequences_go_on_as_themselves(rows, changes):
    model = tiny(**changes)
    ids, memory = read(model, rows=3)
    _, alone = read(model, rows=3)
    want = rest(model, ids, alone)[rows]
    memory.reorder(torch.tensor(rows))
    assert (rest(model, ids[rows], memory) - want).abs().max() < 1e-5


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([0, 3]),
        torch.tensor([-1]),
        torch.tensor([0.0]),
        torch.tensor([[0]]),
        torch.tensor([]).long(),
    ],
)
def test_sequences_that_are_not_there_cannot_be_selected(rows):
    with pytest.raises(ValueError, match="^rows: got .*, accepted are int64 .B'. of 0 to 2$"):
        read(tiny(), rows=3)[1].reorder(rows)


@torch.no_grad()
def test_growing_holds_no_more_than_one_store_twice(monkeypatch):
    """Of K, V and landmarks: the largest of the three beside all that is held."""
    config = tiny().config
    memory = ChunkMemory(config)
    kv, landmark = (
        (config.chunk_size, config.hsa_kv_heads, config.hsa_head_dim),
        (config.retrieval_heads, config.retrieval_dim),
    )
    shapes = (kv, kv, landmark)
    fresh = [torch.randn(1, 4096, *shape) for shape in shapes]
    want = [part.clone() for part in fresh]
    memory.chunks.append(*fresh)
    del fresh
    alive, zeros = [], torch.zeros

    def watched(*arguments, **options):
        made = zeros(*arguments, **options)
        alive.append(living_bytes())
        return made

    before = living_bytes()
    monkeypatch.setattr(torch, "zeros", watched)
    memory.chunks.append(*(part[:, :1] for part in want))
    sizes = [part.nbytes * 9 // 8 for part in want]
    assert len(alive) == 3 and max(alive) - before <= sizes[0] + sum(sizes) // 9 + 10_000
    for store, part in zip((memory.chunks.k, memory.chunks.v, memory.chunks.landmarks), want):
        assert torch.equal(store, torch.cat((part, part[:, :1]), dim=1))


@pytest.mark.parametrize("offload", [False, True])
@torch.no_grad()
def test_a_text_that_does_not_fit_is_refused_before_it_is_read(monkeypatch, offload):
    model, free = tiny(), 1 << 40
    monkeypatch.setattr("hsa_mini.memory.memory_budget.free_bytes", lambda device: free)
    ids = torch.randint(4096, (2, 300))
    memory = ChunkMemory(model.config, offload=offload)
    prefill(model, ids[:, :50], memory)
    copy = rest(model, ids[:, 50:60], memory.fork())
    free, stores = (
        1_000_000,
        [store.data_ptr() for store in (memory.chunks.k, memory.chunks.v, memory.chunks.landmarks)],
    )
    long = torch.randint(4096, (2, 40_000))
    with pytest.raises(
        MemoryError,
        match=r"^memory: got 48,240 tokens, .* GB more .* on cpu .* up to [\d,]+ tokens$",
    ) as caught:
        prefill(model, long, memory)
    assert (
        memory.position == 50
        and [
            store.data_ptr()
            for store in (memory.chunks.k, memory.chunks.v, memory.chunks.landmarks)
        ]
        == stores
    )
    fits = int(str(caught.value).split("up to ")[1].split(" tokens")[0].replace(",", ""))
    room = dict(batch=2, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(MemoryError, match=f"up to {fits:,} tokens"):
        memory.reserve(fits + 4, **room)
    memory.reserve(fits, **room)
    assert memory.chunks.buffers[0].shape[1] * 4 == fits
    assert torch.equal(rest(model, ids[:, 50:60], memory), copy)


@torch.no_grad()
def test_a_prefill_that_is_cut_short_leaves_the_memory_as_it_was():
    model = tiny()
    ids, memory = read(model)
    twin = read(model)[1]

    def stop(tokens):
        raise KeyboardInterrupt

    for cut in (memory, ChunkMemory(model.config)):
        with pytest.raises(KeyboardInterrupt):
            prefill(model, torch.randint(4096, (2, 5000)), cut, segment=1000, progress=stop)
    assert cut.batch is None and cut.position == 0
    assert torch.equal(rest(model, ids, memory), rest(model, ids, twin))


@pytest.mark.parametrize("part", ["logits", "upper_decoder", "append_chunks", "lower_decoder"])
@torch.no_grad()
def test_a_segment_that_is_cut_short_leaves_the_memory_as_it_was(monkeypatch, part):
    model = tiny()
    ids, memory = read(model)
    plain = getattr(model, part)

    def fails(*arguments, **options):
        plain(*arguments, **options)
        raise torch.OutOfMemoryError("no more memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, part, fails)
        with pytest.raises(torch.OutOfMemoryError):
            model(torch.randint(4096, (2, 50)), memory)
    assert memory.position == T and torch.equal(
        rest(model, ids, memory), rest(model, ids, read(model)[1])
    )


def test_a_memory_of_another_dtype_is_refused_and_stays_usable():
    model = tiny()
    ids, memory = read(model)
    with pytest.raises(
        ValueError, match="^memory: got torch.float32 on cpu, accepted is torch.float64 on cpu"
    ):
        tiny(torch.float64)(ids[:, -10:], memory)
    assert torch.equal(rest(model, ids, memory), rest(model, ids, read(model)[1]))
