"""How the presets are trained: a recipe is a list of stages, and all of it is declared here."""

from dataclasses import dataclass, field, replace

from hsa_mini.config import HSAConfig
from hsa_mini.training.mixture import Mixture


@dataclass(frozen=True)
class Stage:
    """Some steps in a row that see the same: data, window, chunks kept, context."""

    steps: int
    batch: int
    tokens: int  # of a sequence
    window: int | None = None  # W, instead of the preset's
    top_k: int | None = None  # K, instead of the preset's
    explore: bool = True  # Gumbel noise on the choice
    # Chunks of earlier batches that every sequence has in front of its own, with those of its whole batch (None: its own alone).
    crowd: int | None = None
    alone: int = (
        0  # sequences of a batch that have nothing in front even so: texts have a beginning
    )
    text_weight: float = 1.0  # of plain text in the loss, where copies and answers weigh 1
    mixture: Mixture = field(default_factory=Mixture)

    def config(self, preset: HSAConfig) -> HSAConfig:
        """The preset as this stage has it."""
        changes = {
            name: value
            for name in ("window", "top_k")
            if (value := getattr(self, name)) is not None
        }
        return replace(preset, **changes)


@dataclass(frozen=True)
class Recipe:
    """Stages, and one optimizer for all. Learning rate: linear warm-up, constant, then linear decay to 0."""

    stages: tuple[Stage, ...]
    learning_rate: float = 1e-3
    warmup: int = 200
    decay: float = 0.4  # share of the steps
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    balance_rate: float = 1e-3  # of the experts' bias, a step

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def crowd(self) -> int:
        """Chunks of earlier batches to keep."""
        return max(stage.crowd or 0 for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """The stage of `step`, counted from 0."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise ValueError(
            f"step: got one beyond the recipe's {self.steps}, accepted is 0 to {self.steps - 1}"
        )

    def rate(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        left = (self.steps - step) / max(self.decay * self.steps, 1)
        return self.learning_rate * min((step + 1) / self.warmup, left, 1.0)

    def scaled(self, steps: int) -> "Recipe":
        """The same recipe in `steps` steps: every stage keeps its share."""
        ends = [
            round(steps * sum(s.steps for s in self.stages[: i + 1]) / self.steps)
            for i in range(len(self.stages))
        ]
        shares = (last - first for first, last in zip([0, *ends], ends))
        return replace(self, stages=tuple(replace(s, steps=n) for s, n in zip(self.stages, shares)))


# Needles are learnt among 16 chunks, with noise; then they have to be found among thousands of texts that were read before.
# Plain text is content with soft mixtures of chunks, in which an answer drowns among many: then it counts for less.
_ALONE = Stage(
    2000,
    batch=32,
    tokens=1024,
    text_weight=0.25,
    mixture=Mixture(self_copy=0.3, needles=0.35, chains=0.25),
)
_CROWD = replace(_ALONE, steps=4000, explore=False, crowd=4096, text_weight=0.1)
_MINI = Recipe((_ALONE, replace(_CROWD, alone=4)))
# The five stages of the paper in small: warm-up (a short window, every chunk kept, mostly copies), sparse pre-training, longer
# texts, annealing, and questions.
_SMALL = Recipe(
    (
        replace(
            _ALONE,
            steps=500,
            window=64,
            top_k=16,
            mixture=Mixture(self_copy=0.6, needles=0.2, chains=0.1),
        ),
        replace(_ALONE, steps=1700),
        replace(_CROWD, steps=400, batch=8, tokens=4096),
        replace(_CROWD, steps=1400),
        replace(_CROWD, steps=1000, mixture=Mixture(self_copy=0.1, needles=0.5, chains=0.35)),
    ),
    learning_rate=7e-4,
)
# For a processor. Copying is learnt from a single chunk, where nothing has to be retrieved yet; then, among more and more
# chunks, which one it is; and at last to do with a few. The window stays below what is copied, or it would do the copying.
_NANO = Recipe(
    (
        Stage(
            250,
            32,
            32,
            window=4,
            top_k=8,
            text_weight=0.1,
            mixture=Mixture(self_copy=1.0, needles=0.0, copy_least=16),
        ),
        Stage(
            100,
            32,
            64,
            window=8,
            top_k=8,
            text_weight=0.1,
            mixture=Mixture(self_copy=0.7, needles=0.3, copy_least=24),
        ),
        Stage(400, 16, 128, window=16, top_k=8, text_weight=0.1, mixture=Mixture(copy_least=32)),
        Stage(650, 8, 256, text_weight=0.25, mixture=Mixture(copy_least=64)),
    ),
    learning_rate=5e-3,
    warmup=30,
)
RECIPES = {"nano": _NANO, "mini": _MINI, "mini_moe": _MINI, "small_moe": _SMALL}
