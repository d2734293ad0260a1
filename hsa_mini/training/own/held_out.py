"""The held-out loss: the mean loss of text that training never reads."""

from dataclasses import replace

import torch

from hsa_mini.config import HSAConfig
from hsa_mini.data.corpus import Corpus
from hsa_mini.hsa_model import HSAModel
from hsa_mini.training.cross_batch import ChunkQueue
from hsa_mini.training.mixture import NONE, TEXT
from hsa_mini.training.own.batches import DocumentBatches
from hsa_mini.training.parallel.ranks import ONE_PROCESS, OneProcess
from hsa_mini.training.recipes import Recipe, Stage
from hsa_mini.training.step import forward_and_loss

MAX_BATCHES = 16  # of one measurement, which takes as long as about five training steps


class HeldOut:
    """The same batches of whole documents at every measurement of a stage."""

    def __init__(self, corpus: Corpus, recipe: Recipe, config: HSAConfig) -> None:
        """Raises ValueError if no document of the corpus has two tokens."""
        self.recipe = recipe
        self.batches = {
            stage: DocumentBatches(
                corpus,
                batch=stage.batch,
                tokens=stage.tokens,
                chunk_size=config.chunk_size,
                seed=0,
            )
            for stage in dict.fromkeys(recipe.stages)
        }

    @torch.no_grad()
    def loss(self, model: HSAModel, stage: Stage, ranks: OneProcess = ONE_PROCESS) -> float:
        """The mean loss in nats per token of `model`, which is in training mode again afterwards.
        ranks: the processes of which each reads a part of every batch.

        Sequences retrieve among their own chunks, without noise.
        """
        batches = self.batches[stage]
        plain = replace(stage, queue_chunks=None, text_weight=1.0)
        steps = min(-(-len(batches.rows) // stage.batch), MAX_BATCHES)
        device = next(model.parameters()).device
        sums = torch.zeros(2, device=device)  # of losses, and of tokens
        model.eval()
        for step in range(steps):
            rows = len(batches.rows) - step * stage.batch  # those behind begin a second pass
            batch = batches[step]
            batch[1][rows:] = NONE
            equal_shares = -(-rows // ranks.data_ranks) * ranks.data_ranks
            ids, parts, starts = ranks.own_part(
                tuple(x[:equal_shares].to(device) for x in batch), chunk_size=batches.chunk_size
            )
            ones = torch.ones(3, device=device)  # a sum, not a mean
            _, (loss, *_) = forward_and_loss(
                model, self.recipe, plain, ChunkQueue(0), ids, parts, starts, ones
            )
            sums += torch.stack((loss, (parts[:, 1:] == TEXT).sum()))
        model.train()
        total, count = ranks.total(sums)
        return float(total / count)
