"""Tensors as a safetensors file in a folder that `write_folder` writes."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn


def tensor_file(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None
) -> Callable[[Path], None]:
    """A function that writes the tensors at the path it is given. It raises OSError.

    dtype: see `stored_dtype`. The copies are made when the file is written, so that a folder of
    several files holds the copies of one at a time.
    """

    def write(path: Path) -> None:
        try:
            save_file(
                {
                    name: value.detach().to("cpu", stored_dtype(value, dtype)).contiguous()
                    for name, value in tensors.items()
                },
                path,
            )
        except SafetensorError as error:
            raise OSError(f"cannot write {path} ({error})") from None

    return write


def is_finite(value: torch.Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity. This waits for the device.

    It looks at the minimum and the maximum, because `isfinite` would make a copy of the tensor.
    """
    return not value.numel() or bool(torch.stack(value.aminmax()).isfinite().all())


def stored_dtype(value: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a tensor in a file: `dtype`, if it is given, for a parameter; else its own.

    A buffer keeps its own dtype, because it may be state that needs float32.
    """
    return dtype if dtype and isinstance(value, nn.Parameter) else value.dtype
