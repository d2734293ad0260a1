"""Tensors as a safetensors file in a folder that `write_folder` writes."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def tensor_file(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None
) -> Callable[[Path], None]:
    """A function that writes the tensors at the path it is given. It raises OSError.

    Floating-point tensors are cast to `dtype` if it is given. The copies are made when the file is
    written, so that a folder of several files holds the copies of one at a time.
    """

    def write(path: Path) -> None:
        try:
            save_file({name: _stored(value, dtype) for name, value in tensors.items()}, path)
        except SafetensorError as error:
            raise OSError(f"cannot write {path} ({error})") from None

    return write


def _stored(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor as it is written: contiguous on the CPU, in `dtype` if it is floating-point."""
    return value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
