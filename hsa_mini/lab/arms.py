"""The arms of the laboratory: what each changes of the baseline `hsa`, and nothing else, at every scale.

All arms of a scale have as many parameters (the width of their MLPs makes up for what a change takes or adds), and see as many
tokens in as many steps with the same seeds.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from hsa_mini.config import PRESETS, HSAConfig
from hsa_mini.hsa_model import HSAModel
from hsa_mini.lab import variants
from hsa_mini.model.cost_estimate import idle
from hsa_mini.training.mixture import Mixture
from hsa_mini.training.recipes import Recipe, Stage, recipe_settings

MLP_STEP = 8  # widths of MLPs are multiples of it


@dataclass(frozen=True)
class Scale:
    """What all arms of a size share: the baseline's configuration and training, and what is asked of a trained model."""

    name: str
    config: HSAConfig
    stage: Stage  # at the training length: the last one
    # The ones before it, as (part of the training length, batch, steps): retrieval is learnt among few chunks first.
    growth: tuple[tuple[float, int, int], ...] = ()
    learning_rate: float = 1e-3
    warmup: int = 100
    multiples: tuple[int, ...] = (
        1,
        4,
        16,
        64,
    )  # of the training length, at which a model is evaluated
    questions: int = 32  # of a task, at each length
    texts: int = 16  # for perplexity and copies, at each length
    tail: int = 256  # tokens at the end of each text that are scored

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.stage.tokens * multiple for multiple in self.multiples)

    def stages(self, window: int) -> tuple[Stage, ...]:
        """Contexts grow, and with them the window of the arm and the distance of copies: what it cannot reach stays so."""

        def part(share: float, batch: int, steps: int) -> Stage:
            mixture = dataclasses.replace(
                self.stage.mixture, min_copy=round(share * self.stage.mixture.min_copy)
            )
            tokens = round(share * self.stage.tokens)
            near = max(round(share * window), 1)
            return dataclasses.replace(
                self.stage, steps=steps, batch=batch, tokens=tokens, window=near, mixture=mixture
            )

        return *(part(*row) for row in self.growth), part(1, self.stage.batch, self.stage.steps)


@dataclass(frozen=True)
class Arm:
    """One variant: another model, other settings, or other training."""

    name: str
    what: str  # it is, beside the baseline
    model: type[HSAModel] = HSAModel
    changes: Callable[[Scale], dict] = lambda scale: {}  # of the configuration
    training: Callable[[Scale, Stage], dict] = lambda scale, stage: {}  # changes of every stage
    packed: int = 1  # sequences that make one of the training length: what lies further back than a shorter one never helps
    counted: str = field(
        default="parameters", kw_only=True
    )  # what is equal to the baseline's: these, or "active" ones

    def config(self, scale: Scale) -> HSAConfig:
        return _matched(self, scale)

    def recipe(self, scale: Scale, steps: int | None = None) -> Recipe:
        """steps: instead of the scale's."""
        stages = scale.stages(self.config(scale).window)
        stages = tuple(
            dataclasses.replace(stage, **self.training(scale, stage)) for stage in stages
        )
        recipe = Recipe(stages, learning_rate=scale.learning_rate, warmup=scale.warmup)
        return (
            recipe
            if steps is None
            else dataclasses.replace(recipe, warmup=min(recipe.warmup, steps)).scaled(steps)
        )

    def parameters(self, scale: Scale) -> dict[str, int]:
        """All of them, and those that one token meets."""
        return _count(self.model, self.config(scale))

    def settings(self, scale: Scale, steps: int | None = None) -> dict:
        """All that decides how a run goes, but its seed."""
        return {
            "scale": scale.name,
            "arm": self.name,
            "model": self.model.__name__,
            "packed": self.packed,
            "config": dataclasses.asdict(self.config(scale)),
            "recipe": recipe_settings(self.recipe(scale, steps)),
            "evaluation": {
                name: getattr(scale, name) for name in ("lengths", "questions", "texts", "tail")
            },
        }


