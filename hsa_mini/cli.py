"""The command line: `python -m hsa_mini demo|train|eval|fetch`. What goes wrong is said in one line, with exit status 2."""

import argparse
import io
import json
import logging
import sys
from pathlib import Path

from .paths import data_dir, write_whole


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(words: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    arguments = build_parser().parse_args(words)
    try:
        return arguments.command(arguments)
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"hsa-mini {arguments.name}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; nothing half-written was left behind", file=sys.stderr)
        return 130


def build_parser() -> Parser:
    parser = Parser(prog="hsa-mini", description="Hierarchical Sparse Attention: find needles, train, evaluate.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="demo|train|eval|fetch")

    demo = commands.add_parser("demo", help="find one needle in a long text")
    demo.add_argument("--tokens", type=int, default=1_048_576, help="length of the haystack (default 1,048,576; at least 1,024)")
    demo.add_argument("--haystack", type=Path, metavar="FILE", help="any UTF-8 text, repeated to length (default: held-out text)")
    demo.add_argument("--depth", type=float, default=0.5, help="where the needle lies: 0 first, 1 last (default 0.5)")
    demo.add_argument("--seed", type=int, default=0, help="of needles, question and place in the text (default 0)")
    demo.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="where the picture goes (default out)")
    demo.add_argument("--json", metavar="PATH|-", help="write the result as JSON to a file, or to standard output")
    demo.add_argument("--checkpoint", default="mini", help="a shipped model or a folder (default mini)")
    demo.set_defaults(command=run_demo)

    train = commands.add_parser("train", help="train a model from nothing, or go on where a run was cut off")
    train.add_argument("preset", help="which model: nano or mini")
    train.add_argument("--run", type=Path, metavar="DIR", help="states, log and final model (default runs/PRESET)")
    train.add_argument("--steps", type=int, help="instead of the recipe's")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--workers", type=int, help="processes that draw batches (default: by the cores at hand)")
    train.set_defaults(command=run_train)

    evaluate = commands.add_parser("eval", help="ask many needle questions by length and depth")
    evaluate.add_argument("checkpoint", help="a shipped model (mini) or a folder")
    evaluate.add_argument("--task", default="s_niah", choices=["s_niah"])
    evaluate.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="default: those of the paper's Figure 4")
    evaluate.add_argument("--samples", type=int, help="questions a depth (default 10, and 5 from 4M tokens on)")
    evaluate.add_argument("--seed", type=int, default=1)
    evaluate.add_argument("--out", type=Path, metavar="FILE", help="default: data/results/CHECKPOINT_TASK.json")
    evaluate.set_defaults(command=run_eval)

    for command in (demo, train, evaluate):
        command.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU if there is one)")

    fetch = commands.add_parser("fetch", help="fetch the corpora (13 plays and poems, code, documentation) into the cache")
    fetch.set_defaults(command=run_fetch)
    return parser


