"""The estimated cost of a preset against a real model.

The estimate has to match the model's tensors, its gradients, and the FLOP that torch counts.

Dimensions: B batch, T tokens, S chunk size, C width, W window, H heads, D head dimension,
E experts, A experts active.
"""

import dataclasses
import json

import pytest
import torch
from helpers import call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hsa_mini import PRESETS, ChunkMemory, HSAConfig, HSAModel
from hsa_mini.cli.plan import table
from hsa_mini.config import MAX_TOKENS
from hsa_mini.inference.prefill import prefill
from hsa_mini.lab.variants import NoEncoder
from hsa_mini.model.cost_estimate import estimate_cost, mean_keys, training_flops
from hsa_mini.model.norm import RMSNorm

# K = 2 of 64 chunks are kept. With so few, attention gathers the kept chunks, as the estimate
# assumes; with more, it would attend to all chunks and mask.
SMALL = dataclasses.replace(PRESETS["nano"], vocab_size=512, top_k=2)
MOE = dataclasses.replace(SMALL, experts=5, experts_active=2, expert_width=24)
REQUIRED = (
    "preset",
    "params_total",
    "params_active",
    "params_active_with_head",
    "params_base_without_hsa",
    "kv_bytes",
    "landmark_bytes",
    "window_cache_bytes",
    "weight_bytes",
    "prefill_flops_per_token",
    "decode_flops_per_token",
)


def build(config: HSAConfig, dtype=None) -> HSAModel:
    torch.manual_seed(0)
    return HSAModel(config, dtype=dtype).eval()


def text(tokens: int) -> torch.Tensor:
    return torch.randint(512, (1, tokens), generator=torch.Generator().manual_seed(1))


