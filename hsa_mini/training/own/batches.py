"""Batches of whole documents, packed into rows.

Dimensions: B batch, T tokens; a row has T+1 tokens (inputs and targets overlap).
"""

from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Dataset

from hsa_mini.checks import check_integer
from hsa_mini.data.corpus import Corpus
from hsa_mini.data.packing import fill_row, pack_documents
from hsa_mini.training.mixture import NONE, TEXT


class DocumentBatches(Dataset):
    """Item `step` is a batch: ids int64 [B, T+1], parts int8 [B, T+1] and document_starts int32
    [B, T+1], the place in its row where the document of each token begins.

    Every pass over the rows has an order of its own, a function of (seed, pass). split: the number
    of documents longer than a row, which are split.
    """

    def __init__(
        self, corpus: Corpus, *, batch: int, tokens: int, chunk_size: int, seed: int
    ) -> None:
        """Raises ValueError for sizes below 1, and if no document has two tokens."""
        check_integer("batch", batch, 1)
        check_integer("tokens", tokens, 1)
        self.corpus = corpus
        self.batch = batch
        self.length = tokens + 1
        self.chunk_size = chunk_size
        self.seed = seed
        lengths = np.diff(corpus.starts, append=len(corpus))
        # Nothing of a document of one token can be predicted.
        some = np.where(lengths > 1, lengths, 0).tolist()
        self.rows = pack_documents(some, self.length, chunk_size)
        if not self.rows:
            raise ValueError(
                f"data: got {len(corpus)} tokens, accepted is a document of at least two"
            )
        self.split = int((lengths > self.length).sum())
        self._order = lru_cache(2)(self._draw_order)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, ...]:
        places = range(step * self.batch, (step + 1) * self.batch)
        turns = (divmod(place, len(self.rows)) for place in places)
        rows = [self._row(self._order(turn)[i]) for turn, i in turns]
        return tuple(torch.from_numpy(np.stack(column)) for column in zip(*rows))

    def _row(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, parts and document starts of one row."""
        places = [(self.corpus.starts[d] + start, n) for d, start, n in self.rows[i]]
        texts = [self.corpus.tokens[first : first + n] for first, n in places]
        row = [(place, 0, len(text)) for place, text in enumerate(texts)]
        ids, predicted, starts = fill_row(row, texts, self.length, self.chunk_size, padding=0)
        return ids, np.where(predicted, TEXT, NONE).astype(np.int8), starts

    def _draw_order(self, turn: int) -> np.ndarray:
        return np.random.default_rng((self.seed, turn)).permutation(len(self.rows))
