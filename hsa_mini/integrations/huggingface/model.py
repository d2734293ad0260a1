"""An HSA model with the interface of transformers.

Dimensions: B batch, T tokens.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.generic import can_return_tuple

from hsa_mini.checkpoint.weights import CONFIG, INDEX, WEIGHTS
from hsa_mini.checks import quoted
from hsa_mini.files.reading import read_json
from hsa_mini.files.whole_file import write_file
from hsa_mini.files.whole_folder import MANIFEST, read_folder, write_manifest
from hsa_mini.hsa_model import HSAModel
from hsa_mini.inference.prefill import prefill
from hsa_mini.integrations.huggingface.cache import HSACache
from hsa_mini.integrations.huggingface.configuration import HSAPretrainedConfig
from hsa_mini.integrations.huggingface.padding import Padding, rolled
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.paths import checkpoint_folder

PREFIX = "model."  # of a weight's name here; files hold the names of `HSAModel`
REMOTE = "modeling_hsa_mini.py"  # what `trust_remote_code=True` runs
REMOTE_CODE = b'''"""The classes of this checkpoint: `pip install 'hsa-mini[hf]'`."""

from hsa_mini.integrations.huggingface import HSAForCausalLM, HSAPretrainedConfig

__all__ = ["HSAForCausalLM", "HSAPretrainedConfig"]
'''
AUTO_MAP = {
    "AutoConfig": "modeling_hsa_mini.HSAPretrainedConfig",
    "AutoModelForCausalLM": "modeling_hsa_mini.HSAForCausalLM",
}
HUB_OPTIONS = {"repo_id", "commit_message", "private", "create_pr", "revision", "tags"}
UNSUPPORTED = {"inputs_embeds", "position_ids", "output_attentions", "output_hidden_states"}


class HSAForCausalLM(PreTrainedModel, GenerationMixin):
    """`HSAModel` (the attribute `model`) for `generate`, `pipeline` and `Trainer`.

    Every text of a padded batch is read by itself, from its own first token on, and gives what it
    gives alone. Checkpoint folders are those of `HSAModel`: each class reads what the other wrote.
    """

    config_class = HSAPretrainedConfig
    base_model_prefix = PREFIX.rstrip(".")  # so that names without the prefix are found
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _input_embed_layer = "embedding"
    _is_stateful = True  # no assisted decoding: a memory cannot be cropped
    _no_split_modules: ClassVar = ["Block", "ChunkEncoder"]
    _tied_weights_keys: ClassVar = {"model.head.weight": "model.embedding.weight"}

    def __init__(self, config: HSAPretrainedConfig) -> None:
        super().__init__(config)
        # transformers makes a model that it loads on the meta device.
        self.model = HSAModel(config.native(), device=torch.get_default_device())
        self.gradient_checkpointing = False
        self.register_load_state_dict_pre_hook(_add_prefix)
        self.post_init()

    def _init_weights(self, module) -> None:
        """Nothing: `HSAModel` initialises itself."""

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: torch.nn.Linear) -> None:
        self.model.head = new_embeddings

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own cache

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: HSACache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """input_ids int64 [B, T] -> logits [B, T, vocabulary], or those of the last
        `logits_to_keep` tokens; the loss, if there are labels; and the cache, if it is used.

        attention_mask [B, >= T]: 0 for padding, in front of a text or behind it. Its last T columns
        belong to input_ids. If one logit is kept, it is that of a text's last token wherever the
        padding is. kwargs: for the loss. Raises ValueError for gaps in a text, for an argument of
        transformers that an HSA model does not have, and as `HSACore.forward` does.
        """
        for name in UNSUPPORTED & kwargs.keys():
            if (value := kwargs.pop(name)) is not None and value is not False:
                raise ValueError(f"{name}: got a {type(value).__name__}, accepted is None")
        if cache is None and use_cache:
            cache = HSACache(ChunkMemory(self.model.config))
        logits = self._logits(input_ids, attention_mask, cache, logits_to_keep)
        if cache is not None:
            cache.columns += input_ids.shape[1]
        loss = None
        if labels is not None:
            vocabulary = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)

    def _logits(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        cache: HSACache | None,
        keep: int | torch.Tensor,
    ) -> torch.Tensor:
        reading = not torch.is_grad_enabled()
        memory = None if cache is None else cache.memory
        if reading and cache is not None and cache.is_initialized and ids.shape[1] == 1:
            return cache.step(self.model, ids)
        padding = Padding.of(mask, ids.shape[1])
        if reading and isinstance(keep, int) and keep == 1:  # the upper decoder reads only the tail
            return self._last_logits(ids, padding, memory)
        if padding is None:
            logits = self.model(ids, memory).logits
        elif memory is not None:
            raise ValueError(
                f"logits_to_keep: got {quoted(keep)} for padded texts with a cache, accepted is 1"
            )
        else:
            texts = rolled(ids, padding.first)  # what stands behind a text does not change it
            logits = rolled(self.model(texts).logits, -padding.first)
        return logits[:, slice(-keep, None) if isinstance(keep, int) else keep]

    def _last_logits(
        self, ids: torch.Tensor, padding: Padding | None, memory: ChunkMemory | None
    ) -> torch.Tensor:
        """The logits [B, 1, vocabulary] of the last token of every text."""
        if padding is None:
            return prefill(self.model, ids, memory).logits
        in_front = rolled(ids, padding.first + padding.lengths - ids.shape[1])
        return prefill(self.model, in_front, memory, lengths=padding.lengths).logits

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func=checkpoint, every_n_layers: int = 1
    ) -> None:
        """transformers calls this; `gradient_checkpointing_func(function, *inputs)`."""
        self.gradient_checkpointing = enable
        for i, block in enumerate((*self.model.lower, *self.model.upper)):
            vars(block).pop("forward", None)
            if enable and i % every_n_layers == 0:
                block.forward = partial(gradient_checkpointing_func, block.forward)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers, from safetensors only; the files of a folder with a manifest are
        verified first. The name of a shipped model, such as "mini", means that model.

        Raises ValueError for a file that was altered, and if weights are missing.
        """
        report = kwargs.pop("output_loading_info", False)
        kwargs.pop("use_safetensors", None)
        given = pretrained_model_name_or_path or ""
        folder = checkpoint_folder(given)
        if (folder / CONFIG).is_file() and not (folder / GENERATION_CONFIG_NAME).is_file():
            # transformers would take `top_k` of `HSAConfig` for an option of sampling.
            config = HSAPretrainedConfig.from_pretrained(folder)
            kwargs.setdefault("generation_config", GenerationConfig.from_model_config(config))

        def load(*_) -> Any:
            path = pretrained_model_name_or_path if folder == Path(given) else folder
            return super(HSAForCausalLM, cls).from_pretrained(
                path, *args, output_loading_info=True, use_safetensors=True, **kwargs
            )

        verified = (folder / MANIFEST).is_file()
        model, info = read_folder(folder, (CONFIG,), load) if verified else load()
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"path: {folder} lacks the weight {quoted(missing[0])}; "
                "accepted is a whole checkpoint"
            )
        return (model, info) if report else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """As in transformers, with the manifest that `HSAModel.from_pretrained` verifies.

        Other files of the folder stay as they are, and the manifest does not name them.
        """
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS & kwargs.keys()}
        weights = self.state_dict() if state_dict is None else state_dict
        weights = {name.removeprefix(PREFIX): value for name, value in weights.items()}
        if self.config.tied:
            weights.pop("head.weight", None)
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, is_main_process, weights, **kwargs)
        if is_main_process:
            _complete(Path(save_directory))
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Nothing: `save_pretrained` writes the file for `trust_remote_code`."""


def _complete(folder: Path) -> None:
    """Add what transformers does not write: the file for `trust_remote_code`, and the manifest."""
    write_file(folder / REMOTE, REMOTE_CODE)
    found = [path for path in (folder / WEIGHTS, folder / INDEX) if path.is_file()]
    found.sort(key=lambda path: path.stat().st_mtime_ns)
    for stale in found[:-1]:  # of an earlier save: transformers would read it
        stale.unlink()
    for path in found[-1:]:  # none: only an adapter or a variant was saved
        shards = read_json(path)["weight_map"].values() if path.name == INDEX else ()
        write_manifest(folder, {CONFIG, REMOTE, path.name, *shards})


def _add_prefix(module: HSAForCausalLM, state_dict: dict, prefix: str, *_) -> None:
    """Before `load_state_dict`: weights from a file get the names that they have here."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        if not name.startswith(prefix + PREFIX):
            state_dict[prefix + PREFIX + name.removeprefix(prefix)] = state_dict.pop(name)
    for tied, source in module._tied_weights_keys.items():
        if module.config.tied and prefix + source in state_dict:
            state_dict.setdefault(prefix + tied, state_dict[prefix + source])
