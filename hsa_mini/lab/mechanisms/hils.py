"""HiLS attention (Hu et al. 2026, arXiv 2607.02980): a chunk is chosen and weighed by a linear
estimate of its attention mass.

The log mass of a chunk for a query q is L(q), the logsumexp of q.k_s / sqrt(D) over its tokens s.
Its first-order expansion at a reference query q' of the chunk is linear in q:

    L(q) = q.k' / sqrt(D) + b'     k' = sum over s of p_s k_s,   b' = entropy of p,
                                   p = softmax of q'.k_s / sqrt(D)

because the gradient of L at q' is k' / sqrt(D), and L(q') - q'.k' / sqrt(D) is the entropy of p.
(k', b') is the landmark. A low-rank matrix calibrates the query that meets landmarks.

NOTE: differs from the paper in three points. Its reference query comes from an extra token at the
end of every chunk; here it is a projection of the chunk's last token. Its chunks keep some
positions (HoPE); here they have none, as in every arm but `hsa_rope`. The norm by which query heads
are compared before they choose chunks together is not in the texts that we could read; here it is a
softmax over all visible chunks.

Dimensions: B batch, T tokens, C width, N chunks, S chunk size, J key/value heads, G = H/J query
heads of each, D head dimension.
"""

import torch
from torch import nn

from hsa_mini.config import HSAConfig
from hsa_mini.lab.mechanisms.choosing import HIDDEN, best_chunks, kept, visible
from hsa_mini.lab.mechanisms.joint import JointAttention, JointVariant
from hsa_mini.lab.scales import Scale
from hsa_mini.lab.variants import WithoutCLS
from hsa_mini.model.norm import RMSNorm

LOW_RANK = 8  # the rank of the calibration is C / LOW_RANK


def sizes(scale: Scale) -> dict:
    """The fields of the configuration that HiLS needs: a landmark is a key and a number."""
    return {
        "retrieval_heads": scale.config.hsa_kv_heads,
        "retrieval_dim": scale.config.hsa_head_dim + 1,
    }


def surrogate(reference: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Landmarks (k', b') [B, N, J, D+1] of chunks with keys k [B, N, S, J, D], expanded at the
    reference queries [B, N, J, D].
    """
    exact = torch.promote_types(k.dtype, torch.float32)
    k = k.to(exact)
    logits = torch.einsum("bnjd,bnsjd->bnjs", reference.to(exact), k) * k.shape[-1] ** -0.5
    p = logits.softmax(-1)
    mean = torch.einsum("bnjs,bnsjd->bnjd", p, k)
    entropy = -(p * logits.log_softmax(-1)).sum(-1, keepdim=True)
    return torch.cat((mean, entropy), dim=-1)


def estimated_masses(q: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
    """The estimated log masses [B, T, J, G, N] of all chunks for queries [B, T, J*G, D]."""
    J = landmarks.shape[2]
    landmarks = landmarks.to(q.dtype)
    scores = torch.einsum("btjgd,bnjd->btjgn", q.unflatten(2, (J, -1)), landmarks[..., :-1])
    bias = landmarks[..., -1].transpose(1, 2)[:, None, :, None]  # [B, N, J] -> [B, 1, J, 1, N]
    return scores * q.shape[-1] ** -0.5 + bias


class SurrogateEncoder(WithoutCLS):
    """k and v of each token alone, and the landmark that `surrogate` makes of the keys."""

    def __init__(self, config: HSAConfig) -> None:
        super().__init__(config)
        del self.landmark, self.landmark_norm
        self.blocks = nn.ModuleList()
        self.reference = nn.Linear(
            config.width, config.hsa_kv_heads * config.hsa_head_dim, bias=False
        )
        self.reference_norm = RMSNorm(config.hsa_head_dim, eps=config.norm_eps)

    def summary(self, tokens: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        reference = self.reference(tokens[:, :, -1]).unflatten(-1, (-1, k.shape[-1]))
        with torch.autocast(k.device.type, enabled=False):
            return surrogate(self.reference_norm(reference), k)


class HiLSAttention(JointAttention):
    """Keeps the K chunks whose estimated masses are the largest, and weighs them by these."""

    def __init__(self, config: HSAConfig) -> None:
        super().__init__(config)
        rank = max(config.width // LOW_RANK, 1)
        self.narrow = nn.Linear(config.width, rank, bias=False)
        self.widen = nn.Linear(rank, config.hsa_heads * config.hsa_head_dim, bias=False)

    def calibrate(self, x: torch.Tensor) -> torch.Tensor:
        return self.widen(self.narrow(x)).unflatten(-1, (-1, self.config.hsa_head_dim))

    def choose(self, q, calibration, source, *, position, gumbel_seed):
        assert calibration is not None
        masses = estimated_masses(q + calibration, source.landmarks)
        seen = visible(masses, position, self.config.chunk_size)
        masses = masses.masked_fill(~seen, HIDDEN)
        logits = masses.detach()
        shares = logits - logits.logsumexp(-1, keepdim=True)  # logarithms; NaN if nothing is seen
        best = shares.amax(3).masked_fill(~seen[:, :, 0], HIDDEN)
        indices = best_chunks(best, self.config.top_k, position, gumbel_seed)
        slots = indices[:, :, :, None].expand(-1, -1, -1, masses.shape[3], -1)
        return indices, kept(masses, slots).flatten(2, 3)


class HiLS(JointVariant):
    """Hierarchical Landmark Sparse attention in the blocks with HSA, without an encoder."""

    attention = HiLSAttention
    summarise = SurrogateEncoder
    starts_at_0 = ("widen.weight",)
