"""Where the model looked: the chunks that its HSA layers chose for the last token, and the scores
of all chunks.

Dimensions: N chunks, J_r retrieval heads, R retrieval dimension.
"""

import numpy as np
import torch

from hsa_mini.hsa_model import HSAModel
from hsa_mini.model.core import Aux, Output


def chunks_retrieved(aux: Aux) -> list[set[int]]:
    """The chunks that each HSA layer chose for the last token read (batch entry 0, all heads
    together).
    """
    return [set(retrieval.indices[0, -1].flatten().tolist()) - {-1} for retrieval in aux.retrievals]


@torch.no_grad()
def retrieval_scores(model: HSAModel, output: Output) -> np.ndarray:
    """Scores that the last token read gives to all chunks: float32 [HSA layers, N].

    A chunk's score is the best of its retrieval heads. It is -inf where the chunk is not complete
    before that token.
    """
    chunks = output.memory.chunks
    rows = []
    for retrieval in output.aux.retrievals:
        query = retrieval.queries[0, -1].float()  # [J_r, R]
        scores = torch.stack(
            [chunks.landmarks[0, :, j].float() @ query[j] for j in range(len(query))]
        ).amax(dim=0)
        rows.append(scores / query.shape[-1] ** 0.5)
    ends = torch.arange(1, len(chunks) + 1, device=rows[0].device) * model.config.chunk_size
    visible = ends < output.memory.position
    return torch.stack(rows).masked_fill(~visible, float("-inf")).cpu().numpy()
