"""The folder of a memory: what contradicts itself, the configuration or the weights is refused."""

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from material import tiny
from safetensors.torch import load_file, save_file

from hsa_mini import ChunkMemory
from hsa_mini.inference.decode_step import DecodeStep
from hsa_mini.inference.prefill import prefill
from hsa_mini.memory.origin import fingerprint

T = 37  # 9 chunks of 4 tokens, and one token that waits


def saved(folder: Path, *, equal: bool = True, **changes) -> Path:
    """The memory of two texts, of 37 tokens, or the second of 30."""
    ids = torch.randint(4096, (2, T), generator=torch.Generator().manual_seed(0))
    model = tiny(**changes)
    lengths = None if equal else torch.tensor([T, 30])
    prefill(model, ids, lengths=lengths).memory.save(folder / "memory")
    return folder / "memory"


def seal(folder: Path) -> None:
    """Write a manifest that fits the files."""
    files = [file for file in folder.iterdir() if file.name != "manifest.json"]
    entries = {
        f.name: {"sha256": hashlib.sha256(f.read_bytes()).hexdigest(), "bytes": f.stat().st_size}
        for f in files
    }
    (folder / "manifest.json").write_text(json.dumps(entries))


def refused(folder: Path) -> str:
    """The one line that refuses the folder."""
    with pytest.raises(ValueError) as caught:
        ChunkMemory.load(folder)
    message = str(caught.value)
    assert message.startswith(f"path: {folder} cannot be read (memory: got ")
    assert message.isprintable() and len(message) < len(str(folder)) + 250
    return message


def alter_position(folder: Path, change: dict) -> None:
    path = folder / "position.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    seal(folder)


POSITIONS = [
    *({"position": value} for value in (0, -1, 33, T - 1, T + 1, T + 4, 1 << 40, 10**4000)),
    *({"position": value} for value in (37.0, True, "\x1b[1m", None, [37], {})),
    *({"padding": value} for value in ([0], [0, 0], [0, T], [1, 2], [0, -1], [0, 7, 7], [0, 7])),
    *({"padding": value} for value in (None, 0, "07", {"0": 7}, [0, 7.0], [0, True], [[0, 7]])),
    *({"padding": [0, 10**4000]}, {"padding": list(range(30))}, {"padding": [0] * 10**6}),
    *({"weights": value} for value in (0, "", "f" * 63, "f" * 65, "F" * 64, ["f" * 64], "é" * 64)),
]


@pytest.mark.parametrize("change", POSITIONS, ids=lambda change: f"{change!s:.30}")
def test_positions_that_contradict_the_tensors_or_have_other_types_are_refused(tmp_path, change):
    folder = saved(tmp_path)
    alter_position(folder, change)
    refused(folder)


@pytest.mark.parametrize("padding", [[], [0, 8], [7, 0], [0], [0, 7, 7]])
def test_the_lengths_of_sequences_fit_the_chunks(tmp_path, padding):
    folder = saved(tmp_path, equal=False)
    alter_position(folder, {"padding": padding})
    if padding in ([0, 8], [7, 0]):  # as long in all, so nothing contradicts
        assert ChunkMemory.load(folder).lengths == (T - padding[0], T - padding[1])
    else:
        refused(folder)


def last(value: float):
    return lambda x: x.flatten().index_fill(0, torch.tensor([-1]), value).view(x.shape)


CHANGES = {
    "another shape": lambda x: torch.cat((x, x), dim=1),
    "other axes": lambda x: x.transpose(0, 1),
    "another dtype": lambda x: x.double(),
    "whole numbers": lambda x: x.int(),
    "eight bits": lambda x: x.to(torch.float8_e4m3fn),
    "NaN": last(torch.nan),
    "infinity": last(-torch.inf),
    "no axis": lambda x: x.flatten()[0],
    "missing": None,
}
NAMES = ["k", "v", "landmarks", "partial", "lower.0.k", "upper.3.v", "block_queries.1"]


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_contradict_each_other_or_the_configuration_are_refused(
    tmp_path, change, name, equal
):
    folder = saved(tmp_path, equal=equal, query_block=2)
    tensors = load_file(folder / "memory.safetensors")
    value = tensors.pop(name)
    if CHANGES[change]:
        tensors[name] = CHANGES[change](value).contiguous()
    save_file(tensors, folder / "memory.safetensors")
    seal(folder)
    assert name in refused(folder) or name == "k"  # if K is wrong, others contradict it first


