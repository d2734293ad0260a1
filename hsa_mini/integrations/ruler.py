"""Texts of any length for those tasks of lm-eval's RULER that need no download.

The texts come from lm-eval's own functions. lm-eval finds how many sentences fit by tokenizing a
text of every size, and makes 500 texts of each length. At a million tokens that would take hours.
Here longer texts are fitted in larger steps, and only as many texts are made as are asked for.
Below twice `FINE` tokens, the steps are lm-eval's.
"""

import io
import random
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from hsa_mini.data.tokenizer import load_tokenizer

try:
    # The import of `prepare_niah` would download a sentence splitter, which only other tasks use.
    with patch("nltk.download"), redirect_stdout(io.StringIO()):
        from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, prepare_niah, vt_utils
except ImportError as error:
    raise ImportError(
        f"lm-eval: {error}; accepted is an environment with `pip install 'hsa-mini[eval]'`"
    ) from None

FINE = 40960  # tokens; a text of n times this length is fitted in n times larger steps

LIST = cwe_utils.TEMPLATE[:40]  # how every list of `ruler_cwe` begins

# What the haystack consists of, and what keys and values are.
NEEDLES = {
    "niah_single_1": ("repeat", "words", "numbers"),
    "niah_multikey_2": ("needle", "words", "numbers"),
    "niah_multikey_3": ("needle", "uuids", "uuids"),
}


def ruler_texts(task: str, tokens: int, *, samples: int, seed: int) -> list[dict]:
    """The documents of a task: `samples` texts of at most `tokens` tokens, room for the answer
    included.

    Task, length and seed decide them. `ruler_cwe` has used up its words at about 240,000 tokens:
    its texts become no longer.
    """
    # lm-eval's functions draw from these three generators.
    random.seed(f"{seed} {task} {tokens}")
    np.random.seed(seed)
    cwe_utils.RNG.seed(seed)
    tokenizer: Any = _encode  # all that these functions use of a Hugging Face tokenizer
    times = max(1, tokens // FINE)
    with redirect_stdout(io.StringIO()):  # lm-eval prints every size that it tries
        if task in NEEDLES:
            return _needles(*NEEDLES[task], tokens, samples, times)
        if task == "ruler_vt":
            vary = vt_utils.sys_vartrack_w_noise_random
            (example,) = vary(tokenizer, 1, 500, incremental=5)
            return vary(tokenizer, samples, tokens, incremental=10 * times, icl_example=example)
        if task == "ruler_cwe":
            # lm-eval also counts an example that its prompt does not have. With it, no list fits
            # into 4,096 of our tokens.
            return cwe_utils.sys_word_pair_random(
                samples,
                tokens,
                lambda text: _encode(text[text.rindex(LIST) :]),
                incremental=10 * times,
            )
        return fwe_utils.sys_kwext(tokenizer, tokens, samples)


def _encode(text: str) -> SimpleNamespace:
    return SimpleNamespace(input_ids=load_tokenizer().encode_ordinary(text))


def _needles(
    haystack: str,
    keys: str,
    values: str,
    tokens: int,
    samples: int,
    times: int,
) -> list[dict]:
    """`generate_samples` of lm-eval with `times` as many sentences wherever it counts them."""
    make = prepare_niah.generate_input_output

    def make_longer(sentences: int, *words, **options):
        return make(sentences * times, *words, **options)

    with patch.object(prepare_niah, "generate_input_output", make_longer):
        return prepare_niah.generate_samples(
            prepare_niah.get_haystack(haystack),
            max_seq_length=tokens,
            template=niah_utils.TEMPLATE,
            type_haystack=haystack,
            type_needle_k=keys,
            type_needle_v=values,
            num_samples=samples,
            TOKENIZER=_encode,
        )
