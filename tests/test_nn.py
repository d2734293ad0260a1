"""The layers: RoPE, the window layer and its cache, the chunk encoder, the HSA layer.

Dimensions: B batch, T tokens, C width, D head dimension, N chunks, S chunk size, J key/value heads,
R retrieval dimension.
"""

import dataclasses
import math
from decimal import Decimal, localcontext
from typing import NamedTuple

import pytest
import torch
from helpers import assert_close, error, random, results
from torch.nn.functional import rms_norm, silu

from hsa_mini import PRESETS, reference
from hsa_mini.model.chunk_encoder import ChunkEncoder
from hsa_mini.model.hsa import HSA
from hsa_mini.model.mlp import MLP
from hsa_mini.model.swa import SlidingWindowAttention
from hsa_mini.ops.rope import apply_rope, rope_table

CONFIG = dataclasses.replace(PRESETS["debug"], width=24, head_dim=8)


def build(layer: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """float64, every parameter random (norm gains too, so that a gain left out shows)."""
    layer = layer.double()
    for i, parameter in enumerate(layer.parameters()):
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
        parameter.data = random(*parameter.shape, seed=seed + i) * scale
    return layer


def test_mlp_is_the_gated_unit_and_all_its_gradients():
    mlp, x = build(MLP(6, 10)), random(2, 3, 6)

    def formula(x, weight_in, weight_out):
        up, gate = x @ weight_in[:10].T, x @ weight_in[10:].T
        return (up * silu(gate)) @ weight_out.T

    def layer(x, weight_in, weight_out):
        return torch.func.functional_call(
            mlp, {"up_and_gate.weight": weight_in, "down.weight": weight_out}, x
        )

    inputs = dict(x=x, weight_in=mlp.up_and_gate.weight, weight_out=mlp.down.weight)
    assert_close(results(layer, inputs), results(formula, inputs), 1e-13)


def test_rope_turns_each_pair_by_its_angle():
    x, positions = random(3, 1, 8), torch.tensor([0, 1, 700])
    cos, sin = rope_table(positions, 8, 100.0)
    turned = apply_rope(x, (cos.double(), sin.double()))
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angles = positions[:, None, None] * 100.0 ** -(torch.arange(4).double() / 4)
    want = pairs * torch.polar(torch.ones_like(angles), angles)
    assert_close(
        torch.cat((turned[..., :4], turned[..., 4:]), -1),
        torch.cat((want.real, want.imag), -1),
        1e-7,
    )


@pytest.mark.parametrize("shift", [1, 4096, 16_777_000])
def test_rope_is_relative(shift):
    q, k, positions = random(50, 1, 16), random(50, 1, 16, seed=1), torch.arange(50)

    def scores(positions):
        table = rope_table(positions, 16, 10_000.0)
        return torch.einsum("thd,shd->ts", apply_rope(q, table), apply_rope(k, table))

    assert_close(scores(positions + shift), scores(positions), 2e-7)  # the table is float32
    assert error(scores(positions * 2), scores(positions)) > 0.1


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
@pytest.mark.parametrize("position", [16_777_216, 33_554_431])  # the second is no float32 number
def test_rope_is_exact_at_position_16m(position, base):
    dim = 64
    cos, sin = rope_table(torch.tensor([position]), dim, base)
    with localcontext(prec=50):
        turn = 2 * Decimal("3.14159265358979323846264338327950288419716939937511")
        for i in range(dim // 2):
            angle = float(position * Decimal(base) ** (Decimal(-2 * i) / dim) % turn)
            assert (
                abs(cos[0, i].item() - math.cos(angle)) < 1e-7
                and abs(sin[0, i].item() - math.sin(angle)) < 1e-7
            )


@pytest.mark.parametrize("sizes", [(1,) * 30, (30,), (7, 8, 15), (13, 1, 16)], ids=str)
def test_window_layer_with_its_cache_gives_what_the_whole_gives(sizes):
    layer, x, start = build(SlidingWindowAttention(CONFIG)), random(2, 30, 24), 1000
    rope = rope_table(torch.arange(start, start + 30), 8, 10_000.0)
    whole, kept = layer(x, rope)
    cache, parts, first = None, [], 0
    for size in sizes:
        rows = slice(first, first + size)
        part, cache = layer(x[:, rows], tuple(table[rows] for table in rope), cache, first)
        parts.append(part)
        first += size
        # no more than later tokens see, in a buffer of one size
        assert cache.in_order(first)[0].shape[1] == min(first, CONFIG.window - 1)
        assert cache.k.shape[1] == CONFIG.window
    assert_close(torch.cat(parts, dim=1), whole, 1e-12)
    assert_close(dict(k=cache.k, v=cache.v), dict(k=kept.k, v=kept.v), 1e-12)


def by_hand(x, qkv, first: int, attention):
    """QK norm, RoPE from position `first` on and `attention` of heads [B, T, H or J, D], in plain
    operations.
    """
    positions = torch.arange(first, first + x.shape[1])
    angles = positions.double()[:, None, None] * CONFIG.rope_base ** -(torch.arange(4).double() / 4)
    turn = torch.polar(torch.ones_like(angles), angles)

    def heads(projection, norm):
        part = (x @ projection.weight.T).unflatten(-1, (-1, 8))
        part = part / (part.square().mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt() * norm.weight
        pairs = torch.complex(part[..., :4], part[..., 4:]) * turn
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    v = (x @ qkv.v.weight.T).unflatten(-1, (-1, 8))
    return attention(heads(qkv.q, qkv.q_norm), heads(qkv.k, qkv.k_norm), v).flatten(2)


def test_window_layer_is_normed_turned_heads_around_the_reference():
    layer, x = build(SlidingWindowAttention(CONFIG)), random(2, 30, 24)

    def formula(x):
        def window(q, k, v):
            return reference.sliding_window_attention(q, k, v, window=CONFIG.window)

        return by_hand(x, layer.qkv, 70, window) @ layer.out.weight.T

    def computed(x):
        return layer(x, rope_table(torch.arange(70, 100), 8, CONFIG.rope_base))[0]

    # The table is float32.
    assert_close(results(computed, dict(x=x)), results(formula, dict(x=x)), 1e-6)


def test_chunk_encoder_is_bidirectional_attention_with_cls_last():
    encoder, hidden = build(ChunkEncoder(CONFIG)), random(2, 3, 4, 24)
    block, eps = encoder.blocks[0], CONFIG.norm_eps

    def everywhere(q, k, v):  # two query heads share the one key/value head
        weights = torch.einsum("bthd,bsd->bhts", q, k[:, :, 0]).mul(8**-0.5).softmax(-1)
        return torch.einsum("bhts,bsd->bthd", weights, v[:, :, 0])

    def formula(hidden, cls):
        x = torch.cat((hidden.flatten(0, 1), cls.expand(6, 1, 24)), dim=1)
        normed = rms_norm(x, (24,), block.attention_norm.weight, eps)
        x = x + by_hand(normed, block.qkv, 0, everywhere) @ block.out.weight.T
        x = x + block.mlp(rms_norm(x, (24,), block.mlp_norm.weight, eps))
        x = rms_norm(x, (24,), encoder.norm.weight, eps).unflatten(0, (2, 3))
        k = rms_norm(
            (x[:, :, :4] @ encoder.k.weight.T).unflatten(-1, (2, 8)),
            (8,),
            encoder.k_norm.weight,
            eps,
        )
        v = (x[:, :, :4] @ encoder.v.weight.T).unflatten(-1, (2, 8))
        landmarks = (x[:, :, 4] @ encoder.landmark.weight.T).unflatten(-1, (2, 16))
        return k, v, landmarks, x[:, :, 4]

    def computed(hidden, cls):
        return tuple(torch.func.functional_call(encoder, {"cls": cls}, hidden))

    inputs = dict(hidden=hidden, cls=encoder.cls)
    assert_close(results(computed, inputs), results(formula, inputs), 1e-6)


@pytest.mark.parametrize("layers", [1, 2])
def test_chunks_do_not_see_each_other(layers):
    encoder = build(ChunkEncoder(dataclasses.replace(CONFIG, encoder_layers=layers)))
    hidden = random(2, 3, 4, 24).requires_grad_()
    for part in encoder(hidden):
        for b, n in ((0, 1), (1, 2)):
            (gradient,) = torch.autograd.grad(part[b, n].square().sum(), hidden, retain_graph=True)
            reached = gradient.abs().sum((-1, -2)) > 0
            assert reached.nonzero().tolist() == [[b, n]]
    alone = [encoder(hidden[:, n : n + 1]) for n in range(3)]
    for together, parts in zip(encoder(hidden), zip(*alone)):
        assert_close(torch.cat(parts, dim=1), together, 1e-12)


def test_every_token_of_a_chunk_sees_the_whole_chunk():
    encoder, hidden = build(ChunkEncoder(CONFIG)), random(1, 1, 4, 24).requires_grad_()
    k, v, landmarks, _ = encoder(hidden)
    for part in (*k[0, 0], *v[0, 0], landmarks):
        (gradient,) = torch.autograd.grad(part.square().sum(), hidden, retain_graph=True)
        assert (gradient.abs().sum(-1) > 0).all()


def test_landmark_knows_the_order_of_its_tokens():
    encoder, hidden = build(ChunkEncoder(CONFIG)), random(1, 1, 4, 24)
    turned = hidden.flip(2)
    assert error(encoder(turned)[2], encoder(hidden)[2]) > 0.01
    assert_close(turned.mean(2), hidden.mean(2), 1e-14)  # which a mean would not


def test_keys_and_landmarks_are_normed_and_values_are_not():
    encoder, hidden = (
        build(ChunkEncoder(dataclasses.replace(CONFIG, retrieval_norm=True))),
        random(2, 3, 4, 24),
    )
    k, v, landmarks, _ = encoder(hidden)
    assert_close(
        k, rms_norm(k / encoder.k_norm.weight, (CONFIG.hsa_head_dim,)) * encoder.k_norm.weight, 1e-5
    )
    gain = encoder.landmark_norm.weight
    assert_close(landmarks, rms_norm(landmarks / gain, (CONFIG.retrieval_dim,)) * gain, 1e-5)
    with torch.no_grad():
        for projection in (encoder.k, encoder.v, encoder.landmark):
            projection.weight *= 3
    for got, want, factor in zip(encoder(hidden)[:3], (k, v, landmarks), (1, 3, 1)):
        assert_close(got, factor * want, 1e-5)


class Chunks(NamedTuple):
    """A source of chunks that attends by the reference."""

    k: torch.Tensor
    v: torch.Tensor
    landmarks: torch.Tensor
    position_offset: int = 0

    def attend(self, q, indices, weights):
        return reference.chunk_attention(q, self.k, self.v, indices, weights)


@pytest.mark.parametrize(
    "options",
    [{}, dict(retrieval_heads=1), dict(retrieval_norm=True), dict(weighting="stick_breaking")],
)
def test_hsa_layer_is_its_projections_around_the_reference(options):
    config = dataclasses.replace(CONFIG, **options)
    layer, x = build(HSA(config)), random(2, 11, 24)
    memory = (
        random(2, 5, 4, 2, 8, seed=1),
        random(2, 5, 4, 2, 8, seed=2),
        random(2, 5, config.retrieval_heads, 16, seed=3),
    )
    position = 9

    def formula(x, k, v, landmarks):
        q = rms_norm(
            (x @ layer.q.weight.T).unflatten(-1, (4, 8)), (8,), layer.q_norm.weight, config.norm_eps
        )
        asked = (x @ layer.retrieval_q.weight.T).unflatten(-1, (config.retrieval_heads, 16))
        if config.retrieval_norm:
            asked = rms_norm(asked, (16,), layer.retrieval_norm.weight, config.norm_eps)
        choice = reference.retrieve(
            asked,
            landmarks,
            chunk_size=4,
            top_k=config.top_k,
            offset=position,
            weighting=config.weighting,
        )
        choice = (part.repeat(1, 1, 2 // config.retrieval_heads, 1) for part in choice)
        return reference.chunk_attention(q, k, v, *choice).flatten(2) @ layer.out.weight.T

    def computed(x, k, v, landmarks):
        return layer(x, Chunks(k, v, landmarks), position=position)[0]

    inputs = dict(zip(("x", "k", "v", "landmarks"), (x, *memory)))
    got, want = results(computed, inputs), results(formula, inputs)
    assert_close(got, want, 1e-12)
    assert (want["gradient of landmarks"] != 0).any()


def test_hsa_layer_does_not_know_where_its_chunks_lie():
    """No positions: with every chunk visible and kept, moving the text around changes nothing."""
    config = dataclasses.replace(CONFIG, top_k=5)
    layer, x, order = build(HSA(config)), random(1, 3, 24), [3, 0, 4, 2, 1]
    k, v, landmarks = (
        random(1, 5, 4, 2, 8, seed=1),
        random(1, 5, 4, 2, 8, seed=2),
        random(1, 5, 2, 16, seed=3),
    )
    near = layer(x, Chunks(k, v, landmarks), position=20)[0]
    far = layer(x, Chunks(k[:, order], v[:, order], landmarks[:, order]), position=16_777_216)[0]
    assert_close(far, near, 1e-12)
