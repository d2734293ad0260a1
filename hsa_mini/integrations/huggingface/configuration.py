"""The configuration of an HSA model as transformers stores it."""

import dataclasses
from typing import ClassVar

from transformers import PreTrainedConfig

from hsa_mini.config import MODEL_TYPE, RENAMED, HSAConfig


class HSAPretrainedConfig(PreTrainedConfig):
    """The fields of `HSAConfig`, by their names, and what transformers adds to every configuration.

    `top_k` alone is called `hsa_top_k`: transformers has an option of sampling with that name.
    `hidden_size` and other common names of transformers work too. Raises ValueError as `HSAConfig`
    does.
    """

    model_type = MODEL_TYPE
    attribute_map: ClassVar = {
        "hidden_size": "width",
        "intermediate_size": "mlp_width",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "sliding_window": "window",
        "tie_word_embeddings": "tied",
    }

    def __post_init__(self, **kwargs):
        given = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        fields = dataclasses.asdict(HSAConfig.from_dict({**given, "transformers_version": ""}))
        super().__post_init__(**{k: v for k, v in given.items() if k not in fields})
        for name, value in fields.items():
            setattr(self, RENAMED.get(name, name), value)

    @property
    def num_hidden_layers(self) -> int:
        """The blocks of both decoders."""
        return self.native().lower_layers + self.native().upper_layers

    def native(self) -> HSAConfig:
        """The same as the configuration of an `HSAModel`. Raises ValueError as `HSAConfig` does."""
        return HSAConfig.from_dict(vars(self))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: `HSAForCausalLM.save_pretrained` writes the file for `trust_remote_code`."""
