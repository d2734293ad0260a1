"""`demo`: hide a needle in a long text, ask for it, and show where the model looked."""

import argparse
import sys
from pathlib import Path

from hsa_mini.cli.arguments import (
    MAX_SEED,
    MIN_DEMO_TOKENS,
    MIN_HAYSTACK,
    add_device,
    add_json,
    check_json,
    choose_device,
    integer,
    number,
)
from hsa_mini.cli.models import check_length, read_encoder, read_model
from hsa_mini.cli.report import printable, report, write_json
from hsa_mini.config import MAX_TOKENS
from hsa_mini.files.whole_file import check_writable


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its arguments; returns its parser."""
    command = commands.add_parser("demo", help="find one needle in a long text")
    command.add_argument(
        "--tokens",
        type=integer(MIN_DEMO_TOKENS, MAX_TOKENS),
        default=1_048_576,
        help="length of the haystack (default 1,048,576; at least 1,024)",
    )
    command.add_argument(
        "--haystack",
        type=Path,
        metavar="FILE|-",
        help="UTF-8 text, which is repeated; -: standard input (default: held-out text)",
    )
    command.add_argument(
        "--depth",
        type=number(0, 1),
        default=0.5,
        help="place of the needle, from 0 (start of the text) to 1 (end; default 0.5)",
    )
    command.add_argument(
        "--seed",
        type=integer(0, MAX_SEED),
        default=0,
        help="seed of the needles, the question and the place in the held-out text (default 0)",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="DIR",
        help="folder for the picture (default out)",
    )
    command.add_argument(
        "--checkpoint", default="mini", help="a shipped model or a folder (default mini)"
    )
    add_json(command)
    add_device(command)
    return command


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from tqdm import tqdm

    from hsa_mini.evaluation.demo import find_needle

    try:
        from hsa_mini.viz.plots import save_needle_strip
    except ImportError:  # matplotlib comes with an extra, and the answer does not need it
        save_needle_strip = None
    messages = sys.stderr if arguments.json == "-" else sys.stdout
    check_writable("--out", arguments.out, folder=True)
    check_json(arguments.json)
    device = choose_device(arguments.device)
    encoder = read_encoder("--checkpoint", arguments.checkpoint)
    model = read_model("--checkpoint", arguments.checkpoint, device, encoder=encoder)
    check_length("--tokens", arguments.tokens, model.config, encoder=encoder)
    corpus, first = load_haystack(arguments.haystack, arguments.tokens, arguments.seed, encoder)
    if arguments.haystack and len(corpus) > arguments.tokens:
        print("--haystack: the text is longer, and the rest of it is not read", file=sys.stderr)
    print(
        f"reading {arguments.tokens:,} tokens of {corpus.name} on {device}",
        file=messages,
        flush=True,
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
            encoder=encoder,
            progress=bar.update,
        )
    picture = "none: matplotlib is not installed"
    if save_needle_strip:
        picture = arguments.out / f"needle_{finding.tokens}_{finding.seed}.png"
        title = f"{finding.question}   {printable(finding.answer.rstrip('.'))}"
        save_needle_strip(picture, finding, title)
    print(report(finding), file=messages)
    print(f"picture    {picture}", file=messages)
    write_json(arguments.json, finding.to_json())
    return 0


def load_haystack(path: Path | None, tokens: int, seed: int, encoder):
    """The text to hide the needle in, and the position of the first token to take from it.

    The text is the file `path` from its start (`tokens` tokens, and one more if it is longer), or,
    if path is None, the held-out corpus from a position drawn with `seed`. encoder: the model's
    tokenizer. Raises ValueError if the text is too short, and for the corpus with another tokenizer
    than the course's.
    """
    import numpy as np

    from hsa_mini.data.corpus import load_corpus, load_text

    if path:
        corpus = load_text(path, max_tokens=tokens + 1, name="--haystack", encoder=encoder)
        if len(corpus) < MIN_HAYSTACK:
            raise ValueError(
                f"--haystack: got {len(corpus)} tokens of text, "
                f"accepted are at least {MIN_HAYSTACK}"
            )
        return corpus, 0
    if not encoder.is_default:
        raise ValueError(
            "--haystack: got none, accepted is a text for a model with a tokenizer of its own"
        )
    corpus = load_corpus("validation")
    return corpus, int(np.random.default_rng(seed).integers(len(corpus)))
