"""The Triton kernels against the float64 reference: outputs, every gradient, ragged shapes, what
must never be read.

On a machine with a GPU they run there; elsewhere Triton's interpreter runs the same source on the
processor (`conftest.py`).

Dimensions: B batch, T tokens, H query heads, J key/value heads, G = H/J, D head dimension, R
retrieval dimension, N chunks, S chunk size, K kept.
"""

import numpy as np
import pytest
import torch
import triton
from helpers import assert_close, error, random, random_choice, results, with_special_scores
from hypothesis import example, given, settings
from hypothesis import strategies as st
from material import document_starts
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode

import hsa_kernels
from hsa_kernels.attention import by_chunk, by_token_block, operator, partial_results
from hsa_kernels.attention.merge import merge
from hsa_kernels.common import checks, tiles
from hsa_kernels.common.checks import tile_fits
from hsa_kernels.common.interpreter import check_interpreter
from hsa_kernels.common.inverted_index import cut, invert
from hsa_kernels.retrieval import operator as retrieval
from hsa_mini import reference
from hsa_mini.ops import torch_backend
from hsa_mini.ops.rope import rope_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter's bfloat16 is wrong, so it is tested on a GPU alone
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if DEVICE == "cuda" else ()))
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
grid = settings(max_examples=8)


