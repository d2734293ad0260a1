"""The course: what a notebook defines equals what the package has, and every notebook keeps the
promises that all of them make.
"""

import ast
import dataclasses
import functools
import io
import linecache
import re
import tokenize
import types
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from helpers import assert_close, random, random_choice

from hsa_kernels.attention import backward, by_chunk, by_token_block
from hsa_kernels.attention.operator import _schedules
from hsa_kernels.common import inverted_index, selection
from hsa_mini import PRESETS, ChunkMemory, HSAModel, reference
from hsa_mini.evaluation.statistics import wilson_interval
from hsa_mini.exercises.check import Check
from hsa_mini.inference.prefill import prefill
from hsa_mini.lab import claims
from hsa_mini.model.cost_estimate import estimate_cost
from hsa_mini.model.moe import MoE
from hsa_mini.ops.rope import apply_rope, rope_table
from hsa_mini.reference.dispatch import route
from hsa_mini.training.cross_batch import ChunkQueue, CrossBatchChunks
from hsa_mini.training.loss import mixture_loss
from hsa_mini.training.mixture import COPY, TEXT
from hsa_mini.training.recipes import RECIPES

jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("anywidget")

FOLDER = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
MAX_KILOBYTES = 580
MAX_FUNCTION_LINES = 15

each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


# ---- Definitions: the notebook's own against the package's. To add one, write a function with a
# `@twin` above it.

TWINS = []


def twin(notebook: str, name: str):
    """The check below compares the function `name` of `notebook` with that of the package."""

    def remember(check):
        TWINS.append(pytest.param(notebook, name, check, id=f"{notebook}-{name}"))
        return check

    return remember


@functools.cache
def definitions(notebook: str) -> dict:
    """The functions and classes that a notebook defines. Nothing else of its source runs."""
    tree = ast.parse((FOLDER / f"{notebook}.py").read_text(encoding="utf-8"))
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    tree.body = [node for node in tree.body if isinstance(node, kept)]
    names: dict = {"__name__": notebook}
    with_source = traceable((FOLDER / f"{notebook}.py").read_text(encoding="utf-8"), notebook)
    exec(compile(tree, with_source, "exec"), names)
    return names


def traceable(text: str, name: str) -> str:
    """A file name under which Python finds `text` again.

    On a GPU, Triton compiles a kernel from its source.
    """
    name = f"<{name} {hash(text)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    return name


@twin("01_why", "full_attention")
def _full_attention(ours):
    q, k, v = (random(9, 5, seed=seed) for seed in range(3))
    theirs = reference.sliding_window_attention(*(x[None, :, None] for x in (q, k, v)), window=9)
    assert_close(ours(q, k, v), theirs[0, :, 0], 1e-12)


@twin("02_chunks", "split_into_chunks")
def _split_into_chunks(ours):
    config = PRESETS["debug"]  # chunks of 4
    model = HSAModel(config, dtype=torch.float64)
    for tokens in (4, 11, 12):
        hidden = random(tokens, config.width)
        memory = ChunkMemory(config)
        with torch.no_grad():
            model.append_chunks(hidden[None], memory)
            chunks, waiting = ours(hidden, config.chunk_size)
            assert_close(model.encoder(chunks[None]).k, memory.chunks.k, 1e-12)
        assert torch.equal(waiting, memory.tail[0, : memory.position % config.chunk_size])


@twin("02_chunks", "rope")
def _rope(ours):
    x = random(3, 7, 16)  # heads, positions, numbers
    theirs = apply_rope(x.transpose(0, 1), rope_table(torch.arange(7), 16, 10_000.0)).transpose(
        0, 1
    )
    assert_close(ours(x), theirs, 1e-6)  # the package keeps its table in float32


@twin("02_chunks", "encoder_block")
def _encoder_block(ours):
    block = HSAModel(PRESETS["debug"], dtype=torch.float64).encoder.blocks[0].requires_grad_(False)
    x = random(3, 5, PRESETS["debug"].width)
    rope = rope_table(torch.arange(5), PRESETS["debug"].head_dim, PRESETS["debug"].rope_base)
    assert_close(ours(x, block), block(x, rope), 1e-6)


