"""Which weights made a memory.

Only the weights that made a memory can read it. Others of the same sizes would compute wrong
numbers from it without any error. So a memory knows its model, and a saved memory the fingerprint
of the model's weights.
"""

import hashlib

import torch
from torch import nn

# The model that a memory was last read by; or the fingerprint of its weights, for a memory from a
# file; or None, for a memory that has read nothing or whose file does not say.
Origin = nn.Module | str | None


def fingerprint(origin: Origin) -> str | None:
    """64 hexadecimal digits that identify the weights of a model, buffers included.

    They depend on names, shapes and values after rounding to bfloat16, so that they are the same on
    every device, and for a float32 model and its bfloat16 copy. One changed value changes them, and
    so does the order of rows, but not the order inside a row of a matrix. Every weight is read
    once, where it lies. They guard against mistakes: other weights that have the same digits can be
    built on purpose.
    """
    if not isinstance(origin, nn.Module):
        return origin
    digest = hashlib.sha256()
    for name, value in sorted(origin.state_dict().items()):
        digest.update(f"{name} {list(value.shape)} ".encode())
        rows = value.bfloat16() if value.dim() > 1 else value.bfloat16()[..., None]
        hashes = torch.hash_tensor(rows, -1)  # exact, in whatever order a device reads a row
        digest.update(hashes.cpu().numpy().astype("<u8").tobytes())
    return digest.hexdigest()


def check_origin(origin: Origin, model: nn.Module) -> None:
    """Raise ValueError for a memory that neither `model` made nor a model of the same weights."""
    if origin is None or origin is model or fingerprint(origin) == fingerprint(model):
        return
    raise ValueError(
        "memory: got one that other weights made, accepted is one that this model made"
    )