def there(
    inputs: dict[str, torch.Tensor], dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Inputs on the device, those that are not weights in `dtype`."""

    def wanted(name: str, x: torch.Tensor) -> torch.dtype:
        return dtype if dtype and x.is_floating_point() and name != "weights" else x.dtype

    return {name: x.to(DEVICE, wanted(name, x)) for name, x in inputs.items()}


def exact(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def assert_as_exact(
    operation, twin, inputs: dict[str, torch.Tensor], dtype: torch.dtype, **options
) -> None:
    """`operation` on inputs of `dtype` equals its twin in float64 on the same numbers, for outputs
    and every gradient.
    """
    inputs = there(inputs, dtype)
    got, want = results(operation, inputs, **options), results(twin, exact(inputs), **options)
    for name, expected in want.items():
        if expected.is_floating_point():
            distance = error(got[name], expected)
            assert got[name].isfinite().all() and distance <= TOLERANCE[dtype], (
                f"{name}: {distance:.1e}"
            )
        else:
            assert torch.equal(got[name], expected), name


def attention_inputs(B=2, T=7, J=2, G=2, D=16, N=4, S=16, K=3, seed=0) -> dict[str, torch.Tensor]:
    indices, weights = random_choice(B, T, J, K, N, seed=seed, dtype=torch.float32)
    q, k, v = (
        random(B, T, J * G, D),
        random(B, N, S, J, D, seed=seed + 1),
        random(B, N, S, J, D, seed=seed + 2),
    )
    return there(dict(q=q.float(), k=k.float(), v=v.float(), indices=indices, weights=weights))


@grid
@given(
    B=st.integers(1, 2), T=st.integers(1, 9), J=st.sampled_from([1, 2, 3]), G=st.sampled_from([1,
    2, 3, 5, 8, 16]),
    D=st.sampled_from([16, 24, 64]), S=st.sampled_from([16, 24, 32]), N=st.integers(1, 7),
    K=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES), scale=st.sampled_from([None, 0.5, -0.5, 0.0]),
)  # fmt: skip
@example(B=1, T=3, J=1, G=64, D=16, S=16, N=3, K=2, dtype=torch.float32, scale=None)
@example(B=1, T=2, J=1, G=2, D=256, S=128, N=2, K=2, dtype=torch.float16, scale=None)
@example(B=1, T=70, J=1, G=1, D=16, S=16, N=5, K=3, dtype=torch.float32, scale=None)
@example(B=1, T=2, J=1, G=4, D=16, S=16, N=300, K=290, dtype=torch.float32, scale=None)
def test_chunk_attention_equals_the_reference(B, T, J, G, D, S, N, K, dtype, scale):
    inputs = attention_inputs(B, T, J, G, D, N, S, K)
    assert_as_exact(
        hsa_kernels.chunk_attention, reference.chunk_attention, inputs, dtype, scale=scale
    )


@pytest.mark.parametrize("buffer_bytes", [1, 4000, 1 << 30])
@pytest.mark.parametrize("segment", [1, 7])
def test_gradients_over_several_tiles_launches_and_segments(monkeypatch, buffer_bytes, segment):
    sizes = dict(MIN_TILE=4, MAX_TILE=4, SEGMENT=segment, PARTIAL_RESULTS_BYTES=buffer_bytes)
    for name, value in sizes.items():
        monkeypatch.setattr(partial_results, name, value)
    inputs = attention_inputs(B=3, T=11, N=5, K=2)
    assert_as_exact(hsa_kernels.chunk_attention, reference.chunk_attention, inputs, torch.float32)


@pytest.mark.parametrize("schedule", [by_chunk, by_token_block])
def test_both_schedules_equal_the_reference(monkeypatch, schedule):
    sizes = dict(MIN_TILE=4, MAX_TILE=4, SEGMENT=3, PARTIAL_RESULTS_BYTES=4000)
    for name, value in sizes.items():
        monkeypatch.setattr(partial_results, name, value)
    inputs = attention_inputs(B=2, T=11, J=2, G=3, D=24, N=5, S=24, K=3)
    got = schedule.forward(*inputs.values(), 24**-0.5)
    assert error(got, reference.chunk_attention(**exact(inputs))) < 2e-6


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0)])
@pytest.mark.parametrize("sizes", [dict(G=4, D=256, S=64), dict(G=2, D=16, S=16)], ids=str)
def test_the_configuration_of_other_gpus_changes_no_result(monkeypatch, capability, sizes):
    """Tiles of 32 rows for large chunks, no copy engine, and shorter parts of the window."""
    monkeypatch.setattr(tiles, "capability", lambda x: capability)
    inputs = attention_inputs(B=1, T=19, J=1, N=3, K=2, **sizes)
    rows = tiles.Sizes.of(inputs["q"].half(), inputs["k"]).M * sizes["G"]
    assert rows == (32 if sizes["D"] == 256 and capability < (9, 0) else 64)
    for dtype in (torch.float16, torch.float32):
        assert_as_exact(hsa_kernels.chunk_attention, reference.chunk_attention, inputs, dtype)
    q, k, v = (random(1, n, 2, 32, seed=n).to(DEVICE, torch.float32) for n in (1, 99, 98))
    v = k.flip(1)
    got = hsa_kernels.window_decode_attention(q, k, v, torch.tensor([98], device=DEVICE))
    want = reference.sliding_window_attention(q.double(), k.double(), v.double(), window=99)
    assert error(got, want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "capability, dtype, G, numbers",
    [
        ((8, 0), torch.bfloat16, 16, 16384),
        ((8, 0), torch.bfloat16, 64, 8192),
        ((8, 0), torch.float32, 16, 8192),
        ((8, 0), torch.float32, 64, 4096),
        ((8, 6), torch.float16, 64, 8192),
        ((8, 9), torch.float32, 16, 4096),
        ((12, 0), torch.float32, 64, 2048),
        ((9, 0), torch.bfloat16, 64, 32768),
        ((10, 0), torch.float32, 16, 16384),
    ],
)
def test_the_largest_chunk_depends_on_shared_memory(monkeypatch, capability, dtype, G, numbers):
    """`test_compile` shows that these sizes fit. What is larger goes through PyTorch."""
    monkeypatch.setattr(tiles, "capability", lambda x: capability)
    q = torch.empty(1, 1, G, 128, dtype=dtype, device="meta")
    for S, fits in ((numbers // 128, True), (numbers // 128 + 1, False)):
        k = torch.empty(1, 1, S, 1, 128, dtype=dtype, device="meta")
        assert tile_fits(q, k) == fits, S


def test_gpus_older_than_ampere_are_refused(monkeypatch):
    monkeypatch.setattr(checks, "capability", lambda x: (7, 5))
    with pytest.raises(
        ValueError, match=r"^q: got a GPU of capability \(7, 5\), accepted is \(8, 0"
    ):
        hsa_kernels.chunk_attention(**attention_inputs())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_block_of_tokens_gets_its_own_schedule(monkeypatch, dtype):
    """Neighbours with the same choices go by token block, others by chunk, in one call."""
    attend_blocks = by_token_block.attend_blocks
    counts = []

    def counted(*args):
        counts.append(args[3].counts)
        return attend_blocks(*args)

    monkeypatch.setattr(operator, "MIN_CHOICES", 1)
    monkeypatch.setattr(operator, "SORTING_COST", 1)
    monkeypatch.setattr(by_token_block, "attend_blocks", counted)
    inputs = attention_inputs(B=2, T=75, J=2, G=2 if dtype == torch.float32 else 4, N=96, S=16, K=3)
    inputs["indices"][:, 16:40] = inputs["indices"][:, 16:17]
    assert_as_exact(hsa_kernels.chunk_attention, reference.chunk_attention, inputs, dtype)
    assert (counts[0] < 0).any() and (counts[0] > 0).any()


@pytest.mark.parametrize(("T", "N", "K"), [(0, 3, 2), (4, 0, 2), (4, 3, 0)])
def test_nothing_to_attend_to(T, N, K):
    inputs = attention_inputs(T=T, N=N, K=K)
    got, want = (
        results(f, inputs) for f in (hsa_kernels.chunk_attention, reference.chunk_attention)
    )
    assert_close(got, want, 0)


def test_what_nobody_chose_is_never_read():
    inputs = attention_inputs(T=5, N=6, K=2)
    want = results(reference.chunk_attention, exact(inputs))
    chosen = torch.zeros(2, 6, 2, dtype=torch.bool, device=DEVICE)
    for b, j in ((b, j) for b in range(2) for j in range(2)):
        kept = inputs["indices"][b, :, j]
        chosen[b, kept[kept >= 0].long(), j] = True
    assert not chosen.all()
    for name in ("k", "v"):
        inputs[name] = inputs[name].masked_fill(~chosen[:, :, None, :, None], float("nan"))
    inputs["weights"] = inputs["weights"].masked_fill(inputs["indices"] < 0, float("nan"))
    got = results(hsa_kernels.chunk_attention, inputs)
    for name, expected in want.items():
        assert got[name].isfinite().all() and error(got[name], expected) < 2e-6, name
    assert not got["gradient of k"][~chosen.unsqueeze(2).expand(2, 6, 16, 2)].any()  # exactly 0


def test_chunks_that_no_copy_engine_can_read():
    """They begin between two multiples of 16 bytes."""
    inputs = attention_inputs()
    want = reference.chunk_attention(**exact(inputs))
    for name in ("k", "v"):
        inputs[name] = torch.cat((inputs[name].new_zeros(1), inputs[name].flatten()))[1:].view_as(
            inputs[name]
        )
    assert inputs["k"].data_ptr() % 16 and error(hsa_kernels.chunk_attention(**inputs), want) < 2e-6


def test_a_memory_with_room_behind_its_chunks():
    inputs = attention_inputs(N=4)
    roomy = {
        name: torch.full((2, 9, 16, 2, 16), float("nan"), device=DEVICE) for name in ("k", "v")
    }
    for name, room in roomy.items():
        room[:, :4] = inputs[name]
    with torch.no_grad():
        got = hsa_kernels.chunk_attention(
            **{**inputs, **{name: room[:, :4] for name, room in roomy.items()}}
        )
    assert torch.equal(got, hsa_kernels.chunk_attention(**inputs))


def test_a_chunk_named_twice_counts_twice():
    inputs = attention_inputs(T=6, N=2, K=3)
    inputs["indices"] = (
        torch.randint(-1, 2, (2, 6, 2, 3), generator=torch.Generator().manual_seed(0))
        .int()
        .to(DEVICE)
    )
    assert (inputs["indices"][..., 0] == inputs["indices"][..., 1]).any()
    assert_as_exact(hsa_kernels.chunk_attention, reference.chunk_attention, inputs, torch.float32)


def test_an_index_beyond_the_memory_counts_as_empty_or_is_refused_in_debugging(monkeypatch):
    inputs = attention_inputs(N=4)
    beyond = {**inputs, "indices": inputs["indices"].masked_fill(inputs["indices"] < 0, 4)}
    assert_close(
        results(hsa_kernels.chunk_attention, beyond),
        results(hsa_kernels.chunk_attention, inputs),
        0,
    )
    monkeypatch.setattr("hsa_kernels.common.checks.DEBUG", True)
    hsa_kernels.chunk_attention(**inputs)
    with pytest.raises(ValueError, match=r"^indices: got 0 to 4, accepted are -1 .empty. to 3$"):
        hsa_kernels.chunk_attention(**beyond)


def test_results_are_the_same_from_run_to_run():
    inputs = attention_inputs(T=40, N=3)
    first = results(hsa_kernels.chunk_attention, inputs)
    for _ in range(3):
        assert_close(results(hsa_kernels.chunk_attention, inputs), first, 0)


@pytest.fixture
def poisoned():
    """Memory that nobody has written to holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_every_number_of_a_result_is_written(poisoned):
    assert torch.empty(3).isnan().all()
    assert_as_exact(
        hsa_kernels.chunk_attention,
        reference.chunk_attention,
        attention_inputs(T=9, N=6, K=2),
        torch.float32,
    )
    assert_as_exact(*RETRIEVE, retrieval_inputs(T=9, N=6), torch.float32, chunk_size=2, top_k=4)
    inputs, options = decode_inputs(N=9), dict(chunk_size=16, top_k=4, offset=70)
    assert (
        error(hsa_kernels.decode(**inputs, **options), reference.decode(**exact(inputs), **options))
        < 2e-6
    )


@given(
    T=st.integers(1, 12),
    K=st.integers(1, 5),
    N=st.integers(1, 6),
    tokens=st.sampled_from([1, 2, 4]),
)
def test_merged_lists_name_every_chunk_of_a_block_once(T, K, N, tokens):
    indices, weights = random_choice(2, T, 2, K, N, dtype=torch.float32)
    indices, weights = indices.to(DEVICE), weights.to(DEVICE)
    lists = merge(indices, weights, N, tokens)
    for b, i, j in (
        (b, i, j) for b in range(2) for i in range(lists.counts.shape[1]) for j in range(2)
    ):
        block = indices[b, i * tokens : (i + 1) * tokens, j]
        count = lists.counts[b, i, j]
        names = lists.chunks[b, i, j, :count].tolist()
        assert names == sorted(set(block.flatten().tolist()) - {-1})
        for m, t in enumerate(range(i * tokens, min((i + 1) * tokens, T))):
            weight_of = dict(zip(indices[b, t, j].tolist(), weights[b, t, j].tolist()))
            assert lists.weights[b, i, j, :count, m].tolist() == [
                weight_of.get(n, 0.0) for n in names
            ]


@given(
    T=st.integers(0, 12),
    K=st.integers(1, 5),
    N=st.integers(1, 6),
    size=st.sampled_from([1, 3, 512]),
    tile=st.integers(1, 12),
)
def test_the_inverted_index_lists_who_chose_a_chunk(T, K, N, size, tile):
    indices, _ = random_choice(2, T, 2, K, N)
    index = invert(indices.to(DEVICE), N, tile)
    segments = cut(index, size)
    flat, tiles, rows = indices.flatten().tolist(), -(-T // tile), len(index.starts) - 1
    assert rows == 2 * tiles * 2 * N
    for row in range(rows):
        (b, p, j), n = (row // N // 2 // tiles, row // N // 2 % tiles, row // N % 2), row % N
        first, last = index.starts[row], index.starts[row + 1]
        own = [
            (e // K // 2 // T, e // K // 2 % T // tile, e // K % 2, chunk)
            for e, chunk in enumerate(flat)
        ]
        want = [e for e, place in enumerate(own) if place == (b, p, j, n)]
        assert index.entries[first:last].tolist() == want  # by token: always in the same order
        mine = slice(segments.starts[row], segments.starts[row + 1])
        assert segments.owners[mine].tolist() == [row] * -(-len(want) // size)
    assert segments.starts[-1] <= len(segments.owners)


@given(T=st.integers(1, 12), K=st.integers(1, 5), N=st.integers(1, 6))
def test_choices_stand_in_the_order_of_the_index(T, K, N):
    inputs = attention_inputs(T=T, K=K, N=N)
    choices = partial_results.Choices(*(inputs[name] for name in ("q", "k", "indices", "weights")))
    entries = invert(inputs["indices"], N, choices.tile).entries
    assert torch.equal(entries[choices.inverse_order], torch.arange(len(entries), device=DEVICE))
    assert torch.equal(choices.rows, (entries // K).int())
    assert torch.equal(choices.weights, inputs["weights"].flatten()[entries])


def sorted_retrieve(retrieve):
    """Sort the slots, whose order is free, by chunk, so that two results can be compared."""

    def operation(**arguments):
        indices, weights = retrieve(**arguments)
        indices, order = indices.sort(dim=-1, descending=True)
        return indices, weights.gather(-1, order)

    return operation


RETRIEVE = sorted_retrieve(hsa_kernels.retrieve), sorted_retrieve(reference.retrieve)


def retrieval_inputs(B=2, T=20, J=2, R=16, N=5) -> dict[str, torch.Tensor]:
    return there(
        dict(retrieval_q=random(B, T, J, R).float(), landmarks=random(B, N, J, R, seed=1).float())
    )


@grid
@given(
    B=st.integers(1, 2), T=st.integers(1, 20), J=st.integers(1, 2), R=st.sampled_from([16, 24,
    128]), N=st.integers(1, 12),
    top_k=st.integers(1, 9), chunk_size=st.sampled_from([1, 4]), offset=st.sampled_from([0, 3,
    1000]),
    weighting=st.sampled_from(["softmax", "stick_breaking"]), gumbel_seed=st.sampled_from([None, 0,
    (7 << 32) + 5]),
    exclude_window=st.sampled_from([0, 8]), query_block=st.sampled_from([1, 4]),
)  # fmt: skip
@example(
    B=1, T=9, J=1, R=16, N=200, top_k=70, chunk_size=4, offset=900, weighting="softmax",
    gumbel_seed=None, exclude_window=0,
    query_block=1,
)  # fmt: skip
def test_retrieve_equals_the_reference(B, T, J, R, N, **options):
    assert_as_exact(*RETRIEVE, retrieval_inputs(B, T, J, R, N), torch.float32, **options)


@pytest.mark.parametrize(
    "order", ["the older the better", "the newer the better", "all the same", "random"]
)
@pytest.mark.parametrize("gumbel_seed", [None, 5])
def test_retrieve_from_more_chunks_than_a_candidate_buffer_holds(monkeypatch, order, gumbel_seed):
    monkeypatch.setattr(retrieval, "CANDIDATES_BYTES", 1)  # as many launches as tiles of tokens
    inputs = retrieval_inputs(B=1, T=35, J=1, R=16, N=700)
    if order != "random":
        slope = {"the older the better": -0.01, "the newer the better": 0.01, "all the same": 0.0}[
            order
        ]
        one = (
            4 * inputs["landmarks"][:, :1]
        ).round() / 4  # its square is exact: equal scores are equal on every processor
        inputs["landmarks"] = (
            one * (1 + slope * torch.arange(700, device=DEVICE)[:, None, None])
        ).contiguous()
        inputs["retrieval_q"] = inputs["landmarks"][:, :1].expand(-1, 35, -1, -1).contiguous()
    options = dict(chunk_size=4, top_k=5, offset=2780, gumbel_seed=gumbel_seed)
    (got, weights), (want, exact_weights) = (
        RETRIEVE[0](**inputs, **options),
        RETRIEVE[1](**exact(inputs), **options),
    )
    assert torch.equal(got, want) and error(weights, exact_weights) < 1e-5


def test_retrieve_in_half_precision_chooses_by_unrounded_scores():
    inputs = there(retrieval_inputs(T=30, R=64, N=40), torch.float16)
    options = dict(chunk_size=4, top_k=5, offset=200)
    got, want = (results(f, x, **options) for f, x in zip(RETRIEVE, (inputs, exact(inputs))))
    assert torch.equal(got["output 0"], want["output 0"])
    assert error(got["output 1"], want["output 1"]) < 2e-6  # weights are float32
    for name in ("retrieval_q", "landmarks"):
        assert (
            error(got[f"gradient of {name}"], want[f"gradient of {name}"])
            < TOLERANCE[torch.float16]
        )


def test_sequences_may_stand_at_different_positions():
    offset = torch.tensor([0, 30], device=DEVICE)
    assert_as_exact(
        *RETRIEVE, retrieval_inputs(), torch.float32, chunk_size=4, top_k=3, offset=offset
    )


@pytest.mark.parametrize(
    "offset, dtype, options",
    [
        (0, torch.int64, {}),
        (200, torch.int32, dict(gumbel_seed=5, exclude_window=8)),
        (200, torch.int64, dict(query_block=4)),
    ],
)
def test_retrieve_keeps_to_the_document(offset, dtype, options):
    """Documents begin in front of the tokens, among them, inside a chunk, and one after another."""
    starts = document_starts([3, 8, 160, 208, 212], [16, 206], tokens=offset + 35)[:, offset:]
    options |= dict(chunk_size=4, top_k=3, offset=offset)
    options["document_starts"] = starts.to(DEVICE, dtype)
    assert_as_exact(*RETRIEVE, retrieval_inputs(T=35, J=1, N=56), torch.float32, **options)


@grid
@given(N=st.integers(1, 90), top_k=st.sampled_from([1, 3, 8]), seed=st.integers(0, 99))
def test_of_equal_scores_the_newest_chunk_is_kept(N, top_k, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = dict(
        retrieval_q=torch.randint(-1, 2, (1, 5, 1, 16), generator=generator).float(),
        landmarks=torch.randint(-1, 2, (1, N, 1, 16), generator=generator).float(),
    )
    assert_as_exact(*RETRIEVE, inputs, torch.float32, chunk_size=4, top_k=top_k, offset=4 * N - 2)


def test_equal_scores_of_either_sign_of_zero():
    q, landmarks = torch.ones(1, 1, 1, 16), torch.zeros(1, 6, 1, 16)
    landmarks[:, ::2] = -0.0
    indices, _ = hsa_kernels.retrieve(
        q.to(DEVICE), landmarks.to(DEVICE), chunk_size=4, top_k=3, offset=24
    )
    assert sorted(indices.flatten().tolist()) == [3, 4, 5]


def test_landmarks_that_are_not_visible_are_not_kept_whatever_they_hold():
    inputs = retrieval_inputs(T=6, N=8)
    want = hsa_kernels.retrieve(**inputs, chunk_size=4, top_k=3, offset=9)
    inputs["landmarks"][:, 3:] = float("nan")  # position 14 is the last: chunk 3 ends at 15
    assert_close(
        dict(enumerate(hsa_kernels.retrieve(**inputs, chunk_size=4, top_k=3, offset=9))),
        dict(enumerate(want)),
        0,
    )


@settings(max_examples=4)
@given(
    N=st.sampled_from([3, 9, 40]), top_k=st.integers(1, 9), seed=st.integers(0, 99),
    weighting=st.sampled_from(["softmax", "stick_breaking"]), query_block=st.sampled_from([1, 4]),
    gumbel_seed=st.sampled_from([None, 5]),
)  # fmt: skip
@example(N=3, top_k=8, seed=3, weighting="softmax", query_block=1, gumbel_seed=None)
@example(N=400, top_k=3, seed=0, weighting="softmax", query_block=4, gumbel_seed=None)
def test_retrieve_shows_nan_and_infinite_scores(N, seed, **options):
    q, landmarks, _ = with_special_scores(1, 12, 2, 16, N, seed=seed, dtype=torch.float32)
    inputs = there(dict(retrieval_q=q, landmarks=landmarks))
    options |= dict(chunk_size=1, offset=N - 5 if N > 5 else 0)
    (got, weights), (want, exact_weights) = (f(**inputs, **options) for f in RETRIEVE)
    assert torch.equal(got, want)
    torch.testing.assert_close(weights, exact_weights, equal_nan=True)


@settings(max_examples=6)
@given(
    N=st.sampled_from([3, 9, 70]), top_k=st.integers(1, 9), seed=st.integers(0, 99),
    value=st.sampled_from([float("nan"), -float("nan"), float("inf"), -float("inf")]),
    share=st.sampled_from([0.1, 1.0]),
)  # fmt: skip
@example(N=1500, top_k=3, seed=0, value=float("nan"), share=0.001)
@example(N=1500, top_k=3, seed=1, value=-float("nan"), share=0.001)
def test_decode_shows_nan_and_infinite_scores(N, top_k, seed, value, share):
    """A score of -inf gives no weight, also where there is no other."""
    inputs = decode_inputs(N=N)
    spoiled = torch.rand(2, N, 2, generator=torch.Generator().manual_seed(seed)) < share
    for name in ("retrieval_q", "landmarks"):
        inputs[name][..., 1:] = 0.0
    inputs["retrieval_q"].abs_()
    inputs["landmarks"][..., 0].masked_fill_(spoiled.to(DEVICE), value)
    options = dict(chunk_size=16, top_k=top_k, offset=16 * N - 5)
    got, want = (f(**inputs, **options) for f in (hsa_kernels.decode, reference.decode))
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["q", "k", "v", "weights"])
@pytest.mark.parametrize("schedule", [by_chunk, by_token_block])
def test_chunk_attention_never_hides_what_is_not_a_number(schedule, name):
    """A token whose result is not finite in the reference is not finite in any schedule."""
    inputs = attention_inputs()
    inputs[name].view(-1)[:: inputs[name].numel() // 3 - 1] = float("nan")
    inputs["weights"].masked_fill_(inputs["indices"] < 0, 0.0)
    want = reference.chunk_attention(**inputs)
    got = schedule.forward(*inputs.values(), 16**-0.5)
    assert (~want.isfinite()).any() and not (got.isfinite() & ~want.isfinite()).any()


def expert_inputs(M=9, C=16, H=5, E=3) -> dict[str, torch.Tensor]:
    shapes = dict(x=(M, C), up_and_gate=(E, C, 2 * H), down=(E, H, C))
    inputs = {name: random(*shape, dtype=torch.float32) for name, shape in shapes.items()}
    names = ("expert_offsets", "token_indices", "inverse_order", "topk_scores")
    choice = reference.dispatch(random(M, E, dtype=torch.float32), torch.zeros(E), 2)
    return there(inputs | dict(zip(names, choice)))


def decode_inputs(B=2, J=2, G=2, D=16, R=16, N=9, S=16) -> dict[str, torch.Tensor]:
    shapes = dict(
        retrieval_q=(B, 1, J, R),
        landmarks=(B, N, J, R),
        q=(B, 1, J * G, D),
        k=(B, N, S, J, D),
        v=(B, N, S, J, D),
    )
    return there(
        {name: random(*shape, seed=i).float() for i, (name, shape) in enumerate(shapes.items())}
    )


@grid
@given(
    B=st.integers(1, 2), J=st.integers(1, 3), G=st.sampled_from([1, 3, 16]), D=st.sampled_from([16,
    24, 64]),
    R=st.sampled_from([16, 48]), N=st.sampled_from([1, 5, 64, 130]), S=st.sampled_from([16, 24]),
    top_k=st.sampled_from([1, 4, 9]),
    short=st.integers(0, 40), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@example(B=1, J=1, G=1, D=16, R=16, N=200, S=16, top_k=80, short=3, dtype=torch.float32)
# More blocks than are kept.
@example(B=1, J=2, G=2, D=16, R=16, N=1500, S=16, top_k=3, short=5000, dtype=torch.float32)
def test_decode_equals_the_reference(B, J, G, D, R, N, S, top_k, short, dtype):
    inputs = there(decode_inputs(B, J, G, D, R, N, S), dtype)
    options = dict(chunk_size=S, top_k=top_k, offset=max(N * S - short, 0))
    want = reference.decode(**exact(inputs), **options)
    complete = options["offset"] // S
    for name in ("landmarks", "k", "v"):  # what is not complete yet may hold anything
        inputs[name][:, complete:] = float("nan")
    got = hsa_kernels.decode(**inputs, **options)
    assert got.isfinite().all() and error(got, want) < TOLERANCE[dtype]


def test_decode_at_different_positions_and_before_the_first_chunk():
    inputs = decode_inputs()
    options = dict(chunk_size=16, top_k=3, offset=torch.tensor([7, 140], device=DEVICE))
    got, want = (
        hsa_kernels.decode(**inputs, **options),
        reference.decode(**exact(inputs), **options),
    )
    assert error(got, want) < 2e-6 and not got[0].any()


@grid
@given(
    J=st.integers(1, 3), G=st.sampled_from([1, 3, 16]), D=st.sampled_from([16, 24, 64]),
    W=st.integers(1, 200),
    positions=st.lists(st.integers(0, 500), min_size=1, max_size=3), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_window_decode_attention_equals_the_sliding_window(J, G, D, W, positions, dtype):
    """Over the same keys in order of time. Slots that are not filled yet may hold anything."""
    B = len(positions)
    q, *caches = (
        random(B, n, heads, D, seed=i).to(DEVICE, dtype)
        for i, (n, heads) in enumerate(((1, J * G), (W, J), (W, J)))
    )
    for b, position in enumerate(positions):
        for cache in caches:
            cache[b, position + 1 :] = float("nan")
    got = hsa_kernels.window_decode_attention(q, *caches, torch.tensor(positions, device=DEVICE))
    assert got.isfinite().all()
    for b, position in enumerate(positions):
        slots = torch.arange(max(position - W + 1, 0), position + 1) % W
        k, v = (cache[b : b + 1, slots].double() for cache in caches)
        want = reference.sliding_window_attention(q[b : b + 1].double(), k, v, window=W)
        assert error(got[b : b + 1], want) < TOLERANCE[dtype]
        tidy = [cache.nan_to_num(0.0).double() for cache in caches]
        assert (
            error(
                torch_backend.window_decode_attention(
                    q.double(), *tidy, torch.tensor(positions, device=DEVICE)
                )[b : b + 1],
                want,
            )
            < 1e-12
        )


@grid
@given(
    J=st.integers(1, 3), G=st.sampled_from([1, 3, 16]), D=st.sampled_from([16, 24, 64]),
    W=st.integers(1, 20),
    slots=st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=3), dtype=st.sampled_from(DTYPES),
    normed=st.booleans(),
)  # fmt: skip
def test_update_window_cache_equals_the_torch_backend(J, G, D, W, slots, dtype, normed):
    B = len(slots)
    shapes = dict(
        q=(B, 1, J * G, D),
        k=(B, 1, J, D),
        v=(B, 1, J, D),
        cache_k=(B, W, J, D),
        cache_v=(B, W, J, D),
    )
    inputs = there(
        {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}, dtype
    )
    gains = {
        name: random(D, seed=i).to(DEVICE, dtype) if normed else None
        for i, name in enumerate(("q_gain", "k_gain"))
    }
    table = tuple(part.to(DEVICE) for part in rope_table(torch.tensor(slots)[:, None], D, 100.0))
    options = dict(slots=torch.tensor(slots, device=DEVICE) % W, eps=1e-6)
    twin = {name: x if x is None else x.double() for name, x in (inputs | gains).items()}
    got = hsa_kernels.update_window_cache(**inputs, **gains, **options, table=table)
    want = torch_backend.update_window_cache(**twin, **options, table=table)
    for a, b in (
        (got, want),
        (inputs["cache_k"], twin["cache_k"]),
        (inputs["cache_v"], twin["cache_v"]),
    ):
        assert error(a, b) < TOLERANCE[dtype]


@grid
@given(
    M=st.integers(1, 64),
    E=st.integers(1, 70),
    A=st.integers(1, 6),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
)
def test_dispatch_hands_over_what_the_reference_does(M, E, A, seed, dtype):
    A = min(A, E)
    scores, bias = (
        random(M, E, seed=seed).to(DEVICE, dtype),
        random(E, seed=seed + 1).to(DEVICE, torch.float32),
    )
    offsets, tokens, inverse_order, topk_scores = hsa_kernels.dispatch(scores, bias, A)
    want = reference.dispatch(scores, bias, A)
    assert torch.equal(offsets, want[0]) and torch.equal(tokens, want[1])
    # A token's experts come in any order.
    order = inverse_order.argsort(-1)
    twin = want[2].argsort(-1)
    assert torch.equal(inverse_order.gather(-1, order), want[2].gather(-1, twin))
    assert error(topk_scores.gather(-1, order), want[3].gather(-1, twin)) < 2e-6


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_dispatch_chooses_no_expert_twice_whatever_the_scores_and_the_bias(value):
    M, E, A = 6, 5, 4
    scores = random(M, E, dtype=torch.float32)
    bias = torch.zeros(E)
    scores[1] = value
    scores[2, :3] = value
    scores[3, 4] = value
    bias[3] = value
    for got in (
        hsa_kernels.dispatch(scores.to(DEVICE), bias.to(DEVICE), A),
        reference.dispatch(scores, bias, A),
    ):
        offsets, tokens, inverse_order, topk_scores = (x.cpu() for x in got)
        experts = torch.searchsorted(offsets, inverse_order, right=True)  # [M, A]
        assert all(len(set(row)) == A for row in experts.tolist())
        assert torch.equal(inverse_order.flatten().sort().values, torch.arange(M * A))
        assert torch.equal(tokens[inverse_order], torch.arange(M)[:, None].expand(M, A))
        if value != value:
            assert topk_scores[1:4].isnan().all() and topk_scores[[0, 4, 5]].isfinite().all()


@grid
@given(
    M=st.integers(1, 30), C=st.sampled_from([16, 40, 600]), H=st.sampled_from([8, 24, 40]),
    E=st.integers(1, 9),
    A=st.integers(1, 4), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@example(M=3, C=16, H=600, E=1, A=1, dtype=torch.float32)
@example(M=9, C=1032, H=8, E=9, A=2, dtype=torch.float32)
def test_grouped_experts_equal_each_expert_alone(M, C, H, E, A, dtype):
    A = min(A, E)
    weights = dict(
        up_and_gate=random(E, C, 2 * H, seed=1) * C**-0.5, down=random(E, H, C, seed=2) * H**-0.5
    )
    inputs = there(dict(x=random(M, C)) | weights, dtype)
    choice = reference.dispatch(
        random(M, E, seed=3).to(DEVICE, torch.float32), torch.zeros(E, device=DEVICE), A
    )
    got = hsa_kernels.grouped_experts(inputs["x"], *choice, inputs["up_and_gate"], inputs["down"])
    offsets, _, inverse_order, topk_scores = choice
    twin = exact(inputs)
    want = []
    for m in range(M):
        chosen = torch.searchsorted(offsets, inverse_order[m], right=True)  # [A]
        up, gate = torch.einsum("c,ach->ah", twin["x"][m], twin["up_and_gate"][chosen]).chunk(
            2, dim=-1
        )
        want.append(
            torch.einsum(
                "ah,ahc,a->c", up * silu(gate), twin["down"][chosen], topk_scores[m].double()
            )
        )
    assert error(got, torch.stack(want)) < TOLERANCE[dtype]


def test_decode_keeps_the_newest_of_equal_scores():
    inputs = decode_inputs(B=1, J=1, N=1500)  # more blocks than are kept, too
    inputs["landmarks"] = inputs["landmarks"][:, :1].expand(-1, 1500, -1, -1).contiguous()
    options = dict(chunk_size=16, top_k=5, offset=24000)
    assert (
        error(hsa_kernels.decode(**inputs, **options), reference.decode(**exact(inputs), **options))
        < 2e-6
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_custom_operators_keep_their_promises():
    """Schema, fake tensors, autograd registration and tracing, as PyTorch checks them."""
    inputs = attention_inputs(T=3, N=2, K=2)
    leaves = [
        inputs[name].requires_grad_(name in ["q", "k", "v", "weights"])
        for name in ("q", "k", "v", "indices", "weights")
    ]
    torch.library.opcheck(torch.ops.hsa_kernels.chunk_attention.default, (*leaves, 0.3))
    inputs = retrieval_inputs(T=9, N=2)
    leaves = [x.requires_grad_() for x in inputs.values()]
    # The fourth check adds up outputs, integers too.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.hsa_kernels.retrieve.default,
        (*leaves, None, 0, 1, 4, 2, 0, None, None),
        test_utils=checks,
    )


def test_a_whole_graph_is_captured():
    inputs, memory = retrieval_inputs(T=9, N=3), attention_inputs(T=9, N=3)

    def layer(retrieval_q, landmarks, q, k, v):
        indices, weights = hsa_kernels.retrieve(retrieval_q, landmarks, chunk_size=2, top_k=2)
        return hsa_kernels.chunk_attention(q, k, v, indices, weights)

    named = {**inputs, **{name: memory[name] for name in "qkv"}}
    got = results(torch.compile(layer, fullgraph=True, backend="aot_eager"), named)
    assert_close(got, results(layer, named), 1e-6)


def test_flops_are_counted():
    inputs = attention_inputs(B=1, T=4, J=1, G=2, D=16, N=3, S=16, K=2)
    inputs["q"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = hsa_kernels.chunk_attention(**inputs)
    # Two products of B*T*H*K*S*D multiply-adds.
    assert counter.get_total_flops() == 4 * 1 * 4 * 2 * 2 * 16 * 16
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 10 * 1 * 4 * 2 * 2 * 16 * 16  # five


def moved(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in another order of memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def many(x: torch.Tensor) -> torch.Tensor:
    """2,000 times the chunks."""
    return x.repeat_interleave(2000, 1)


@pytest.mark.parametrize(
    ("operation", "changes", "message"),
    [
        ("chunk_attention", dict.fromkeys("qkv", torch.Tensor.double),
        "q: got torch.float64, accepted are float16"),
        ("chunk_attention", dict(weights=torch.Tensor.double),
        "weights: got torch.float64, accepted is float32"),
        ("chunk_attention", dict(q=moved), "q: got strides"),
        ("chunk_attention", dict(k=moved), "k: got strides"),
        ("chunk_attention", dict(indices=moved), "indices: got strides"),
        ("chunk_attention", {name: lambda x: x[..., :8].contiguous() for name in "qkv"},
        "q: got D=8, accepted are 16 to 256"),
        ("chunk_attention", {name: lambda x: x[:, :, :8].contiguous() for name in "kv"},
        "k: got S=8, accepted are 16 to 128"),
        ("chunk_attention", dict(q=lambda x: x.repeat(1, 1, 65, 1)),
        "q: got H/J=130, accepted are 1 to 64"),
        ("chunk_attention", dict(v=lambda x: x[:, :3]), "v: got shape"),
        ("retrieve", dict(landmarks=moved), "landmarks: got strides"),
        ("retrieve", dict.fromkeys(("retrieval_q", "landmarks"), torch.Tensor.double),
        "retrieval_q: got torch.float64"),
        ("retrieve", {"landmarks": many, "top_k": lambda _: 9000}, "top_k: got K=9000"),
        ("decode", dict(v=moved), "v: got strides"),
        ("decode", dict(q=lambda x: x.repeat(1, 2, 1, 1)), "q: got shape"),
        ("decode", dict.fromkeys(("landmarks", "k", "v"), many) | {"top_k": lambda _: 2500},
        "top_k: got K=2500"),
        ("grouped_experts", {},
        "down: got H=5 and C=16 with 9 tokens, accepted are multiples of 4"),
    ],
)  # fmt: skip
def test_what_a_kernel_does_not_take(operation, changes, message):
    inputs, options = {
        "chunk_attention": (attention_inputs, {}),
        "retrieve": (retrieval_inputs, dict(chunk_size=4, top_k=2)),
        "grouped_experts": (expert_inputs, {}),
        "decode": (decode_inputs, dict(chunk_size=16, top_k=2, offset=20)),
    }[operation]
    arguments = inputs() | options
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(hsa_kernels, operation)(**arguments)


@pytest.mark.parametrize(
    "versions, works",
    [(("3.6.0", "2.4.6"), False), (("3.6.0", "2.3.5"), True), (("3.7.1", "2.5.0"), True)],
)
def test_an_interpreter_that_would_fail_is_refused_in_one_line(monkeypatch, versions, works):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    for module, version in zip((triton, np), versions):
        monkeypatch.setattr(module, "__version__", version)
    if works:
        return check_interpreter()
    said = "got triton 3.6.0 with numpy 2.4.6, accepted is triton from 3.7 on, or numpy below 2.4$"
    with pytest.raises(ImportError, match=said):
        check_interpreter()