@twin("02_chunks", "encode_chunks")
def _encode_chunks(ours):
    encoder = HSAModel(PRESETS["nano"], dtype=torch.float64).encoder.requires_grad_(False)
    chunks = random(3, 16, PRESETS["nano"].width)
    k, v, landmarks, _ = encoder(chunks[None])
    for got, want in zip(ours(chunks, encoder), (k[0], v[0], landmarks[0, :, 0])):
        assert_close(got, want, 1e-6)


@twin("03_retrieval", "visible_chunks")
def _visible_chunks(ours):
    assert torch.equal(ours(23, 6, 4), reference.retrieval.visible_chunks(torch.arange(23), 6, 4))


@twin("03_retrieval", "keep_best")
def _keep_best(ours):
    scores = random(40, 9).mul(2).round()  # many ties
    visible = random(40, 9, seed=1) > -0.3
    theirs = reference.retrieval.newest_top_k(scores.masked_fill(~visible, float("-inf")), 4)
    for t in range(40):
        assert sorted(ours(scores[t], visible[t], 4)) == sorted(theirs[t].tolist())


@twin("03_retrieval", "retrieve_plainly")
def _retrieve_plainly(ours):
    queries, landmarks = random(30, 6), random(8, 6, seed=1)
    for top_k in (1, 3, 10):
        indices, weights = ours(queries, landmarks, 4, top_k)
        theirs = reference.retrieve(
            queries[None, :, None], landmarks[None, :, None], chunk_size=4, top_k=top_k
        )
        theirs = theirs[0][0, :, 0].long(), theirs[1][0, :, 0]
        assert_close(_by_chunk(indices, weights), _by_chunk(*theirs), 1e-12)


@twin("03_retrieval", "break_stick")
def _break_stick(ours):
    scores = random(6)
    assert_close(ours(scores), reference.retrieval.stick_breaking(scores), 1e-12)


@twin("04_fusion", "chunk_attention")
def _chunk_attention(ours):
    q, k, v = random(2, 9, 4, 8), random(2, 3, 4, 2, 8, seed=1), random(2, 3, 4, 2, 8, seed=2)
    chosen = reference.retrieve(
        random(2, 9, 2, 8, seed=3), random(2, 3, 2, 8, seed=4), chunk_size=4, top_k=2
    )
    assert_close(ours(q, k, v, *chosen), reference.chunk_attention(q, k, v, *chosen), 1e-12)
    assert_close(
        ours(q, k, v, *chosen, scale=0.1),
        reference.chunk_attention(q, k, v, *chosen, scale=0.1),
        1e-12,
    )


@twin("04_fusion", "select_then_concatenate")
def _select_then_concatenate(ours):
    q, k, v = random(2, 9, 4, 8), random(2, 1, 6, 2, 8, seed=1), random(2, 1, 6, 2, 8, seed=2)
    halves = torch.tensor([1, 0], dtype=torch.int32).expand(
        2, 9, 2, 2
    )  # both halves of one chunk are that chunk
    whole, sure = (
        torch.zeros(2, 9, 2, 1, dtype=torch.int32),
        torch.ones(2, 9, 2, 1, dtype=torch.float64),
    )
    in_halves = (x.unflatten(2, (2, 3)).flatten(1, 2) for x in (k, v))
    assert_close(
        ours(q, *in_halves, halves), reference.chunk_attention(q, k, v, whole, sure), 1e-12
    )


@twin("05_layer", "sliding_window_attention")
def _sliding_window_attention(ours):
    q, k, v = random(2, 9, 4, 8), random(2, 12, 2, 8, seed=1), random(2, 12, 2, 8, seed=2)
    for window in (1, 4, 20):
        assert_close(
            ours(q, k, v, window=window),
            reference.sliding_window_attention(q, k, v, window=window),
            1e-12,
        )


