"""The rotary positions of a checkpoint as an HSA model has them: one factor for each frequency.

The formulas are those of transformers: linear (Chen et al., arXiv 2306.15595), yarn (Peng et al.,
arXiv 2309.00071) and llama3 (arXiv 2407.21783).

Dimensions: D head dimension.
"""

import math
from typing import Any, NamedTuple

from hsa_mini.checks import check_number, quoted

KINDS = ("default", "linear", "llama3", "yarn")


class Rope(NamedTuple):
    """base and factors [D/2]: fields of `HSAConfig`. query_scale: what queries are multiplied by,
    where a checkpoint multiplies sines and cosines.
    """

    base: float
    factors: tuple[float, ...] = ()
    query_scale: float = 1.0


def read_rope(values: dict[str, Any], head_dim: int) -> Rope:
    """From the content of a checkpoint's config.json. Raises ValueError for another kind of RoPE,
    and for a number that is missing or out of range.
    """
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind not in KINDS:
        raise ValueError(f"rope_type: got {quoted(kind)}, accepted are {', '.join(KINDS)}")
    if (share := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"partial_rotary_factor: got {quoted(share)}, accepted is 1.0")
    base = rope.get("rope_theta") or values.get("rope_theta") or 10_000.0
    check_number("rope_theta", base, 1.0, 1e12)
    if kind == "default":
        return Rope(base)
    factor = _number(rope, "factor", 1.0)
    frequencies = [base ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if kind == "linear":
        return Rope(base, (1 / factor,) * len(frequencies))
    outer = values.get("original_max_position_embeddings")
    trained = rope if outer is None else {"original_max_position_embeddings": outer}
    tokens = _number(
        {"original_max_position_embeddings": values.get("max_position_embeddings"), **trained},
        "original_max_position_embeddings",
        1.0,
    )
    if kind == "llama3":
        return Rope(base, _llama3(rope, frequencies, factor, tokens))
    return Rope(base, _yarn(rope, base, len(frequencies), factor, tokens), _scale(rope, factor))


def _number(rope: dict[str, Any], name: str, least: float, default: float | None = None) -> float:
    value = rope.get(name, default)
    check_number(name, value, least, 1e12)
    return value


def _llama3(
    rope: dict[str, Any], frequencies: list[float], factor: float, tokens: float
) -> tuple[float, ...]:
    """Frequencies of few turns in `tokens` tokens are divided by the factor, those of many are
    kept, and those in between are blended.
    """
    few = _number(rope, "low_freq_factor", 1e-6)
    many = _number(rope, "high_freq_factor", few)
    if many == few:
        raise ValueError(f"high_freq_factor: got {many}, accepted is more than low_freq_factor")
    turns = (tokens * frequency / (2 * math.pi) for frequency in frequencies)
    kept = (min(max((x - few) / (many - few), 0.0), 1.0) for x in turns)
    return tuple((1 - share) / factor + share for share in kept)


def _yarn(
    rope: dict[str, Any], base: float, pairs: int, factor: float, tokens: float
) -> tuple[float, ...]:
    """As `_llama3`, but blended along the pairs of a head."""
    many = rope.get("beta_fast") or 32
    few = rope.get("beta_slow") or 1
    for name, value in (("beta_fast", many), ("beta_slow", few)):
        check_number(name, value, 1e-6, 1e12)
    first, last = (
        pairs * math.log(tokens / (turns * 2 * math.pi)) / math.log(base) for turns in (many, few)
    )
    if rope.get("truncate", True):
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, 2 * pairs - 1)
    width = last - first or 0.001
    divided = (min(max((i - first) / width, 0.0), 1.0) for i in range(pairs))
    return tuple(share / factor + 1 - share for share in divided)


def _scale(rope: dict[str, Any], factor: float) -> float:
    """Of queries: the square of what yarn multiplies sines and cosines by."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    one, other = (rope.get(name) for name in ("mscale", "mscale_all_dim"))
    for name in ("mscale", "mscale_all_dim", "attention_factor"):
        if rope.get(name) is not None:
            check_number(name, rope[name], 0.0, 1e6)
    found = rope.get("attention_factor")
    if found is None:
        found = scale(one) / scale(other) if one and other else scale(1.0)
    return found**2
