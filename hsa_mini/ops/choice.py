"""Which backend does the work: the Triton kernels of `hsa_kernels`, or plain PyTorch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hsa_mini.checks import quoted

CHOICES = ("auto", "kernels", "torch")
MIN_CAPABILITY = (8, 0)  # Ampere

_choice = "auto"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block, choose the backend: "kernels" (Triton), "torch" (plain PyTorch) or "auto".

    "auto" uses the kernels on an NVIDIA GPU from Ampere on, in 16 bits, for the sizes that they
    support, and PyTorch everywhere else. "kernels" raises ValueError for arguments that they do not
    support; without a GPU they need Triton's interpreter. Raises ValueError for any other name.
    """
    global _choice
    if name not in CHOICES:
        raise ValueError(f"name: got {quoted(name)}, accepted are {', '.join(CHOICES)}")
    before = _choice
    _choice = name
    try:
        yield
    finally:
        _choice = before


def current() -> str:
    """The backend in force: "auto", "kernels" or "torch"."""
    return _choice


def kernels() -> Any:
    """The package `hsa_kernels`; None where Triton is missing, unless the backend is "kernels"."""
    try:
        import hsa_kernels
    except ImportError:
        if _choice == "kernels":
            raise
        return None
    return hsa_kernels


def runs_kernels(device: torch.device) -> bool:
    """Whether the kernels are made for this device: an NVIDIA GPU from Ampere on.

    PyTorch calls AMD's GPUs cuda too. There, and on older GPUs of NVIDIA, plain PyTorch works.
    """
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
    )


def check_device(device: torch.device) -> None:
    """Raise ValueError for a kind of device on which this package was never tried."""
    if device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(
            f"device: got {device.type}, accepted are cpu and cuda; Apple's and other GPUs are not "
            "supported"
        )


def use_kernels(tensor: torch.Tensor, sizes_fit: bool) -> bool:
    """Whether the kernels do the work on `tensor`. sizes_fit: whether they support its sizes."""
    if _choice != "auto":
        return _choice == "kernels"
    return (
        runs_kernels(tensor.device)
        and tensor.dtype in (torch.float16, torch.bfloat16)
        and sizes_fit
        and kernels() is not None
    )


def needs_gradient(*tensors: torch.Tensor) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