@twin("05_layer", "layer")
def _layer(ours):
    config = PRESETS["debug"]
    model = HSAModel(config, dtype=torch.float64).requires_grad_(False)
    memory = ChunkMemory(config)
    x = model.lower_decoder(torch.randint(config.vocab_size, (2, 21)), memory)
    model.append_chunks(x, memory)
    rope = rope_table(torch.arange(21), config.head_dim, config.rope_base)
    for block in (block for block in model.upper if block.hsa is not None):
        theirs, _ = block(
            x, rope, None, 0, lambda hsa, x: hsa(x, memory.chunks.source(), position=0)[0]
        )
        assert_close(ours(block, x, memory), theirs, 1e-12)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _one_head(T=24, K=3, N=5, S=16, G=3, D=16):
    """One sequence with one key/value head in float32.

    q [T, G, D], k and v [N, S, D], indices and weights [T, K].
    """
    indices, weights = random_choice(1, T, 1, K, N, dtype=torch.float32)
    q, k, v = random(T, G, D), random(N, S, D, seed=1), random(N, S, D, seed=2)
    return [
        x.to(DEVICE) for x in (q.float(), k.float(), v.float(), indices[0, :, 0], weights[0, :, 0])
    ]


def _with_heads(q, k, v, indices, weights):
    return (
        q[None],
        k[None, :, :, None],
        v[None, :, :, None],
        indices[None, :, None],
        weights[None, :, None],
    )


@twin("06_forward_kernel", "run_token_kernel")
def _run_token_kernel(ours):
    q, k, v, indices, weights = _one_head(G=1)
    theirs = by_token_block.forward(*_with_heads(q, k, v, indices, weights), 0.3)
    assert_close(ours(q[:, 0].contiguous(), k, v, indices, weights, 0.3), theirs[0, :, 0], 2e-6)


def _schedule(ours):
    inputs = _one_head()
    theirs = by_chunk.forward(*_with_heads(*inputs), inputs[0].shape[-1] ** -0.5)
    assert_close(ours(definitions("06_forward_kernel")["Meter"](), *inputs), theirs[0], 2e-6)


for _name in ("token_schedule", "token_block_schedule", "chunk_schedule"):
    twin("06_forward_kernel", _name)(_schedule)


@twin("06_forward_kernel", "package_schedule")
def _package_schedule(ours):
    names = {
        "by token block": {by_token_block},
        "by chunk": {by_chunk},
        "either": {by_token_block, by_chunk},
    }
    seen = set()
    for T, J, K in product(
        (1024, 8192, 32768, 49152, 1 << 17, 1 << 20), (1, 2, 8, 16), (4, 64, 256)
    ):
        q, k, indices = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in (
            (1, T, 16, 128), (1, T // 64, 64, J, 128), (1, T, J, K)
        ))  # fmt: skip
        seen.add(order := ours(dict(T=T, H=16, J=J, D=128, S=64, K=K)))
        assert names[order] == _schedules(q, k, indices), (T, J, K)
    assert seen == {*names}


@twin("07_backward_kernel", "gradients")
def _gradients(ours):
    q, k, v, indices, weights = _one_head(G=1)
    grad_out = random(*q.shape, seed=9).float().to(DEVICE)
    theirs = backward.backward(*_with_heads(q, k, v, indices, weights), grad_out[None], 0.3)
    plain = ours(q[:, 0], k, v, indices, weights, grad_out[:, 0], 0.3)
    for got, want in zip(
        plain,
        (theirs[0][0, :, 0], theirs[1][0, :, :, 0], theirs[2][0, :, :, 0], theirs[3][0, :, 0]),
    ):
        assert_close(got, want, 2e-6)


@twin("07_backward_kernel", "gradient_of_landmarks")
def _gradient_of_landmarks(ours):
    queries, landmarks = random(30, 6), random(8, 6, seed=1).requires_grad_()
    indices, weights = reference.retrieve(
        queries[None, :, None], landmarks[None, :, None], chunk_size=4, top_k=3
    )
    dweights = random(30, 3, seed=2)
    (theirs,) = torch.autograd.grad(weights[0, :, 0], landmarks, dweights)
    assert_close(
        ours(dweights, indices[0, :, 0], weights[0, :, 0].detach(), queries, 8), theirs, 1e-12
    )


@twin("07_backward_kernel", "invert_by_hand")
def _invert_by_hand(ours):
    indices, _ = random_choice(1, 40, 1, 3, 7)
    theirs = inverted_index.invert(indices, 7)
    entries, starts = ours(indices[0, :, 0], 7)
    assert torch.equal(entries, theirs.entries) and torch.equal(starts, theirs.starts)


