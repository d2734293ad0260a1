"""Random tensors on the GPU, and comparison by relative error."""

import torch


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(
        shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda"
    ).to(dtype)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()
