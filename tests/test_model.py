"""The model: the same numbers however the text is cut, causal, and every parameter learns.

Dimensions: B=2 batch, T tokens, S=4 chunk size, W=8 window, K=2 chunks kept: the `debug` preset and
each option of it.
"""

import pytest
import torch
from helpers import assert_close, error
from material import (
    DEBUG,
    DENSE,
    OPTIONS,
    build,
    every_dense_option,
    every_option,
    in_segments,
    text,
)
from torch.nn.functional import cross_entropy

from hsa_mini import PRESETS, ChunkMemory, HSAModel

S, W = DEBUG.chunk_size, DEBUG.window


def loss(model: HSAModel, ids: torch.Tensor, **options) -> torch.Tensor:
    return cross_entropy(model(ids, **options).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize(
    "option, dtype, bound",
    [*((o, torch.float64, 1e-12) for o in DENSE), *((o, torch.float32, 1e-5) for o in OPTIONS)],
)
@torch.no_grad()
def test_whole_text_equals_segments_equals_token_by_token(option, dtype, bound):
    model, ids = build(option, dtype), text(37)
    whole = model(ids).logits
    for size in (1, 7, S, W):
        assert_close(in_segments(model, ids, size), whole, bound)


@pytest.mark.parametrize("option", ["default", "query block", "stick breaking"])
@torch.no_grad()
def test_exploration_noise_does_not_depend_on_the_segments(option):
    model, ids = build(option).train(), text(61)
    whole = model(ids, gumbel_seed=3).logits
    for size in (1, 7, 16):
        assert_close(in_segments(model, ids, size, gumbel_seed=3), whole, 1e-12)
    assert error(model(ids, gumbel_seed=4).logits, whole) > 1e-6


@pytest.mark.parametrize("option", ["default", "bypass", "query block", "one retrieval head"])
def test_gradients_through_segments_equal_those_of_the_whole(option):
    model, ids = build(option), text(40)
    parameters = dict(model.named_parameters())

    def gradients(logits):
        value = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return dict(zip(parameters, torch.autograd.grad(value, parameters.values())))

    assert_close(gradients(in_segments(model, ids, 3)), gradients(model(ids).logits), 1e-10)


@every_option
@torch.no_grad()
def test_changing_a_token_changes_nothing_before_it(option):
    model, ids = (
        build(option, torch.float32 if option == "experts" else torch.float64).train(),
        text(40),
    )
    before = model(ids, gumbel_seed=1).logits
    for t in (0, S - 1, S, 2 * W, 39):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % DEBUG.vocab_size
        after = model(changed, gumbel_seed=1).logits
        if t:
            assert_close(after[:, :t], before[:, :t], 1e-6 if option == "experts" else 1e-13)
        assert error(after[:, t], before[:, t]) > 1e-3


@torch.no_grad()
def test_what_no_window_reaches_is_read_through_hsa_alone():
    model, ids = build(top_k=100), text(80)
    reach = DEBUG.lower_reach + DEBUG.upper_tail - 1
    changed = ids.clone()
    changed[:, 0] += 1
    far = slice(reach + 1, None)
    assert error(model(changed).logits[:, far], model(ids).logits[:, far]) > 1e-5
    for block in model.upper:
        if block.hsa is not None:
            block.hsa.out.weight.zero_()
    got, want = model(changed).logits, model(ids).logits
    assert torch.equal(got[:, far], want[:, far])
    assert not torch.equal(got[:, reach], want[:, reach])  # the windows reach exactly this far


def test_a_lower_output_depends_on_lower_reach_tokens_before_it():
    model, T = build(), 40
    embedded = model.embedding(text(T)).detach().requires_grad_()
    model.embedding.register_forward_hook(lambda *_: embedded)
    hidden = model.lower_decoder(text(T), ChunkMemory(model.config))
    (gradient,) = torch.autograd.grad(hidden[:, -1].square().sum(), embedded)
    reached = (gradient != 0).any(-1)[0].nonzero().flatten().tolist()
    assert reached == list(range(T - 1 - DEBUG.lower_reach, T))


@pytest.mark.parametrize("option", ["default", "query block", "bypass"])
@pytest.mark.parametrize("T", range(44, 52))
def test_last_logits_and_caches_depend_on_the_upper_tail_alone(option, T):
    model = build(option)
    memory = ChunkMemory(model.config)
    with torch.no_grad():
        hidden = model.lower_decoder(text(T), memory)
        model.append_chunks(hidden, memory)
    hidden.requires_grad_()
    out, _ = model.upper_decoder(hidden, memory)
    kept = sum(cache.k.square().sum() + cache.v.square().sum() for cache in memory.upper)
    kept = kept + sum(query.square().sum() for query in memory.block_queries if query is not None)
    for value, exact in ((out[:, -1].square().sum(), option != "query block"), (kept, False)):
        (gradient,) = torch.autograd.grad(value, hidden, retain_graph=True)
        first = (gradient != 0).any(-1)[0].nonzero().min().item()
        assert first >= T - model.config.upper_tail
        assert not exact or first == T - model.config.upper_tail


@pytest.mark.parametrize("reserve", [0, 400])
@torch.no_grad()
def test_a_branch_leaves_the_original_usable(reserve):
    model, ids, other = build(), text(70), text(70, seed=1)
    memory = ChunkMemory(model.config, reserve_tokens=reserve)
    model(ids[:, :22], memory)
    for _ in range(2):
        branch = memory.fork()
        logits = model(other[:, :30], branch).logits
        want = model(torch.cat((ids[:, :22], other[:, :30]), dim=1)).logits[:, 22:]
        assert_close(logits, want, 1e-12)
        assert memory.position == 22 and branch.position == 52
    assert_close(model(ids[:, 22:], memory).logits, model(ids).logits[:, 22:], 1e-12)


@torch.no_grad()
def test_replaced_chunks_are_read_and_can_be_put_back():
    model, ids = build(top_k=100), text(30)

    def answer(change=None):
        memory = ChunkMemory(model.config)
        model(ids[:, :24], memory)
        if change is not None:
            change(memory)
        return model(ids[:, 24:], memory).logits

    def replace(memory):
        before = memory.chunks.copy(1, 3)
        memory.chunks.replace(1, *(torch.ones_like(part) for part in before))
        return before

    assert error(answer(replace), answer()) > 1e-6
    assert_close(answer(lambda memory: memory.chunks.replace(1, *replace(memory))), answer(), 0)


@every_option
def test_every_parameter_gets_a_gradient_once_two_chunks_can_be_chosen(option):
    model = build(option, torch.float32)
    for T, idle in (
        (S, ("encoder.", ".hsa.", ".hsa_norm.")),  # no chunk is visible to any token
        # One chunk is visible: softmax gives it weight 1, whatever its score and its place.
        (S + 2, (".retrieval_", "encoder.landmark", ".recency.")),
        (30, ()),
    ):
        model.zero_grad()
        loss(model, text(T)).backward()
        without = {
            name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
        }
        if T == S + 2 and option in (
            "exclude window",
            "query block, exclude window",
            "stick breaking",
        ):
            continue  # no chunk lies outside the window yet; stick-breaking weighs a lone chunk too
        assert without == {
            name for name, _ in model.named_parameters() if any(part in name for part in idle)
        }, T


@every_dense_option
def test_gradient_of_the_loss_equals_its_slope(option):
    """Along a random direction of all parameters, and of the landmark projection alone: retrieval
    learns from the loss.
    """
    # In this text no choice of chunks is so near a tie that a step changes it.
    model = build(option)
    ids = text(40, seed=2)
    parameters = dict(model.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss(model, ids), parameters.values())))
    for names in (list(parameters), ["encoder.landmark.weight"]):
        directions = {name: torch.randn_like(parameters[name]) for name in names}
        want = sum(
            (gradients[name] * direction).sum() for name, direction in directions.items()
        ).item()
        values, step = [], 1e-6
        for sign in (1, -1):
            with torch.no_grad():
                moved = {
                    name: parameters[name] + sign * step * direction
                    for name, direction in directions.items()
                }
                output = torch.func.functional_call(model, moved, (ids,))
            values.append(
                cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
            )
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(want, rel=1e-5, abs=1e-9)
        assert want != 0