def _by_chunk(indices, weights):
    """Slots [T, K] -> weight of each of 8 chunks [T, 8]; the order of slots is free."""
    return torch.zeros(len(indices), 9, dtype=weights.dtype).scatter_add(1, indices % 9, weights)


@twin("13_laboratory", "judge_pair")
def _judge_pair(ours):
    rng = np.random.default_rng(0)
    for what, seeds in product(("vt", "perplexity"), (2, 3, 5)):
        measure, seen = claims.Measure(what, 64), set()
        for gap in np.linspace(-0.5, 0.5, 40):
            better, worse = (
                tuple(rng.uniform(0.1, 0.6, seeds) + shift) for shift in (max(gap, 0), max(-gap, 0))
            )
            theirs = claims.verdict(measure, claims.Spread(better), claims.Spread(worse))
            assert (
                ours(
                    *(tuple(map(measure.goodness, values)) for values in (better, worse)),
                    measure.margin,
                )
                == theirs
            )
            seen.add(theirs)
        assert len(seen) == (3 if seeds > 2 else 1)


@triton.jit
def _select(x, keys, back, kept, floors, known, K: tl.constexpr, n: tl.constexpr):
    row = tl.program_id(0)
    o = row * n + tl.arange(0, n)[None, :]
    b_key = selection.keyed(tl.load(x + o))
    b_known = tl.load(known + row + tl.arange(0, 1)).to(tl.uint32)
    m_kept, b_floor = selection.largest(b_key, b_known, tl.max(b_key, 1), K)
    tl.store(keys + o, b_key.to(tl.int64))
    tl.store(back + o, selection.unkeyed(b_key))
    tl.store(kept + o, m_kept.to(tl.int32))
    tl.store(floors + row + tl.arange(0, 1), b_floor.to(tl.int64))


