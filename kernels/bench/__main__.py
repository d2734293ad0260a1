"""`python kernels/bench`: time and memory of the operations, or of a whole model, on this device.

Dimensions: B batch, T tokens, N chunks in memory, S chunk size, K chunks kept, H query heads, J
key/value heads, D head dimension, R retrieval dimension, W window.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from ceilings import bytes_per_second, flops_per_second
from of_peers import chosen_peers, run_peers
from table import COLUMNS, COLUMNS_OF_WINDOWS, COLUMNS_ON_GPU, table
from timing import measure
from tqdm import tqdm

from hsa_mini import PRESETS, ops
from hsa_mini.cli.arguments import Parser, choose_device
from hsa_mini.files.whole_file import check_writable
from hsa_mini.provenance import write_results

SEED = 0


@dataclass(frozen=True)
class Case:
    """The sizes of one measurement. The defaults are those of the `mini` preset."""

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
        """Whether the backward pass is timed too.

        This is so for whole sequences, but not for a few tokens after a long memory.
        """
        return self.N * self.S == self.T


CASES = (Case(T=1024, N=16), Case(T=4096, N=64), Case(T=256, N=4096))


def inputs(case: Case, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tensors for every operation; every token chooses K different chunks at random."""
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(
            shape, generator=generator, device=device, dtype=getattr(torch, case.dtype)
        )

    B, T, N, J = case.B, case.T, case.N, case.J
    K = min(case.K, case.N)
    rows = []
    # In parts, because the random numbers of all tokens at once would need more memory than the
    # measurement.
    for part in range(0, T, 256):
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


def operations(
    case: Case, x: dict[str, torch.Tensor]
) -> Iterator[tuple[str, Callable, tuple[str, ...]]]:
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


def rows_of(case: Case, device: torch.device, advance: Callable[[], object]) -> list[dict]:
    """One row per operation and pass.

    Forward, and also forward with backward where the sizes are those of training.
    """
    x = inputs(case, device)
    rows = []
    for name, call, learnt in operations(case, x):
        for passes in ("forward", "forward+backward") if case.trains and learnt else ("forward",):
            if passes == "forward":
                with torch.no_grad():
                    ms, peak = measure(call, device)
            else:
                ms, peak = measure_backward(call, [x[key] for key in learnt], device)
            sizes = asdict(case) | ({"T": 1} if name == "decode" else {})
            row = {"op": name, "pass": passes, **sizes, "choices": "random"}
            rows.append(row | {"ms": ms, "peak_bytes": peak})
            advance()
    return rows


def measure_backward(
    call: Callable, leaves: list[torch.Tensor], device: torch.device
) -> tuple[float, int | None]:
    """`measure` of a call and the gradients of its leaves."""
    for leaf in leaves:
        leaf.requires_grad_()
    gradient = torch.rand_like(call())
    measured = measure(lambda: torch.autograd.grad(call(), leaves, gradient), device)
    for leaf in leaves:
        leaf.requires_grad_(False)
    return measured


def run_on_cpu(device: torch.device) -> tuple[dict, str]:
    """The operations in plain PyTorch, on sizes that take a CPU some seconds."""
    rows = []
    with tqdm(
        total=sum(7 if case.trains else 4 for case in CASES), unit="measurement", desc=str(device)
    ) as bar:
        for case in CASES:
            rows += rows_of(case, device, bar.update)
    return {"rows": rows}, table(rows, COLUMNS)


def run_on_gpu(device: torch.device) -> tuple[dict, str]:
    """The kernels, and the attention of PyTorch for comparison."""
    import on_gpu

    torch.manual_seed(SEED)
    ceilings = {
        "flops_per_second": flops_per_second(device),
        "bytes_per_second": bytes_per_second(device),
    }
    steps = list(on_gpu.steps(ceilings["bytes_per_second"]))
    rows = []
    with tqdm(steps, unit="step") as bar:
        for name, measure_rows in bar:
            bar.set_description(name)
            rows += measure_rows()
            torch.cuda.empty_cache()
    windows = [row for row in rows if row["op"] == "sliding_window_attention"]
    rows = [row for row in rows if row not in windows]
    text = f"{table(rows, COLUMNS_ON_GPU)}\n\n{table(windows, COLUMNS_OF_WINDOWS)}"
    return {"ceilings": ceilings, "rows": rows, "window_rows": windows}, text


