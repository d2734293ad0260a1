"""What a preset costs at a given length, before any of it exists: parameters, bytes and FLOP, from
the meta device.

Parameters and bytes are those of the model itself, made without memory. FLOP are 2 per multiply-add
of matrix products: norms, RoPE, softmax, top-k and the gates of experts are left out, and keys that
a window or causality masks.

Dimensions: B batch (1 here), N chunks, S chunk size, K chunks kept, C width, W window.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from hsa_mini.config import MAX_TOKENS, PRESETS, HSAConfig
from hsa_mini.model.chunk_encoder import ChunkEncoder
from hsa_mini.model.core import HSACore
from hsa_mini.model.moe import MoE
from hsa_mini.ops.rope import rope_table

PRINTED = {  # what the paper prints of its two models
    "ul_0_5b": {"params_total": 537.7e6, "params_base_without_hsa": 519.6e6},
    "ul_8b_a1b": {"params_total": 8e9, "params_active": 1e9},
}


@dataclass(frozen=True)
class Plan:
    """One sequence of `tokens` tokens through a model of `config`, weights and caches in bfloat16."""

    preset: str  # "custom" for a configuration that has no name
    config: HSAConfig
    tokens: int
    params_total: int
    params_active: int  # that one token meets, without the embedding and the head
    params_active_with_head: int
    params_base_without_hsa: (
        int  # without the HSA layers and the chunk encoder, their norms included
    )
    params_by_part: dict[str, int]
    weight_bytes: int
    kv_bytes: int  # of the chunk memory
    landmark_bytes: int
    window_cache_bytes: int
    full_attention_kv_bytes: int
    prefill_flops_per_token: int
    decode_flops_per_token: int
    full_attention_prefill_flops_per_token: int
    full_attention_decode_flops_per_token: int

    def to_json(self) -> dict:
        """What the command line's JSON holds."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "config"}


@torch.no_grad()
def plan(preset: str | HSAConfig, tokens: int = 1 << 20) -> Plan:
    """Count a preset, or any configuration, at `tokens` tokens; see `Plan`. Makes nothing but
    shapes.

    The full-attention model of the same shape is the one without HSA layers and chunk encoder whose
    blocks, each with its own KV cache of as many heads, attend to every token. Raises ValueError
    for an unknown preset and for tokens out of range.
    """
    if not isinstance(preset, HSAConfig) and preset not in tuple(PRESETS):
        raise ValueError(f"preset: got {preset!r}, accepted are {', '.join(PRESETS)}")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"tokens: got {tokens!r}, accepted is 1 to {MAX_TOKENS}")
    config = preset if isinstance(preset, HSAConfig) else PRESETS[preset]
    model = HSACore(config, device="meta", dtype=torch.bfloat16)
    parts = count_parts(model)
    total = sum(parts.values())
    active = total - parts["embedding and head"] - idle(model)
    kv, landmarks = memory_bytes(model, tokens)
    return Plan(
        preset=next((name for name, known in PRESETS.items() if known == config), "custom"),
        config=config,
        tokens=tokens,
        params_total=total,
        params_active=active,
        params_active_with_head=active + model.head.weight.numel(),
        params_base_without_hsa=total - parts["chunk encoder"] - parts["HSA"],
        params_by_part=parts,
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        kv_bytes=kv,
        landmark_bytes=landmarks,
        window_cache_bytes=cache_bytes(model, min(tokens, config.window - 1)),
        full_attention_kv_bytes=cache_bytes(model, tokens),
        prefill_flops_per_token=round(prefill_flops(model, tokens) / tokens),
        decode_flops_per_token=round(decode_flops(model, tokens)),
        full_attention_prefill_flops_per_token=round(
            full_attention_flops(model, (tokens + 1) / 2, predicted=1 / tokens)
        ),
        full_attention_decode_flops_per_token=round(
            full_attention_flops(model, tokens + 1, predicted=1)
        ),
    )


