"""The model for users: what `hsa_mini.model.core` computes, with generation, saving and loading."""

from pathlib import Path
from typing import Self

import torch

from hsa_mini.checkpoint.weights import CONFIG, SHARD_BYTES, load_weights, save_weights
from hsa_mini.config import MODEL_TYPE, HSAConfig
from hsa_mini.files.reading import read_json
from hsa_mini.files.whole_folder import read_folder
from hsa_mini.inference.generate import Generation, generate
from hsa_mini.model.core import HSACore
from hsa_mini.ops.choice import check_device
from hsa_mini.paths import checkpoint_folder


class HSAModel(HSACore):
    """A causal language model for long texts.

    It reads nearby tokens by sliding-window attention, and all earlier ones in chunks by
    Hierarchical Sparse Attention.
    """

    def generate(self, ids: torch.Tensor, **options) -> Generation:
        """Continue ids [B, T]; see `hsa_mini.inference.generate.generate` for the options."""
        return generate(self, ids, **options)

    def save_pretrained(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        texts: dict[str, str] | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Write weights, configuration and sha256 manifest as the folder `path`.

        dtype: that of the stored parameters (None: the model's own); the router's bias is always
        float32. texts: further files, name ->
        content. shard_bytes: weights that take more bytes are split over several files. Raises
        ValueError for shard_bytes below 1, and if `path` holds something other than a checkpoint.
        """
        texts = {CONFIG: self.config.to_json(model_type=MODEL_TYPE), **(texts or {})}
        weights = self._stored_weights()
        save_weights(weights, Path(path), texts=texts, dtype=dtype, shard_bytes=shard_bytes)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The model in the folder `path`, in evaluation mode and without gradients.

        path: a folder, or the name of a shipped model such as "mini" (see
        `hsa_mini.paths.checkpoint_folder`). dtype: that of the parameters; None is bfloat16 on a
        GPU and float32 elsewhere. The router's bias is always float32. Raises ValueError if a file
        is missing or was altered, if the files do not fit together, for weights that are NaN or
        infinite, and for a device that is neither the CPU nor what PyTorch calls cuda.
        """
        device = torch.device(device)
        check_device(device)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)

        def read(files: dict[str, Path]) -> Self:
            model = cls(HSAConfig.from_dict(read_json(files[CONFIG])), device="meta", dtype=dtype)
            model.adopt_weights(load_weights(files, model._stored_weights(), device=device))
            return model.eval().requires_grad_(False)

        return read_folder(checkpoint_folder(path), (CONFIG,), read)

    def adopt_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Take tensors by name as the weights, without a copy. A tied head is the embedding."""
        self.load_state_dict(weights, strict=False, assign=True)
        if self.config.tied:
            self.head.weight = self.embedding.weight

    def _stored_weights(self) -> dict[str, torch.Tensor]:
        """The weights to store, by name. A tied head is left out because it is the embedding."""
        return {
            name: value
            for name, value in self.state_dict(keep_vars=True).items()
            if not (self.config.tied and name == "head.weight")
        }
