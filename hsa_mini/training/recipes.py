"""How the presets are trained: a recipe is a list of stages and the settings of one optimizer."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hsa_mini.config import HSAConfig
from hsa_mini.training.mixture import Mixture


@dataclass(frozen=True)
class Stage:
    """Consecutive steps with the same data, context length, window and number of kept chunks.

    queue_chunks: None means that a sequence retrieves only among its own chunks. A number means
    that it retrieves among that many chunks of earlier batches, the chunks of all other sequences
    of its batch, and its own. isolated: this many sequences of each batch see only their own chunks
    even so. They keep the model used to the beginning of a text, where nothing has been read
    before.
    """

    steps: int
    batch: int  # sequences
    tokens: int  # of a sequence
    window: int | None = None  # W; None: the preset's
    top_k: int | None = None  # K; None: the preset's
    gumbel_noise: bool = True  # on the retrieval scores, so that other chunks are tried too
    queue_chunks: int | None = None
    isolated: int = 0
    text_weight: float = 1.0  # of plain text in the loss; copies and answers have weight 1
    mixture: Mixture = field(default_factory=Mixture)

    def config(self, preset: HSAConfig) -> HSAConfig:
        """The preset with the window and K of this stage."""
        changes = {
            name: value
            for name in ("window", "top_k")
            if (value := getattr(self, name)) is not None
        }
        return replace(preset, **changes)


@dataclass(frozen=True)
class Recipe:
    """Stages, trained one after the other with one optimizer.

    The learning rate warms up linearly, stays constant, and decays linearly to 0.
    """

    stages: tuple[Stage, ...]
    learning_rate: float = 1e-3
    warmup: int = 200  # steps
    decay: float = 0.4  # share of the steps
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest norm of the gradient
    balance_rate: float = 1e-3  # change of an expert's bias in one step

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def queue_chunks(self) -> int:
        """The size of the chunk queue: large enough for every stage."""
        return max(stage.queue_chunks or 0 for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """The stage of `step`, counted from 0. Raises ValueError for a step after the last one."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise ValueError(
            f"step: got one beyond the recipe's {self.steps}, accepted is 0 to {self.steps - 1}"
        )

    def rate(self, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
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


# Files of earlier versions hold these keys, and a run is resumed only if its settings are equal.
KEYS_IN_FILES = {
    "gumbel_noise": "explore",
    "queue_chunks": "crowd",
    "isolated": "alone",
    "max_needles": "needles_most",
    "max_chains": "chains_most",
    "max_questions": "questions_most",
    "min_copy": "copy_least",
}
# Fields that are left out of files where they change nothing: earlier versions did not have them.
ADDED = ("facts", "spans")


def recipe_settings(recipe: Recipe) -> dict:
    """The recipe with the keys that training.json, progress.json and lab.jsonl use."""

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {key: x for key, x in value.items() if x or key not in ADDED}
            return {KEYS_IN_FILES.get(key, key): renamed(x) for key, x in kept.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(renamed, value))
        return value

    return renamed(asdict(recipe))


# First the model learns to find a needle among 16 chunks, with noise. Then it has to find one among
# thousands of chunks of other texts. The loss of plain text rewards a soft mixture of many chunks,
# in which a single answer is lost. So plain text gets a lower weight in the second stage.
_OWN_CHUNKS = Stage(
    2000,
    batch=32,
    tokens=1024,
    text_weight=0.25,
    mixture=Mixture(self_copy=0.3, needles=0.35, chains=0.25),
)
_WITH_QUEUE = replace(
    _OWN_CHUNKS, steps=4000, gumbel_noise=False, queue_chunks=4096, text_weight=0.1
)
_MINI = Recipe((_OWN_CHUNKS, replace(_WITH_QUEUE, isolated=4)))
# Facts in many forms.
_ANY_OWN_CHUNKS = replace(
    _OWN_CHUNKS,
    steps=1200,
    mixture=Mixture(self_copy=0.12, needles=0.06, chains=0.04, facts=0.64, spans=0.07),
)
_ANY_WITH_QUEUE = replace(
    _ANY_OWN_CHUNKS,
    steps=22_800,
    gumbel_noise=False,
    queue_chunks=4096,
    isolated=4,
    text_weight=0.1,
)
_MINI_ANY = Recipe((_ANY_OWN_CHUNKS, _ANY_WITH_QUEUE))
# The paper's five stages at a small scale: warm-up (short window, every chunk kept, mostly copies),
# sparse pre-training, longer texts, annealing, and questions.
_SMALL = Recipe(
    (
        replace(
            _OWN_CHUNKS,
            steps=500,
            window=64,
            top_k=16,
            mixture=Mixture(self_copy=0.6, needles=0.2, chains=0.1),
        ),
        replace(_OWN_CHUNKS, steps=1700),
        replace(_WITH_QUEUE, steps=400, batch=8, tokens=4096),
        replace(_WITH_QUEUE, steps=1400),
        replace(_WITH_QUEUE, steps=1000, mixture=Mixture(self_copy=0.1, needles=0.5, chains=0.35)),
    ),
    learning_rate=7e-4,
)
# For a CPU. The model learns to copy from a single chunk, where nothing has to be retrieved yet.
# Then it learns which chunk to copy from, among more and more of them. At last it learns to copy
# with few kept chunks. The window stays shorter than the copied passage. Otherwise the window alone
# could do the copying.
_NANO = Recipe(
    (
        Stage(
            250,
            32,
            32,
            window=4,
            top_k=8,
            text_weight=0.1,
            mixture=Mixture(self_copy=1.0, needles=0.0, min_copy=16),
        ),
        Stage(
            100,
            32,
            64,
            window=8,
            top_k=8,
            text_weight=0.1,
            mixture=Mixture(self_copy=0.7, needles=0.3, min_copy=24),
        ),
        Stage(400, 16, 128, window=16, top_k=8, text_weight=0.1, mixture=Mixture(min_copy=32)),
        Stage(650, 8, 256, text_weight=0.25, mixture=Mixture(min_copy=64)),
    ),
    learning_rate=5e-3,
    warmup=30,
)
RECIPES = {
    "nano": _NANO,
    "mini": _MINI,
    "mini_moe": _MINI,
    "mini_any": _MINI_ANY,
    "mini_any_moe": _MINI_ANY,
    "small_moe": _SMALL,
}