def count_parts(model: HSACore) -> dict[str, int]:
    """The parameters of every part; those of the encoder and of HSA include their norms."""
    halves = [
        f"{half} {kind}"
        for half in ("lower", "upper")
        for kind in ("window attention", "MLPs and experts")
    ]
    parts = dict.fromkeys(
        ["embedding and head", *halves[:2], "chunk encoder", halves[2], "HSA", halves[3], "norms"],
        0,
    )
    for name, parameter in model.named_parameters():
        parts[part_of(name)] += parameter.numel()
    return parts


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name."""
    half = name.partition(".")[0]
    if half in ("embedding", "head"):
        return "embedding and head"
    if half == "encoder":
        return "chunk encoder"
    if ".hsa" in name:
        return "HSA"
    if "norm" in name:
        return "norms"
    return f"{half} {'window attention' if '.swa.' in name else 'MLPs and experts'}"


def idle(module: nn.Module) -> int:
    """Weights of the experts that one token is not sent to."""
    layers = [layer for layer in module.modules() if isinstance(layer, MoE)]
    experts = [
        (weights, layer.top_k) for layer in layers for weights in (layer.up_and_gate, layer.down)
    ]
    return sum(weights[active:].numel() for weights, active in experts)


def memory_bytes(model: HSACore, tokens: int) -> tuple[int, int]:
    """Bytes of K and V, and of landmarks, of the complete chunks of `tokens` tokens, as the encoder
    makes them.

    Left out: what waits of the unfinished chunk, less than S vectors of width C.
    """
    S = model.config.chunk_size
    C = model.config.width
    k, v, landmarks, _ = model.encoder(
        torch.empty(1, tokens // S, S, C, device="meta", dtype=model.norm.weight.dtype)
    )
    return k.nbytes + v.nbytes, landmarks.nbytes


def cache_bytes(model: HSACore, tokens: int) -> int:
    """Bytes of keys and values of `tokens` tokens in every block, as its attention makes them."""
    config = model.config
    rope = rope_table(torch.arange(tokens, device="meta"), config.head_dim, config.rope_base)
    x = torch.empty(1, tokens, config.width, device="meta", dtype=model.norm.weight.dtype)
    projected = (block.swa.qkv(x, rope) for block in (*model.lower, *model.upper))
    return sum(k.nbytes + v.nbytes for _, k, v in projected)


def linear_flops(module: nn.Module) -> int:
    """Linear maps of one token: 2 for every weight of a matrix that it meets."""
    return 2 * (
        sum(weights.numel() for weights in module.parameters() if weights.dim() > 1) - idle(module)
    )


def attention_flops(heads: int, head_dim: int, keys: float) -> float:
    """q . k and weights . v of one token."""
    return 4 * heads * head_dim * keys


def mean_keys(tokens: int, window: int) -> float:
    """Keys that a token sees, its own included, on average over the first `tokens`."""
    full = min(tokens, window)
    return full - full * (full - 1) / (2 * tokens)


def block_flops(model: HSACore, blocks: nn.ModuleList, keys: float) -> float:
    """Blocks over one token that sees `keys` keys in its window; of HSA the linear maps alone."""
    return linear_flops(blocks) + len(blocks) * attention_flops(
        model.config.heads, model.config.head_dim, keys
    )


def upper_flops(model: HSACore, keys: float, chunks: int, *, query_block: int = 1) -> float:
    """The upper decoder over one token. Eq. (1): scores of all chunks; Eq. (2): attention in K of
    them, and their sum.
    """
    config = model.config
    scores = 2 * config.retrieval_heads * config.retrieval_dim * chunks / query_block
    kept = min(config.top_k, chunks)
    reading = attention_flops(config.hsa_heads, config.hsa_head_dim, kept * config.chunk_size)
    fusion = 2 * config.hsa_heads * config.hsa_head_dim * kept
    return block_flops(model, model.upper, keys) + config.groups * (scores + reading + fusion)


def chunk_flops(encoder: ChunkEncoder) -> float:
    """The encoder over one chunk: S tokens and [CLS], each attending to all of them; K and V of S,
    one landmark.
    """
    config = encoder.config
    rows = encoder.config.chunk_size + 1
    attention = len(encoder.blocks) * attention_flops(config.heads, config.head_dim, rows)
    keys_values = linear_flops(encoder.k) + linear_flops(encoder.v)
    return (
        rows * (linear_flops(encoder.blocks) + attention)
        + (rows - 1) * keys_values
        + linear_flops(encoder.landmark)
    )


def prefill_flops(model: HSACore, tokens: int) -> float:
    """Reading all tokens: lower decoder and encoder over all, the upper decoder over its tail, the
    head over the last.

    Every token of the tail is charged with the landmarks of the whole text, as the operation
    computes them.
    """
    config = model.config
    chunks = tokens // model.config.chunk_size
    tail = tokens - model.config.tail_start(tokens)
    lower = tokens * block_flops(model, model.lower, mean_keys(tokens, config.window))
    upper = tail * upper_flops(
        model, mean_keys(tail, config.window), chunks, query_block=config.query_block
    )
    return lower + chunks * chunk_flops(model.encoder) + upper + linear_flops(model.head)


def training_flops(model: HSACore, tokens: int) -> float:
    """A step over a whole sequence: every layer and the head over all tokens, and twice as much for
    the gradients.

    A token is charged with the landmarks that it sees; nothing is charged twice that is computed
    again.
    """
    config = model.config
    keys = mean_keys(tokens, model.config.window)
    upper = upper_flops(
        model, keys, tokens // config.chunk_size // 2, query_block=config.query_block
    )
    blocks = tokens * (block_flops(model, model.lower, keys) + upper + linear_flops(model.head))
    return 3 * (blocks + tokens // config.chunk_size * chunk_flops(model.encoder))


def decode_flops(model: HSACore, tokens: int) -> float:
    """One token behind `tokens` others: all layers, the head, and a token's share in encoding its
    chunk.
    """
    config = model.config
    keys = min(tokens + 1, model.config.window)
    blocks = block_flops(model, model.lower, keys) + upper_flops(
        model, keys, tokens // config.chunk_size
    )
    return blocks + chunk_flops(model.encoder) / config.chunk_size + linear_flops(model.head)


def full_attention_flops(model: HSACore, keys: float, *, predicted: float) -> float:
    """One token through the blocks without HSA, each attending to `keys` keys; the head over this
    share of the tokens.
    """
    blocks = sum(block_flops(model, part, keys) for part in (model.lower, model.upper))
    hsa = sum(linear_flops(block.hsa) for block in model.upper if block.hsa is not None)
    return blocks - hsa + predicted * linear_flops(model.head)


def table(plan: Plan) -> str:
    """The plan for people: parameters beside what the paper prints, bytes and FLOP beside full
    attention.
    """
    c = plan.config
    printed = PRINTED.get(plan.preset, {})
    lines = [
        f"{plan.preset} at {plan.tokens:,} tokens",
        "",
        f"{'parameters':<38}{'ours':>16}{'paper':>12}{'ours/paper':>12}",
    ]
    for label, name in (
        ("total", "params_total"),
        ("active per token, without head", "params_active"),
        ("active per token, with head", "params_active_with_head"),
        ("base: without HSA", "params_base_without_hsa"),
    ):
        value = getattr(plan, name)
        paper = (
            f"{printed[name] / 1e6:>10,.1f} M{value / printed[name]:>12.3f}"
            if name in printed
            else ""
        )
        lines.append(f"  {label:<36}{value:>16,}{paper}")
    lines += [f"    {part:<34}{value:>16,}" for part, value in plan.params_by_part.items()]
    sizes = f"width {c.width}, {c.lower_layers} + {c.upper_layers} blocks, {c.groups} with HSA, MLPs of {c.mlp_width}"
    sizes += f", experts of {c.expert_width}" if c.experts else ""
    ours = (
        "  The paper prints no widths or depths; ours, chosen to meet its totals:"
        if printed
        else "  Every size is ours:"
    )
    full_kv = plan.full_attention_kv_bytes
    full_prefill = plan.full_attention_prefill_flops_per_token
    lines += [
        f"{ours} {sizes}.",
        "",
        f"{'bytes, in bfloat16':<38}{'ours':>16}{'full attention':>20}",
        row("weights", plan.weight_bytes, "B"),
        row("K and V of the chunk memory", plan.kv_bytes, "B"),
        row("landmarks", plan.landmark_bytes, "B"),
        row("window caches", plan.window_cache_bytes, "B"),
        row(
            "all three", plan.kv_bytes + plan.landmark_bytes + plan.window_cache_bytes, "B", full_kv
        ),
        "",
        f"{'per token, 2 FLOP a multiply-add':<38}{'ours':>16}{'full attention':>20}",
        row("prefill", plan.prefill_flops_per_token, "FLOP", full_prefill),
        row(
            "decode, the next token",
            plan.decode_flops_per_token,
            "FLOP",
            plan.full_attention_decode_flops_per_token,
        ),
        f"  Full attention: the same {c.lower_layers + c.upper_layers} blocks without HSA, every one with a KV cache "
        f"(KV heads: {c.kv_heads} of {c.head_dim}).",
    ]
    return "\n".join(lines)


def row(label: str, value: int, unit: str, full: int | None = None) -> str:
    return f"  {label:<36}{scaled(value, unit):>16}" + (
        "" if full is None else f"{scaled(full, unit):>20}"
    )


def scaled(value: float, unit: str) -> str:
    """ "1.23 GB", in powers of 1,000."""
    size, prefix = next(
        (
            (size, p)
            for size, p in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
            if value >= size
        ),
        (1, ""),
    )
    return f"{value / size:,.2f} {prefix}{unit}"
