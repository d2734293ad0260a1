"""The tokenizer of this project as a fast tokenizer of transformers."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from hsa_mini.config import MAX_TOKENS
from hsa_mini.data.tokenizer import PATTERN, SPECIAL_TOKENS, load_ranks


class _Converter(TikTokenConverter):
    load_tiktoken_bpe = staticmethod(load_ranks)  # verified ranks instead of a file as it is


def fast_tokenizer(path: Path | None = None) -> PreTrainedTokenizerFast:
    """The same ids as `load_tokenizer(path).encode_ordinary` gives, for every text.

    So `<|endoftext|>` in a text is text, and no token is added in front or behind. Batches are
    padded on the left. Raises ValueError as `load_ranks` does.
    """
    end, pad = SPECIAL_TOKENS
    converter = _Converter(path, pattern=PATTERN, extra_special_tokens=list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token=end,
        eos_token=end,
        pad_token=pad,
        padding_side="left",
        model_max_length=MAX_TOKENS,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