def size(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("changes", [{}, dict(tied=False, retrieval_norm=True, encoder_layers=2)])
@pytest.mark.parametrize("config", [PRESETS["debug"], SMALL, MOE])
def test_parts_are_those_of_a_real_model_and_sum_to_its_total(config, changes):
    model = build(dataclasses.replace(config, **changes))
    got = estimate_cost(model.config)
    outside = [
        *model.lower.modules(),
        *(m for name, m in model.upper.named_modules() if "hsa" not in name),
        model.norm,
    ]
    assert got.params_by_part == {
        "embedding and head": size({model.embedding.weight, model.head.weight}),
        "lower window attention": size(
            p for block in model.lower for p in block.swa.parameters() if p.dim() > 1
        ),
        "lower MLPs and experts": size(p for block in model.lower for p in block.mlp.parameters()),
        "chunk encoder": size(model.encoder.parameters()),
        "upper window attention": size(
            p for block in model.upper for p in block.swa.parameters() if p.dim() > 1
        ),
        "HSA": size(
            p
            for block in model.upper
            if block.hsa
            for m in (block.hsa, block.hsa_norm)
            for p in m.parameters()
        ),
        "upper MLPs and experts": size(p for block in model.upper for p in block.mlp.parameters()),
        "norms": size(m.weight for m in outside if isinstance(m, RMSNorm)),
    }
    assert sum(got.params_by_part.values()) == got.params_total == size(model.parameters())
    assert (
        got.params_base_without_hsa
        == got.params_total - got.params_by_part["chunk encoder"] - got.params_by_part["HSA"]
    )
    assert got.params_active_with_head == got.params_active + model.head.weight.numel()
    assert got.weight_bytes == sum(p.nbytes for p in model.bfloat16().parameters())


@pytest.mark.parametrize(
    "config", [SMALL, MOE, dataclasses.replace(MOE, tied=False)], ids=["dense", "experts", "untied"]
)
def test_active_parameters_are_those_that_one_token_gives_a_gradient(config):
    model = build(config)
    with torch.no_grad():
        memory = model(
            text(8 * config.chunk_size)
        ).memory  # made by the encoder, which has no work left
    model(text(1), memory).logits.sum().backward()
    reached = 0
    for name, parameter in model.named_parameters():
        by_expert = parameter.dim() == 3
        gradients = parameter.grad if by_expert else [parameter.grad]
        if not name.startswith(("embedding", "head", "encoder")):
            reached += sum(g.numel() for g in gradients if g.any())
    got = estimate_cost(config)
    assert got.params_active == reached + got.params_by_part["chunk encoder"]


def test_active_parameters_by_hand():
    got = estimate_cost(MOE)
    # 3 of the 4 blocks have experts (the first is dense). Each of the 3 leaves 3 of its 5 experts
    # idle, with weights [C, 2*24] and [24, C], C = 64.
    assert got.params_total - got.params_by_part[
        "embedding and head"
    ] - got.params_active == 3 * 3 * (64 * 48 + 24 * 64)
    assert estimate_cost(SMALL).params_active == estimate_cost(SMALL).params_total - 512 * 64


@pytest.mark.parametrize("tokens", [1, 3, 31, 32, 33, 250, 601])
@pytest.mark.parametrize("name", ["debug", "nano"])
def test_bytes_are_those_of_the_tensors_that_a_real_memory_holds(name, tokens):
    model = build(PRESETS[name], torch.bfloat16)
    memory = prefill(model, text(tokens), segment=97).memory
    got = estimate_cost(name, tokens)
    assert (got.preset, got.tokens) == (name, tokens)
    assert got.kv_bytes == memory.chunks.k.nbytes + memory.chunks.v.nbytes
    assert got.landmark_bytes == memory.chunks.landmarks.nbytes
    # A cache has W slots from the first token on. The estimate counts the slots that the next token
    # sees.
    caches = memory.lower + memory.upper
    seen = [part for cache in caches for part in cache.in_order(memory.position)]
    assert got.window_cache_bytes == sum(part.nbytes for part in seen)
    assert all(part.shape[1] == model.config.window for cache in caches for part in cache)
    # A window over everything is full attention.
    wide = dataclasses.replace(PRESETS[name], window=tokens + 1)
    assert got.full_attention_kv_bytes == estimate_cost(wide, tokens).window_cache_bytes


def multiplied(step) -> int:
    """FLOP of matrix products.

    The plain attention kernel is chosen because torch's counter does not know the CPU's fused one.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def expert_flops(config: HSAConfig) -> float:
    """FLOP per token of `grouped_mm`, which torch's counter does not see.

    The product of gates and outputs is subtracted, which the counter sees and the estimate omits.
    """
    return (
        2 * config.experts_active * (3 * config.width * config.expert_width - config.width)
        if config.experts
        else 0
    )


def window_surplus(config: HSAConfig, tokens: int) -> float:
    """FLOP of one block's products that a mask throws away: blocks of W queries against 2W keys."""
    W, blocks = config.window, -(-tokens // config.window)
    return 4 * config.heads * config.head_dim * (blocks * W * 2 * W - tokens * mean_keys(tokens, W))


@pytest.mark.parametrize("tokens", [1024, 1000])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        MOE,
        dataclasses.replace(SMALL, tied=False, query_block=4, encoder_layers=2),
        PRESETS["debug"],
    ],
    ids=["dense", "experts", "options", "debug"],
)
def test_flops_are_what_the_counter_sees(config, tokens):
    """They agree to 1 in 10,000 after known differences are removed.

    The differences are the blocks of the window operation and the chunk that decoding completes.
    """
    model = build(config)
    memory = ChunkMemory(config)
    got = estimate_cost(config, tokens)
    tail = min(config.upper_tail + (tokens - config.upper_tail) % config.query_block, tokens)
    counted = multiplied(lambda: prefill(model, text(tokens), memory))
    counted -= config.lower_layers * window_surplus(
        config, tokens
    ) + config.upper_layers * window_surplus(config, tail)
    lower_experts = config.lower_layers - 1  # the first block is dense
    counted += expert_flops(config) * (lower_experts * tokens + config.upper_layers * tail)
    assert got.prefill_flops_per_token == pytest.approx(counted / tokens, rel=1e-4)

    S, layers = config.chunk_size, config.lower_layers + config.upper_layers
    # One of them completes a chunk.
    counted = multiplied(lambda: [model(text(1), memory) for _ in range(S)]) / S
    counted -= layers * 4 * config.heads * config.head_dim  # a masked key before the window
    counted += expert_flops(config) * (layers - 1)
    assert got.decode_flops_per_token == pytest.approx(counted, rel=2e-4)


