"""The command line: `python -m hsa_mini demo|generate|train|eval|perplexity|lab|plan|fetch`. What is wrong is said in one line, with status 2."""

import json
import logging
import sys
from functools import partial
from itertools import takewhile
from pathlib import Path

from hsa_mini.cli.arguments import (
    Parser,
    check_choices,
    check_length,
    check_range,
    checkpoint_folder,
    choose_device,
    integer,
    number,
    read_model,
)
from hsa_mini.cli.report import printable, report
from hsa_mini.config import MOST_TOKENS, PRESETS
from hsa_mini.paths import check_writable, data_dir, write_whole

MOST_SEED = (1 << 32) - 1
TASKS = ("s_niah", "mq_niah", "vt")  # of data/tasks.py, which the parser need not load


def main(words: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    arguments = build_parser().parse_args(words)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # any text is printed, on any terminal
    try:
        return arguments.command(arguments)
    except (
        ValueError,
        OSError,
        ImportError,
        FloatingPointError,
        MemoryError,
        RuntimeError,
    ) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise  # only torch's way to say that memory ran out is the user's to know
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"hsa-mini {arguments.name}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; nothing half-written was left behind", file=sys.stderr)
        return 130


def build_parser() -> Parser:
    parser = Parser(
        prog="hsa-mini",
        description="Hierarchical Sparse Attention: find needles, continue a text, train, evaluate, plan.",
    )
    commands = parser.add_subparsers(
        dest="name", required=True, metavar="demo|generate|train|eval|perplexity|lab|plan|fetch"
    )

    demo = commands.add_parser("demo", help="find one needle in a long text")
    demo.add_argument(
        "--tokens",
        type=integer,
        default=1_048_576,
        help="length of the haystack (default 1,048,576; at least 1,024)",
    )
    demo.add_argument(
        "--haystack",
        type=Path,
        metavar="FILE|-",
        help="UTF-8 text, repeated; -: standard input (default: held-out)",
    )
    demo.add_argument(
        "--depth",
        type=number,
        default=0.5,
        help="where the needle lies: 0 first, 1 last (default 0.5)",
    )
    demo.add_argument(
        "--seed",
        type=integer,
        default=0,
        help="of needles, question and place in the text (default 0)",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="DIR",
        help="where the picture goes (default out)",
    )
    demo.add_argument(
        "--checkpoint", default="mini", help="a shipped model or a folder (default mini)"
    )
    demo.set_defaults(command=run_demo)

    generate = commands.add_parser("generate", help="continue a text")
    generate.add_argument(
        "checkpoint", nargs="?", default="mini", help="a shipped model or a folder (default mini)"
    )
    generate.add_argument(
        "--prompt-file",
        type=Path,
        required=True,
        metavar="FILE|-",
        help="any UTF-8 text; -: standard input",
    )
    generate.add_argument(
        "--max-new-tokens", type=integer, default=256, help="ends there at the latest (default 256)"
    )
    generate.add_argument(
        "--temperature",
        type=number,
        default=0.0,
        help="0 takes the likeliest token, above it draws (default 0)",
    )
    generate.add_argument(
        "--top-k",
        type=integer,
        default=0,
        help="draw from the K likeliest tokens alone (default 0: all)",
    )
    generate.add_argument(
        "--top-p",
        type=number,
        default=1.0,
        help="then from the fewest that hold this share (default 1: all)",
    )
    generate.add_argument("--seed", type=integer, default=0, help="of the draws (default 0)")
    generate.set_defaults(command=run_generate)

    train = commands.add_parser(
        "train", help="train a model from nothing, or go on where a run was cut off"
    )
    train.add_argument("preset", help="which model: nano, mini, mini_moe or small_moe")
    train.add_argument(
        "--run", type=Path, metavar="DIR", help="states, log and final model (default runs/PRESET)"
    )
    train.add_argument("--steps", type=integer, help="instead of the recipe's")
    train.add_argument("--seed", type=integer, default=0)
    train.set_defaults(command=run_train)

    evaluate = commands.add_parser("eval", help="ask many questions of a task by length and depth")
    evaluate.add_argument("--task", default="s_niah", choices=TASKS, help="default s_niah")
    evaluate.add_argument(
        "--lengths",
        type=integer,
        nargs="+",
        metavar="TOKENS",
        help="default: those of the paper's Figure 4",
    )
    evaluate.add_argument(
        "--samples", type=integer, default=10, help="questions a depth (default 10)"
    )
    evaluate.add_argument(
        "--distractors",
        type=integer,
        default=0,
        metavar="N",
        help="more sentences of the same form (default 0)",
    )
    evaluate.add_argument(
        "--border", action="store_true", help="every sentence lies across the border of two chunks"
    )
    evaluate.add_argument(
        "--jobs",
        type=integer,
        default=1,
        metavar="N",
        help="lengths at once, each in a process (default 1)",
    )
    evaluate.set_defaults(command=run_eval)

    perplexity = commands.add_parser(
        "perplexity", help="predict the same held-out tokens behind more and more text"
    )
    perplexity.add_argument(
        "--lengths",
        type=integer,
        nargs="+",
        metavar="TOKENS",
        help="tokens read (default: 1K to 1M)",
    )
    perplexity.add_argument(
        "--stretches", type=integer, default=20, metavar="N", help="places in the text (default 20)"
    )
    perplexity.set_defaults(command=run_perplexity)

    for command, results in (
        (evaluate, "CHECKPOINT_TASK[_N_distractors][_border]"),
        (perplexity, "CHECKPOINT_perplexity"),
    ):
        command.add_argument("checkpoint", help="a shipped model (mini) or a folder")
        command.add_argument("--seed", type=integer, default=1)
        command.add_argument(
            "--out", type=Path, metavar="FILE", help=f"default: data/results/{results}.json"
        )

    lab = commands.add_parser(
        "lab",
        help="train and measure variants of the mechanism, and judge the paper's claims; goes on where it was",
    )
    lab.add_argument("--arms", nargs="+", metavar="ARM", help="which variants (default: all)")
    lab.add_argument(
        "--seeds",
        type=integer,
        nargs="+",
        default=[0, 1, 2],
        metavar="SEED",
        help="each is a run of every arm",
    )
    lab.add_argument(
        "--steps",
        type=integer,
        help="instead of the recipe's; shorter runs are no evidence for a claim",
    )
    lab.add_argument(
        "--jobs", type=integer, help="runs at once (default: 3 on a GPU, which share it, else 1)"
    )
    lab.add_argument(
        "--scale",
        default="lab",
        help="lab, or tiny: seconds on a processor, to try it (default lab)",
    )
    lab.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="one line of JSON a run (default data/results/lab.jsonl)",
    )
    lab.set_defaults(command=run_lab)

    plan = commands.add_parser(
        "plan", help="what a model costs at a length: parameters, bytes, FLOP; makes nothing"
    )
    plan.add_argument("preset", help=f"which model: {', '.join(PRESETS)}")
    plan.add_argument(
        "--tokens", type=integer, default=1_048_576, help="length of the text (default 1,048,576)"
    )
    plan.set_defaults(command=run_plan)

    for command in (demo, plan):
        command.add_argument(
            "--json",
            metavar="PATH|-",
            help="write the result as JSON to a file, or to standard output",
        )
    for command in (demo, generate, train, evaluate, perplexity, lab):
        command.add_argument(
            "--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU if there is one)"
        )

    fetch = commands.add_parser(
        "fetch", help="fetch the corpora (plays and poems, code, documentation) into the cache"
    )
    fetch.set_defaults(command=run_fetch)
    return parser


