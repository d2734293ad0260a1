"""One new token against the whole memory: Eq. (1) and Eq. (2) in one step."""

import torch

from hsa_mini.reference.checks import check_decode
from hsa_mini.reference.chunk_attention import chunk_attention
from hsa_mini.reference.retrieval import retrieve


def decode(
    retrieval_q: torch.Tensor,
    landmarks: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    chunk_size: int,
    top_k: int,
    offset: int | torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Retrieve and attend for one new token per sequence: `retrieve`, then `chunk_attention`.

    retrieval_q [B, 1, J, R], landmarks [B, N, J, R], q [B, 1, H, D], k and v [B, N, S, J, D] -> [B,
    1, H, D]. offset: position of the new token. Raises ValueError for wrong shapes, dtypes or
    devices.
    """
    check_decode(retrieval_q, landmarks, q, k, v, chunk_size)
    indices, weights = retrieve(
        retrieval_q, landmarks, chunk_size=chunk_size, top_k=top_k, offset=offset
    )
    return chunk_attention(q, k, v, indices, weights, scale=scale)
