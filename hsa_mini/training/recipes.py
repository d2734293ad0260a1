"""How the presets are trained: a recipe is a list of stages and the settings of one optimizer."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from hsa_mini.checks import check_integer, check_number, quoted
from hsa_mini.config import HSAConfig
from hsa_mini.training.mixture import LONG, Mixture

MAX_NUMBER = 10**9  # in a recipe; more is a typing error
MAX_BETA = 1 - 1e-9  # AdamW accepts no 1


@dataclass(frozen=True)
class Stage:
    """Consecutive steps with the same data, context length, window and number of kept chunks.

    queue_chunks: None means that a sequence retrieves only among its own chunks. A number means
    that it retrieves among that many chunks of earlier batches, the chunks of all other sequences
    of its batch, and its own. isolated: this many sequences of each batch see only their own chunks
    even so. They keep the model used to the beginning of a text, where nothing has been read
    before. mixture: None means whole documents, packed into rows, in which nothing attends or
    retrieves across the border of a document.

    Raises ValueError for values out of range.
    """

    steps: int
    batch: int  # sequences that are read at once
    tokens: int  # of a sequence
    window: int | None = None  # W; None: the preset's
    top_k: int | None = None  # K; None: the preset's
    gumbel_noise: bool = True  # on the retrieval scores, so that other chunks are tried too
    queue_chunks: int | None = None
    isolated: int = 0
    text_weight: float = 1.0  # of plain text in the loss; copies and answers have weight 1
    mixture: Mixture | None = field(default_factory=Mixture)

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch", 1), ("tokens", 1), ("isolated", 0)):
            check_integer(name, getattr(self, name), least, MAX_NUMBER)
        for name, least in (("window", 1), ("top_k", 1), ("queue_chunks", 0)):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least, MAX_NUMBER)
        _check_choice("gumbel_noise", self.gumbel_noise, (True, False))
        check_number("text_weight", self.text_weight, 0, MAX_NUMBER)

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

    Raises ValueError for values out of range.
    """

    stages: tuple[Stage, ...]
    learning_rate: float = 1e-3
    warmup: int = 200  # steps
    decay: float = 0.4  # share of the steps
    muon: float = 0.0  # updates of the blocks' matrices under Muon, per update of AdamW; 0: AdamW
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest norm of the gradient
    balance_rate: float = 1e-3  # change of an expert's bias in one step
    accumulate: int = 1  # batches whose gradients are added in one step
    eval_every: int = 0  # steps between two measurements of the held-out loss; 0: none
    dtype: str = "float32"  # of weights and gradients; the optimizer's are float32
    compile_blocks: bool = False  # on a GPU with kernels, which takes a minute
    checkpoint_blocks: bool = False  # keep only the inputs of blocks for the backward pass
    loss_tokens: int = 0  # make logits of this many tokens at a time; 0: of all at once

    def __post_init__(self) -> None:
        if not self.stages or not all(isinstance(stage, Stage) for stage in self.stages):
            raise ValueError(f"stages: got {quoted(self.stages)}, accepted is at least one stage")
        for name in ("warmup", "accumulate"):
            check_integer(name, getattr(self, name), 1, MAX_NUMBER)
        for name in ("eval_every", "loss_tokens"):
            check_integer(name, getattr(self, name), 0, MAX_NUMBER)
        for name in ("learning_rate", "muon", "weight_decay", "clip", "balance_rate"):
            check_number(name, getattr(self, name), 0, MAX_NUMBER)
        check_number("decay", self.decay, 0, 1)
        if len(self.betas) != 2:
            raise ValueError(f"betas: got {quoted(self.betas)}, accepted are two numbers")
        for i, beta in enumerate(self.betas):
            check_number(f"betas[{i}]", beta, 0, MAX_BETA)
        for name in ("compile_blocks", "checkpoint_blocks"):
            _check_choice(name, getattr(self, name), (True, False))
        _check_choice("dtype", self.dtype, ("float32", "bfloat16"))

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


def _check_choice(name: str, value: Any, accepted: tuple) -> None:
    if type(value) is not type(accepted[0]) or value not in accepted:
        known = " and ".join(map(str, accepted))
        raise ValueError(f"{name}: got {quoted(value)}, accepted are {known}")


# Files of earlier versions lack these settings. They hold them only where they are not the default.
ADDED = (
    "muon", "accumulate", "eval_every", "dtype", "compile_blocks", "checkpoint_blocks",
    "loss_tokens",
)  # fmt: skip
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
# Shares that are left out of files where they are 0: earlier versions did not have them.
ADDED_SHARES = ("facts", "spans", *LONG)


def recipe_settings(recipe: Recipe) -> dict:
    """The recipe with the keys that training.json, progress.json and lab.jsonl use."""

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {key: x for key, x in value.items() if x or key not in ADDED_SHARES}
            return {KEYS_IN_FILES.get(key, key): renamed(x) for key, x in kept.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(renamed, value))
        return value

    values = asdict(recipe)
    defaults = {f.name: f.default for f in fields(recipe) if f.name in ADDED}
    return renamed({k: x for k, x in values.items() if k not in ADDED or x != defaults[k]})


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
