"""Counter-based Gumbel noise (Philox-4x32-10).

The same (seed, b, t, j, chunk) gives the same noise everywhere.
"""

import torch

_MASK = 0xFFFFFFFF


def philox(seed: int | torch.Tensor, counter: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """First output word of Philox-4x32-10 (Salmon et al. 2011), as int64 in [0, 2^32).

    seed: an int or an int64 tensor [], of which the low 64 bits are used. counter: four int64
    tensors of one shape.
    """
    c0, c1, c2, c3 = counter
    key0 = seed & _MASK
    key1 = (seed >> 32) & _MASK
    for _ in range(10):
        low0, high0 = _multiply(c0, 0xD2511F53)
        low1, high1 = _multiply(c2, 0xCD9E8D57)
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 = (key0 + 0x9E3779B9) & _MASK
        key1 = (key1 + 0xBB67AE85) & _MASK
    return c0


def _multiply(x: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high 32 bits of x * constant.

    The constant is split in two halves, because the whole product may not fit in a signed 64-bit
    integer.
    """
    # both products are below 2^48
    low = x * (constant & 0xFFFF)
    high = x * (constant >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return total & _MASK, (total >> 32) + (high >> 16)


def gumbel_noise(
    seed: int | torch.Tensor, positions: torch.Tensor, heads: int, chunks: int
) -> torch.Tensor:
    """Gumbel(0, 1) noise float32 [B, T, J, N] for tokens at `positions` int64 [B, T].

    Positions are counted from the start of the sequence.
    """
    device = positions.device
    b = torch.arange(positions.shape[0], device=device)[:, None, None, None]
    j = torch.arange(heads, device=device)[:, None]
    n = torch.arange(chunks, device=device)
    shape = (*positions.shape, heads, chunks)
    counter = tuple(x.expand(shape) for x in (n, positions[..., None, None], j, b))
    uniform = (philox(seed, counter).double() + 0.5) * 2.0**-32  # never 0, never 1
    return -torch.log(-torch.log(uniform)).float()
