"""What a preset costs at a given length: parameters, bytes and FLOP, counted on the meta device.

Parameters and bytes are those of the model itself, which is made with shapes but without memory.
FLOP are 2 per multiply-add of matrix products. Norms, RoPE, softmax, top-k and the gates of experts
are left out, and so are the keys that a window or causality masks.

Dimensions: B batch (1 here), N chunks, S chunk size, K chunks kept, C width, W window.
"""

import dataclasses
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from hsa_mini.checks import check_integer, quoted
from hsa_mini.config import MAX_TOKENS, PRESETS, HSAConfig
from hsa_mini.model.chunk_encoder import ChunkEncoder
from hsa_mini.model.core import Block, HSACore
from hsa_mini.model.moe import MoE
from hsa_mini.ops.rope import rope_table

PRINTED = {  # the numbers of parameters that the paper prints for its two models
    "ul_0_5b": {"params_total": 537.7e6, "params_base_without_hsa": 519.6e6},
    "ul_8b_a1b": {"params_total": 8e9, "params_active": 1e9},
}


@dataclass(frozen=True)
class CostEstimate:
    """The cost of one sequence of `tokens` tokens in a model of `config`.

    Weights and caches are in bfloat16. FLOP are given per token.
    """

    preset: str  # "custom" for a configuration without a name
    config: HSAConfig
    tokens: int
    params_total: int
    params_active: int  # parameters that one token uses, without the embedding and the head
    params_active_with_head: int
    params_base_without_hsa: int  # without the HSA layers, the chunk encoder and their norms
    params_by_part: dict[str, int]
    weight_bytes: int
    kv_bytes: int  # K and V of the chunk memory
    landmark_bytes: int
    window_cache_bytes: int
    full_attention_kv_bytes: int
    prefill_flops_per_token: int
    decode_flops_per_token: int
    full_attention_prefill_flops_per_token: int
    full_attention_decode_flops_per_token: int

    def to_json(self) -> dict:
        """The fields as the command `plan` writes them; `config` is left out."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "config"}


@torch.no_grad()
def estimate_cost(preset: str | HSAConfig, tokens: int = 1 << 20) -> CostEstimate:
    """Count a preset, or any configuration, at `tokens` tokens; allocates no memory for tensors.

    It is compared with full attention: a model of the same shape without HSA layers and chunk
    encoder, in which every block attends to every token and has its own KV cache with as many
    heads. Raises ValueError for an unknown preset and for tokens out of range.
    """
    if not isinstance(preset, HSAConfig) and preset not in tuple(PRESETS):
        raise ValueError(f"preset: got {quoted(preset)}, accepted are {', '.join(PRESETS)}")
    check_integer("tokens", tokens, 1, MAX_TOKENS)
    config = preset if isinstance(preset, HSAConfig) else PRESETS[preset]
    model = HSACore(config, device="meta", dtype=torch.bfloat16)
    parts = count_parts(model)
    total = sum(parts.values())
    active = total - parts["embedding and head"] - idle(model)
    kv, landmarks = memory_bytes(model, tokens)
    return CostEstimate(
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
    """The number of parameters of every part; the encoder and HSA include their norms."""
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
    """The part that a parameter with this name belongs to."""
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
    """The number of weights in the experts that a token is not routed to."""
    layers = [layer for layer in module.modules() if isinstance(layer, MoE)]
    experts = [
        (weights, layer.top_k) for layer in layers for weights in (layer.up_and_gate, layer.down)
    ]
    return sum(weights[active:].numel() for weights, active in experts)


def memory_bytes(model: HSACore, tokens: int) -> tuple[int, int]:
    """Bytes of K and V, and bytes of landmarks, for the complete chunks in `tokens` tokens.

    They are counted from the tensors that the encoder returns. The hidden states of the unfinished
    chunk are left out: fewer than S vectors of width C.
    """
    S = model.config.chunk_size
    C = model.config.width
    k, v, landmarks, _ = model.encoder(
        torch.empty(1, tokens // S, S, C, device="meta", dtype=model.norm.weight.dtype)
    )
    return k.nbytes + v.nbytes, landmarks.nbytes


def cache_bytes(model: HSACore, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens in the window attention of all blocks."""
    config = model.config
    rope = rope_table(torch.arange(tokens, device="meta"), config.head_dim, config.rope_base)
    x = torch.empty(1, tokens, config.width, device="meta", dtype=model.norm.weight.dtype)
    projected = (block.swa.qkv(x, rope) for block in _blocks(model))
    return sum(k.nbytes + v.nbytes for _, k, v in projected)


