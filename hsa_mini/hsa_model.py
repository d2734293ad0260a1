"""The model that users meet: what `model.core` computes, and the ways to generate text, to save and to load."""

from pathlib import Path

import torch

from hsa_mini.model.core import HSACore


class HSAModel(HSACore):
    """A causal language model that reads nearby tokens through a window and all others through chunks."""

    def generate(self, ids: torch.Tensor, **options):
        """Continue ids [B, T]; see `hsa_mini.inference.generate.generate`."""
        from hsa_mini.inference.generate import generate

        return generate(self, ids, **options)

    def save_pretrained(self, path: str | Path, **options) -> None:
        """Write weights, configuration and sha256 manifest; for the options see `hsa_mini.checkpoint.weights.save_model`."""
        from hsa_mini.checkpoint.weights import save_model

        save_model(self, Path(path), **options)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> "HSAModel":
        """The model in folder `path`, in evaluation mode. Raises ValueError if a file is missing or was altered."""
        from hsa_mini.checkpoint.weights import load_model

        return load_model(Path(path), device=device, dtype=dtype)