def test_a_tensor_too_many_is_refused_and_its_name_cannot_write_to_the_terminal(tmp_path):
    folder = saved(tmp_path)
    for name in ("lower.2.k", "block_queries.0", "\x1b[31m" * 99):
        tensors = load_file(folder / "memory.safetensors")
        save_file(tensors | {name: torch.zeros(3)}, folder / "memory.safetensors")
        seal(folder)
        assert repr(name)[:20] in refused(folder)
        save_file(tensors, folder / "memory.safetensors")


def test_batches_without_a_byte_cannot_claim_any_size(tmp_path):
    folder = saved(tmp_path)
    tensors = load_file(folder / "memory.safetensors")
    tensors |= {name: tensors[name][:, :0].clone() for name in ("k", "v", "landmarks")}
    save_file(tensors, folder / "memory.safetensors")
    content = (folder / "memory.safetensors").read_bytes()
    assert b"[2,0," in content
    (folder / "memory.safetensors").write_bytes(content.replace(b"[2,0,4", b"[9,0,4"))
    alter_position(folder, {"position": 3})
    refused(folder)


NO_OBJECT = {
    "nested": b"[" * 10**5 + b"]" * 10**5,
    "nested objects": b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
    "a list": b"[]",
    "no text": b"\xff",
    "a number": b"1" * 5000,
    "a long number": b'{"position": ' + b"9" * 5000 + b"}",
    "huge": b" " * (17 << 20),
}


@pytest.mark.parametrize("name", ["config.json", "position.json"])
@pytest.mark.parametrize("content", NO_OBJECT)
def test_files_that_hold_no_small_object_are_refused(tmp_path, name, content):
    folder = saved(tmp_path)
    (folder / name).write_bytes(NO_OBJECT[content])
    seal(folder)
    with pytest.raises(ValueError, match=f"^path: {folder / name} ") as caught:
        ChunkMemory.load(folder)
    assert len(str(caught.value)) < len(str(folder)) + 200


