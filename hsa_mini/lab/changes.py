"""What an arm changes: its configuration, as a function of the scale; its training, as a function
of scale and stage.
"""

import dataclasses
from collections.abc import Callable

from hsa_mini.lab import variants
from hsa_mini.lab.scales import Scale
from hsa_mini.training.recipes import Stage

MLP_STEP = 8  # widths of MLPs are multiples of it
MIN_CHAIN_TOKENS = 128  # shorter contexts cannot hold a chain and the question about it

ConfigChange = Callable[[Scale], dict]  # field of HSAConfig -> value
TrainingChange = Callable[[Scale, Stage], dict]  # field of Stage -> value


# Changes of the configuration


def window(times: int) -> ConfigChange:
    """A window `times` as long as the baseline's."""
    return lambda scale: {"window": times * scale.config.window}


def without_noise(scale: Scale) -> dict:
    return {"exploration": False}


def without_hsa(scale: Scale) -> dict:
    return variants.NO_HSA


def full_attention(scale: Scale) -> dict:
    """No HSA, and a window as long as the longest text."""
    return variants.NO_HSA | {"window": max(scale.lengths)}


def attention_queries(scale: Scale) -> dict:
    """Attention's queries also retrieve: they have D dimensions, and one of them serves each
    key/value head.
    """
    return {
        "retrieval_dim": scale.config.hsa_head_dim,
        "retrieval_heads": scale.config.hsa_kv_heads,
    }


def landmark_attention(scale: Scale) -> dict:
    """As `attention_queries`, with a norm on the landmarks, which are keys here."""
    return attention_queries(scale) | {"retrieval_norm": True}


def experts(scale: Scale) -> dict:
    """Eight experts, two of them active. These two and the shared expert are together as wide as
    the baseline's MLP.
    """
    return {
        "experts": 8,
        "experts_active": 2,
        "expert_width": scale.config.mlp_width // (3 * MLP_STEP) * MLP_STEP,
    }


# Changes of the training


def every_chunk(scale: Scale, stage: Stage) -> dict:
    """K so large that every chunk of a training sequence is kept."""
    return {"top_k": _chunks(scale)}


def window_of_stage(scale: Scale, stage: Stage) -> dict:
    """A window as long as the sequences of the stage."""
    return {"window": stage.tokens}


def mixture(**shares) -> TrainingChange:
    """Other shares of the training data."""

    def change(scale: Scale, stage: Stage) -> dict:
        assert stage.mixture is not None, "the laboratory trains on mixtures"
        return {"mixture": dataclasses.replace(stage.mixture, **shares)}

    return change


def chains(scale: Scale, stage: Stage) -> dict:
    """A quarter of the data are questions about chains, except in contexts that are too short for
    them.
    """
    if stage.tokens < MIN_CHAIN_TOKENS:
        return {}
    return mixture(needles=0.4, chains=0.25)(scale, stage)


text_only = mixture(self_copy=0.0, needles=0.0)


def text_in_full_attention(scale: Scale, stage: Stage) -> dict:
    return text_only(scale, stage) | window_of_stage(scale, stage)


def text_behind_queue(scale: Scale, stage: Stage) -> dict:
    """Plain text. Stages at the full training length also have a queue with as many chunks of other
    texts as the longest evaluation text has chunks.
    """
    changes = text_only(scale, stage)
    if stage.tokens == scale.stage.tokens:
        changes |= {
            "queue_chunks": max(scale.lengths) // scale.config.chunk_size,
            "gumbel_noise": False,
        }
    return changes


def no_warm_up(scale: Scale, stage: Stage) -> dict:
    """No copies in any stage."""
    return mixture(self_copy=0.0)(scale, stage)


def warm_up_on_copies(scale: Scale, stage: Stage) -> dict:
    """Copies only in the stages before the full training length."""
    if stage.tokens < scale.stage.tokens:
        return {"mixture": stage.mixture}
    return no_warm_up(scale, stage)


def warm_up_with_short_window(scale: Scale, stage: Stage) -> dict:
    """No copies. The stages before the full training length use the baseline's window (a quarter of
    this arm's) and keep every chunk.
    """
    changes = no_warm_up(scale, stage)
    if stage.tokens < scale.stage.tokens:
        assert stage.window is not None, "`Scale.stages` sets the window of every such stage"
        changes |= {"window": stage.window // 4, "top_k": _chunks(scale)}
    return changes


def _chunks(scale: Scale) -> int:
    """The number of chunks in a training sequence."""
    return scale.stage.tokens // scale.config.chunk_size