def selected(x, K, known=None) -> tuple:
    """What the kernels' `selection` makes of x [rows, n].

    Keys, the floats that they turn back into, whether a number is among the K largest, and floors.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = torch.zeros(len(x), dtype=torch.int64) if known is None else known
    results = [
        torch.empty(x.shape, dtype=dtype, device=device)
        for dtype in (torch.int64, torch.float32, torch.int32)
    ]
    floors = torch.empty(len(x), dtype=torch.int64, device=device)
    _select[(len(x),)](x.to(device), *results, floors, known.to(device), K=K, n=x.shape[1])
    return tuple(y.cpu() for y in (*results, floors))


def _scores(rows=20, n=32):
    """With equal ones, zeros of either sign, infinities and very small ones."""
    x = random(rows, n).float()
    x[:10] = x[:10].mul(2).round().div(2)
    x[0, :8] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-42, -1e-42, 3e38, -3e38])
    return x


@twin("08_retrieval_and_decode_kernels", "keyed")
def _keyed(ours):
    assert torch.equal(ours(_scores()), selected(_scores(), 4)[0])


@twin("08_retrieval_and_decode_kernels", "unkeyed")
def _unkeyed(ours):
    keys, back, *_ = selected(_scores(), 4)
    assert torch.equal(ours(keys), back)


@twin("08_retrieval_and_decode_kernels", "largest")
def _largest(ours):
    for K in (1, 5, 32):
        keys, _, kept, floors = selected(_scores(), K)
        got, floor = ours(keys, K)
        assert torch.equal(got.int(), kept) and torch.equal(floor, floors)
        *_, kept, higher = selected(_scores(), K, floors)
        got, floor = ours(keys, K, floors)
        assert torch.equal(got.int(), kept) and torch.equal(floor, higher)


@twin("08_retrieval_and_decode_kernels", "stream_top_k")
def _stream_top_k(ours):
    for x in _scores():
        for K, room in ((1, 2), (5, 9), (40, 50)):
            kept = reference.retrieval.newest_top_k(x, min(K, len(x)))
            assert sorted(ours(x.tolist(), K, room)[0]) == sorted(
                n for n in kept.tolist() if n >= 0 and x[n] > -float("inf")
            )


@twin("08_retrieval_and_decode_kernels", "noise_at")
def _noise_at(ours):
    tokens, chunks = torch.tensor([3, 70_000, 2**24]), torch.tensor([8, 0, 5])
    theirs = reference.noise.gumbel_noise(2**40 + 9, tokens[None], 1, 9)[0, :, 0, chunks]
    assert torch.equal(ours(2**40 + 9, tokens, chunks), theirs)


@twin("08_retrieval_and_decode_kernels", "retrieve_by_tiles")
def _retrieve_by_tiles(ours):
    queries, landmarks = random(30, 6).float(), random(8, 6, seed=1).float()
    for top_k, tile, offset in ((1, 3, 0), (3, 8, 2), (10, 5, 9)):
        indices, weights = ours(queries, landmarks, 4, top_k, offset + torch.arange(30), tile=tile)
        options = dict(chunk_size=4, top_k=top_k, offset=offset)
        theirs = reference.retrieve(queries[None, :, None], landmarks[None, :, None], **options)
        assert_close(
            _by_chunk(indices, weights),
            _by_chunk(theirs[0][0, :, 0].long(), theirs[1][0, :, 0]),
            1e-6,
        )


@twin("08_retrieval_and_decode_kernels", "decode_in_phases")
def _decode_in_phases(ours):
    asked, landmarks, q = (
        random(6).float(),
        random(50, 6, seed=1).float(),
        random(4, 16, seed=2).float(),
    )
    k, v = random(50, 4, 16, seed=3).float(), random(50, 4, 16, seed=4).float()
    there = (
        asked[None, None, None],
        landmarks[None, :, None],
        q[None, None],
        k[None, :, :, None],
        v[None, :, :, None],
    )
    for K, tile in ((1, 8), (7, 8), (50, 3)):
        theirs = reference.decode(*there, chunk_size=4, top_k=K, offset=200)
        assert_close(ours(asked, landmarks, q, k, v, K, tile), theirs[0, 0], 1e-6)


@twin("09_memory", "kept_after")
def _kept_after(ours):
    filled = definitions("09_memory")["filled"]
    model = HSAModel(PRESETS["debug"]).requires_grad_(False)
    for tokens in (1, 7, 8, 12, 30):
        memory = prefill(model, torch.randint(512, (1, tokens))).memory
        theirs = len(memory.chunks), filled(memory.tail), filled(memory.upper[-1].k)
        assert ours(tokens, PRESETS["debug"].chunk_size, PRESETS["debug"].window) == theirs


def _filled(ours, *options):
    """Compare a method that fills a memory with the package's prefill: logits and all tensors."""
    contents = definitions("09_memory")["contents"]
    model = HSAModel(PRESETS["debug"], dtype=torch.float64).eval().requires_grad_(False)
    for tokens in (1, 29, 61):
        ids = torch.randint(512, (2, tokens))
        theirs, (logits, memory) = prefill(model, ids, segment=16), ours(model, ids, *options)
        assert memory.position == theirs.memory.position
        assert_close(
            {"logits": logits, **contents(memory)},
            {"logits": theirs.logits, **contents(theirs.memory)},
            1e-10,
        )


for _name in ("full", "token_by_token"):
    twin("09_memory", _name)(_filled)


@twin("09_memory", "early_exit")
def _early_exit(ours):
    _filled(ours, PRESETS["debug"].upper_tail)


@twin("09_memory", "bill")
def _bill(ours):
    for name, tokens in product(("ul_8b_a1b", "ul_0_5b", "mini"), (1 << 14, 1 << 20)):
        counted, rows = estimate_cost(name, tokens), ours(PRESETS[name], tokens)
        caches, marks = counted.window_cache_bytes, counted.landmark_bytes
        assert [row[0] for row in rows.values()] == [
            counted.full_attention_kv_bytes,
            caches,
            caches + marks + counted.kv_bytes,
            caches + marks,
        ]
        assert rows["HSA, library outside"][1] == counted.kv_bytes
        more, grown = estimate_cost(name, 2 * tokens), ours(PRESETS[name], 2 * tokens)
        assert (
            grown["HSA"][4] - rows["HSA"][4]
            == more.decode_flops_per_token - counted.decode_flops_per_token
        )


