"""The mixture of experts against a loop over experts.

Dimensions: B batch, T tokens, C width, E experts, A experts active.
"""

import pytest
import torch
from helpers import assert_close, random, results
from torch.nn.functional import silu

from hsa_mini.model.moe import MoE
from hsa_mini.reference.dispatch import route

C, HIDDEN, E = 16, 8, 6


def build(active: int, bias: list[float] | None = None) -> MoE:
    layer = MoE(C, HIDDEN, E, active)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = random(*parameter.shape, seed=i, dtype=torch.float32) * C**-0.5
    if bias is not None:
        layer.bias.copy_(torch.tensor(bias))
    return layer


def loop_experts(layer: MoE, x, **weights):
    """Every expert over every token, in the weights' dtype; gate 0 where it was not chosen."""
    affinity = torch.sigmoid(x @ weights["router.weight"].T)  # [B, T, E]
    chosen = (affinity.detach() + layer.bias).topk(layer.top_k, dim=-1).indices
    gates = torch.zeros_like(affinity).scatter(-1, chosen, 1.0) * affinity
    gates = gates / gates.sum(-1, keepdim=True)
    up, gate = (x @ weights["shared.up_and_gate.weight"].T).chunk(2, dim=-1)
    out = (up * silu(gate)) @ weights["shared.down.weight"].T
    for e in range(E):
        up, gate = (x @ weights["up_and_gate"][e]).chunk(2, dim=-1)
        out = out + gates[..., e : e + 1] * ((up * silu(gate)) @ weights["down"][e])
    return out


def both(layer: MoE, x: torch.Tensor):
    """Outputs and gradients of the layer in float32 and of the loop in float64."""
    inputs = dict(x=x, **dict(layer.named_parameters()))
    got = results(lambda x, **weights: torch.func.functional_call(layer, weights, x), inputs)
    want = results(
        lambda x, **weights: loop_experts(layer, x, **weights),
        {n: p.double() for n, p in inputs.items()},
    )
    return got, {name: value.float() for name, value in want.items()}


@pytest.mark.parametrize("active", [1, 2, 4, E])
@pytest.mark.parametrize("B, T", [(1, 1), (2, 13)])
def test_equals_a_loop_over_experts(active, B, T):
    got, want = both(build(active), random(B, T, C, dtype=torch.float32))
    if active == 1:  # the only gate is always 1: the router learns nothing
        assert got.pop("gradient of router.weight").abs().max() < 1e-6
        want.pop("gradient of router.weight")
    assert_close(got, want, 2e-6)


