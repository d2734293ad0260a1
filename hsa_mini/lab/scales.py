"""The scales of the laboratory: what all arms of one size share."""

import dataclasses
from dataclasses import dataclass

from hsa_mini.config import PRESETS, HSAConfig
from hsa_mini.lab.capacity.crowds import Crowds
from hsa_mini.training.mixture import Mixture
from hsa_mini.training.recipes import Stage


@dataclass(frozen=True)
class Scale:
    """The baseline's configuration and training, and the questions that every trained model must
    answer.

    stage: the last stage of training, at the full training length.
    growth: the stages before it, as (share of the training length, batch, steps). In short contexts
    retrieval is learnt first, because there are few chunks to choose from.
    multiples: lengths of evaluation, as multiples of the training length.
    questions: how many per task and length. texts: how many per length, for perplexity and copies.
    tail: tokens scored at the end of each text.
    points: how many times in the last stage the held-out loss is measured, at the lengths of
    `curve_multiples`.
    distractors: further needles in the texts of the measure "crowded", which is S-NIAH at the
    lengths of `crowded_multiples`; 0: it is not measured.
    crowds: for the scale "capacity", which is measured in texts crowded with needles only.
    """

    name: str
    config: HSAConfig
    stage: Stage
    growth: tuple[tuple[float, int, int], ...] = ()
    learning_rate: float = 1e-3
    warmup: int = 100
    multiples: tuple[int, ...] = (1, 4, 16, 64)
    questions: int = 32
    texts: int = 16
    tail: int = 256
    points: int = 0
    curve_multiples: tuple[int, ...] = (1, 4)
    distractors: int = 0
    crowded_multiples: tuple[int, ...] = (16, 64)
    crowds: Crowds | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of evaluation in tokens."""
        return tuple(self.stage.tokens * multiple for multiple in self.multiples)

    def stages(self, window: int) -> tuple[Stage, ...]:
        """All stages of training for an arm with this window.

        The arm's window and the distance of copies grow with the context, so that a copy is beyond
        the window in every stage or in none.
        """

        def part(share: float, batch: int, steps: int) -> Stage:
            mixture = self.stage.mixture
            assert mixture is not None, "the laboratory trains on mixtures"
            mixture = dataclasses.replace(mixture, min_copy=round(share * mixture.min_copy))
            tokens = round(share * self.stage.tokens)
            near = max(round(share * window), 1)
            return dataclasses.replace(
                self.stage, steps=steps, batch=batch, tokens=tokens, window=near, mixture=mixture
            )

        return *(part(*row) for row in self.growth), part(1, self.stage.batch, self.stage.steps)


# `mini` with 4 blocks instead of 7, half its training length and chunk size, and a quarter of its
# window, so that the stacked windows do not reach a needle. Below 1,024 tokens FlexAttention, which
# would have to be compiled, is not used.
LAB = Scale(
    "lab",
    dataclasses.replace(
        PRESETS["mini"],
        lower_layers=2,
        layers_per_group=1,
        window=32,
        chunk_size=32,
        embedding_std=0.0625,
    ),
    Stage(steps=850, batch=32, tokens=512, text_weight=0.25, mixture=Mixture(min_copy=128)),
    growth=((1 / 8, 64, 250), (1 / 4, 64, 200), (1 / 2, 32, 200)),
    learning_rate=1.5e-3,
)
# Takes seconds on a CPU: too small to learn more than words, large enough to try every arm.
TINY = Scale(
    "tiny",
    dataclasses.replace(
        PRESETS["debug"],
        vocab_size=4096,
        chunk_size=32,
        window=16,
        top_k=4,
        hsa_heads=2,
        hsa_kv_heads=1,
        retrieval_heads=1,
        layers_per_group=1,
        lower_layers=1,
    ),
    Stage(steps=20, batch=2, tokens=512, mixture=Mixture(min_copy=128)),
    growth=((1 / 4, 4, 20),),
    learning_rate=3e-3,
    warmup=10,
    multiples=(1, 4),
    questions=2,
    texts=2,
    tail=64,
)
# As LAB, four times as long.
SETTLED = dataclasses.replace(
    LAB,
    name="settled",
    stage=dataclasses.replace(LAB.stage, steps=5350),
    questions=64,
    texts=32,
    points=12,
    distractors=192,
)
# As LAB, for models that are asked in texts crowded with needles.
CAPACITY = dataclasses.replace(LAB, name="capacity", crowds=Crowds())
SCALES = {scale.name: scale for scale in (LAB, TINY, SETTLED, CAPACITY)}