@pytest.mark.parametrize("name", ["config.json", "memory.safetensors", "manifest.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_not_a_regular_file_is_refused(tmp_path, name, make):
    folder = saved(tmp_path)
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(ValueError, match=f"^path: .*{folder}.*{name}"):
        ChunkMemory.load(folder)


@pytest.mark.parametrize("change", [{"window": 9}, {"chunk_size": 8}, {"width": 33}, {"groups": 1}])
def test_a_configuration_that_the_tensors_contradict_is_refused(tmp_path, change):
    folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    seal(folder)
    refused(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_memory_in_half_the_bits_is_read_and_so_is_one_made_under_autocast(tmp_path, dtype):
    ids = torch.zeros(1, T, dtype=torch.int64)
    tiny(dtype)(ids).memory.save(tmp_path / "memory")
    assert ChunkMemory.load(tmp_path / "memory").chunks.k.dtype == dtype
    with torch.autocast("cpu", dtype):
        tiny()(ids).memory.save(tmp_path / "memory")
    loaded = ChunkMemory.load(tmp_path / "memory")
    assert loaded.tail is not None
    assert (loaded.chunks.k.dtype, loaded.tail.dtype) == (dtype, torch.float32)


@torch.no_grad()
def test_a_memory_that_is_not_finite_is_not_written(tmp_path):
    model = tiny()
    memory = model(torch.zeros(1, T, dtype=torch.int64)).memory
    assert memory.tail is not None
    memory.tail[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="^memory: got partial with NaN"):
        memory.save(tmp_path / "memory")
    assert not any(tmp_path.iterdir())


@torch.no_grad()
def test_a_loaded_memory_does_not_depend_on_its_file(tmp_path):
    """It goes on after the file has been truncated, which would end the process if it were mapped,
    and after it has been written over.
    """
    model, more = tiny(), torch.randint(4096, (2, 10))
    folder = saved(tmp_path)
    want = model(more, ChunkMemory.load(folder)).logits
    loaded = ChunkMemory.load(folder)
    file = folder / "memory.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with file.open("r+b") as opened:
        opened.truncate(0)
    assert torch.equal(loaded.chunks.k[:, -1].isfinite().all(), torch.tensor(True))
    assert torch.equal(model(more, loaded).logits, want)


def test_a_memory_that_does_not_fit_is_refused_with_what_fits(tmp_path, monkeypatch):
    folder = saved(tmp_path)
    monkeypatch.setattr("hsa_mini.memory.memory_budget.free_bytes", lambda device: 10_000)
    with pytest.raises(MemoryError, match=r"^memory: got [\d,]+ tokens, .* on cpu .* up to "):
        ChunkMemory.load(folder)


# Which weights made it.


def others():
    """A model of the same sizes and other weights."""
    model = tiny()
    with torch.no_grad():
        model.encoder.cls[0] += 0.01
    return model


def read_on(model, memory: ChunkMemory, way: str) -> None:
    ids = torch.zeros(2, 1, dtype=torch.int64)
    if way == "segment":
        model(ids, memory)
    elif way == "prefill":
        prefill(model, ids, memory)
    else:
        DecodeStep(model, memory)(ids)


@pytest.mark.parametrize("where", ["from a file", "living"])
@pytest.mark.parametrize("way", ["segment", "prefill", "step"])
@torch.no_grad()
def test_a_memory_of_other_weights_of_the_same_sizes_is_refused(tmp_path, way, where):
    model = tiny()
    memory = prefill(model, torch.zeros(2, T, dtype=torch.int64)).memory
    if where == "from a file":
        memory.save(tmp_path / "memory")
        memory = ChunkMemory.load(tmp_path / "memory")
    for copy in (memory, memory.fork(), memory.view_row(0)):
        with pytest.raises(ValueError, match="^memory: got one that other weights made"):
            read_on(others(), copy, way)
    assert memory.position == T
    read_on(tiny(), memory, way)  # the same weights in another object
    assert memory.position == T + 1


@torch.no_grad()
def test_a_memory_saved_again_keeps_the_fingerprint_of_its_weights(tmp_path):
    folder = saved(tmp_path)
    first = json.loads((folder / "position.json").read_text())["weights"]
    memory = ChunkMemory.load(folder)
    memory.save(folder)
    assert json.loads((folder / "position.json").read_text())["weights"] == first
    read_on(tiny(), memory, "segment")
    memory.save(folder)
    assert json.loads((folder / "position.json").read_text())["weights"] == first


def test_a_memory_from_before_fingerprints_is_taken_and_the_log_says_so(tmp_path, caplog):
    folder = saved(tmp_path)
    position = json.loads((folder / "position.json").read_text())
    del position["weights"]
    (folder / "position.json").write_text(json.dumps(position))
    seal(folder)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        memory = ChunkMemory.load(folder)
        read_on(others(), memory, "segment")
    (record,) = caplog.records
    assert str(folder) in record.message and "which weights" in record.message
    memory.save(folder)
    with pytest.raises(ValueError, match="other weights"):
        read_on(tiny(), ChunkMemory.load(folder), "segment")


@torch.no_grad()
def test_forks_of_a_loaded_memory_share_its_chunks_and_answer_like_the_original(tmp_path):
    """Each fork reads a question of several chunks and decodes; K, V and landmarks never move."""
    folder = saved(tmp_path)
    model = tiny()
    memory = ChunkMemory.load(folder)
    original = prefill(
        model, torch.randint(4096, (2, T), generator=torch.Generator().manual_seed(0))
    )
    held = memory.chunks.buffers
    before = [buffer[:, : len(memory.chunks)].clone() for buffer in held]
    for seed in range(3):
        question = torch.randint(4096, (2, 19), generator=torch.Generator().manual_seed(seed))
        fork = memory.fork()
        got = model.generate(question, memory=fork, max_new_tokens=9).ids
        want = model.generate(question, memory=original.memory.fork(), max_new_tokens=9).ids
        assert torch.equal(got, want)
        assert len(fork.chunks) > len(memory.chunks) and fork.chunks.buffers is held
    for buffer, want in zip(memory.chunks.buffers, before):
        assert torch.equal(buffer[:, : len(memory.chunks)], want)


def test_the_fingerprint_changes_with_any_weight_and_not_with_place_or_dtype(tmp_path):
    options = dict(tied=False, experts=4, experts_active=2, expert_width=16)
    model = tiny(**options).bfloat16()
    want = fingerprint(model)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert fingerprint(model.to(dtype)) == want
    assert fingerprint(tiny(**options)) == want  # rounds to the same values
    model.save_pretrained(tmp_path / "model")
    assert fingerprint(type(model).from_pretrained(tmp_path / "model")) == want
    seen = {want}
    for value in model.state_dict().values():
        before = value.clone()
        value.flatten()[-1] += 1 + value.flatten()[-1].abs()
        seen.add(fingerprint(model))
        value.copy_(before)
        if value.dim() > 1:  # two rows change places: two experts, the rows of two tokens
            value[[0, 1]] = before[[1, 0]]
        else:  # all values of a gain change in the same way
            value += 1
        seen.add(fingerprint(model))
        value.copy_(before)
    assert len(seen) == 1 + 2 * len(model.state_dict())
    assert fingerprint(model) == want


def test_one_step_of_training_changes_the_fingerprint():
    model = tiny().train()
    before = fingerprint(model)
    model(torch.arange(20)[None]).logits.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    assert fingerprint(model) != before