@pytest.mark.parametrize("config", [SMALL, MOE], ids=["dense", "experts"])
def test_flops_of_training_are_three_times_those_of_a_forward_pass(config, tokens=1024):
    model = build(config)
    layers = config.lower_layers + config.upper_layers
    counted = multiplied(lambda: model(text(tokens))) - layers * window_surplus(config, tokens)
    counted += expert_flops(config) * (layers - 1) * tokens
    # the operation scores all chunks; on average half of them lie before a token
    counted -= (
        config.groups
        * 2
        * config.retrieval_heads
        * config.retrieval_dim
        * tokens
        * (tokens // config.chunk_size)
        / 2
    )
    assert training_flops(model, tokens) == pytest.approx(3 * counted, rel=1e-4)


def test_full_attention_is_a_model_whose_window_is_everything():
    tokens = 512
    got = estimate_cost(SMALL, tokens)
    model = build(dataclasses.replace(SMALL, window=tokens + 1))
    for block in model.upper:
        block.hsa = None
    model.encoder = NoEncoder(model.config)
    memory = ChunkMemory(model.config)
    counted = multiplied(lambda: model(text(tokens), memory))
    step = multiplied(lambda: model(text(1), memory))
    head = 2 * 512 * 64
    all_keys = 4 * SMALL.heads * SMALL.head_dim * 4
    # prefill multiplies every query with the tokens + 1 keys of its window and the 128 of its
    # block, and predicts the token after each token
    keys = tokens + 1 + 128
    want = counted / tokens - all_keys * (keys - (tokens + 1) / 2) - head * (1 - 1 / tokens)
    assert got.full_attention_prefill_flops_per_token == pytest.approx(want, abs=1)
    # decoding multiplies the query with one more key, which is masked
    assert got.full_attention_decode_flops_per_token == step - all_keys


@pytest.mark.parametrize("tokens, window", [(1, 1), (1, 8), (5, 8), (8, 8), (20, 8), (20, 1)])
def test_mean_keys(tokens, window):
    assert mean_keys(tokens, window) == pytest.approx(
        sum(min(t + 1, window) for t in range(tokens)) / tokens
    )


def test_totals_of_the_paper():
    dense = estimate_cost("ul_0_5b")
    large = estimate_cost("ul_8b_a1b")
    assert dense.params_base_without_hsa == pytest.approx(519.6e6, rel=0.02)
    assert dense.params_total == pytest.approx(537.7e6, rel=0.02)
    assert large.params_total == pytest.approx(8e9, rel=0.05)
    assert large.params_active == pytest.approx(1e9, rel=0.1)


def test_a_longer_text_costs_no_more_a_token():
    """Early exit: a longer text spreads the upper decoder's tail over more tokens.

    The lower decoder and the encoder are what each token still costs.
    """
    short, long = (estimate_cost("ul_8b_a1b", tokens) for tokens in (1 << 20, 1 << 24))
    ratio = long.prefill_flops_per_token / short.prefill_flops_per_token
    assert 0.9 < ratio < 1
    full = (
        long.full_attention_prefill_flops_per_token / short.full_attention_prefill_flops_per_token
    )
    assert 15 < full < 16
    # Only the landmarks grow with the text.
    assert long.decode_flops_per_token < 1.2 * short.decode_flops_per_token
    assert (
        long.window_cache_bytes == short.window_cache_bytes and long.kv_bytes == 16 * short.kv_bytes
    )


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True, "4096", MAX_TOKENS + 1])
def test_tokens_out_of_range_are_refused(tokens):
    with pytest.raises(ValueError, match=f"^tokens: got {tokens!r}, .* from 1 to 1073741824$"):
        estimate_cost("nano", tokens)


@pytest.mark.parametrize("preset", ["huge", "", None, ["nano"]])
def test_an_unknown_preset_is_refused_with_those_that_there_are(preset):
    with pytest.raises(ValueError, match=f"^preset: got .*, accepted are {', '.join(PRESETS)}$"):
        estimate_cost(preset)


def test_a_plan_does_not_change_and_a_configuration_without_a_name_is_custom():
    got = estimate_cost(SMALL)
    assert (
        got == estimate_cost(SMALL)
        and got.preset == "custom"
        and estimate_cost(PRESETS["nano"]) == estimate_cost("nano")
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.tokens = 1


def test_json_on_standard_output_is_json_alone(capfd):
    status, out, err = call(capfd, "plan", "ul_8b_a1b", "--tokens", "4096", "--json", "-")
    result = json.loads(out)
    assert (status, err) == (0, "") and result == estimate_cost("ul_8b_a1b", 4096).to_json()
    assert set(REQUIRED) < set(result) and all(
        isinstance(result[name], int) for name in REQUIRED[1:]
    )


def test_json_in_a_file_and_the_table_for_people(tmp_path, capfd):
    path = tmp_path / "new" / "plan.json"
    status, out, err = call(capfd, "plan", "ul_8b_a1b", "--json", str(path))
    got = estimate_cost("ul_8b_a1b")
    assert (status, out, err) == (0, table(got) + "\n", "")
    assert json.loads(path.read_text()) == got.to_json() and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_says_every_number_and_what_it_stands_beside(name):
    got = estimate_cost(name)
    text = table(got)
    assert (
        f"{name} at 1,048,576 tokens" in text
        and "full attention" in text.lower()
        and max(map(len, text.split("\n"))) < 160
    )
    assert all(
        f"{number:>16,}" in text for number in [got.params_active, *got.params_by_part.values()]
    )
    assert ("ours, chosen to meet" in text) == ("paper prints" in text) == name.startswith("ul_")
    printed = {
        "ul_0_5b": ("519.6 M", "537.7 M", "1.001", "1.002"),
        "ul_8b_a1b": ("8,000.0 M", "1,000.0 M", "0.998", "0.971"),
    }
    assert all(number in text for number in printed.get(name, ()))


class MetaAlone(TorchDispatchMode):
    """Refuses every operation that makes a tensor with numbers in it."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        assert all(leaf.is_meta for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)), (
            operation
        )
        return out


def test_nothing_is_made_but_shapes():
    with MetaAlone():
        assert estimate_cost("ul_8b_a1b", MAX_TOKENS).kv_bytes > 5e11
    with pytest.raises(AssertionError), MetaAlone():
        torch.zeros(1)