@twin("09_memory", "attend_fetching")
def _attend_fetching(ours):
    q, k, v = random(1, 9, 4, 8), random(1, 7, 4, 2, 8, seed=1), random(1, 7, 4, 2, 8, seed=2)
    indices, weights = random_choice(1, 9, 2, 3, 7)
    for chosen, w in (
        (indices, weights),
        (indices.clamp(min=0), weights),
        (torch.full_like(indices, -1), 0 * weights),
    ):
        out, fetched = ours(q, k, v, chosen, w)
        assert_close(out, reference.chunk_attention(q, k, v, chosen, w), 1e-12)
        assert fetched == len(set(chosen.flatten().tolist()) - {-1})


def _mixture(experts: int = 6, top_k: int = 2) -> MoE:
    torch.manual_seed(0)
    config = dataclasses.replace(
        PRESETS["debug"], experts=experts, experts_active=top_k, expert_width=24
    )
    layer = HSAModel(config).upper[0].mlp.requires_grad_(False)
    layer.bias.copy_(random(experts) / 10)
    return layer


@twin("10_model_and_experts", "choose")
def _choose(ours):
    layer, tokens = _mixture(), random(30, 32).float()
    chosen, gates = ours(layer.router(tokens).sigmoid(), layer.bias, layer.top_k)
    want = route(layer.router(tokens), layer.bias, layer.top_k)
    assert torch.equal(chosen, want[0])
    assert_close(gates, want[1], 1e-6)


@twin("10_model_and_experts", "update_bias")
def _update_bias(ours):
    layer, bias = _mixture().train(), _mixture().bias
    layer.count_tokens()
    layer(random(2, 15, 32).float())
    moved = ours(bias, layer.statistics().load, 0.01)
    layer.update_bias(0.01)
    assert torch.equal(moved, layer.bias) and not torch.equal(moved, bias)


def _mixture_twin(ours):
    for experts, top_k in ((6, 2), (5, 1), (3, 3)):
        layer, x = _mixture(experts, top_k), random(2, 15, 32).float()
        assert_close(ours(layer, x), layer(x), 1e-6)


for _name in ("loop_over_experts", "grouped_experts"):
    twin("10_model_and_experts", _name)(_mixture_twin)


@twin("10_model_and_experts", "logits")
def _logits(ours):
    build = definitions("10_model_and_experts")["build"]
    experts = dataclasses.replace(PRESETS["debug"], experts=6, experts_active=2, expert_width=24)
    for config in (PRESETS["debug"], PRESETS["nano"], experts):
        model, parts = HSAModel(config).requires_grad_(False), build(config)
        parts.load_state_dict(model.state_dict())
        ids = torch.randint(config.vocab_size, (2, 70))
        assert_close(ours(parts, ids, config), model.eval()(ids).logits, 1e-5)


@twin("10_model_and_experts", "parameters")
def _parameters(ours):
    for name, config in PRESETS.items():
        counted, met = estimate_cost(name), ours(config, config.experts_active)
        assert ours(config, config.experts) == counted.params_by_part
        assert sum(met.values()) - met["embedding and head"] == counted.params_active


@twin("10_model_and_experts", "decode_flop")
def _decode_flop(ours):
    for name, tokens in (("ul_8b_a1b", 1 << 24), ("ul_8b_a1b", 1000), ("ul_0_5b", 1 << 20)):
        assert sum(ours(PRESETS[name], tokens).values()) == pytest.approx(
            estimate_cost(name, tokens).decode_flops_per_token, rel=0.01
        )


@twin("11_training", "mixed_loss")
def _mixed_loss(ours):
    logits, targets = random(3, 20, 30), torch.randint(30, (3, 20))
    for parts in (torch.randint(4, (3, 20)), torch.full((3, 20), TEXT), torch.full((3, 20), COPY)):
        loss, means = ours(logits, targets, parts, text_weight=0.3)
        theirs, shares, _ = mixture_loss(logits, targets, parts, text_weight=0.3)
        assert_close(
            torch.stack((loss, *means)), torch.stack((theirs, *shares)).to(loss.dtype), 1e-6
        )


@twin("11_training", "learning_rate")
def _learning_rate(ours):
    for recipe in RECIPES.values():
        assert [ours(recipe, step) for step in range(recipe.steps)] == [
            recipe.rate(step) for step in range(recipe.steps)
        ]