def _count(model: type[HSAModel], config: HSAConfig) -> dict[str, int]:
    made = model(config, device="meta")
    total = sum(parameter.numel() for parameter in made.parameters())
    return {"parameters": total, "active": total - idle(made)}


@cache
def _matched(arm: Arm, scale: Scale) -> HSAConfig:
    """The arm's configuration with MLPs as wide as makes it count what the baseline does, to the nearest `MLP_STEP`."""
    config = dataclasses.replace(scale.config, **arm.changes(scale))
    wanted = _count(HSAModel, scale.config)[arm.counted]
    narrow, wide = (
        _count(arm.model, dataclasses.replace(config, mlp_width=width))[arm.counted]
        for width in (MLP_STEP, 2 * MLP_STEP)
    )
    width = MLP_STEP * max(
        1 + round((wanted - narrow) / (wide - narrow)), 1
    )  # parameters are linear in the width
    return dataclasses.replace(config, mlp_width=width)


def _one_query(scale: Scale) -> dict:
    """Attention's queries in the place of retrieval's: as large, and one for each key/value head."""
    return {
        "retrieval_dim": scale.config.hsa_head_dim,
        "retrieval_heads": scale.config.hsa_kv_heads,
    }


def _full_rope(scale: Scale) -> dict:
    """A window as long as the longest text."""
    return variants.NO_HSA | {"window": max(scale.lengths)}


def _window(times: int) -> Callable[[Scale], dict]:
    return lambda scale: {"window": times * scale.config.window}


def _every_chunk(scale: Scale) -> int:
    """K that keeps all chunks of a training sequence."""
    return scale.stage.tokens // scale.config.chunk_size


def _experts(scale: Scale) -> dict:
    """Eight experts; the shared one and two of the others are together as wide as the baseline's MLP."""
    return {
        "experts": 8,
        "experts_active": 2,
        "expert_width": scale.config.mlp_width // (3 * MLP_STEP) * MLP_STEP,
    }


def _mixture(**shares) -> Callable[[Scale, Stage], dict]:
    return lambda scale, stage: {"mixture": dataclasses.replace(stage.mixture, **shares)}


def _chains(scale: Scale, stage: Stage) -> dict:
    """Questions about chains, but in contexts without room for one and its question."""
    return _mixture(needles=0.4, chains=0.25)(scale, stage) if stage.tokens >= 128 else {}


_text = _mixture(self_copy=0.0, needles=0.0)  # alone


def _text_in_a_crowd(scale: Scale, stage: Stage) -> dict:
    """At the training length behind as many chunks as the longest text of evaluation has."""
    queue = {
        "queue_chunks": max(scale.lengths) // scale.config.chunk_size,
        "gumbel_noise": False,
    }
    return _text(scale, stage) | (queue if stage.tokens == scale.stage.tokens else {})


def _warm_up(**changes) -> Callable[[Scale, Stage], dict]:
    """No copies; but changes (functions of the scale and the stage) while contexts grow, the warm-up."""

    def training(scale: Scale, stage: Stage) -> dict:
        warming = changes if stage.tokens < scale.stage.tokens else {}
        return _mixture(self_copy=0.0)(scale, stage) | {
            name: change(scale, stage) for name, change in warming.items()
        }

    return training


