"""DashAttention (Huang et al. 2026, arXiv 2605.18753): alpha-entmax chooses as many chunks as a
query needs, and its weights are a prior of the attention to their tokens.

A chunk's landmark is the attention of one learned query over its keys, which is their mean before
training. Each query head turns its scores of all landmarks into weights by 1.5-entmax; the weights
of the heads that share a key/value head are averaged. A chunk is chosen if its weight is above 0.
The softmax over the tokens of the window and of the chosen chunks then has the bias

    (log w_c - mu) / sigma   for a token of chunk c,    0 for a token of the window.

NOTE: the paper continues the training of models that attended to everything, and its prior is weak
(sigma of 10^6 and more). These models train from nothing, so sigma is 1. The texts that we could
read do not define mu. Here it is the log weight of the best chunk, whose tokens then count as much
as those of the window. alpha is 1.5 from the first step on.

Dimensions: B batch, T tokens, N chunks, S chunk size, J key/value heads, G = H/J query heads of
each, D head dimension, K chunks kept.
"""

import torch
from torch import nn

from hsa_mini.config import HSAConfig
from hsa_mini.lab.mechanisms.choosing import HIDDEN, best_chunks, kept, log_masses, visible
from hsa_mini.lab.mechanisms.entmax import entmax15
from hsa_mini.lab.mechanisms.joint import JointAttention, JointVariant
from hsa_mini.lab.scales import Scale
from hsa_mini.lab.variants import WithoutCLS

# A token keeps at most this many chunks, because shapes must not depend on the data. A training
# sequence of the laboratory has fewer.
MAX_CHOSEN = 64


def sizes(scale: Scale) -> dict:
    """The fields of the configuration that DashAttention needs: a landmark is a key."""
    return {
        "retrieval_heads": scale.config.hsa_kv_heads,
        "retrieval_dim": scale.config.hsa_head_dim,
    }


class SummaryEncoder(WithoutCLS):
    """k and v of each token alone. The landmark is what a learned query reads from the keys."""

    def __init__(self, config: HSAConfig) -> None:
        super().__init__(config)
        del self.landmark, self.landmark_norm
        self.blocks = nn.ModuleList()
        self.summary_query = nn.Parameter(torch.empty(config.hsa_kv_heads, config.hsa_head_dim))

    def summary(self, tokens: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        logits = torch.einsum("jd,bnsjd->bnsj", self.summary_query.to(k.dtype), k)
        p = (logits * k.shape[-1] ** -0.5).softmax(2)
        return torch.einsum("bnsj,bnsjd->bnjd", p.to(k.dtype), k)


class DashLayer(JointAttention):
    """Keeps every chunk with an entmax weight above 0."""

    def choose(self, q, calibration, source, *, position, gumbel_seed):
        weights = self.weights(q, source.landmarks, position)
        indices = best_chunks(
            weights.masked_fill(weights == 0, HIDDEN), MAX_CHOSEN, position, gumbel_seed=None
        )
        chosen = weights.gather(-1, indices.clamp(min=0))
        some = torch.where(indices < 0, torch.ones_like(chosen), chosen)
        best = torch.where(indices < 0, torch.zeros_like(chosen), chosen)
        best = best.amax(-1, keepdim=True) if indices.shape[-1] else best
        best = torch.where(best > 0, best, torch.ones_like(best))  # a token without chunks
        prior = some.log() - best.log()  # [B, T, J, K]
        group = q.shape[2] // prior.shape[2]
        prior, slots = (part.repeat_interleave(group, dim=2) for part in (prior, indices))
        return indices, kept(log_masses(q, source.k.to(q.dtype)), slots) + prior

    def weights(self, q: torch.Tensor, landmarks: torch.Tensor, position: int) -> torch.Tensor:
        """The entmax weight of every chunk [B, T, J, N] for queries [B, T, J*G, D]."""
        J, D = landmarks.shape[2:]
        scores = torch.einsum("btjgd,bnjd->btjgn", q.unflatten(2, (J, -1)), landmarks.to(q.dtype))
        seen = visible(scores, position, self.config.chunk_size)
        return entmax15((scores * D**-0.5).masked_fill(~seen, HIDDEN)).mean(3)


class DashAttention(JointVariant):
    """DashAttention in the blocks with HSA, without an encoder. It has no use for K."""

    attention = DashLayer
    summarise = SummaryEncoder
    starts_at_0 = ("summary_query",)