def _blocks(model: HSACore) -> list[Block]:
    """The blocks of both decoders, typed as `Block`; a ModuleList does not keep that type."""
    return cast("list[Block]", [*model.lower, *model.upper])


def linear_flops(module: nn.Module) -> int:
    """FLOP of the linear maps for one token: 2 for every matrix weight that the token uses."""
    return 2 * (
        sum(weights.numel() for weights in module.parameters() if weights.dim() > 1) - idle(module)
    )


def attention_flops(heads: int, head_dim: int, keys: float) -> float:
    """FLOP of q . k and weights . v for one token that attends to `keys` keys."""
    return 4 * heads * head_dim * keys


def mean_keys(tokens: int, window: int) -> float:
    """The average number of keys that one of the first `tokens` tokens sees, its own included."""
    full = min(tokens, window)
    return full - full * (full - 1) / (2 * tokens)


def block_flops(model: HSACore, blocks: nn.ModuleList, keys: float) -> float:
    """FLOP of blocks for one token that sees `keys` keys in its window.

    HSA layers count with their linear maps; `upper_flops` adds the rest.
    """
    return linear_flops(blocks) + len(blocks) * attention_flops(
        model.config.heads, model.config.head_dim, keys
    )


def upper_flops(model: HSACore, keys: float, chunks: int, *, query_block: int = 1) -> float:
    """FLOP of the upper decoder for one token.

    Eq. (1): scores of all chunks. Eq. (2): attention in the K chunks kept, and their weighted sum.
    """
    config = model.config
    scores = 2 * config.retrieval_heads * config.retrieval_dim * chunks / query_block
    kept = min(config.top_k, chunks)
    reading = attention_flops(config.hsa_heads, config.hsa_head_dim, kept * config.chunk_size)
    fusion = 2 * config.hsa_heads * config.hsa_head_dim * kept
    return block_flops(model, model.upper, keys) + config.groups * (scores + reading + fusion)


def chunk_flops(encoder: ChunkEncoder) -> float:
    """FLOP of the encoder for one chunk.

    S tokens and [CLS] attend to each other; K and V are made for S tokens, and one landmark.
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
    """FLOP of reading a text.

    The lower decoder and the encoder read all tokens, the upper decoder its tail, the head the last
    token. Every token of the tail scores the landmarks of the whole text, as the operation does.
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
    """FLOP of a training step over a whole sequence.

    Every layer and the head read all tokens, and the gradients take twice as much. A token scores
    the landmarks that it sees. What the backward pass recomputes is counted once.
    """
    config = model.config
    keys = mean_keys(tokens, model.config.window)
    upper = upper_flops(
        model, keys, tokens // config.chunk_size // 2, query_block=config.query_block
    )
    blocks = tokens * (block_flops(model, model.lower, keys) + upper + linear_flops(model.head))
    return 3 * (blocks + tokens // config.chunk_size * chunk_flops(model.encoder))


def decode_flops(model: HSACore, tokens: int) -> float:
    """FLOP of one token after `tokens` others.

    All layers and the head read it, and 1/S of the encoding of a chunk is added.
    """
    config = model.config
    keys = min(tokens + 1, model.config.window)
    blocks = block_flops(model, model.lower, keys) + upper_flops(
        model, keys, tokens // config.chunk_size
    )
    return blocks + chunk_flops(model.encoder) / config.chunk_size + linear_flops(model.head)


def full_attention_flops(model: HSACore, keys: float, *, predicted: float) -> float:
    """FLOP of one token in the full-attention model, whose blocks attend to `keys` keys.

    predicted: the share of the tokens for which the head predicts the next one.
    """
    blocks = sum(block_flops(model, part, keys) for part in (model.lower, model.upper))
    hsa = sum(linear_flops(block.hsa) for block in _blocks(model) if block.hsa is not None)
    return blocks - hsa + predicted * linear_flops(model.head)


def scaled(value: float, unit: str) -> str:
    """A number with a unit prefix in powers of 1,000: 1.23e9 and "B" make "1.23 GB"."""
    size, prefix = next(
        (
            (size, p)
            for size, p in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
            if value >= size
        ),
        (1, ""),
    )
    return f"{value / size:,.2f} {prefix}{unit}"