_ARMS = (
    Arm("hsa", "the baseline: fused scores, no positions, chunk encoder, sparse K, exploration noise, long data"),
    Arm(
        "full_rope", "full attention with RoPE in every block, no HSA", variants.WithoutHSA, changes=_full_rope,
        training=lambda scale, stage: {"window": stage.tokens},
    ),
    Arm("window", "the window alone, no HSA", variants.WithoutHSA, changes=lambda scale: variants.NO_HSA),
    Arm("hsa_rope", "RoPE on queries and keys of chunks", variants.RopeInside),
    Arm("mean_landmark", "no chunk encoder: the landmark is made of the mean of a chunk", variants.MeanLandmark),
    Arm("concatenated", "select, then concatenate (NSA's selected branch): scores choose and get no gradient", variants.Concatenated),
    Arm(
        "mean_key", "as MoBA: mean keys are landmarks, attention's query scores them, chosen chunks are concatenated",
        variants.MeanKey, changes=_one_query,
    ),
    Arm(
        "grouped_softmax", "as Landmark Attention: landmarks are keys, in one softmax with the token's own", variants.GroupedSoftmax,
        changes=lambda scale: _one_query(scale) | {"retrieval_norm": True},
    ),
    Arm(
        "full_k", "every chunk is kept in training, K in evaluation",
        training=lambda scale, stage: {"top_k": _every_chunk(scale)},
    ),
    Arm("no_noise", "no exploration noise on the choice", changes=lambda scale: {"exploration": False}),
    Arm("window_4x", "a window of four times the baseline's: as long as the shortest copy distance", changes=_window(4)),
    Arm("window_8x", "a window of eight times the baseline's: as long as the longest copy distance", changes=_window(8)),
    Arm("window_16x", "a window as long as a training sequence", changes=_window(16)),
    Arm("warmup_none", "window 4x; needles in text, no copies, no warm-up", changes=_window(4), training=_warm_up()),
    Arm(
        "warmup_self_copy", "the same after a warm-up on self-copies", changes=_window(4),
        training=_warm_up(mixture=lambda scale, stage: stage.mixture),
    ),
    Arm(
        "warmup_short_window", "the same after a warm-up with the baseline's window and every chunk kept", changes=_window(4),
        training=_warm_up(window=lambda scale, stage: stage.window // 4, top_k=lambda scale, stage: _every_chunk(scale)),
    ),
    Arm("data_short", "no sequence longer than a quarter, several in a row: nothing useful lies further back", packed=4),
    Arm("dense_chains", "a quarter of the data are questions about chains", training=_chains),
    Arm(
        "moe_chains", "the same with experts: as many active parameters, more in all", changes=_experts, training=_chains,
        counted="active",
    ),
    Arm("text", "plain text alone: no copies, no questions", training=_text),
    Arm("text_window_4x", "the same, a window of a quarter of a sequence, as the paper's", changes=_window(4), training=_text),
    Arm("text_window_8x", "the same, a window of half a sequence", changes=_window(8), training=_text),
    Arm("text_no_noise", "plain text alone, no noise on the choice", changes=lambda scale: {"exploration": False}, training=_text),
    Arm("text_crowd", "plain text alone, at last behind as many chunks as a long text has", training=_text_in_a_crowd),
    Arm(
        "text_full_rope", "plain text alone for full attention with RoPE", variants.WithoutHSA, changes=_full_rope,
        training=lambda scale, stage: _text(scale, stage) | {"window": stage.tokens},
    ),
    Arm("no_qk_norm", "no norm on queries and keys, in any attention", variants.WithoutQKNorm),
)  # fmt: skip
ARMS = {arm.name: arm for arm in _ARMS}

SCALES = {
    scale.name: scale
    for scale in (
        # `mini` with 4 blocks in the place of 7, and half its training length, chunks and, twice over, window: stacked windows
        # do not reach a needle. Below 1,024 tokens no step waits for a compiler.
        Scale(
            "lab",
            dataclasses.replace(
                PRESETS["mini"], lower_layers=2, layers_per_group=1, window=32, chunk_size=32, embedding_std=0.0625
            ),
            Stage(steps=850, batch=32, tokens=512, text_weight=0.25, mixture=Mixture(min_copy=128)),
            growth=((1 / 8, 64, 250), (1 / 4, 64, 200), (1 / 2, 32, 200)), learning_rate=1.5e-3,
        ),
        # Seconds on a processor: too small to learn more than words, large enough to try every arm.
        Scale(
            "tiny",
            dataclasses.replace(
                PRESETS["debug"], vocab_size=4096, chunk_size=32, window=16, top_k=4, hsa_heads=2, hsa_kv_heads=1, retrieval_heads=1,
                layers_per_group=1, lower_layers=1,
            ),
            Stage(steps=20, batch=2, tokens=512, mixture=Mixture(min_copy=128)),
            growth=((1 / 4, 4, 20),), learning_rate=3e-3, warmup=10, multiples=(1, 4), questions=2, texts=2, tail=64,
        ),
    )
}  # fmt: skip
