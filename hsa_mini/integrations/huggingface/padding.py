"""Texts of different lengths in one batch of transformers: padded in front, behind, or both.

Dimensions: B batch, T tokens.
"""

from typing import NamedTuple

import torch


class Padding(NamedTuple):
    """Where the texts of ids [B, T] lie: the column of the first token, and the number of tokens of
    every text, both int64 [B].
    """

    first: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor | None, tokens: int) -> "Padding | None":
        """The padding of the last `tokens` columns of an attention mask [B, >= T]; None if there is
        none. Raises ValueError for a mask of another form.
        """
        if mask is None:
            return None
        texts = mask[..., -tokens:].bool()
        if texts.shape[1:] == (tokens,) and texts.all():
            return None
        if texts.shape[1:] == (tokens,) and texts.any(dim=1).all():
            first = texts.int().argmax(dim=1)
            lengths = texts.sum(dim=1)
            columns = torch.arange(tokens, device=mask.device) - first[:, None]
            if torch.equal(texts, (columns >= 0) & (columns < lengths[:, None])):
                return cls(first, lengths)
        raise ValueError(
            f"attention_mask: got {list(mask.shape)} for {tokens} tokens, accepted are texts of at "
            "least one token, without gaps, padded in front or behind"
        )


def rolled(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """x [B, T, ...], each row moved to the left around its end, by columns int64 [B]."""
    T = x.shape[1]
    places = (torch.arange(T, device=x.device) + columns[:, None]) % T  # [B, T]
    return x.take_along_dim(places.reshape(places.shape + (1,) * (x.dim() - 2)), dim=1)
