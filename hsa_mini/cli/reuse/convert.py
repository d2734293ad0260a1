"""`convert`: make an HSA model from a pretrained Llama-like checkpoint."""

import argparse
from pathlib import Path

from hsa_mini.cli.arguments import MAX_SEED, integer
from hsa_mini.config import MAX_LAYERS, MAX_SIZE


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its arguments; returns its parser."""
    command = commands.add_parser(
        "convert",
        help="make an HSA model from a pretrained Llama-like one",
        description="Make an HSA model from a pretrained checkpoint of Hugging Face, in "
        "safetensors: Llama, Mistral or Qwen3. Its attention becomes window attention. The HSA "
        "layers are new and change nothing until they are trained.",
    )
    command.add_argument("folder", type=Path, help="the checkpoint, with its tokenizer")
    command.add_argument("out", type=Path, help="the folder for the HSA model")
    command.add_argument(
        "--window",
        type=integer(1, MAX_SIZE),
        default=512,
        help="tokens in the window (default 512)",
    )
    command.add_argument(
        "--chunk-size", type=integer(1, MAX_SIZE), default=64, help="tokens in a chunk (default 64)"
    )
    command.add_argument(
        "--top-k", type=integer(1, MAX_SIZE), default=8, help="chunks that are kept (default 8)"
    )
    command.add_argument(
        "--groups",
        type=integer(1, MAX_LAYERS),
        default=1,
        help="groups of layers in the upper decoder, each with one HSA layer (default 1)",
    )
    command.add_argument(
        "--lower-layers",
        type=integer(1, MAX_LAYERS),
        help="layers in the lower decoder (default: half of them, or a few more)",
    )
    command.add_argument(
        "--seed", type=integer(0, MAX_SEED), default=0, help="seed of the new weights (default 0)"
    )
    return command


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from hsa_mini.checkpoint.weights import INDEX, WEIGHTS
    from hsa_mini.files.whole_file import check_writable
    from hsa_mini.files.whole_folder import check_replaceable
    from hsa_mini.integrations.convert import convert, read_source

    options = ("window", "chunk_size", "top_k", "groups", "lower_layers")
    source = read_source(arguments.folder, **{name: getattr(arguments, name) for name in options})
    check_writable("out", arguments.out, folder=True)
    check_replaceable(arguments.out, {WEIGHTS, INDEX})
    model = convert(source, seed=arguments.seed)
    model.save_pretrained(arguments.out, texts=source.companions)
    config = source.config
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    new = sum(sizes[name] for name in sizes if name.startswith("encoder.") or ".hsa" in name)
    print(
        f"the model is in {arguments.out}: {sum(sizes.values()):,} parameters, of which {new:,} "
        f"are new; {config.lower_layers} layers below, "
        f"{config.groups} x {config.layers_per_group} above"
    )
    return 0
