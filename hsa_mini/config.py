"""The configuration of a model, and the named presets. Imports no torch.

One letter, one size: B batch, T tokens, S chunk size, N chunks, K chunks kept, H query heads,
J key/value heads, D head dimension, R retrieval dimension, C width, E experts, A experts active,
P groups, W window.
"""

import dataclasses
import json
import math
from dataclasses import dataclass

from hsa_mini.checks import check_integer, check_number, quoted

MODEL_TYPE = "hsa_mini"  # in config.json, where transformers looks for it
RENAMED = {"top_k": "hsa_top_k"}  # fields that transformers would take for its own
MAX_TOKENS = 1 << 30  # the longest text that a command or a plan accepts; more is a typing error
MAX_LAYERS = 1024  # a model of more blocks takes seconds to make even without memory
MAX_SIZE = 1 << 24
MAX_WEIGHTS = 1 << 36  # numbers in one weight
MAX_STATE = 1 << 30  # numbers that one layer keeps of one sequence

CHOICES = {"weighting": ("softmax", "stick_breaking"), "residual": ("add", "bypass")}
RANGES = {"rope_base": (1.0, 1e12), "norm_eps": (0.0, 1.0), "embedding_std": (0.0, 1e3)}
MAY_BE_0 = ("encoder_mlp_width", "experts", "experts_active", "expert_width")
# Sizes whose product is the number of elements of one tensor, and the most that it may have.
PRODUCTS = (
    ("lower_layers", MAX_LAYERS),
    ("encoder_layers", MAX_LAYERS),
    ("groups layers_per_group", MAX_LAYERS),
    ("vocab_size width", MAX_WEIGHTS),
    ("mlp_width width", MAX_WEIGHTS),
    ("encoder_mlp_width width", MAX_WEIGHTS),
    ("heads head_dim width", MAX_WEIGHTS),
    ("hsa_heads hsa_head_dim width", MAX_WEIGHTS),
    ("retrieval_heads retrieval_dim width", MAX_WEIGHTS),
    ("experts expert_width width", MAX_WEIGHTS),
    ("window kv_heads head_dim", MAX_STATE),
    ("chunk_size width", MAX_STATE),
    ("chunk_size hsa_kv_heads hsa_head_dim", MAX_STATE),
    ("top_k hsa_kv_heads", 1 << 16),
)


