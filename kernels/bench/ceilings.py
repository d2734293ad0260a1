"""The ceilings of a device, measured: the rates of a large matrix product and of a large copy."""

import torch
from timing import measure

# rows of the square matrices, dtype
PRODUCT = {"cuda": (8192, torch.bfloat16), "cpu": (512, torch.float32)}
COPIED = {"cuda": 1 << 31, "cpu": 1 << 26}  # bytes


def flops_per_second(device: torch.device) -> float:
    """FLOP per second of a product of square random matrices."""
    size, dtype = PRODUCT[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / measure(lambda: a @ b, device)[0] * 1e3


def bytes_per_second(device: torch.device) -> float:
    """Bytes per second of a copy: bytes read plus bytes written."""
    source = torch.empty(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source), device)[0] * 1e3
