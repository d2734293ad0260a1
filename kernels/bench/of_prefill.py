"""`python kernels/bench/of_prefill.py PRESET`: a long text that several processes read together,
beside the same text read by one.

The model has random weights. Each process has a GPU of its own, or a share of the CPU's threads.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from of_model import LONGEST, waited
from timing import peak_bytes
from torch.multiprocessing.spawn import start_processes
from tqdm import tqdm

from hsa_mini import PRESETS, ChunkMemory, HSAModel
from hsa_mini.checks import quoted
from hsa_mini.cli.arguments import Parser, choose_device, integer
from hsa_mini.config import MAX_TOKENS
from hsa_mini.files.reading import read_json
from hsa_mini.files.whole_file import check_writable, write_file
from hsa_mini.inference.parallel_prefill import part_bounds, prefill_parallel
from hsa_mini.inference.prefill import checked_segment, prefill
from hsa_mini.model.core import Output
from hsa_mini.provenance import record

WARM = 4  # segments of a first run, which compiles
MAX_PROCESSES = 64


def measure_prefill(preset: str, device: torch.device, processes: int, tokens: int) -> dict:
    """Every figure, by key. peak_bytes, with the weights, are None without a GPU."""
    threads = max(torch.get_num_threads() // processes, 1)
    with tempfile.TemporaryDirectory() as folder:
        # Daemons, so that they end with this process.
        arguments = (preset, device.type, processes, tokens, threads, Path(folder))
        start_processes(_process, arguments, processes, daemon=True, start_method="spawn")
        return json.loads((Path(folder) / "result.json").read_bytes())


def _process(
    rank: int, preset: str, kind: str, processes: int, tokens: int, threads: int, folder: Path
) -> None:
    """One of the processes; the first also reads the text alone, and writes the result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers
    torch.set_num_threads(threads)
    cuda = kind == "cuda"
    device = torch.device(kind, rank) if cuda else torch.device(kind)
    if cuda:
        torch.cuda.set_device(device)
    store = f"file://{folder}/store"
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=processes)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if cuda else torch.float32
    model = HSAModel(PRESETS[preset], device=device, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator).to(device)
    segment = checked_segment(None, ids)
    warm = ids[:, : WARM * segment]
    first, own = (part_bounds(model.config, x.shape[1], segment, processes)[1] for x in (warm, ids))
    shown = warm.shape[1] + first + own + tokens
    with tqdm(total=shown, unit=" tokens", unit_scale=True, desc=preset, disable=rank > 0) as bar:
        prefill(model, warm, progress=bar.update)
        prefill_parallel(model, warm, progress=bar.update)
        together, seconds, peak = _timed(partial(prefill_parallel, model, ids), bar)
        dist.destroy_process_group()
        if rank > 0:
            return
        alone, seconds_alone, _ = _timed(partial(prefill, model, ids), bar)
    result = {
        "tokens": tokens,
        "processes": processes,
        "dtype": str(dtype).removeprefix("torch."),
        "segment": segment,
        "tokens_of_first_part": own,
        "tokens_reread": model.config.lower_reach,
        "memory_bytes": sum(x.nbytes for x in _tensors(together.memory)),
        "seconds_of_one": seconds_alone,
        "seconds": seconds,
        "speedup": seconds_alone / seconds,
        "peak_bytes": peak,
        **_compared(together, alone),
    }
    (folder / "result.json").write_text(json.dumps(result))


def _timed(read, bar: tqdm) -> tuple[Output, float, int | None]:
    """The output of a prefill, its seconds until all processes have finished, the peak of bytes."""
    device = read.args[1].device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if dist.is_initialized():
        dist.barrier()
    start = waited(device)
    output = read(progress=bar.update)
    if dist.is_initialized():
        dist.barrier()
    return output, waited(device) - start, peak_bytes(device)


def _tensors(memory: ChunkMemory) -> Iterator[torch.Tensor]:
    """Everything that a memory holds, but for the spare capacity."""
    yield from (memory.chunks.k, memory.chunks.v, memory.chunks.landmarks)
    yield from (part for cache in (*memory.lower, *memory.upper) if cache for part in cache)
    yield from (x for x in (memory.tail, *memory.block_queries) if x is not None)


def _compared(together: Output, alone: Output) -> dict:
    """Whether both memories and logits are the same bit for bit, and the largest difference."""
    pairs = list(zip(_tensors(together.memory), _tensors(alone.memory), strict=True))
    pairs.append((together.logits, alone.logits))
    differences = [
        (x.float() - y.float()).abs().max().item()
        for pair in pairs
        for x, y in zip(*(tensor.split(1 << 14, dim=1) for tensor in pair))
        if x.numel()
    ]
    equal = all(torch.equal(x, y) for x, y in pairs)
    return {"same_bits": equal, "largest_difference": max(differences)}


def parse(words: list[str] | None) -> tuple[argparse.Namespace, torch.device, Path]:
    """The arguments, the device and the file to write; exits with one line if they are wrong."""
    parser = Parser(
        prog="kernels/bench/of_prefill.py",
        description="Time the prefill of a long text by several processes, and by one.",
    )
    parser.add_argument("preset", help="such as ul_8b_a1b; mini on a CPU")
    parser.add_argument("--processes", type=integer(2, MAX_PROCESSES), default=2)
    parser.add_argument("--tokens", type=integer(1, MAX_TOKENS), default=LONGEST)
    parser.add_argument("--device", default="auto", help="cpu or cuda (default: GPUs if there are)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="gets one more entry (default out/scale.json, on GPUs data/results/scale.json)",
    )
    arguments = parser.parse_args(words)
    try:
        device = choose_device(arguments.device)
        out = arguments.out or Path("out" if device.type == "cpu" else "data/results", "scale.json")
        check_writable("--out", out)
        if out.exists():
            read_json(out)
        if arguments.preset not in PRESETS:
            accepted = ", ".join(PRESETS)
            raise ValueError(f"preset: got {quoted(arguments.preset)}, accepted are {accepted}")
        gpus = torch.cuda.device_count()
        if device.type == "cuda" and arguments.processes > gpus:
            raise ValueError(f"--processes: got {arguments.processes}, but there are {gpus} GPUs")
    except ValueError as error:
        parser.error(str(error))
    return arguments, device, out


def main(words: list[str] | None = None) -> int:
    arguments, device, out = parse(words)
    sizes = (arguments.processes, arguments.tokens)
    try:
        result = measure_prefill(arguments.preset, device, *sizes)
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    print("\n".join(f"{name:<32}{value}" for name, value in result.items()))
    source = record(device)
    if device.type == "cuda":
        source["hardware"] = f"{arguments.processes} x {torch.cuda.get_device_name(device)}"
    entries = read_json(out) if out.exists() else {}
    entries[f"prefill_{arguments.preset}"] = source | {"preset": arguments.preset} | result
    write_file(out, (json.dumps(entries, indent=1) + "\n").encode())
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