@pytest.mark.parametrize(
    "option",
    [
        "bypass",
        "stick breaking",
        "exclude window",
        "query block",
        "query block, exclude window",
        "retrieval norm",
    ],
)
@torch.no_grad()
def test_options_without_weights_of_their_own_change_the_logits(option):
    plain, other, ids = build(), build(option), text(60)
    other.load_state_dict(plain.state_dict(), strict=False)
    assert error(other(ids).logits, plain(ids).logits) > 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_are_not_in_the_text_teach_the_embedding_only_if_it_is_the_head(tied):
    model, ids = build(tied=tied), text(30)
    (gradient,) = torch.autograd.grad(loss(model, ids), model.embedding.weight)
    absent = torch.ones(DEBUG.vocab_size, dtype=torch.bool).index_fill(0, ids.flatten(), False)
    assert (gradient[absent] != 0).any() == tied
    assert (gradient[~absent] != 0).any()


@torch.no_grad()
def test_exploration_acts_in_training_on_the_choice_alone():
    ids = text(60)
    model = build()
    want = model(ids, gumbel_seed=1).logits
    assert torch.equal(model(ids).logits, want)  # evaluation: no noise
    model.train()
    assert error(model(ids, gumbel_seed=1).logits, want) > 1e-4
    torch.manual_seed(5)
    first = model(ids).logits
    assert not torch.equal(model(ids).logits, first)
    torch.manual_seed(5)
    assert torch.equal(model(ids).logits, first)
    # With every chunk kept there is nothing to choose.
    for changes in (dict(exploration=False), dict(top_k=100)):
        model = build(**changes)
        want = model(ids).logits
        assert_close(model.train()(ids, gumbel_seed=1).logits, want, 1e-13)
    model = build()
    assert torch.equal(
        model(ids).logits, model.train()(ids, gumbel_noise=False, gumbel_seed=1).logits
    )


