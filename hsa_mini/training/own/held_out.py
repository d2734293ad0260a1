"""The held-out loss: the mean loss of text that training never reads."""

from dataclasses import replace

import torch

from hsa_mini.config import HSAConfig
from hsa_mini.data.corpus import Corpus
from hsa_mini.hsa_model import HSAModel
from hsa_mini.training.cross_batch import ChunkQueue
from hsa_mini.training.mixture import TEXT
from hsa_mini.training.own.batches import DocumentBatches
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
    def loss(self, model: HSAModel, stage: Stage) -> float:
        """The mean loss in nats per token of `model`, which is in training mode again afterwards.

        Sequences retrieve among their own chunks, without noise.
        """
        batches = self.batches[stage]
        plain = replace(stage, queue_chunks=None, text_weight=1.0)
        steps = min(-(-len(batches.rows) // stage.batch), MAX_BATCHES)
        device = next(model.parameters()).device
        losses = torch.zeros((), device=device)
        count = torch.zeros((), device=device)
        model.eval()
        for step in range(steps):
            rows = len(batches.rows) - step * stage.batch  # those behind begin a second pass
            ids, parts, starts = (x[:rows].to(device) for x in batches[step])
            ones = torch.ones(3, device=device)  # a sum, not a mean
            _, (loss, *_) = forward_and_loss(
                model, self.recipe, plain, ChunkQueue(0), ids, parts, starts, ones
            )
            losses += loss
            count += (parts == TEXT).sum()
        model.train()
        return float(losses / count)
