"""The window of sequences that take one token at a time, in tensors of fixed size and place: what a CUDA graph can hold.

Dimensions: B batch, W window, H query heads, J key/value heads, D head dimension, C width.
"""

import torch

from hsa_mini import ops
from hsa_mini.model.qkv import QKV
from hsa_mini.model.swa import WindowCache


class Clock:
    """Where every sequence stands; all rings of a memory share it: positions int64 [B] of the tokens to come, and their slots."""

    def __init__(self, positions: torch.Tensor, window: int) -> None:
        self.positions = positions
        self.slots = positions % window
        self.window = window

    def set(self, positions: torch.Tensor) -> None:
        self.positions.copy_(positions)
        self.slots.copy_(positions % self.window)


class WindowRing:
    """k and v [B, W, J, D]: what stands at position p lies in slot p % W, so that a token writes one slot and moves none."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, clock: Clock) -> None:
        self.k = k
        self.v = v
        self.clock = clock

    @classmethod
    def of(cls, cache: WindowCache, read: int, window: int, clock: Clock) -> "WindowRing":
        """The keys and values of sequences that have all read so many tokens."""
        slots = torch.arange(read - cache.k.shape[1], read, device=cache.k.device) % window
        rings = []
        for part in (cache.k, cache.v):
            rings.append(part.new_zeros(len(part), window, *part.shape[2:]))
            rings[-1][:, slots] = part
        return cls(*rings, clock)

    def ordered(self, read: int) -> WindowCache:
        """A copy in order of time, for segments: what the next of `read` tokens sees."""
        window = self.k.shape[1]
        slots = torch.arange(read - min(read, window - 1), read, device=self.k.device) % window
        return WindowCache(self.k[:, slots], self.v[:, slots])

    def attend(self, qkv: QKV, x: torch.Tensor, rope) -> torch.Tensor:
        """x [B, 1, C], the token to come, which enters the ring -> [B, 1, H, D]."""
        clock = self.clock
        gains = (qkv.q_norm.weight, qkv.k_norm.weight)
        q = ops.update_window_cache(
            *qkv.project(x), self.k, self.v, clock.slots, *gains, rope, eps=qkv.q_norm.eps
        )
        return ops.window_decode_attention(q, self.k, self.v, clock.positions)