@torch.no_grad()
def test_groups_explore_differently():
    model = build().train()
    for block in model.upper:  # equal scores: the noise alone chooses
        if block.hsa is not None:
            block.hsa.retrieval_q.weight.zero_()
    first, second = (
        r.indices.sort(-1).values for r in model(text(100), gumbel_seed=0).aux.retrievals
    )
    assert not torch.equal(first, second)
    again = model(text(100), gumbel_seed=1).aux.retrievals[0].indices.sort(-1).values
    assert not torch.equal(second, again)  # nor is a group's noise the next seed's of another group


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # autocast leaves the norms in float32
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("experts", [{}, dict(experts=4, experts_active=4, expert_width=24)])
def test_16_bits_stay_near_float64(autocast, experts):
    """With all chunks and all experts in use, rounding changes no choice."""
    options = dict(top_k=100, **experts)
    model, ids = build(**options), text(60)
    want = model(ids).logits
    low = build(dtype=torch.float32 if autocast else torch.bfloat16, **options)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logits = low(ids).logits
        cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        with torch.no_grad():
            memory = low(ids[:, :37]).memory
            rest = low(ids[:, 37:], memory).logits
    assert error(logits, want) < 3e-2 and error(rest, want[:, 37:]) < 3e-2
    assert all(p.grad.isfinite().all() and p.grad.any() for p in low.parameters())


@pytest.mark.parametrize(
    "ids, message",
    [
        ([[1, 2]], "ids: got list"),
        (torch.zeros(5, dtype=torch.int64), r"ids: got \[5\]"),
        (torch.zeros(2, 5), "ids: got .*float32"),
        (torch.zeros(2, 0, dtype=torch.int64), r"ids: got \[2, 0\]"),
        (torch.full((2, 5), 512), "ids: got 512 to 512, accepted are 0 to 511"),
        (torch.full((2, 5), -1), "ids: got -1 to -1"),
    ],
)
def test_wrong_ids_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        build()(ids)


def test_a_memory_of_another_model_or_batch_is_refused():
    model = build()
    memory = model(text(5)).memory
    with pytest.raises(ValueError, match="memory: got a batch of 2, accepted is that of ids"):
        model(text(5)[:1], memory)
    with pytest.raises(ValueError, match="memory: got one of another configuration"):
        build(top_k=3)(text(5), memory)


@pytest.mark.parametrize(
    "preset, millions, within",
    [
        ("nano", 0.6, 0.2),
        ("mini", 8, 0.2),
        ("mini_moe", 12, 0.2),
        ("small_moe", 120, 0.1),
        ("ul_0_5b", 537.7, 0.02),
        ("ul_8b_a1b", 8000, 0.05),
    ],
)
def test_size_of_a_preset(preset, millions, within):
    model = HSAModel(PRESETS[preset], device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=within)


def test_size_of_debug_and_of_the_dense_model_without_hsa():
    assert sum(p.numel() for p in build().parameters()) < 200_000
    model = HSAModel(PRESETS["ul_0_5b"], device="meta")
    base = sum(
        p.numel()
        for name, p in model.named_parameters()
        if "hsa" not in name and "encoder" not in name
    )
    assert base / 1e6 == pytest.approx(519.6, rel=0.02)


@pytest.mark.parametrize("option", ["default", "experts", "untied"])
def test_a_model_from_the_meta_device_is_initialised_like_a_fresh_one(option):
    config = build(option).config
    fresh = HSAModel(config)
    empty = HSAModel(config, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for value in empty.state_dict().values():
            value.fill_(7)  # what memory from nowhere may hold
    for model in (fresh, empty):
        torch.manual_seed(1)
        model.reset_parameters()
    for name, value in fresh.state_dict().items():
        assert torch.equal(empty.state_dict()[name], value), name
    assert (empty.head.weight is empty.embedding.weight) == config.tied