@twin("11_training", "cross_batch_chunks")
def _cross_batch_chunks(ours):
    model = HSAModel(PRESETS["debug"], dtype=torch.float64).train().requires_grad_(False)
    queue = ChunkQueue(5)
    for _ in range(2):
        encoded = model(torch.randint(512, (3, 30))).aux.encoded
        queue.push(encoded, torch.tensor([2, 0]))
    theirs = CrossBatchChunks(encoded, model.encoder, queue).landmarks
    old = model.encoder.landmarks(queue.stores[2][None])
    for j in range(PRESETS["debug"].retrieval_heads):
        assert torch.equal(ours(encoded.landmarks[:, :, j], old[0, :, j]), theirs[:, :, j])


@twin("12_sixteen_million", "wilson")
def _wilson(ours):
    for right, asked in ((0, 7), (3, 10), (99, 100), (100, 100)):
        assert ours(right, asked) == pytest.approx(wilson_interval(right, asked), abs=1e-12)


@pytest.mark.parametrize("notebook, name, check", TWINS)
def test_definition_is_the_packages(notebook, name, check):
    torch.manual_seed(0)
    check(definitions(notebook)[name])


# ---- What every notebook promises


def cells(source: Path, kind: str) -> list[str]:
    return [cell.source for cell in jupytext.read(source).cells if cell.cell_type == kind]


def code(source: Path) -> str:
    return "\n\n".join(cells(source, "code"))


def executed(source: Path):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def solutions(source: Path) -> list[str]:
    """The Python of the folded solutions, in order."""
    folded = re.findall(
        r"<details>.*?</details>", "\n".join(cells(source, "markdown")), flags=re.DOTALL
    )
    return [
        block
        for text in folded
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    ]


@each_notebook
def test_ipynb_is_what_its_source_makes(source):
    want = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    assert [(cell.cell_type, cell.source) for cell in executed(source).cells] == want


@each_notebook
def test_ipynb_is_executed_and_small(source):
    assert source.with_suffix(".ipynb").stat().st_size <= MAX_KILOBYTES * 1024
    for cell in executed(source).cells:
        if cell.cell_type == "code":
            assert cell.execution_count, cell.source
            assert not [output for output in cell.outputs if output.output_type == "error"], (
                cell.source
            )


@each_notebook
def test_ipynb_keeps_pictures_and_no_widgets(source):
    """A stored view hides the picture in JupyterLab until the notebook is run. Its id changes in
    every run.
    """
    assert "widgets" not in executed(source).metadata
    for cell in executed(source).cells:
        for output in cell.get("outputs", ()):
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), (
                cell.source
            )


@each_notebook
def test_links_lead_somewhere(source):
    links = re.findall(r"\]\(([^)\s]+)\)", "\n".join(cells(source, "markdown")))
    assert not [
        link for link in links if not link.startswith("https://") and not (FOLDER / link).is_file()
    ]


@each_notebook
def test_below_every_figure_stand_its_words(source):
    for cell in executed(source).cells:
        outputs = cell.get("outputs", [])
        for i, output in enumerate(outputs):
            if "image/png" in output.get("data", {}):
                words = output.metadata["image/png"]["alt"].split()
                assert words and outputs[i + 1].data["text/plain"].split() == words, cell.source


@each_notebook
def test_something_is_checked_and_something_moves(source):
    assert any(text.startswith("# NBVAL_CHECK_OUTPUT") for text in cells(source, "code"))
    assert re.search(r"\bexplore(_map|_needle|_scale)?\(|\bipywidgets\.", code(source))


@each_notebook
def test_nothing_stalls_a_headless_run(source):
    called = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(code(source)))
        if isinstance(node, ast.Call)
    }
    assert not {
        name
        for name in called
        if name.split(".")[-1] in ("interact", "interactive") or name == "plt.show"
    }