def choose_device(name: str):
    """The device of a name; "auto" is a GPU if there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count()
    accepted = ["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in accepted:
        raise ValueError(f"--device: got {name!r}, accepted here are {', '.join(accepted)}")
    return torch.device(name)


def checkpoint_folder(name: str) -> Path:
    shipped = data_dir() / "checkpoints" / name
    return shipped if "/" not in name and shipped.is_dir() else Path(name)


def run_demo(arguments) -> int:
    import numpy as np
    from tqdm import tqdm

    from .checkpoint import load_model
    from .data.corpus import load_corpus, load_text
    from .demo import find_needle

    talk = sys.stderr if arguments.json == "-" else sys.stdout
    device = choose_device(arguments.device)
    model = load_model(checkpoint_folder(arguments.checkpoint), device=device)
    if arguments.haystack:
        corpus, first = load_text(arguments.haystack, name="--haystack"), 0
    else:
        corpus = load_corpus("validation")
        first = int(np.random.default_rng(abs(arguments.seed)).integers(len(corpus)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"reading {arguments.tokens:,} tokens of {corpus.name} on {device}", file=talk, flush=True)
    with tqdm(total=arguments.tokens, unit=" tokens", unit_scale=True, mininterval=0.2, desc="prefill") as bar:
        finding = find_needle(
            model,
            corpus.tokens,
            tokens=arguments.tokens,
            depth=arguments.depth,
            seed=arguments.seed,
            first=first,
            progress=bar.update,
        )
    picture = arguments.out / f"needle_{finding.tokens}_{finding.seed}.png"
    save_picture(finding, picture)
    print(report(finding), file=talk)
    print(f"picture    {picture}", file=talk)
    text = json.dumps(finding.to_json(), indent=1) + "\n"
    if arguments.json == "-":
        sys.stdout.write(text)
    elif arguments.json:
        write_whole(Path(arguments.json), text.encode())
    return 0


def report(finding) -> str:
    """What a person wants to know of a finding."""
    layers = "; ".join(f"layer {i}: {' '.join(map(str, chunks))}" for i, chunks in enumerate(finding.retrieved_chunks))
    found = [chunk for chunk in finding.needle_chunks if any(chunk in chunks for chunks in finding.retrieved_chunks)]
    shown = found or finding.needle_chunks
    lines = [
        f"\nquestion   {finding.question}",
        f"answer     {finding.answer.rstrip('.')}   ({'right' if finding.correct else f'wrong: it is {finding.expected}'})",
        f"needle in  chunk {' and '.join(map(str, finding.needle_chunks))} of {finding.scores.shape[1]:,}",
        f"retrieved  {layers}",
    ]
    for chunk in shown:
        kind = "retrieved" if chunk in found else "not retrieved"
        lines += [f"\nchunk {chunk} ({kind}), the needle between >>> and <<<:", "  " + finding.chunk_text(chunk).replace("\n", "\n  ")]
    rate = finding.tokens / finding.prefill_seconds
    lines.append(
        f"\nprefill    {finding.prefill_seconds:.1f} s ({rate:,.0f} tokens/s), answer {finding.decode_seconds:.2f} s, "
        f"peak memory {finding.peak_memory_bytes / 1e9:.2f} GB"
    )
    return "\n".join(lines)


def save_picture(finding, path: Path) -> None:
    """The retrieval scores over the haystack as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from .viz.plots import needle_strip

    figure = Figure(figsize=(11, 2.4 * len(finding.scores) + 0.8), layout="constrained")
    needle_strip(figure, finding.scores, finding.needle_chunks, finding.retrieved_chunks, finding.chunk_size)
    figure.suptitle(f"{finding.question}   {finding.answer.rstrip('.')}", fontsize=13)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_whole(path, image.getvalue())


def run_train(arguments) -> int:
    from .train import train

    run = arguments.run or Path("runs") / arguments.preset
    device = choose_device(arguments.device)
    train(arguments.preset, run=run, device=device, steps=arguments.steps, seed=arguments.seed, workers=arguments.workers)
    print(f"the model is in {run / 'final'}, the log in {run / 'log.csv'}")
    return 0


def run_eval(arguments) -> int:
    from .checkpoint import load_model
    from .evaluate import LENGTHS, by_length, evaluate_s_niah, write_results

    device = choose_device(arguments.device)
    folder = checkpoint_folder(arguments.checkpoint)
    model = load_model(folder, device=device)
    for name, values in (("--lengths", arguments.lengths or []), ("--samples", [arguments.samples or 1])):
        if any(value < 1 for value in values):
            raise ValueError(f"{name}: got {min(values)}, accepted is 1 or more")
    path = arguments.out or data_dir() / "results" / f"{folder.name}_{arguments.task}.json"
    rows, controls = evaluate_s_niah(
        model,
        lengths=arguments.lengths or LENGTHS,
        samples=lambda tokens: arguments.samples or (10 if tokens < 1 << 22 else 5),
        seed=arguments.seed,
    )
    print(f"{'tokens':>12} {'right':>9} {'accuracy':>9} {'95% interval':>16} {'retrieved':>10}   wrong by depth")
    for entry in by_length(rows):
        wrong = [f"{row.depth:.2f}: {row.samples - row.correct}" for row in rows if row.tokens == entry["tokens"]]
        wrong = [text for text in wrong if not text.endswith(": 0")]
        print(
            f"{entry['tokens']:>12,} {entry['correct']:>4}/{entry['samples']:<4} {entry['accuracy']:>9.1%} "
            f"{entry['low']:>7.1%} to {entry['high']:>6.1%} {entry['retrieved']:>5}/{entry['samples']:<4}  {', '.join(wrong) or 'none'}"
        )
    right = sum(row.correct for row in controls)
    print(f"control: {right} of {sum(row.samples for row in controls)} right where the key is nowhere in the text")
    write_results(path, rows, controls, device)
    print(f"written to {path}")
    return 0


def run_fetch(arguments) -> int:
    from .data.corpus import SPLITS, fetch_archives, load_corpus

    try:
        fetch_archives()
    except OSError as error:
        print(f"{error}; the standard library of this Python will serve as text instead", file=sys.stderr)
    for split in SPLITS:
        print(f"{split:>10}: {len(load_corpus(split)):,} tokens")
    return 0
