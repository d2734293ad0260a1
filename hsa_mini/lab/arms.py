"""The arms of the laboratory: variants of the baseline `hsa` that change one thing each.

All arms of a scale have the same number of parameters: the width of their MLPs makes up for what a
change removes or adds. They train on equally many tokens, in equally many steps, with the same
seeds.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import cache

from hsa_mini.config import HSAConfig
from hsa_mini.hsa_model import HSAModel
from hsa_mini.lab import changes, variants
from hsa_mini.lab.changes import MLP_STEP, ConfigChange, TrainingChange
from hsa_mini.lab.scales import Scale
from hsa_mini.model.cost_estimate import idle
from hsa_mini.training.recipes import Recipe, recipe_settings


@dataclass(frozen=True)
class Arm:
    """One variant of the baseline: another model, other settings, or other training.

    what: the difference from the baseline, in words.
    changes: fields of the configuration that differ. training: fields of each stage that differ.
    packed: how many short sequences share one row of the training length. With more than one, no
    token before the start of a short sequence helps to predict it.
    counted: which count of parameters equals the baseline's, "parameters" (all) or "active" (those
    that one token uses); or "mlp_width", where the MLPs are as wide as the baseline's and nothing
    is made up for. share: the count is this share of the baseline's.
    """

    name: str
    what: str
    model: type[HSAModel] = HSAModel
    changes: ConfigChange = lambda scale: {}
    training: TrainingChange = lambda scale, stage: {}
    packed: int = 1
    counted: str = field(default="parameters", kw_only=True)
    share: float = field(default=1.0, kw_only=True)

    def config(self, scale: Scale) -> HSAConfig:
        """The configuration at this scale, with the width of its MLPs adapted."""
        return _matched(self, scale)

    def recipe(self, scale: Scale, steps: int | None = None) -> Recipe:
        """The training at this scale; `steps` replaces the scale's number of steps."""
        stages = scale.stages(self.config(scale).window)
        stages = tuple(
            dataclasses.replace(stage, **self.training(scale, stage)) for stage in stages
        )
        recipe = Recipe(stages, learning_rate=scale.learning_rate, warmup=scale.warmup)
        if steps is None:
            return recipe
        return dataclasses.replace(recipe, warmup=min(recipe.warmup, steps)).scaled(steps)

    def parameters(self, scale: Scale) -> dict[str, int]:
        """The number of all parameters, and of those that one token uses ("active")."""
        return _count(self.model, self.config(scale))

    def settings(self, scale: Scale, steps: int | None = None) -> dict:
        """All settings that determine a run, except its seed."""
        return {
            "scale": scale.name,
            "arm": self.name,
            "model": self.model.__name__,
            "packed": self.packed,
            "config": dataclasses.asdict(self.config(scale)),
            "recipe": recipe_settings(self.recipe(scale, steps)),
            "evaluation": {
                name: getattr(scale, name) for name in ("lengths", "questions", "texts", "tail")
            }
            | {name: x for name in ("points", "distractors") if (x := getattr(scale, name))}
            | ({"crowds": dataclasses.asdict(scale.crowds)} if scale.crowds else {}),
        }


def _count(model: type[HSAModel], config: HSAConfig) -> dict[str, int]:
    """Counts parameters on the meta device, which allocates none."""
    made = model(config, device="meta")
    total = sum(parameter.numel() for parameter in made.parameters())
    return {"parameters": total, "active": total - idle(made)}


@cache
def _matched(arm: Arm, scale: Scale) -> HSAConfig:
    """The arm's configuration, with MLPs so wide that `arm.counted` is `arm.share` of the
    baseline's, to the nearest `MLP_STEP`.
    """
    config = dataclasses.replace(scale.config, **arm.changes(scale))
    if arm.counted == "mlp_width":
        return config

    def count(width: int) -> int:
        return _count(arm.model, dataclasses.replace(config, mlp_width=width))[arm.counted]

    wanted = arm.share * _count(HSAModel, scale.config)[arm.counted]
    narrow = count(MLP_STEP)
    wide = count(2 * MLP_STEP)
    # The number of parameters is linear in the width.
    steps = 1 + round((wanted - narrow) / (wide - narrow))
    return dataclasses.replace(config, mlp_width=MLP_STEP * max(steps, 1))