@dataclass(frozen=True)
class HSAConfig:
    """All sizes and options of an HSA model.

    Raises ValueError for values that do not fit together.
    """

    vocab_size: int
    width: int  # C
    # Blocks: `lower_layers` blocks with a sliding window, then `groups` times
    # [window + HSA, window, ...] with `layers_per_group` blocks in each group.
    lower_layers: int
    groups: int  # P, each with one HSA layer
    layers_per_group: int
    mlp_width: int
    # Sliding-window attention, with RoPE.
    window: int  # W: the number of keys that a token attends to, its own included
    heads: int
    kv_heads: int
    head_dim: int
    # Hierarchical sparse attention, without positions.
    chunk_size: int  # S
    top_k: int  # K
    hsa_heads: int  # H
    hsa_kv_heads: int  # J
    hsa_head_dim: int  # D
    retrieval_dim: int  # R
    retrieval_heads: int = 1  # 1: all KV heads share it; hsa_kv_heads: one per KV head
    encoder_layers: int = 1
    encoder_mlp_width: int = 0  # 0 means mlp_width
    # Options of retrieval (§2.2); `reference/retrieval.py` explains what each of them changes.
    weighting: str = "softmax"  # or "stick_breaking"
    recency: bool = False  # True: a token learns to prefer the newer of chunks that match equally
    exploration: bool = True  # Gumbel noise on the scores, only in training
    exclude_window: bool = False  # True: never retrieve a chunk that lies inside the window
    query_block: int = 1  # this many consecutive tokens share the chunks of the first one
    retrieval_norm: bool = False  # RMSNorm on retrieval queries and landmarks
    qk_norm: bool = True  # RMSNorm on queries and keys where positions are; HSA always has it
    residual: str = "add"  # or "bypass": only the MLP reads the retrieved context
    # Mixture of experts. `experts=0` makes a dense model. The first block is always dense.
    experts: int = 0  # E
    experts_active: int = 0  # A
    expert_width: int = 0
    tied: bool = True  # the output head shares the embedding's weights
    rope_base: float = 10_000.0
    rope_factors: tuple[float, ...] = ()  # of RoPE's frequencies, one per pair; (): all are 1
    norm_eps: float = 1e-6
    embedding_std: float = 0.02  # of the embedding and of [CLS] before training

    def __post_init__(self) -> None:
        if isinstance(self.rope_factors, list):  # as JSON has it
            object.__setattr__(self, "rope_factors", tuple(self.rope_factors))
        self._check_fields()
        self._check_products()
        for name, divisor in (("heads", "kv_heads"), ("hsa_heads", "hsa_kv_heads")):
            value = getattr(self, name)
            step = getattr(self, divisor)
            if value % step:
                raise ValueError(
                    f"{name}: got {value}, accepted are multiples of {divisor} ({step})"
                )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim: got {self.head_dim}, accepted are even numbers (RoPE turns pairs)"
            )
        if self.retrieval_heads not in (1, self.hsa_kv_heads):
            raise ValueError(
                f"retrieval_heads: got {self.retrieval_heads}, "
                f"accepted are 1 and hsa_kv_heads ({self.hsa_kv_heads})"
            )
        uneven_window = self.exclude_window and self.window % self.query_block
        if self.chunk_size % self.query_block or uneven_window:
            raise ValueError(
                f"query_block: got {self.query_block}, "
                "accepted are divisors of chunk_size, and of an excluded window"
            )
        if self.experts and not (0 < self.experts_active <= self.experts and self.expert_width > 0):
            raise ValueError(
                f"experts_active: got {self.experts_active} with expert_width {self.expert_width}, "
                f"accepted are 1 to experts ({self.experts}) and a width above 0"
            )

    def _check_fields(self) -> None:
        """Every field by itself: its type and its bounds."""
        for field in dataclasses.fields(self):
            name = field.name
            value = getattr(self, name)
            if field.type is int:
                check_integer(name, value, 0 if name in MAY_BE_0 else 1, MAX_SIZE)
            elif field.type is float:
                check_number(name, value, *RANGES[name])
            elif name == "rope_factors":
                self._check_rope_factors()
            else:
                accepted = CHOICES.get(name, (True, False))
                if type(value) is not field.type or value not in accepted:
                    known = " and ".join(map(str, accepted))
                    raise ValueError(f"{name}: got {quoted(value)}, accepted are {known}")

    def _check_rope_factors(self) -> None:
        factors = self.rope_factors
        if type(factors) is not tuple or len(factors) not in (0, self.head_dim // 2):
            raise ValueError(
                f"rope_factors: got {quoted(factors)}, accepted are none or one number for each "
                "pair of head_dim"
            )
        for factor in factors:
            check_number("rope_factors", factor, 0.0, 1.0)

    def _check_products(self) -> None:
        """Sizes whose product no computer holds, or which would take hours to count."""
        for names, most in PRODUCTS:
            sizes = {name: getattr(self, name) for name in names.split()}
            if math.prod(sizes.values()) > most:
                (first, got), *others = sizes.items()
                given = "".join(f", {name}={size}" for name, size in others)
                what = "a product of" if others else "an integer"
                raise ValueError(f"{first}: got {got}{given}, accepted is {what} up to {most}")

    @property
    def upper_layers(self) -> int:
        """The number of blocks in the upper decoder."""
        return self.groups * self.layers_per_group

    @property
    def lower_reach(self) -> int:
        """How many earlier tokens the lower decoder's output for one token depends on."""
        return self.lower_layers * (self.window - 1)

    @property
    def upper_tail(self) -> int:
        """How many of the last tokens the upper decoder must read after a prefill.

        The last logits and every cache for decoding depend on these tokens alone. A window layer
        adds window - 1 tokens. An HSA layer adds query_block - 1, since the first token of a
        query block chooses the chunks for the others.
        """
        return self.upper_layers * (self.window - 1) + 1 + self.groups * (self.query_block - 1)

    def tail_start(self, tokens: int, last: int = 1) -> int:
        """The first position that the upper decoder must read in a text of `tokens` tokens.

        With this start the logits of the `last` tokens are exact, and so is every cache that
        decoding needs.
        """
        start = max(tokens - last + 1 - self.upper_tail, 0)
        return start - start % self.query_block

    def to_json(self, **others: str) -> str:
        """All fields as a JSON object, one field per line, behind the `others`."""
        return json.dumps(others | dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_dict(cls, values: dict) -> "HSAConfig":
        """The configuration with these fields, as `to_json` writes them.

        `model_type` may be there and must then be ours. With the key `transformers_version`, as in
        a config.json that transformers wrote, other keys are skipped.
        Raises ValueError that names the key if one is unknown or missing.
        """
        if not isinstance(values, dict):
            raise ValueError(f"config: got a {type(values).__name__}, accepted is a dict")
        known = {field.name: field for field in dataclasses.fields(cls)}
        model_type = values.get("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise ValueError(
                f"config: got model_type {quoted(model_type)}, accepted is {MODEL_TYPE}"
            )
        if "transformers_version" in values:
            spellings = {name: (name, RENAMED.get(name, name)) for name in known}
            values = {
                name: values[key]
                for name, keys in spellings.items()
                for key in keys
                if key in values
            }
        for name in values.keys() - known.keys() - {"model_type"}:
            raise ValueError(
                f"config: got unknown key {quoted(name)}, accepted are the fields of HSAConfig"
            )
        for name, field in known.items():
            if field.default is dataclasses.MISSING and name not in values:
                raise ValueError(f"config: key {name!r} is missing")
        return cls(**{name: values[name] for name in known.keys() & values.keys()})


_MINI = HSAConfig(
    vocab_size=4096, width=256, lower_layers=3, groups=2, layers_per_group=2, mlp_width=704,
    window=128, heads=4, kv_heads=2, head_dim=64,
    chunk_size=64, top_k=8, hsa_heads=4, hsa_kv_heads=1, hsa_head_dim=64,
    retrieval_dim=256, retrieval_norm=True,
)  # fmt: skip

# For questions of any form: smaller chunks, so that fewer needles share a landmark, while a token
# reads as many tokens; two KV heads in HSA, so that a value can be told by its key; and a
# preference for newer chunks, because a text may change what it said before.
_ANY = dict(chunk_size=32, top_k=16, hsa_heads=8, hsa_kv_heads=2, recency=True)

# NOTE: differs from the paper because the paper prints no widths and depths. It prints the totals
# of its two large models (519.6 M and 537.7 M; 8 B with 1 B active), 64 experts with 4 active and
# 1 shared, and 16 query heads per key/value head in HSA. The widths and depths below are ours. They
# follow the proportions of Ling-2.0 and were chosen to reach those totals.
PRESETS: dict[str, HSAConfig] = {
    "debug": HSAConfig(
        vocab_size=512, width=32, lower_layers=2, groups=2, layers_per_group=2, mlp_width=64,
        window=8, heads=2, kv_heads=1, head_dim=16,
        chunk_size=4, top_k=2, hsa_heads=4, hsa_kv_heads=2, hsa_head_dim=8,
        retrieval_dim=16, retrieval_heads=2,
    ),
    "nano": HSAConfig(
        vocab_size=4096, width=64, lower_layers=2, groups=1, layers_per_group=2, mlp_width=176,
        window=32, heads=4, kv_heads=2, head_dim=16,
        chunk_size=16, top_k=4, hsa_heads=4, hsa_kv_heads=1, hsa_head_dim=32, retrieval_dim=64,
        # With 0.02, token identity drowns in the random output of the first blocks,
        # and the model does not learn to copy.
        embedding_std=0.125,
    ),
    "mini": _MINI,
    "mini_moe": dataclasses.replace(
        _MINI, mlp_width=512, experts=8, experts_active=2, expert_width=192,
    ),
    "mini_any": dataclasses.replace(_MINI, **_ANY),
    "mini_any_moe": dataclasses.replace(
        _MINI, mlp_width=512, experts=8, experts_active=2, expert_width=192, **_ANY,
    ),
    "small_moe": dataclasses.replace(
        _MINI, width=512, lower_layers=4, mlp_width=1408, heads=8,
        hsa_heads=16, experts=32, experts_active=2, expert_width=288,
    ),
    "ul_0_5b": HSAConfig(
        vocab_size=157_184, width=1024, lower_layers=14, groups=2, layers_per_group=7,
        mlp_width=3328, window=4096, heads=16, kv_heads=4, head_dim=64,
        chunk_size=64, top_k=64, hsa_heads=16, hsa_kv_heads=1, hsa_head_dim=64, retrieval_dim=64,
    ),
    "ul_8b_a1b": HSAConfig(
        vocab_size=157_184, width=2048, lower_layers=14, groups=7, layers_per_group=2,
        mlp_width=5120, window=4096, heads=16, kv_heads=4, head_dim=128,
        chunk_size=64, top_k=64, hsa_heads=16, hsa_kv_heads=1, hsa_head_dim=128,
        retrieval_dim=128, encoder_mlp_width=2048, experts=64, experts_active=4, expert_width=672,
    ),
}  # fmt: skip