def run_model(preset: str, device: torch.device) -> tuple[dict, str]:
    """A whole model, at lengths that need a GPU."""
    from of_model import measure_model
    from of_training import measure_training

    result = measure_training(preset, device) | measure_model(preset, device)
    return {"preset": preset, **result}, "\n".join(
        f"{name:<32}{value}" for name, value in result.items()
    )


def draw(result: dict, folder: Path) -> list[Path]:
    """The crossover with full attention, and the roofline, as pictures in `folder`."""
    from floors import needed
    from matplotlib.figure import Figure

    from hsa_mini.viz.plots import crossover, length_name, roofline, save_figure

    shown = [
        row
        for row in result["rows"]
        if row["op"].startswith("forward") and (row["choices"], row["J"]) == ("random", 1)
    ]
    both = Figure(figsize=(10, 3.8), layout="constrained")
    retrieval = {row["T"]: row["ms"] for row in result["rows"] if row["op"] == "retrieve"}
    for ax, op in zip(both.subplots(1, 2), ("forward", "forward_backward")):
        some = [row for row in shown if row["op"] == op]
        chosen = retrieval if op == "forward" else None  # its backward is not timed by itself
        crossover(ax, some, title=op.replace("_", " + "), retrieval=chosen)
    one = Figure(figsize=(8, 4.2), layout="constrained")
    some = [row for row in shown if row["T"] in (16384, 131072)]
    points = {
        f"{row['op'].replace('_', ' + ')}, {length_name(row['T'])}": (*needed(row), row["ms"])
        for row in some
    }
    roofline(one.subplots(), result["ceilings"], points)
    paths = []
    for name, figure in (("kernels_crossover", both), ("kernels_roofline", one)):
        paths.append(folder / f"{name}.png")
        save_figure(paths[-1], figure)
    return paths


def bench_parser() -> Parser:
    """The arguments of the command."""
    parser = Parser(
        prog="kernels/bench", description="Time the operations of hierarchical sparse attention."
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU if there is one)"
    )
    parser.add_argument(
        "--model",
        metavar="PRESET",
        help="a whole model with random weights instead, such as ul_8b_a1b",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default out/bench.json, on a GPU data/results/NAME.json",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="chunk attention beside the kernels of other people instead (needs a GPU)",
    )
    parser.add_argument(
        "--published-hsa",
        type=Path,
        metavar="FILE",
        help="with --peers: your copy of the Triton kernel of the paper's authors; it is executed",
    )
    parser.add_argument(
        "--fsa",
        type=Path,
        metavar="FOLDER",
        help="with --peers: your copy of FSA's repository; its reference of NSA is executed",
    )
    return parser


def main(words: list[str] | None = None) -> int:
    parser = bench_parser()
    arguments = parser.parse_args(words)
    try:
        device = choose_device(arguments.device)
        if arguments.model not in (None, *PRESETS):
            raise ValueError(f"--model: got {arguments.model!r}, accepted are {', '.join(PRESETS)}")
        name = arguments.model or ("peers" if arguments.peers else "kernels")
        out = arguments.out or Path(
            "out/bench.json" if device.type == "cpu" else f"data/results/{name}.json"
        )
        check_writable("--out", out)
        peers = chosen_peers(arguments, device)
    except ValueError as error:
        parser.error(str(error))
    try:
        if peers:
            torch.manual_seed(SEED)
            result, text = run_peers(*peers)
        elif arguments.model:
            result, text = run_model(arguments.model, device)
        else:
            result, text = (run_on_cpu if device.type == "cpu" else run_on_gpu)(device)
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    print(text)
    write_results(out, device, seed=SEED, **result)
    pictures = draw(result, out.parent) if device.type == "cuda" and name == "kernels" else []
    print(f"written to {', '.join(map(str, [out, *pictures]))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