@each_notebook
def test_functions_are_short(source):
    for node in ast.walk(ast.parse(code(source))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


@each_notebook
def test_no_code_is_commented_out(source):
    tokens = tokenize.generate_tokens(io.StringIO(code(source)).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    assert not [
        text
        for text in comments
        if re.match(r"#\s*(import |from \w+ import|def |for .*:$|print\()", text)
    ]


@each_notebook
def test_opening_says_what_how_long_and_needs(source):
    opening = cells(source, "markdown")[0]
    assert opening.startswith(f"# {source.stem[:2]} · ")
    for promise in ("you will be able to", "minutes", "CPU cores", "**Needs:**"):
        assert promise in opening, promise


@each_notebook
def test_minutes_of_the_next_notebook_are_its_own(source):
    """What a notebook says of the one after it."""
    text = " ".join("\n".join(cells(source, "markdown")).split("What comes next")[-1].split())
    said = re.search(r"\]\((\d\d_\w+)\.ipynb\).*?(\d+) minutes", text)
    if source != SOURCES[-1]:
        opening = " ".join(cells(FOLDER / f"{said[1]}.py", "markdown")[0].split())
        assert re.search(r"\*\*Time:\*\* (\d+) minutes to read", opening)[1] == said[2]


@each_notebook
def test_two_exercises_with_folded_solutions_and_a_way_on(source):
    closing = "\n".join(cells(source, "markdown"))[-12_000:]
    assert closing.count("<summary>Solution</summary>") >= 2
    assert closing.count("<details>") == closing.count("</details>")
    assert (
        re.search(r"\]\(\d\d_\w+\.ipynb\)", closing.split("What comes next")[-1])
        or source == SOURCES[-1]
    )


@each_notebook
def test_solutions_run_and_pass_their_checks(source, capsys, monkeypatch):
    """As long as a function is blank, its check prints one line that says so."""
    monkeypatch.setenv("HSA_MINI_TOKENS", "16384")  # of 00, which otherwise reads a million
    monkeypatch.chdir(FOLDER)
    names: dict = {"__name__": source.stem}
    exec(compile(code(source), traceable(code(source), source.stem), "exec"), names)
    checks = [check.name for check in names.values() if isinstance(check, Check)]
    assert [line for line in capsys.readouterr().out.splitlines() if "still blank" in line] == [
        f"{name} is still blank. Write it and run this cell again." for name in checked(source)
    ]
    for text in solutions(source):
        exec(compile(text, traceable(text, source.stem), "exec"), names)
    verdicts = [line for line in capsys.readouterr().out.splitlines() if line[:1] in "✓✗"]
    assert [line.split(" is right")[0] for line in verdicts] == [f"✓ {n}" for n in checked(source)]
    assert sorted(checks) == sorted(checked(source))


@pytest.mark.parametrize(
    "right, wrong, said",
    [
        (", mask=o_d < D, other=0.0", "", "the load needs a mask"),
        ("/ D), mask=o_d < D", "/ D)", "the store needs a mask"),
        ("other=0.0", "other=1.0", "beyond the row the tile must hold 0"),
        ("0) / D)", "0) / WIDTH)", "you divided by the width of the tile"),
        ("x + row * D", "x", "all rows are those of program 0"),
        ("out + row * D", "out", "every program stores to the first row"),
        ("tl.sum", "tl.total", "stopped with InterpreterError"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="programs of a GPU have no fixed order")
def test_a_wrong_kernel_gets_its_hint(right, wrong, said, capsys):
    source = FOLDER / "06_forward_kernel.py"
    (solution,) = (text for text in solutions(source) if "def norm_kernel" in text)
    assert right in solution
    attempt = solution.replace(right, wrong)
    names = {**definitions.__wrapped__(source.stem), "DEVICE": "cpu"}
    names["run_norm"] = types.FunctionType(names["run_norm"].__code__, names)
    exec(compile(attempt, traceable(attempt, source.stem), "exec"), names)
    assert said in capsys.readouterr().out


def checked(source: Path) -> list[str]:
    """The functions that the exercises of a notebook check, in order."""
    return re.findall(r"^check_\w+\((\w+)\)$", code(source), flags=re.MULTILINE)


@pytest.mark.parametrize("source", SOURCES[1:], ids=lambda path: path.stem)
def test_three_exercises_say_how_hard_how_important_and_how_long(source):
    said = re.findall(
        r"^\*\*\d\. .+?\*\* \*Difficulty [1-5], importance [1-5], \d+ minutes\.\*",
        "\n".join(cells(source, "markdown")),
        flags=re.MULTILINE,
    )
    assert len(said) == len(checked(source)) >= 3
