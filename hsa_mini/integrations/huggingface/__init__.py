"""HSA models in Hugging Face transformers: configuration, model, cache and tokenizer.

Importing this package registers them: `AutoConfig`, `AutoModelForCausalLM` and `pipeline` then read
the checkpoints of this project. Raises ImportError if transformers is not installed.
"""

try:
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError:
    raise ImportError(
        "transformers: not installed, accepted is an installation by `pip install 'hsa-mini[hf]'`"
    ) from None

from hsa_mini.integrations.huggingface.balance import BalanceExperts
from hsa_mini.integrations.huggingface.cache import HSACache
from hsa_mini.integrations.huggingface.configuration import HSAPretrainedConfig
from hsa_mini.integrations.huggingface.model import HSAForCausalLM
from hsa_mini.integrations.huggingface.tokenizer import fast_tokenizer

__all__ = ["BalanceExperts", "HSACache", "HSAForCausalLM", "HSAPretrainedConfig", "fast_tokenizer"]

AutoConfig.register(HSAPretrainedConfig.model_type, HSAPretrainedConfig, exist_ok=True)
AutoModelForCausalLM.register(HSAPretrainedConfig, HSAForCausalLM, exist_ok=True)
