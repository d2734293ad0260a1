"""What a device does at best, measured: a matrix product, and a copy."""

import torch
from timing import measure

PRODUCT = {
    "cuda": (8192, torch.bfloat16),
    "cpu": (512, torch.float32),
}  # rows of the matrices, dtype
COPIED = {"cuda": 1 << 31, "cpu": 1 << 26}  # bytes


def flops_per_second(device: torch.device) -> float:
    """Of a product of square random matrices."""
    size, dtype = PRODUCT[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / measure(lambda: a @ b, device)[0] * 1e3


def bytes_per_second(device: torch.device) -> float:
    """Of a copy, bytes read and written."""
    source = torch.empty(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source), device)[0] * 1e3
