"""Checks of what `HSACore.forward` takes beside the ids: a memory, and the borders of documents."""

import torch
from torch import nn

from hsa_mini.config import HSAConfig
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.memory.origin import check_origin
from hsa_mini.reference.checks import check_same, check_tensor


def check_memory(
    memory: ChunkMemory, ids: torch.Tensor, model: nn.Module, config: HSAConfig, dtype: torch.dtype
) -> None:
    """Raise ValueError for a memory of another model or batch. dtype: that of model's chunks."""
    if memory.config != config:
        raise ValueError(
            "memory: got one of another configuration, accepted is one that this model made"
        )
    check_origin(memory.origin, model)
    if memory.batch is None:
        return
    if memory.batch != ids.shape[0]:
        raise ValueError(
            f"memory: got a batch of {memory.batch}, accepted is that of ids ({ids.shape[0]})"
        )
    got = memory.chunks.landmarks
    if (got.dtype, got.device) != (dtype, ids.device):
        raise ValueError(
            f"memory: got {got.dtype} on {got.device}, accepted is {dtype} on {ids.device}"
        )


def check_document_starts(
    document_starts: torch.Tensor, ids: torch.Tensor, position: int, chunk_size: int
) -> None:
    """Raise ValueError for document starts that do not fit ids, whose first token stands at
    `position`.

    On a GPU the values are not compared, because reading them waits for the GPU.
    """
    sizes = dict(zip("BT", ids.shape))
    check_tensor("document_starts", document_starts, "B T", sizes, (torch.int32, torch.int64))
    check_same("document_starts", document_starts, "ids", ids, dtype=False)
    if ids.device.type != "cpu":
        return
    own = torch.arange(position, position + ids.shape[1])
    wrong = (document_starts < 0) | (document_starts > own) | (document_starts % chunk_size > 0)
    begins = document_starts.diff() != 0
    wrong[:, 1:] |= begins & (document_starts != own)[:, 1:]
    if wrong.any():
        row, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"document_starts: got {int(document_starts[row, token])} for the token at position "
            f"{position + token} of row {row}, accepted is its own position, a multiple of the "
            f"chunk size {chunk_size}, or that of the token before it"
        )
