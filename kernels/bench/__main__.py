"""`python kernels/bench`: how long the operations take, and how much memory, on the device that is there.

Dimensions: B batch, T tokens, N chunks in memory, S chunk size, K chunks kept, H query heads, J key/value heads, D head
dimension, R retrieval dimension, W window.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from hsa_mini import ops, provenance
from hsa_mini.arguments import Parser, choose_device
from hsa_mini.paths import check_writable, write_whole

WARMUP, SAMPLES = 2, 10
LEAST_SAMPLES, SECONDS = 3, 1.5  # after this many seconds a measurement ends with fewer samples


@dataclass(frozen=True)
class Case:
    """The sizes of one measurement; those of the `mini` preset unless told otherwise."""

    T: int
    N: int
    B: int = 1
    H: int = 4
    J: int = 1
    D: int = 64
    S: int = 64
    K: int = 8
    R: int = 256
    W: int = 128
    dtype: str = "float32"

    @property
    def trains(self) -> bool:
        """Whole sequences are trained on; a few last tokens over a long memory are only read."""
        return self.N * self.S == self.T


LARGE = dict(H=16, D=128, K=64, R=128, W=4096, dtype="bfloat16")  # of the `ul_8b_a1b` preset
CASES = {
    "cpu": (Case(T=1024, N=16), Case(T=4096, N=64), Case(T=256, N=4096)),
    "cuda": (
        Case(T=1024, N=16, B=32, dtype="bfloat16"),
        Case(T=16384, N=256, dtype="bfloat16"),
        Case(T=512, N=16384, dtype="bfloat16"),
        Case(T=512, N=262144, dtype="bfloat16"),
        Case(T=16384, N=256, **LARGE),
        Case(T=512, N=16384, **LARGE),
    ),
}


def inputs(case: Case, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tensors for every operation; every token chooses K different chunks at random."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=getattr(torch, case.dtype))

    B, T, N, J, K = case.B, case.T, case.N, case.J, min(case.K, case.N)
    rows = []
    for part in range(0, T, 256):  # the random numbers of all tokens at once would need more memory than what is timed
        drawn = torch.rand(B, min(256, T - part), J, N, generator=generator, device=device)
        rows.append(drawn.topk(K, dim=-1).indices.int())
    return {
        "retrieval_q": normal(B, T, J, case.R),
        "landmarks": normal(B, N, J, case.R),
        "q": normal(B, T, case.H, case.D),
        "k": normal(B, N, case.S, J, case.D),
        "v": normal(B, N, case.S, J, case.D),
        "near_k": normal(B, T, J, case.D),
        "near_v": normal(B, T, J, case.D),
        "indices": torch.cat(rows, dim=1),
        "weights": torch.rand(B, T, J, K, generator=generator, device=device).softmax(dim=-1),
    }


def operations(case: Case, x: dict[str, torch.Tensor]) -> Iterator[tuple[str, Callable, tuple[str, ...]]]:
    """Name, call and differentiable inputs of each operation."""
    sizes = dict(chunk_size=case.S, top_k=case.K)
    context = case.N * case.S

    def retrieve():
        return ops.retrieve(x["retrieval_q"], x["landmarks"], **sizes, offset=context - case.T)[1]

    def chunk_attention():
        return ops.chunk_attention(x["q"], x["k"], x["v"], x["indices"], x["weights"])

    def sliding_window_attention():
        return ops.sliding_window_attention(x["q"], x["near_k"], x["near_v"], window=case.W)

    def decode():
        last = (x["retrieval_q"][:, -1:], x["landmarks"], x["q"][:, -1:], x["k"], x["v"])
        return ops.decode(*last, **sizes, offset=context)

    yield "retrieve", retrieve, ("retrieval_q", "landmarks")
    yield "chunk_attention", chunk_attention, ("q", "k", "v", "weights")
    yield "sliding_window_attention", sliding_window_attention, ("q", "near_k", "near_v")
    yield "decode", decode, ()


def measure(call: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    """Median milliseconds, and the most bytes that a call allocates on a GPU (None elsewhere)."""
    gpu, times, began = device.type == "cuda", [], time.perf_counter()
    for _ in range(WARMUP):
        call()
    before = 0
    if gpu:
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    while len(times) < SAMPLES and (len(times) < LEAST_SAMPLES or time.perf_counter() - began < SECONDS):
        if gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), torch.cuda.max_memory_allocated(device) - before if gpu else None


def rows_of(case: Case, device: torch.device, advance: Callable[[], object]) -> list[dict]:
    """One row for each operation, forward, and forward with backward where the sizes are those of training."""
    x, rows = inputs(case, device), []
    for name, call, learnt in operations(case, x):
        for passes in ("forward", "forward+backward") if case.trains and learnt else ("forward",):
            if passes == "forward":
                with torch.no_grad():
                    ms, peak = measure(call, device)
            else:
                leaves = [x[key].requires_grad_() for key in learnt]
                gradient = torch.rand_like(call())
                ms, peak = measure(lambda: torch.autograd.grad(call(), leaves, gradient), device)
                for leaf in leaves:
                    leaf.requires_grad_(False)
            sizes = asdict(case) | ({"T": 1} if name == "decode" else {})
            rows.append({"op": name, "pass": passes, **sizes, "choices": "random", "ms": round(ms, 4), "peak_bytes": peak})
            advance()
    return rows


def table(rows: list[dict]) -> str:
    """The rows for people."""
    sizes = "BTNHDK"
    header = f"{'operation':<26}{'pass':<18}" + "".join(f"{letter:>8}" for letter in sizes)
    lines = [f"{header}{'dtype':>10}{'ms':>11}{'peak MB':>10}"]
    for row in rows:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.1f}"
        numbers = "".join(f"{row[letter]:>8}" for letter in sizes)
        lines.append(f"{row['op']:<26}{row['pass']:<18}{numbers}{row['dtype']:>10}{row['ms']:>11,.3f}{peak:>10}")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    parser = Parser(prog="kernels/bench", description="Time the operations of hierarchical sparse attention.")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, default=Path("out/bench.json"), metavar="FILE", help="default out/bench.json")
    arguments = parser.parse_args(words)
    try:
        device = choose_device(arguments.device)
        check_writable("--out", arguments.out)
    except ValueError as error:
        parser.error(str(error))
    cases, rows = CASES[device.type], []
    try:
        with tqdm(total=sum(7 if case.trains else 4 for case in cases), unit="measurement", desc=str(device)) as bar:
            for case in cases:
                rows += rows_of(case, device, bar.update)
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    print(table(rows))
    write_whole(arguments.out, (json.dumps({**provenance.record(device), "rows": rows}, indent=1) + "\n").encode())
    print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
