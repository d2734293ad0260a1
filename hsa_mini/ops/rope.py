"""Rotary positions (Su et al., arXiv 2104.09864), for the sliding window, where distance matters.

HSA has no positions.
"""

import functools

import torch


def rope_table(
    positions: torch.Tensor, dim: int, base: float, factors: tuple[float, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """positions [T], or [B, T] -> cos and sin, float32 [..., T, dim/2]. factors: of the frequencies
    base^(-2i/dim), one each; () stands for 1.

    Angles are computed in float64, because at position 16M a float32 angle would be wrong by a
    whole radian.
    """
    frequencies = base ** (
        -torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
    )
    if factors:
        frequencies = frequencies * _on_device(factors, positions.device)
    angles = positions.double()[..., None] * frequencies
    return angles.cos().float(), angles.sin().float()


@functools.lru_cache(maxsize=16)
def _on_device(factors: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Kept, because a decode step must not copy from the CPU."""
    return torch.tensor(factors, dtype=torch.float64, device=device)


def apply_rope(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the two halves of every head of x [..., T, heads, dim] by the table's angles."""
    # [..., T, dim/2] -> [..., T, 1, dim/2]
    cos, sin = (part.unsqueeze(-2).to(x.dtype) for part in table)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
