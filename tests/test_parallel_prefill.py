"""A text that several processes read equals one that a single process reads. They use gloo."""

import math
import re
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from material import DEBUG, OPTIONS, build, text
from processes import Processes

from hsa_mini import ChunkMemory, HSAModel, ops
from hsa_mini.inference.generate import continue_from
from hsa_mini.inference.parallel_prefill import part_bounds, prefill_parallel
from hsa_mini.inference.prefill import prefill
from hsa_mini.model.core import Output


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    started = Processes(3, tmp_path_factory.mktemp("processes"))
    yield started
    started.close()


CASES: dict[str, tuple[int, dict, dict]] = {
    # tokens, changes of the configuration, options of `prefill`
    "whole parts": (64, {}, {"segment": 4}),
    "unfinished chunk": (67, {}, {"segment": 8, "last": 5}),
    "segments that are no chunks": (75, {"window": 3}, {"segment": 5}),
    "last tokens on several processes": (75, {"window": 3}, {"segment": 4, "last": 70}),
    "parts shorter than a window and a chunk": (30, {"window": 12}, {"segment": 4}),
    "no window": (43, {"window": 1}, {"segment": 4, "last": 2}),
    "text shorter than what is read again": (13, {}, {"segment": 4}),
    "text shorter than a chunk": (3, {}, {"segment": 4}),
    "one token": (1, {}, {}),
    "one segment": (40, {}, {}),
}


def tensors(output: Output) -> dict[str, torch.Tensor]:
    """Everything that a prefill returns, by name."""
    memory = output.memory
    assert memory.tail is not None
    found = {"logits": output.logits, "tail": memory.tail}
    found |= {name: getattr(memory.chunks, name) for name in ("k", "v", "landmarks")}
    for name, caches in (("lower", memory.lower), ("upper", memory.upper)):
        for i, cache in enumerate(caches):
            assert cache is not None
            found |= {f"{name}.{i}.k": cache.k, f"{name}.{i}.v": cache.v}
    for i, query in enumerate(memory.block_queries):
        found |= {f"block_queries.{i}": query} if query is not None else {}
    for i, retrieval in enumerate(output.aux.retrievals):
        found |= {f"retrievals.{i}.{name}": x for name, x in retrieval._asdict().items()}
    return found


def difference(got: Output, want: Output) -> float:
    """The largest difference of a number of the two, the memories included."""
    assert got.memory.lengths == want.memory.lengths and got.memory.origin is want.memory.origin
    pairs = tensors(got)
    wanted = tensors(want)
    assert pairs.keys() == wanted.keys()
    differences = [0.0]
    for name, x in wanted.items():
        assert pairs[name].shape == x.shape and pairs[name].dtype == x.dtype, name
        differences += (pairs[name].double() - x.double()).abs().flatten().tolist()
    return max(differences)


def together_and_alone(names: list[tuple[str, str]], dtype: torch.dtype) -> dict[str, float]:
    """By option and case: the largest difference, also after 4 more tokens."""
    found = {}
    rank = dist.get_rank()
    for option, case in names:
        tokens, changes, options = CASES[case]
        model = build(option, dtype, **changes)
        ids = text(tokens)
        read: list[int] = []
        got = prefill_parallel(model, ids, progress=read.append, **options)
        want = prefill(model, ids, **options)
        segment = options.get("segment", 8192)
        bounds = part_bounds(model.config, tokens, segment, dist.get_world_size())
        assert sum(read) == bounds[rank + 1] - bounds[rank]
        found[f"{option}, {case}"] = difference(got, want)
        more = [continue_from(model, output, max_new_tokens=4) for output in (got, want)]
        assert torch.equal(more[0].ids, more[1].ids)
        found[f"{option}, {case}, then decoding"] = difference(got, want)
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_processes_that_read_parts_have_the_memory_of_one(processes, world):
    names = [("default", case) for case in CASES]
    for differences in processes.run(world, together_and_alone, names, torch.float32):
        assert differences == dict.fromkeys(differences, 0.0)


def test_so_it_is_with_every_option(processes):
    names = [(option, "unfinished chunk") for option in OPTIONS if option != "experts"]
    for differences in processes.run(2, together_and_alone, names, torch.float32):
        assert differences == dict.fromkeys(differences, 0.0)


