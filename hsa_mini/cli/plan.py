"""`plan`: what a model costs at a length, in parameters, bytes and FLOP, without making it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hsa_mini.cli.arguments import add_json, add_model, check_json, chosen_model, integer
from hsa_mini.cli.report import write_json
from hsa_mini.config import MAX_TOKENS, PRESETS

if TYPE_CHECKING:  # imported late elsewhere, because it loads torch
    from hsa_mini.model.cost_estimate import CostEstimate


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its arguments; returns its parser."""
    command = commands.add_parser(
        "plan",
        help="what a model costs at a length: parameters, bytes, FLOP; the model is not made",
    )
    add_model(command, ", ".join(PRESETS))
    command.add_argument(
        "--tokens",
        type=integer(1, MAX_TOKENS),
        default=1_048_576,
        help="length of the text (default 1,048,576)",
    )
    add_json(command)
    return command


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from hsa_mini.model.cost_estimate import estimate_cost
    from hsa_mini.training.own.settings import load_config

    check_json(arguments.json)
    given = chosen_model(arguments)
    model = load_config(given) if given.endswith(".json") else given
    estimate = estimate_cost(model, arguments.tokens)
    if arguments.json != "-":
        print(table(estimate))
    write_json(arguments.json, estimate.to_json())
    return 0


def table(estimate: CostEstimate) -> str:
    """The estimate for people, next to the paper's parameters and the cost of full attention."""
    return "\n".join(
        [
            f"{estimate.preset} at {estimate.tokens:,} tokens",
            "",
            *_parameter_lines(estimate),
            "",
            *_byte_lines(estimate),
            "",
            *_flop_lines(estimate),
        ]
    )


def _parameter_lines(estimate: CostEstimate) -> list[str]:
    """Numbers of parameters, with the paper's where it prints them."""
    from hsa_mini.model.cost_estimate import PRINTED

    config = estimate.config
    printed = PRINTED.get(estimate.preset, {})
    lines = [f"{'parameters':<38}{'ours':>16}{'paper':>12}{'ours/paper':>12}"]
    for label, name in (
        ("total", "params_total"),
        ("active per token, without head", "params_active"),
        ("active per token, with head", "params_active_with_head"),
        ("base: without HSA", "params_base_without_hsa"),
    ):
        value = getattr(estimate, name)
        line = f"  {label:<36}{value:>16,}"
        if name in printed:
            line += f"{printed[name] / 1e6:>10,.1f} M{value / printed[name]:>12.3f}"
        lines.append(line)
    lines += [f"    {part:<34}{value:>16,}" for part, value in estimate.params_by_part.items()]
    if printed:
        ours = "The paper prints no widths or depths; ours, chosen to meet its totals:"
    else:
        ours = "Every size is ours:"
    sizes = (
        f"width {config.width}, {config.lower_layers} + {config.upper_layers} blocks, "
        f"{config.groups} with HSA, MLPs of {config.mlp_width}"
    )
    if config.experts:
        sizes += f", experts of {config.expert_width}"
    return [*lines, f"  {ours} {sizes}."]


def _byte_lines(estimate: CostEstimate) -> list[str]:
    """Bytes of weights, memory and caches, with those of full attention's KV cache."""
    state = estimate.kv_bytes + estimate.landmark_bytes + estimate.window_cache_bytes
    return [
        f"{'bytes, in bfloat16':<38}{'ours':>16}{'full attention':>20}",
        _row("weights", estimate.weight_bytes, "B"),
        _row("K and V of the chunk memory", estimate.kv_bytes, "B"),
        _row("landmarks", estimate.landmark_bytes, "B"),
        _row("window caches", estimate.window_cache_bytes, "B"),
        _row("all three", state, "B", estimate.full_attention_kv_bytes),
    ]


def _flop_lines(estimate: CostEstimate) -> list[str]:
    """FLOP per token, with those of full attention, and what full attention means here."""
    config = estimate.config
    return [
        f"{'per token, 2 FLOP per multiply-add':<38}{'ours':>16}{'full attention':>20}",
        _row(
            "prefill",
            estimate.prefill_flops_per_token,
            "FLOP",
            estimate.full_attention_prefill_flops_per_token,
        ),
        _row(
            "decode, the next token",
            estimate.decode_flops_per_token,
            "FLOP",
            estimate.full_attention_decode_flops_per_token,
        ),
        f"  Full attention: the same {config.lower_layers + config.upper_layers} blocks "
        f"without HSA, every one with a KV cache (KV heads: {config.kv_heads} of "
        f"{config.head_dim}).",
    ]


def _row(label: str, value: int, unit: str, full: int | None = None) -> str:
    """One line of the table; full: the number for full attention, if there is one."""
    from hsa_mini.model.cost_estimate import scaled

    line = f"  {label:<36}{scaled(value, unit):>16}"
    return line if full is None else f"{line}{scaled(full, unit):>20}"
