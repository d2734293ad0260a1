"""A text that an index holds: its memory is loaded, and only the last tokens are read again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.hsa_model import HSAModel
from hsa_mini.index.stored import check_model, read_index
from hsa_mini.inference.prefill import prefill
from hsa_mini.viz.retrieval.asking import ReadText


def open_index(model: HSAModel, folder: Path) -> ReadText:
    """The text in the index `folder`, without a needle.

    Raises ValueError for a folder that holds no index, or a damaged or unfinished one, or one of
    other weights; MemoryError if the index does not fit.
    """
    device = model.embedding.weight.device
    try:
        index = read_index(folder, device)
        check_model(index, model, folder)
        if not index.complete:
            raise ValueError(f"{folder} is not read to its end, accepted is a complete index")
    except ValueError as error:
        raise ValueError(f"text: {str(error).removeprefix('DIR: ')}") from None
    ids = index.text.tokens.tolist()
    if len(ids) < model.config.chunk_size:
        raise ValueError(f"text: {folder} holds {len(ids)} tokens, accepted is at least one chunk")
    if unread := ids[index.memory.position :]:
        prefill(model, torch.tensor([unread], device=device), index.memory)
    haystack = load_tokenizer().decode(ids)
    return ReadText(haystack, "", 0.0, ids, range(0), index.memory, stored=True)


def look_up(text: ReadText, needle: str) -> ReadText:
    """The text with the needle where it stands for the first time; with none if it is nowhere."""
    at = text.haystack.find(needle.strip())
    if at < 0 or not needle.strip():
        return replace(text, needle="", needle_tokens=range(0))
    tokenizer = load_tokenizer()
    sizes = np.array(
        [len(token) for token in tokenizer.decode_tokens_bytes(range(tokenizer.n_vocab))]
    )
    ends = sizes[text.ids].cumsum()  # the bytes up to the end of each token
    first = len(text.haystack[:at].encode())
    last = first + len(needle.strip().encode()) - 1
    start, stop = np.searchsorted(ends, (first, last), side="right").tolist()
    return replace(text, needle=needle.strip(), needle_tokens=range(start, stop + 1))
