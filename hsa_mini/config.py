"""The configuration of a model, and the named presets. Knows no torch module.

One letter, one size: B batch, T tokens, S chunk size, N chunks, K chunks kept, H query heads, J key/value heads,
D head dimension, R retrieval dimension, C width, E experts, A experts active, P groups, W window.
"""

import dataclasses
import json
from dataclasses import dataclass

MAX_TOKENS = 1 << 30  # the longest text that a command or a plan accepts; more is a typing error


@dataclass(frozen=True)
class HSAConfig:
    """All sizes and options of an HSA model. Raises ValueError for values that do not fit together."""

    vocab_size: int
    width: int  # C
    # Blocks: `lower_layers` of sliding window, then `groups` x [window + HSA, window, ...].
    lower_layers: int
    groups: int  # P, each with one HSA layer
    layers_per_group: int
    mlp_width: int
    # Sliding-window attention, with RoPE.
    window: int  # W, keys that a token attends, itself included
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
    retrieval_heads: int = 1  # 1 shared by all KV heads, or one for each (= hsa_kv_heads)
    encoder_layers: int = 1
    encoder_mlp_width: int = 0  # 0: mlp_width
    # Options of retrieval (§2.2): what each changes is said in `reference/retrieval.py`.
    weighting: str = "softmax"  # or "stick_breaking"
    exploration: bool = True  # Gumbel noise on the choice, in training alone
    exclude_window: bool = False  # never choose a chunk that lies inside the window
    query_block: int = 1  # tokens that share the choice of the first of them
    retrieval_norm: bool = False  # RMSNorm on retrieval queries and landmarks
    residual: str = "add"  # or "bypass": the retrieved context feeds only the MLP
    # Mixture of experts; `experts=0` is a dense model. The first block is always dense.
    experts: int = 0  # E
    experts_active: int = 0  # A
    expert_width: int = 0
    tied: bool = True  # the output head is the embedding
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    embedding_std: float = 0.02  # of the random weights that training starts from

    def __post_init__(self) -> None:
        at_least_one = (
            "vocab_size width lower_layers groups layers_per_group mlp_width window heads kv_heads head_dim chunk_size top_k "
            "hsa_heads hsa_kv_heads hsa_head_dim retrieval_dim retrieval_heads encoder_layers query_block"
        ).split()
        at_least_zero = "encoder_mlp_width experts experts_active expert_width".split()
        for name in at_least_one + at_least_zero:
            value = getattr(self, name)
            least = int(name in at_least_one)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"{name}: got {value!r}, accepted is an integer of at least {least}"
                )
        for name, few in (("heads", "kv_heads"), ("hsa_heads", "hsa_kv_heads")):
            if getattr(self, name) % getattr(self, few):
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, accepted are multiples of {few} ({getattr(self, few)})"
                )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim: got {self.head_dim}, accepted are even numbers (RoPE turns pairs)"
            )
        if self.retrieval_heads not in (1, self.hsa_kv_heads):
            raise ValueError(
                f"retrieval_heads: got {self.retrieval_heads}, accepted are 1 and hsa_kv_heads ({self.hsa_kv_heads})"
            )
        for name, accepted in (
            ("weighting", ("softmax", "stick_breaking")),
            ("residual", ("add", "bypass")),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, accepted are {' and '.join(accepted)}"
                )
        if self.chunk_size % self.query_block or (
            self.exclude_window and self.window % self.query_block
        ):
            raise ValueError(
                f"query_block: got {self.query_block}, accepted are divisors of chunk_size, and of an excluded window"
            )
        if self.experts and not (0 < self.experts_active <= self.experts and self.expert_width > 0):
            raise ValueError(
                f"experts_active: got {self.experts_active} with expert_width {self.expert_width}, "
                f"accepted are 1 to experts ({self.experts}) and a width above 0"
            )

    @property
    def upper_layers(self) -> int:
        return self.groups * self.layers_per_group

    @property
    def lower_reach(self) -> int:
        """Tokens before a token that its lower-decoder output depends on."""
        return self.lower_layers * (self.window - 1)

    @property
    def upper_tail(self) -> int:
        """Inputs of the upper decoder that the last logits and every decoding cache depend on.

        Each HSA layer adds the tokens between a query and the first of its `query_block`, which chose for it.
        """
        return self.upper_layers * (self.window - 1) + 1 + self.groups * (self.query_block - 1)

    def tail_start(self, tokens: int, last: int = 1) -> int:
        """The first position that the upper decoder must read to predict exactly behind the `last` of `tokens` tokens.

        Every cache that decoding needs is exact then, too.
        """
        start = max(tokens - last + 1 - self.upper_tail, 0)
        return start - start % self.query_block

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "HSAConfig":
        """Raises ValueError that names a key which is unknown or missing."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"config: got a JSON {type(values).__name__}, accepted is an object")
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in values.keys() - known.keys():
            raise ValueError(f"config: got unknown key {name!r}, accepted are {', '.join(known)}")
        for name, field in known.items():
            if field.default is dataclasses.MISSING and name not in values:
                raise ValueError(f"config: key {name!r} is missing")
        return cls(**values)


_MINI = HSAConfig(
    vocab_size=4096, width=256, lower_layers=3, groups=2, layers_per_group=2, mlp_width=704,
    window=128, heads=4, kv_heads=2, head_dim=64,
    chunk_size=64, top_k=8, hsa_heads=4, hsa_kv_heads=1, hsa_head_dim=64, retrieval_dim=256, retrieval_norm=True,
)  # fmt: skip

# NOTE: the paper prints the totals of its two large models (519.6 M and 537.7 M; 8 B with 1 B active), 64 experts with
# 4 active and 1 shared, and 16 query heads to each key/value head in HSA. The widths and depths below are ours, chosen
# from Ling-2.0's proportions so that those totals come out.
PRESETS: dict[str, HSAConfig] = {
    "debug": HSAConfig(
        vocab_size=512, width=32, lower_layers=2, groups=2, layers_per_group=2, mlp_width=64,
        window=8, heads=2, kv_heads=1, head_dim=16,
        chunk_size=4, top_k=2, hsa_heads=4, hsa_kv_heads=2, hsa_head_dim=8, retrieval_dim=16, retrieval_heads=2,
    ),
    "nano": HSAConfig(
        vocab_size=4096, width=64, lower_layers=2, groups=1, layers_per_group=2, mlp_width=176,
        window=32, heads=4, kv_heads=2, head_dim=16,
        chunk_size=16, top_k=4, hsa_heads=4, hsa_kv_heads=1, hsa_head_dim=32, retrieval_dim=64,
        embedding_std=0.125,  # with less, what a token is drowns in what the first layers say at random, and nothing is copied
    ),
    "mini": _MINI,
    "mini_moe": dataclasses.replace(_MINI, width=256, mlp_width=512, experts=8, experts_active=2, expert_width=192),
    "small_moe": dataclasses.replace(
        _MINI, width=512, lower_layers=4, groups=2, layers_per_group=2, mlp_width=1408, heads=8, kv_heads=2,
        hsa_heads=16, hsa_kv_heads=1, experts=32, experts_active=2, expert_width=288,
    ),
    "ul_0_5b": HSAConfig(
        vocab_size=157_184, width=1024, lower_layers=14, groups=2, layers_per_group=7, mlp_width=3328,
        window=4096, heads=16, kv_heads=4, head_dim=64,
        chunk_size=64, top_k=64, hsa_heads=16, hsa_kv_heads=1, hsa_head_dim=64, retrieval_dim=64,
    ),
    "ul_8b_a1b": HSAConfig(
        vocab_size=157_184, width=2048, lower_layers=14, groups=7, layers_per_group=2, mlp_width=5120,
        window=4096, heads=16, kv_heads=4, head_dim=128,
        chunk_size=64, top_k=64, hsa_heads=16, hsa_kv_heads=1, hsa_head_dim=128, retrieval_dim=128,
        encoder_mlp_width=2048, experts=64, experts_active=4, expert_width=672,
    ),
}  # fmt: skip