def write_json(target: str | None, result: dict) -> None:
    """`result` on standard output ("-"), in a file, or nowhere (None)."""
    text = json.dumps(result, indent=1) + "\n"
    if target == "-":
        sys.stdout.write(text)
    elif target is not None:
        write_whole(Path(target), text.encode())


def run_demo(arguments) -> int:
    import numpy as np
    from tqdm import tqdm

    from hsa_mini.data.corpus import load_corpus, load_text
    from hsa_mini.evaluation.demo import MIN_HAYSTACK, MIN_TOKENS, find_needle
    from hsa_mini.viz import plots

    talk = sys.stderr if arguments.json == "-" else sys.stdout
    check_range("--tokens", arguments.tokens, MIN_TOKENS, MOST_TOKENS)
    check_range("--depth", arguments.depth, 0, 1)
    check_range("--seed", arguments.seed, 0, MOST_SEED)
    check_writable("--out", arguments.out, folder=True)
    if arguments.json not in (None, "-"):
        check_writable("--json", Path(arguments.json))
    device = choose_device(arguments.device)
    model = read_model("--checkpoint", arguments.checkpoint, device)
    check_length("--tokens", arguments.tokens, model.config)
    if arguments.haystack:
        corpus = load_text(arguments.haystack, name="--haystack")
        first = 0
        if len(corpus) < MIN_HAYSTACK:
            raise ValueError(
                f"--haystack: got {len(corpus)} tokens of text, accepted are at least {MIN_HAYSTACK}"
            )
    else:
        corpus = load_corpus("validation")
        first = int(np.random.default_rng(arguments.seed).integers(len(corpus)))
    print(
        f"reading {arguments.tokens:,} tokens of {corpus.name} on {device}", file=talk, flush=True
    )
    with tqdm(
        total=arguments.tokens, unit=" tokens", unit_scale=True, mininterval=0.2, desc="prefill"
    ) as bar:
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
    plots.save_needle_strip(
        picture, finding, f"{finding.question}   {printable(finding.answer.rstrip('.'))}"
    )
    print(report(finding), file=talk)
    print(f"picture    {picture}", file=talk)
    write_json(arguments.json, finding.to_json())
    return 0


