"""The exercises of notebook 04: the blend of one token, its gradient, and a sink.

Dimensions: K kept chunks, S tokens per chunk, D numbers per head.
"""

from functools import partial

import torch

from hsa_mini.exercises.check import Check, normal


def _results(q, k, v, scale, dim=1):
    """q [D], k and v [K, S, D] -> the result of each chunk [K, D]."""
    return ((k @ q * scale).softmax(dim)[:, :, None] * v).sum(dim=1)


def _blend(q, k, v, weights, scale, *, dim=1):
    return weights @ _results(q, k, v, scale, dim)


def _end_to_end(q, k, v, weights, scale):
    return (k.flatten(0, 1) @ q * scale).softmax(0) @ v.flatten(0, 1)


check_blend = Check(
    name="blend",
    answer=_blend,
    examples=tuple(
        (
            normal(6),
            normal(K, 4, 6, seed=1),
            normal(K, 4, 6, seed=2),
            normal(K, seed=K).softmax(0),
            0.4,
        )
        for K in (1, 2, 4)
    ),
    usual_mistakes={
        "one softmax runs over all tokens, as if the chunks were laid end to end. Each chunk has a "
        "softmax of its own.": _end_to_end,
        "softmax over the wrong axis. It runs over the tokens of a chunk, not over the chunks.": (
            partial(_blend, dim=0)
        ),
        "the scale is missing: multiply the scores by `scale`.": (
            lambda q, k, v, weights, scale: _blend(q, k, v, weights, 1.0)
        ),
        "the weights are missing: the results of the chunks are only added up.": (
            lambda q, k, v, weights, scale: _results(q, k, v, scale).sum(0)
        ),
        "every chunk gets the same weight. Use `weights`.": (
            lambda q, k, v, weights, scale: _results(q, k, v, scale).mean(0)
        ),
        "the results of the chunks are not added up yet.": (
            lambda q, k, v, weights, scale: weights[:, None] * _results(q, k, v, scale)
        ),
    },
)

check_score_gradient = Check(
    name="score_gradient",
    answer=lambda weights, results, g: weights * ((results - weights @ results) @ g),
    examples=tuple(
        (normal(K, seed=K).softmax(0), normal(K, 5, seed=1), normal(5, seed=2)) for K in (3, 2, 1)
    ),
    usual_mistakes={
        "a chunk is compared with nothing. Subtract the blend from its result.": (
            lambda weights, results, g: weights * (results @ g)
        ),
        "the blend is the sum weighted by `weights`, not the plain mean of the results.": (
            lambda weights, results, g: weights * ((results - results.mean(0)) @ g)
        ),
        "the weight of the chunk is missing as a factor.": (
            lambda weights, results, g: (results - weights @ results) @ g
        ),
        "the sign is wrong: this is the step against the gradient.": (
            lambda weights, results, g: weights * ((weights @ results - results) @ g)
        ),
    },
)


def _with_sink(q, k, v, scale, *, score=0.0, value=0.0):
    scores = torch.cat((k @ q * scale, q.new_full((1,), score)))
    return scores.softmax(0) @ torch.cat((v, v.new_full((1, v.shape[1]), value)))


check_attend_with_sink = Check(
    name="attend_with_sink",
    answer=_with_sink,
    examples=tuple(
        (normal(6, seed=seed), normal(4, 6, seed=1), normal(4, 6, seed=2), 0.4) for seed in (0, 3)
    ),
    usual_mistakes={
        "the shares still add up to 1. The empty token belongs into the softmax.": partial(
            _with_sink, score=-torch.inf
        ),
        "the score of a key of zeros is 0, not 1.": partial(_with_sink, score=1.0),
        "the empty token has a value of zeros, so its share goes to no word.": partial(
            _with_sink, value=1.0
        ),
        "the scale is missing: multiply the scores by `scale`.": (
            lambda q, k, v, scale: _with_sink(q, k, v, 1.0)
        ),
    },
)