_ARMS = (
    Arm(
        "hsa",
        "the baseline: fused scores, no positions, chunk encoder, sparse K, exploration noise,"
        " long data",
    ),
    Arm(
        "full_rope", "full attention with RoPE in every block, no HSA", variants.WithoutHSA,
        changes=changes.full_attention, training=changes.window_of_stage,
    ),
    Arm(
        "window", "only the sliding window, no HSA", variants.WithoutHSA,
        changes=changes.without_hsa,
    ),
    Arm("hsa_rope", "RoPE on queries and keys of chunks", variants.RopeInside),
    Arm(
        "mean_landmark", "no chunk encoder: the landmark is a projection of the chunk's mean",
        variants.MeanLandmark,
    ),
    Arm(
        "concatenated",
        "selected chunks are concatenated (NSA's selected branch): scores only select, and get no"
        " gradient",
        variants.Concatenated,
    ),
    Arm(
        "mean_key",
        "as in MoBA: landmarks are mean keys, attention's queries score them, selected chunks are"
        " concatenated",
        variants.MeanKey, changes=changes.attention_queries,
    ),
    Arm(
        "grouped_softmax",
        "as in Landmark Attention: landmarks are keys, in one softmax with the token's own key",
        variants.GroupedSoftmax, changes=changes.landmark_attention,
    ),
    Arm("full_k", "training keeps every chunk, evaluation keeps K", training=changes.every_chunk),
    Arm("no_noise", "no exploration noise on the selection", changes=changes.without_noise),
    Arm(
        "window_4x", "a window four times the baseline's, as long as the shortest copy distance",
        changes=changes.window(4),
    ),
    Arm(
        "window_8x", "a window eight times the baseline's, as long as the longest copy distance",
        changes=changes.window(8),
    ),
    Arm("window_16x", "a window as long as a training sequence", changes=changes.window(16)),
    Arm(
        "warmup_none", "window 4x; needles in text, no copies, no warm-up",
        changes=changes.window(4), training=changes.no_warm_up,
    ),
    Arm(
        "warmup_self_copy", "as warmup_none, after a warm-up on self-copies",
        changes=changes.window(4), training=changes.warm_up_on_copies,
    ),
    Arm(
        "warmup_short_window",
        "as warmup_none, after a warm-up with the baseline's window and every chunk kept",
        changes=changes.window(4), training=changes.warm_up_with_short_window,
    ),
    Arm(
        "data_short",
        "sequences of at most a quarter of the length, several per row: nothing useful lies further"
        " back",
        packed=4,
    ),
    Arm(
        "dense_chains", "a quarter of the data are questions about chains",
        training=changes.chains,
    ),
    Arm(
        "moe_chains", "as dense_chains, with experts: equal active parameters, more in total",
        changes=changes.experts, training=changes.chains, counted="active",
    ),
    Arm("text", "plain text only: no copies, no questions", training=changes.text_only),
    Arm(
        "text_window_4x", "as text, with a window of a quarter of a sequence, like the paper's",
        changes=changes.window(4), training=changes.text_only,
    ),
    Arm(
        "text_window_8x", "as text, with a window of half a sequence",
        changes=changes.window(8), training=changes.text_only,
    ),
    Arm(
        "text_no_noise", "as text, without exploration noise",
        changes=changes.without_noise, training=changes.text_only,
    ),
    Arm(
        "text_crowd",
        "as text; in the last stage as many chunks of other texts in front as a long text has",
        training=changes.text_behind_queue,
    ),
    Arm(
        "text_full_rope", "as full_rope, trained on plain text only", variants.WithoutHSA,
        changes=changes.full_attention, training=changes.text_in_full_attention,
    ),
    Arm("no_qk_norm", "no norm on queries and keys, in any attention", variants.WithoutQKNorm),
)  # fmt: skip
ARMS = {arm.name: arm for arm in _ARMS}