def run_generate(arguments) -> int:
    import torch
    from tqdm import tqdm

    from hsa_mini.data.corpus import load_text
    from hsa_mini.data.tokenizer import decode_stream, end_of_text, load_tokenizer
    from hsa_mini.inference.generate import stream

    check_range("--max-new-tokens", arguments.max_new_tokens, 1, 10**9)
    check_range("--temperature", arguments.temperature, 0, 10**6)
    check_range("--top-k", arguments.top_k, 0, 10**9)
    check_range("--top-p", arguments.top_p, 0, 1)
    check_range("--seed", arguments.seed, 0, MOST_SEED)
    device = choose_device(arguments.device)
    prompt = load_text(arguments.prompt_file, name="--prompt-file").tokens
    if not len(prompt):
        raise ValueError("--prompt-file: got 0 tokens of text, accepted is at least 1")
    model = read_model("checkpoint", arguments.checkpoint, device)
    tokenizer = load_tokenizer()
    end = end_of_text(tokenizer)
    with tqdm(
        total=len(prompt), unit=" tokens", unit_scale=True, mininterval=0.2, delay=1, desc="prefill"
    ) as bar:
        tokens = stream(
            model,
            torch.from_numpy(prompt.astype("int64"))[None].to(device),
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
            progress=bar.update,
        )
    for text in decode_stream(
        tokenizer, takewhile(lambda token: token != end, (token.item() for token in tokens))
    ):
        print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)
    print()
    return 0


def run_train(arguments) -> int:
    from hsa_mini.training.trainer import train

    run = arguments.run or Path("runs") / arguments.preset
    check_range("--steps", 1 if arguments.steps is None else arguments.steps, 1, 10**9)
    check_range("--seed", arguments.seed, 0, MOST_SEED)
    check_writable("--run", run, folder=True)
    device = choose_device(arguments.device)
    train(arguments.preset, run=run, device=device, steps=arguments.steps, seed=arguments.seed)
    print(f"the model is in {run / 'final'}, the log in {run / 'log.csv'}")
    return 0


def run_eval(arguments) -> int:
    from hsa_mini.checkpoint.folder import fingerprint
    from hsa_mini.evaluation.results import CONTROLS, LENGTHS
    from hsa_mini.evaluation.runner import evaluate, evaluate_side_by_side
    from hsa_mini.evaluation.statistics import by_length
    from hsa_mini.provenance import write_results
    from hsa_mini.tasks.forms import MAX_DISTRACTORS

    lengths = arguments.lengths or LENGTHS
    for tokens in lengths:
        check_range("--lengths", tokens, 1, MOST_TOKENS)
    check_range("--samples", arguments.samples, 1, 10**6)
    check_range("--jobs", arguments.jobs, 1, 64)
    check_range("--seed", arguments.seed, 0, MOST_SEED)
    check_range("--distractors", arguments.distractors, 0, MAX_DISTRACTORS)
    options = {"distractors": arguments.distractors, "border": arguments.border}
    name = f"{Path(arguments.checkpoint).name}_{arguments.task}"
    name += (
        f"_{arguments.distractors}_distractors" * (arguments.distractors > 0)
        + "_border" * arguments.border
    )
    path = results_path(arguments.out, name)
    device = choose_device(arguments.device)
    model = read_model("checkpoint", arguments.checkpoint, device)
    asked = fingerprint(checkpoint_folder(arguments.checkpoint))
    for tokens in lengths:
        check_length("--lengths", tokens, model.config, arguments.task, **options)
    options |= {"lengths": lengths, "samples": arguments.samples, "seed": arguments.seed}
    if arguments.jobs == 1:
        rows, controls = evaluate(model, arguments.task, **options)
    else:
        del model
        load = partial(read_model, "checkpoint", arguments.checkpoint, device)
        rows, controls = evaluate_side_by_side(load, arguments.task, jobs=arguments.jobs, **options)
    print(
        f"{'tokens':>12} {'right':>9} {'accuracy':>9} {'95% interval':>16} {'retrieved':>10}   wrong by depth"
    )
    for entry in by_length(rows):
        wrong = [
            f"{row.depth:.2f}: {row.samples - row.correct}"
            for row in rows
            if row.tokens == entry["tokens"]
        ]
        wrong = [text for text in wrong if not text.endswith(": 0")]
        print(
            f"{entry['tokens']:>12,} {entry['correct']:>4}/{entry['samples']:<4} {entry['accuracy']:>9.1%} "
            f"{entry['low']:>7.1%} to {entry['high']:>6.1%} {entry['retrieved']:>5}/{entry['samples']:<4}  {', '.join(wrong) or 'none'}"
        )
    for control, what in CONTROLS.items():
        same = [row for row in controls if row.control == control]
        print(
            f"control: {sum(row.correct for row in same)} of {sum(row.samples for row in same)} right where {what}"
        )
    write_results(path, device, checkpoint=asked, rows=rows, control_rows=controls)
    print(f"written to {path}")
    return 0


