"""The share of right answers of one model, against needles in the text and chunks kept.

Dimensions: S chunk size, R retrieval dimension, K chunks kept, M landmarks of a chunk.
"""

import dataclasses
from functools import partial

import numpy as np
import torch

from hsa_mini.data.corpus import load_corpus
from hsa_mini.hsa_model import HSAModel
from hsa_mini.lab.capacity.crowds import Crowds, crowded_text
from hsa_mini.lab.measure import batches, right_answers
from hsa_mini.tasks.sentences import EVALUATION
from hsa_mini.training.trainer import with_shared_parameters


@torch.no_grad()
def measure_capacity(model: HSAModel, crowds: Crowds, *, seed: int = 1) -> dict[str, list[dict]]:
    """A row per number of needles and K. The texts are the same for every model and every K.

    together, cut: for each question, how many needles share the chunk of the one asked for, that
    one included, and whether a border cuts it.
    """
    corpus = load_corpus("validation").tokens
    config = model.config
    near = (config.lower_layers + config.upper_layers) * config.window  # what windows can pass on
    device = model.norm.weight.device
    rows = []
    for needles in crowds.needles:
        rng = np.random.default_rng((EVALUATION, seed, crowds.tokens, needles))
        draw = partial(crowded_text, rng, corpus, crowds.tokens, needles, near)
        texts = [draw() for _ in range(crowds.questions)]
        for top_k in crowds.top_k:
            keeping = with_shared_parameters(model, dataclasses.replace(config, top_k=top_k))
            right: list[bool] = []
            for some in batches(texts, crowds.tokens):
                ids = torch.from_numpy(np.stack([text.ids for text in some])).to(device)
                right += right_answers(keeping, ids, [text.answer for text in some])
            row = {"tokens": crowds.tokens, "needles": needles, "top_k": top_k}
            row |= {"samples": len(right), "correct": sum(right), "right": list(map(int, right))}
            row["together"] = [text.together(config.chunk_size) for text in texts]
            row["cut"] = [int(text.is_cut(config.chunk_size)) for text in texts]
            rows.append(row)
    return {"capacity": rows}