def test_experts_differ_by_rounding_alone(processes):
    names = [("experts", case) for case in ("unfinished chunk", "no window")]
    for differences in processes.run(3, together_and_alone, names, torch.float32):
        assert max(differences.values()) < 2e-6, differences


def attended() -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """How many queries and keys window attention gets, of several processes and of one."""
    attend = ops.sliding_window_attention
    sizes: list[set[tuple[int, int]]] = []

    def spy(q: torch.Tensor, k: torch.Tensor, *others, **options) -> torch.Tensor:
        sizes[-1].add((q.shape[1], k.shape[1]))
        return attend(q, k, *others, **options)

    model = build("default", torch.float32)
    ops.sliding_window_attention = spy
    try:
        for read in (prefill_parallel, prefill):
            sizes.append(set())
            read(model, text(100), segment=16)
    finally:
        ops.sliding_window_attention = attend
    return sizes[0], sizes[1]


def test_segments_have_the_sizes_that_they_have_for_one_process(processes):
    """FlexAttention rounds differently with other numbers of keys. No test without a GPU shows
    that.
    """
    for rank, (together, alone) in enumerate(processes.run(2, attended)):
        assert together - alone == ({(1, 1)} if rank else set())


@pytest.mark.parametrize("tokens", [1, 3, 64, 1000, 5003])
@pytest.mark.parametrize("processes, segment", [(2, 8), (3, 5), (7, 4)])
def test_parts_cover_the_text_and_all_processes_read_equally_much(tokens, processes, segment):
    bounds = part_bounds(DEBUG, tokens, segment, processes)
    assert len(bounds) == processes + 1 and bounds == sorted(bounds)
    assert bounds[0] == 0 and bounds[-1] == tokens
    unit = math.lcm(segment, DEBUG.chunk_size)
    assert all(bound % unit == 0 or bound == tokens for bound in bounds)
    if tokens >= 1000:
        again = -(-DEBUG.lower_reach // unit) * unit
        read = [bounds[1], *(end - start + again for start, end in pairwise(bounds[1:]))]
        assert max(read) - min(read) < 2 * unit


def refusal(case: str) -> tuple[type, str]:
    """What a call raises in which the last process does something else."""
    odd = dist.get_rank() == 1
    model = build("default", torch.float32)
    ids = text(40)
    options: dict = {"segment": 4}
    if odd and case == "text":
        ids[1, 7] ^= 1
    if odd and case == "length":
        ids = ids[:, :-1]
    if odd and case == "weights":
        with torch.no_grad():
            model.head.weight[0, 0] += 1
    if odd and case == "segment":
        options["segment"] = 8
    if odd and case == "argument":
        options["last"] = 41
    if odd and case == "configuration":
        model = HSAModel(build("default", window=6).config, dtype=torch.float32)
        model.load_state_dict(build("default", torch.float32).state_dict())
    if odd and case == "memory":
        ChunkMemory.reserve = no_memory
    try:
        prefill_parallel(model, ids, **options)
    except Exception as error:
        return type(error), str(error)
    finally:
        ChunkMemory.reserve = RESERVE
    return type(None), ""


RESERVE = ChunkMemory.reserve


def no_memory(*_, **__) -> None:
    raise MemoryError("memory: got 40 tokens, accepted are up to 4 tokens")


@pytest.mark.parametrize(
    "case, name",
    [
        ("text", "ids"),
        ("length", "ids"),
        ("weights", "model"),
        ("configuration", "model"),
        ("segment", "segment"),
    ],
)
def test_processes_that_differ_are_refused_on_all_of_them(processes, case, name):
    message = f"{name}: got another on process 1 of the group than on process 0"
    for kind, found in processes.run(2, refusal, case):
        assert kind is ValueError and found.startswith(message)


@pytest.mark.parametrize("case, kind", [("argument", ValueError), ("memory", MemoryError)])
def test_an_error_of_one_process_ends_all(processes, case, kind):
    other, own = processes.run(2, refusal, case)
    assert own[0] is kind and re.match("(last|memory): got 4[01]", own[1])
    assert other == (RuntimeError, f"process 1 of the group: {own[1]}")