def run_perplexity(arguments) -> int:
    from hsa_mini.checkpoint.folder import fingerprint
    from hsa_mini.evaluation.perplexity import LENGTHS, TARGETS, PerplexityRow, measure_perplexity
    from hsa_mini.provenance import write_results

    lengths = arguments.lengths or LENGTHS
    for tokens in lengths:
        check_range("--lengths", tokens, TARGETS, MOST_TOKENS)
    check_range("--stretches", arguments.stretches, 1, 10**6)
    check_range("--seed", arguments.seed, 0, MOST_SEED)
    path = results_path(arguments.out, f"{Path(arguments.checkpoint).name}_perplexity")
    device = choose_device(arguments.device)
    model = read_model("checkpoint", arguments.checkpoint, device)
    asked = fingerprint(checkpoint_folder(arguments.checkpoint))

    def show(row: PerplexityRow) -> None:
        read = f"{row.tokens:>12,} tokens, the last {row.targets} predicted"
        print(f"{read}: loss {row.loss:.4f} nats, perplexity {row.perplexity:.2f}", flush=True)

    rows = measure_perplexity(
        model, lengths=lengths, stretches=arguments.stretches, seed=arguments.seed, report=show
    )
    write_results(path, device, checkpoint=asked, rows=rows)
    print(f"written to {path}")
    return 0


def results_path(out: Path | None, name: str) -> Path:
    """The file for a command's result, which can be written."""
    path = data_dir() / "results" / f"{name}.json" if out is None else out
    check_writable("--out", path)
    return path


def run_lab(arguments) -> int:
    from hsa_mini.lab.arms import ARMS
    from hsa_mini.lab.claims import format_findings, judge
    from hsa_mini.lab.harness import run_missing
    from hsa_mini.lab.records import read_records
    from hsa_mini.lab.scales import SCALES

    arms = arguments.arms or list(ARMS)
    check_choices("--arms", arms, ARMS)
    check_choices("--scale", [arguments.scale], SCALES)
    for seed in arguments.seeds:
        check_range("--seeds", seed, 0, MOST_SEED)
    check_range("--steps", 1 if arguments.steps is None else arguments.steps, 1, 10**9)
    path = arguments.out or data_dir() / "results" / "lab.jsonl"
    check_writable("--out", path)
    device = choose_device(arguments.device)
    jobs = (3 if device.type == "cuda" else 1) if arguments.jobs is None else arguments.jobs
    check_range("--jobs", jobs, 1, 64)
    options = dict(scale=arguments.scale, steps=arguments.steps, jobs=jobs)
    count = run_missing(arms, arguments.seeds, path=path, device=device, **options)
    print(f"{count} runs were missing and are now in {path}")
    if arguments.scale == "lab" and arguments.steps is None:
        print(format_findings(judge(read_records(path))))
    return 0


def run_plan(arguments) -> int:
    from hsa_mini.model.cost_estimate import plan, table

    check_range("--tokens", arguments.tokens, 1, MOST_TOKENS)
    if arguments.json not in (None, "-"):
        check_writable("--json", Path(arguments.json))
    counted = plan(arguments.preset, arguments.tokens)
    if arguments.json != "-":
        print(table(counted))
    write_json(arguments.json, counted.to_json())
    return 0


def run_fetch(arguments) -> int:
    from hsa_mini.data.archives import fetch_archives
    from hsa_mini.data.corpus import SPLITS, load_corpus

    try:
        fetch_archives()
    except OSError as error:
        print(
            f"{error}; the standard library of this Python will serve as text instead",
            file=sys.stderr,
        )
    for split in SPLITS:
        print(f"{split:>10}: {len(load_corpus(split)):,} tokens")
    return 0