@pytest.mark.parametrize("width, hidden", [(16, 7), (15, 8), (5, 3), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_experts_may_have_any_width_and_dtype(width, hidden, dtype):
    """`grouped_mm` takes only rows of whole 16 bytes, and no float64."""
    layer = MoE(width, hidden, E, 2)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = random(*parameter.shape, seed=i, dtype=dtype) * width**-0.5
    inputs = dict(x=random(2, 13, width, dtype=dtype), **dict(layer.named_parameters()))
    got = results(lambda x, **weights: torch.func.functional_call(layer, weights, x), inputs)
    twin = {name: value.double() for name, value in inputs.items()}
    want = results(lambda x, **weights: loop_experts(layer, x, **weights), twin)
    bound = {torch.float32: 2e-6, torch.float64: 1e-6, torch.bfloat16: 3e-2}[dtype]
    assert_close({name: value.double() for name, value in got.items()}, want, bound)


@pytest.mark.parametrize("change", [torch.nn.Module.bfloat16, torch.nn.Module.half])
def test_the_bias_moves_by_small_steps_whatever_the_dtype_of_the_weights(change):
    layer = change(build(2, [0.6] * E))
    for _ in range(100):
        layer.tokens_per_expert = torch.tensor([6, 0, 3, 3, 3, 3])
        layer.update_bias(1e-3)
    assert layer.router.weight.dtype != torch.float32
    assert layer.bias.tolist() == pytest.approx([0.5, 0.7, 0.6, 0.6, 0.6, 0.6], abs=1e-4)


def test_the_bias_is_float32_whatever_the_default_dtype_and_survives_the_meta_device():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = MoE(C, HIDDEN, E, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.bias.dtype == torch.float32 and layer.down.dtype == torch.bfloat16
    with torch.device("meta"):
        layer = MoE(C, HIDDEN, E, 2).to(torch.bfloat16)
    assert layer.to_empty(device="cpu").bias.dtype == torch.float32 and not layer.bias.is_meta


@pytest.mark.parametrize(
    "bias, idle",
    [([-9, 0, 0, 0, 0, 0], [0]), ([0, -9, 9, -9, 9, -9], [0, 1, 3, 5]), ([0, 0, 0, 0, 0, -9], [5])],
)
def test_experts_without_tokens_give_nothing_and_get_no_gradient(bias, idle):
    layer = build(2, bias)
    got, want = both(layer, random(2, 13, C, dtype=torch.float32))
    assert_close(got, want, 2e-6)
    for name in ("gradient of up_and_gate", "gradient of down"):
        assert (got[name][idle] == 0).all() and (got[name][2] != 0).any()


def test_bias_moves_the_choice_and_never_the_gates():
    x = random(40, C, dtype=torch.float32)
    plain, biased = build(2), build(2, [0, 0, 0, 5, 0, 0])
    chosen, gates = route(biased.router(x), biased.bias, biased.top_k)
    assert (chosen == 3).any(-1).all() and not (
        route(plain.router(x), plain.bias, plain.top_k)[0] == 3
    ).any(-1).all()
    affinity = torch.sigmoid(x.double() @ biased.router.weight.double().T).gather(-1, chosen)
    assert_close(gates, (affinity / affinity.sum(-1, keepdim=True)).float(), 1e-6)


def test_tokens_do_not_depend_on_their_neighbours():
    layer, x = build(2), random(1, 20, C, dtype=torch.float32)
    whole = layer(x)
    assert_close(torch.cat([layer(x[:, t : t + 1]) for t in range(20)], dim=1), whole, 1e-6)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert_close(layer(x[:, order]), whole[:, order], 1e-6)


def test_statistics_count_what_was_chosen_in_training_alone():
    layer, x = build(2), random(3, 5, C, dtype=torch.float32)
    layer.train()(x)
    assert layer.tokens_per_expert is None and layer.statistics().load.isnan().all()
    layer.count_tokens()
    layer.eval()(x)
    assert layer.statistics().load.isnan().all()
    layer.train()
    for _ in range(2):
        layer(x)
    chosen = torch.bincount(
        route(layer.router(x.flatten(0, 1)), layer.bias, layer.top_k)[0].flatten(), minlength=E
    )
    found = layer.statistics()
    assert torch.equal(layer.tokens_per_expert, 2 * chosen)
    assert_close(found.load, chosen / chosen.sum(), 1e-6)
    assert found.max_over_mean_load == pytest.approx((chosen.max() / chosen.float().mean()).item())
    assert found.entropy == pytest.approx(
        torch.distributions.Categorical(probs=found.load).entropy().item(), abs=1e-5
    )


def test_balance_moves_the_bias_by_the_sign_of_the_error():
    layer = build(2)
    with pytest.raises(
        ValueError, match="^tokens_per_expert: got None, accepted is a layer that counts"
    ):
        layer.update_bias(0.5)
    layer.tokens_per_expert = torch.tensor([9, 0, 3, 3, 1, 2])
    found = layer.update_bias(0.5)
    assert (
        layer.bias.tolist() == [-0.5, 0.5, 0.0, 0.0, 0.5, 0.5] and not layer.tokens_per_expert.any()
    )
    assert found.max_over_mean_load == 3 and not found.bias.any()


def test_balance_evens_the_load_of_a_lopsided_router():
    layer, x = build(2), random(1, 512, C, dtype=torch.float32) + 0.5
    layer.train().router.weight.data[:2] += 0.2  # every token prefers the same two experts
    layer.count_tokens()
    imbalances = []
    for _ in range(150):
        layer(x)
        imbalances.append(layer.update_bias(0.01).max_over_mean_load.item())
    assert imbalances[0] > 1.8 and max(imbalances[-20:]) < 1.3
