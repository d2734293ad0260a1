"""The bytes that a training step needs on one GPU.

Dimensions: T tokens of a process's part, C width, H heads, J key/value heads, D head dimension, F
hidden width of an MLP, A experts active, S chunk size.
"""

from hsa_mini.config import HSAConfig
from hsa_mini.training.scale.shares import TrainingRun, gathered
from hsa_mini.training.scale.traffic import memory_numbers

FLOAT32_BYTES = 4
STATE = ("weights", "gradients", "Adam")


def memory_bytes(run: TrainingRun) -> dict[str, int]:
    """What -> bytes, on the process that holds most.

    weights, gradients, Adam: the shares, float32. gathered: the weights outside of the blocks, and
    the two largest parts (one computes, the next is on its way), with the gradient of one.
    activations: what is kept for the backward pass, and what a block, or the loss of a piece of the
    sequence, needs on top. chunk memory: K, V and landmarks of the whole sequence, and their
    gradients.
    """
    parts = gathered(run.config, run.sizes)
    numbers = sum(group.numbers for part in parts for group in part)
    shared = run.sizes.processes > 1
    *blocks, outside = (shared * sum(group.whole for group in part) for part in parts)
    largest = sorted(blocks)[-2:]
    flowing = max(*blocks, outside) * (run.item_bytes + FLOAT32_BYTES)
    chunks = run.tokens // run.config.chunk_size
    return {
        "weights": numbers * FLOAT32_BYTES,
        "gradients": numbers * FLOAT32_BYTES,
        "Adam": 2 * numbers * FLOAT32_BYTES,
        "gathered": (outside + sum(largest)) * run.item_bytes + flowing,
        "activations": activation_bytes(run),
        "chunk memory": memory_numbers(run, chunks) * (run.item_bytes + FLOAT32_BYTES),
    }


def activation_bytes(run: TrainingRun) -> int:
    """Bytes kept for the backward pass, at their peak."""
    config = run.config
    each = run.part * run.item_bytes
    blocks = [
        block_numbers(config, with_hsa=hsa, with_experts=experts)
        for hsa, experts in block_kinds(config)
    ]
    kept = config.width * len(blocks) if run.checkpoint_blocks else sum(blocks)
    most = max(blocks) if run.checkpoint_blocks else 0
    predicted = min(run.loss_tokens or run.part, run.part)
    # Logits as the head makes them, as float32, and the gradient of each.
    loss = predicted * config.vocab_size * 2 * (run.item_bytes + FLOAT32_BYTES)
    return (kept + encoder_numbers(config)) * each + max(most * each, loss)


def block_kinds(config: HSAConfig) -> list[tuple[bool, bool]]:
    """(has HSA, has experts) of every block."""
    moe = bool(config.experts)
    lower = [(False, moe and i > 0) for i in range(config.lower_layers)]
    return lower + [(i % config.layers_per_group == 0, moe) for i in range(config.upper_layers)]


def block_numbers(config: HSAConfig, *, with_hsa: bool, with_experts: bool) -> int:
    """Numbers per token that a block keeps for its backward pass: the inputs of norms, of matrix
    products, of attention, and of gates.
    """
    C = config.width
    kept = 2 * C + _window_numbers(config, config.kv_heads)
    if with_hsa:
        slots = config.hsa_kv_heads * config.top_k * 2  # index and weight, taken as 4 bytes each
        query = config.hsa_heads * config.hsa_head_dim
        chosen = config.retrieval_heads * config.retrieval_dim
        kept += 2 * C + 3 * query + chosen + slots
    if not with_experts:
        return kept + 2 * C + _mlp_numbers(config.mlp_width)
    rows = 2 * C + _mlp_numbers(config.expert_width)  # before and behind an expert
    routing = config.experts + 1 + 8 * config.experts_active  # scores, gates, and orders as int64
    shared = 2 * C + _mlp_numbers(config.expert_width)
    return kept + shared + routing + config.experts_active * rows


def encoder_numbers(config: HSAConfig) -> int:
    """Numbers per token that the encoder keeps, which is not recomputed. It repeats K and V for
    every head, and reads [CLS] with the tokens of a chunk.
    """
    C = config.width
    mlp = _mlp_numbers(config.encoder_mlp_width or config.mlp_width)
    block = 4 * C + _window_numbers(config, config.heads) + mlp
    rows = config.encoder_layers * block + 2 * C
    keys = 2 * C + config.hsa_kv_heads * config.hsa_head_dim
    return -(-rows * (config.chunk_size + 1) // config.chunk_size) + keys


def _window_numbers(config: HSAConfig, heads: int) -> int:
    """q and k before norm and RoPE, q and as many `heads` of k and v behind them, and the output.

    Without QK norm, nothing before RoPE is needed.
    """
    before = config.heads + config.kv_heads if config.qk_norm else 0
    return (before + 2 * config.heads + 2 * heads) * config.head_dim


def _mlp_numbers(F: int) -> int:
    """Up and gate, silu(gate), and their product."""
    return 4 * F
