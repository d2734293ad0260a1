"""Perplexity by context: streaming gives the loss of one forward pass; only the context changes.

Dimensions: T tokens, S=4 chunk size, W=8 window: TINY, whose blocks reach 2 * 7 + 4 * 7 tokens back
without retrieval.
"""

import math

import numpy as np
import pytest
import torch
from material import TINY, tiny, word_corpus
from torch.nn.functional import cross_entropy

from hsa_mini.evaluation import perplexity
from hsa_mini.evaluation.perplexity import loss_of_last, measure_perplexity

REACH = (TINY.lower_layers + TINY.upper_layers) * (TINY.window - 1)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(perplexity, "load_corpus", word_corpus)


def some_text(tokens: int) -> torch.Tensor:
    return torch.from_numpy(word_corpus("validation").tokens[:tokens].astype(np.int64))


@pytest.mark.parametrize(
    "changes", [{}, dict(query_block=4), dict(top_k=300, exclude_window=True)], ids=str
)
@pytest.mark.parametrize("tokens, targets", [(301, 1), (301, 40), (300, 300)])
@torch.no_grad()
def test_the_streamed_loss_is_that_of_one_forward_pass(changes, tokens, targets):
    model = tiny(torch.float64, **changes)
    text = some_text(tokens + 1)
    plain = cross_entropy(model(text[None, :-1]).logits[0, -targets:], text[-targets:])
    assert loss_of_last(model, text, targets) == pytest.approx(plain.item(), abs=1e-10)


def without_retrieval(model):
    for block in model.upper:
        if block.hsa is not None:
            torch.nn.init.zeros_(block.hsa.out.weight)
    return model


def test_the_targets_are_the_same_at_every_length():
    """Without retrieval more text changes nothing; with retrieval it does."""
    options = dict(lengths=(40 + REACH, 1000, 400), stretches=3, targets=40)
    near = measure_perplexity(without_retrieval(tiny(torch.float64)), **options)
    assert [row.tokens for row in near] == [40 + REACH, 400, 1000]
    for row in near[1:]:
        assert row.losses == pytest.approx(near[0].losses, abs=1e-5)  # RoPE's table is in float32
    assert len({round(loss, 6) for loss in near[0].losses}) == 3  # of three places
    far = measure_perplexity(tiny(torch.float64), **options)
    assert abs(far[1].loss - far[0].loss) > 1e-4


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model = tiny()
    seen = []
    torch.nn.init.zeros_(model.embedding.weight)
    rows = measure_perplexity(
        model, lengths=(100, 200), stretches=2, targets=50, seed=3, report=seen.append
    )
    assert rows == seen and [
        (row.tokens, row.stretches, row.targets, row.seed) for row in rows
    ] == [(100, 2, 50, 3), (200, 2, 50, 3)]
    for row in rows:
        assert row.perplexity == pytest.approx(TINY.vocab_size, rel=1e-5)
        assert row.loss == pytest.approx(sum(row.losses) / 2) and row.perplexity == pytest.approx(
            math.exp(row.loss)
        )


def test_finished_lengths_are_not_measured_again():
    options = dict(lengths=(100, 200, 300), stretches=2, targets=20)
    rows = measure_perplexity(tiny(), **options)
    seen = []
    again = measure_perplexity(tiny(), finished=rows[1:2], report=seen.append, **options)
    assert again == rows and seen == [rows[0], rows[2]]


def test_the_seed_chooses_the_places():
    options = dict(lengths=(100,), stretches=2, targets=20)
    assert measure_perplexity(tiny(), **options) == measure_perplexity(tiny(), **options)
    assert (
        measure_perplexity(tiny(), **options)[0].losses
        != measure_perplexity(tiny(), seed=2, **options)[0].losses
    )


@pytest.mark.parametrize("tokens", [19, len(word_corpus("validation"))])
def test_text_is_neither_repeated_nor_shorter_than_what_is_predicted(tokens):
    with pytest.raises(
        ValueError,
        match=f"^lengths: got {tokens}, accepted is 20 to {len(word_corpus('validation')) - 1}",
    ):
        measure_perplexity(tiny(), lengths=(100, tokens), stretches=1, targets=20)
