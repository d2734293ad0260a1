"""The keys and values of one layer's sliding window, in a buffer of fixed size.

The key of position p lies in slot p % W. With W = 4, after the tokens 0 to 5:

    slot       0   1   2   3
    position   4   5   2   3

A segment of many tokens makes a new buffer (`from_order`), so that autograd can still use the old
one. A single new token overwrites one slot in place (`ops.update_window_cache`), so that a CUDA
graph finds the buffer where it was.

Dimensions: B batch, T tokens, W window, J key/value heads, D head dimension.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import pad


class RollingKVCache(NamedTuple):
    """k (rotated by RoPE) and v [B, W, J, D]. Slots that no token has filled yet hold 0."""

    k: torch.Tensor
    v: torch.Tensor

    def in_order(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [B, P, J, D] of the P = min(position, W-1) tokens that the token at `position`
        sees, oldest first.
        """
        return self.in_front_of(self.k[:, :0], self.v[:, :0], position)

    def in_front_of(
        self, k: torch.Tensor, v: torch.Tensor, position: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [B, T, J, D] of a segment that begins at `position` -> [B, P+T, J, D], the cached
        ones in front.
        """
        keys = torch.cat((*_stretches(self.k, position), k), dim=1)
        values = torch.cat((*_stretches(self.v, position), v), dim=1)
        return keys, values

    @classmethod
    def from_order(
        cls, k: torch.Tensor, v: torch.Tensor, position: int, window: int
    ) -> "RollingKVCache":
        """The cache in front of `position` from k and v [B, P, J, D] of the P tokens before it,
        oldest first.

        Only the newest W-1 tokens are kept, because the next token sees no others.
        """
        kept = min(k.shape[1], window - 1)
        end = position % window  # the slot of the next token
        rings = []
        for part in (k, v):
            newest = part[:, part.shape[1] - kept :]
            newest = pad(newest, (0, 0, 0, 0, window - kept, 0))  # [B, W, J, D], the newest last
            rings.append(torch.cat((newest[:, window - end :], newest[:, : window - end]), dim=1))
        return cls(*rings)


def _stretches(part: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots [B, <= W-1, J, D] that the token at `position` sees, in the order of time.

    They lie in two stretches: from the slot of the oldest one to the end of the buffer, then from
    slot 0 on.
    """
    window = part.shape[1]
    cached = min(position, window - 1)
    first = (position - cached) % window
    wrapped = max(first + cached - window, 0)
    return part[:, first : first + cached - wrapped], part[:, :wrapped]
