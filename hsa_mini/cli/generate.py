"""`generate`: continue a text, and print the new text while the model makes it."""

import argparse
from itertools import takewhile
from pathlib import Path

from hsa_mini.cli.arguments import MAX_SEED, add_device, choose_device, integer, number
from hsa_mini.cli.models import read_encoder, read_model
from hsa_mini.cli.report import write_text

MAX_PROMPT_TOKENS = 1 << 27  # the longest text that was tried; an endless one is refused


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its arguments; returns its parser."""
    command = commands.add_parser("generate", help="continue a text")
    command.add_argument(
        "checkpoint", nargs="?", default="mini", help="a shipped model or a folder (default mini)"
    )
    command.add_argument(
        "--prompt-file",
        type=Path,
        required=True,
        metavar="FILE|-",
        help="any UTF-8 text; -: standard input",
    )
    command.add_argument(
        "--max-new-tokens",
        type=integer(1, 10**9),
        default=256,
        help="stop after this many tokens at the latest (default 256)",
    )
    command.add_argument(
        "--temperature",
        type=number(0, 10**6),
        default=0.0,
        help="0: take the most likely token; above 0: draw a token at random (default 0)",
    )
    command.add_argument(
        "--top-k",
        type=integer(0, 10**9),
        default=0,
        help="draw only from the K most likely tokens (default 0: from all)",
    )
    command.add_argument(
        "--top-p",
        type=number(0, 1),
        default=1.0,
        help="draw only from the smallest set of tokens with this share of the probability "
        "(default 1: from all)",
    )
    command.add_argument(
        "--seed", type=integer(0, MAX_SEED), default=0, help="seed of the draws (default 0)"
    )
    add_device(command)
    return command


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    import torch
    from tqdm import tqdm

    from hsa_mini.data.corpus import load_text
    from hsa_mini.inference.generate import stream

    device = choose_device(arguments.device)
    most = MAX_PROMPT_TOKENS
    encoder = read_encoder("checkpoint", arguments.checkpoint)
    text = load_text(
        arguments.prompt_file, max_tokens=most + 1, name="--prompt-file", encoder=encoder
    )
    prompt = text.tokens
    if not 1 <= len(prompt) <= most:
        given = f"more than {most}" if len(prompt) else "0"
        raise ValueError(f"--prompt-file: got {given} tokens of text, accepted is 1 to {most}")
    model = read_model("checkpoint", arguments.checkpoint, device, encoder=encoder)
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
    made = takewhile(lambda token: token != encoder.end, (int(token) for token in tokens))
    for text in encoder.decode_stream(made):
        write_text(text)
    print()
    return 0
