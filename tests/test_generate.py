"""Early-exit prefill is the full forward pass, and decoding after it goes on as if everything had
been read at once.

Dimensions: B=2 batch, T tokens, S=4 chunk size, W=8 window: the `debug` preset and each option of
it. Its upper decoder needs the last 29 tokens, and up to 6 more where tokens choose in blocks.
"""

import pytest
import torch
from helpers import assert_close, living_bytes
from material import DENSE, build, every_dense_option, every_option, in_segments, text

from hsa_mini import PRESETS, ChunkMemory, HSAModel
from hsa_mini.inference.generate import continue_from, generate, stream
from hsa_mini.inference.prefill import prefill
from hsa_mini.inference.sampling import Decoding, choose, probabilities

DEBUG = PRESETS["debug"]
S = DEBUG.chunk_size
SIZES = [(option, torch.float64, 1e-10) for option in DENSE] + [
    (o, torch.float32, 1e-5) for o in ("default", "experts")
]


def steps(model: HSAModel, output, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last token read and after each of ids [B, n], decoded one by one on top of a
    prefill.
    """
    logits = [output.logits]
    for token in ids.split(1, dim=1):
        logits.append(model(token, output.memory).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("option, dtype, bound", SIZES)
@torch.no_grad()
def test_prefill_equals_the_full_forward_pass_and_so_does_what_is_decoded_after_it(
    option, dtype, bound
):
    model = build(option, dtype)
    for T, segments in (
        (1, [1]),
        (3, [7]),
        (29, [1]),
        (30, [64]),
        (34, [7]),
        (61, [7, 61]),
        (100, [64, 100]),
    ):
        ids = text(T + 6)
        want = model(ids).logits[:, T - 1 :]
        for segment in segments:
            output = prefill(model, ids[:, :T], segment=segment)
            assert output.logits.shape[1] == 1 and output.memory.position == T
            assert_close(steps(model, output, ids[:, T:]), want, bound)


@every_dense_option
@torch.no_grad()
def test_logits_of_several_last_tokens_are_those_of_the_full_forward_pass(option):
    model, ids = build(option, torch.float64), text(100)
    whole, memory = model(ids).logits, prefill(model, ids[:, :45], segment=16).memory
    for last in (2, 33, 55):
        assert_close(prefill(model, ids, last=last, segment=16).logits, whole[:, -last:], 1e-10)
        assert_close(
            prefill(model, ids[:, 45:], memory.fork(), last=last).logits, whole[:, -last:], 1e-10
        )
    lengths = torch.tensor([100, 60])
    ragged = prefill(model, ids, lengths=lengths, last=20).logits
    assert_close(ragged[1:], model(ids[1:, 40:]).logits[:, -20:], 1e-10)


@every_option
@torch.no_grad()
def test_segments_of_any_length_give_the_same_logits_in_float32(option):
    model, T = build(option, torch.float32), 150
    ids = text(T)
    whole = model(ids).logits
    for size in (1, 7, 64, T):
        assert (in_segments(model, ids, size) - whole).abs().max() <= 1e-5
        assert (prefill(model, ids, segment=size).logits - whole[:, -1:]).abs().max() <= 1e-5


@pytest.mark.parametrize("size", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@torch.no_grad()
def test_prefill_equals_the_full_forward_pass_at_the_size_of_nano(size):
    dtype, bound = size
    torch.manual_seed(0)
    model = HSAModel(PRESETS["nano"], dtype=dtype).eval()
    ids = torch.randint(4096, (1, 333))
    want = model(ids).logits[:, 299:]
    for segment in (64, 300):
        assert_close(
            steps(model, prefill(model, ids[:, :300], segment=segment), ids[:, 300:]), want, bound
        )


@every_dense_option
@torch.no_grad()
def test_greedy_decoding_is_the_same_token_for_token(option):
    model = build(option)
    ids = text(58)
    want = ids
    for _ in range(8):
        want = torch.cat((want, model(want).logits[:, -1:].argmax(dim=-1)), dim=1)
    for segment in (7, 64):
        assert torch.equal(
            generate(model, ids, max_new_tokens=8, segment=segment).ids, want[:, 58:]
        )
    assert torch.equal(model.generate(ids, max_new_tokens=8).ids, want[:, 58:])


@pytest.mark.parametrize(
    "option", ["default", "query block", "query block, exclude window", "exclude window", "bypass"]
)
@torch.no_grad()
def test_a_second_turn_equals_one_long_prefill(option):
    model = build(option)
    ids = text(130)
    for T, first, segment in (
        (80, 3, 7),
        (80, 45, 64),
        (80, 79, 7),
        (120, 7, 64),
        (120, 60, 9),
        (31, 30, 64),
    ):
        want = steps(model, prefill(model, ids[:, :T]), ids[:, T : T + 5])
        memory = prefill(model, ids[:, :first], segment=segment).memory
        output = prefill(model, ids[:, first:T], memory, segment=segment)
        assert output.memory is memory and memory.position == T
        assert_close(steps(model, output, ids[:, T : T + 5]), want, 1e-10)


@torch.no_grad()
def test_a_conversation_equals_the_text_that_it_makes():
    """The last token generated has been said, not read: the next turn begins with it."""
    model, ids = build(), text(70)
    first = generate(model, ids[:, :40], max_new_tokens=5)
    assert first.memory.position == 44
    second = generate(
        model,
        torch.cat((first.ids[:, -1:], ids[:, 40:]), dim=1),
        max_new_tokens=5,
        memory=first.memory,
    )
    whole = torch.cat((ids[:, :40], first.ids, ids[:, 40:]), dim=1)
    assert torch.equal(second.ids, generate(model, whole, max_new_tokens=5).ids)


@torch.no_grad()
def test_what_a_prefill_keeps_is_the_chunk_memory_and_nothing_else_that_grows():
    model = build(dtype=torch.float32)
    kept, alive = [], []
    upper_decoder = model.upper_decoder

    def watched(hidden, *arguments, **options):
        kept.append(hidden.shape[1])
        alive.append(living_bytes())
        return upper_decoder(hidden, *arguments, **options)

    model.upper_decoder = watched
    for T in (1000, 3000):
        output = prefill(model, text(T), segment=100)
        assert output.memory.tail.untyped_storage().nbytes() <= 2 * S * DEBUG.width * 4
        del output
    assert kept == [DEBUG.upper_tail] * 2
    chunk = (
        S * DEBUG.hsa_kv_heads * DEBUG.hsa_head_dim * 2
        + DEBUG.retrieval_heads * DEBUG.retrieval_dim
    )
    memory = 2 * (2000 // S) * chunk * 4  # two sequences of float32
    ids = 2 * 2000 * 8
    assert alive[1] - alive[0] == memory + ids
    # Keeping hidden states would be seen.
    assert 2 * 2000 * DEBUG.width * 4 > 2 * (alive[1] - alive[0] - memory)


@torch.no_grad()
def test_after_a_prefill_window_caches_hold_no_more_than_a_segment():
    model = build(dtype=torch.float32)
    memory = prefill(model, text(3000), segment=100).memory
    for cache in (*memory.lower, *memory.upper):
        for part in (cache.k, cache.v):
            assert part.shape[1] == DEBUG.window
            slots = 2 * DEBUG.window  # of two sequences
            assert part.untyped_storage().nbytes() == slots * DEBUG.kv_heads * DEBUG.head_dim * 4


@torch.no_grad()
def test_chunks_complete_while_decoding_and_can_be_retrieved():
    model = build(top_k=100)
    output = prefill(model, text(30))
    for t in range(30, 30 + 3 * S):
        output = model(text(1, seed=t), output.memory)
        assert len(output.memory.chunks) == (t + 1) // S
        for retrieval in output.aux.retrievals:
            kept = set(retrieval.indices.flatten().tolist()) - {-1}
            assert kept == set(range(t // S))  # token t sees the chunks that end before it


@torch.no_grad()
def test_the_retrieval_reported_is_that_of_the_last_prompt_token():
    model, ids = build(), text(77)
    got = generate(model, ids, max_new_tokens=3).first.retrievals
    want = model(ids).aux.retrievals
    assert len(got) == len(want) == DEBUG.groups
    for a, b in zip(got, want):
        assert torch.equal(a.indices[:, -1].sort(-1).values, b.indices[:, -1].sort(-1).values)
        assert_close(a.queries[:, -1], b.queries[:, -1], 1e-10)


@torch.no_grad()
def test_sampling_is_a_function_of_the_seed():
    model, ids = build(), text(40)

    def sample(**options):
        return generate(model, ids, max_new_tokens=20, **options).ids

    state = torch.get_rng_state()
    assert torch.equal(sample(temperature=1.0, seed=1), sample(temperature=1.0, seed=1))
    assert not torch.equal(sample(temperature=1.0, seed=1), sample(temperature=1.0, seed=2))
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are used up
    assert torch.equal(sample(), sample(seed=5))
    assert torch.equal(sample(temperature=1e-4, seed=3), sample())  # cold enough it is greedy


# Of tokens 0 to 4 at temperature 1; worked out by hand below.
CHANCES = [1 / 16, 1 / 2, 1 / 8, 1 / 4, 1 / 16]
FILTERED = [
    (dict(temperature=1.0), CHANCES),
    (dict(temperature=0.5), [1 / 86, 64 / 86, 4 / 86, 16 / 86, 1 / 86]),
    (dict(temperature=1.0, top_k=0), CHANCES),
    (dict(temperature=1.0, top_k=1), [0, 1, 0, 0, 0]),
    (dict(temperature=1.0, top_k=3), [0, 4 / 7, 1 / 7, 2 / 7, 0]),
    (dict(temperature=0.5, top_k=2), [0, 4 / 5, 0, 1 / 5, 0]),
    # A tie: the lower id stays.
    (dict(temperature=1.0, top_k=4), [1 / 15, 8 / 15, 2 / 15, 4 / 15, 0]),
    (dict(temperature=1.0, top_k=5), CHANCES),
    (dict(temperature=1.0, top_k=99), CHANCES),
    (dict(temperature=1.0, top_p=0.0), [0, 1, 0, 0, 0]),
    (dict(temperature=1.0, top_p=0.49), [0, 1, 0, 0, 0]),
    (dict(temperature=1.0, top_p=0.51), [0, 2 / 3, 0, 1 / 3, 0]),
    (dict(temperature=1.0, top_p=0.74), [0, 2 / 3, 0, 1 / 3, 0]),
    (dict(temperature=1.0, top_p=0.76), [0, 4 / 7, 1 / 7, 2 / 7, 0]),
    (dict(temperature=1.0, top_p=0.93), [1 / 15, 8 / 15, 2 / 15, 4 / 15, 0]),
    (dict(temperature=1.0, top_p=0.94), CHANCES),
    # Temperature first: 64/86 is more than 0.74, 1/2 was less.
    (dict(temperature=0.5, top_p=0.74), [0, 1, 0, 0, 0]),
    # Top-k before top-p: 4/7 is more than 0.57.
    (dict(temperature=1.0, top_k=3, top_p=0.57), [0, 1, 0, 0, 0]),
    (dict(temperature=1.0, top_k=2, top_p=0.7), [0, 2 / 3, 0, 1 / 3, 0]),
    # 16/21 is less than 0.8, 20/21 more.
    (dict(temperature=0.5, top_k=3, top_p=0.8), [0, 4 / 5, 0, 1 / 5, 0]),
]


@pytest.mark.parametrize("options, want", FILTERED, ids=str)
def test_draws_follow_the_filtered_distribution(options, want):
    want = torch.tensor(want, dtype=torch.float64)
    # What is added to all logits changes nothing.
    logits = torch.tensor(CHANCES, dtype=torch.float64).log() + 3
    got = probabilities(logits.expand(2, 5), **options)
    assert torch.equal(got == 0, (want == 0).expand(2, 5))  # the support is exact
    assert torch.allclose(got, want.expand(2, 5), rtol=1e-12, atol=0)
    drawn = choose(
        logits.expand(40_000, 5),
        Decoding(max_new_tokens=1, **options),
        torch.Generator().manual_seed(0),
    )
    share = drawn.flatten().bincount(minlength=5) / 40_000
    # 4.8 deviations.
    assert (share[want == 0] == 0).all() and torch.allclose(
        share.double(), want, rtol=0, atol=0.012
    )


def test_of_equal_logits_the_lowest_ids_stay():
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.zeros(1, 4096, dtype=dtype)
        for options in (dict(top_k=1024), dict(top_p=0.24999), dict(top_k=2048, top_p=0.4999)):
            got = probabilities(logits, temperature=1.0, **options)
            assert torch.equal(
                got, torch.tensor([1 / 1024] * 1024 + [0] * 3072, dtype=torch.float64)[None]
            )
        assert (
            choose(logits, Decoding(max_new_tokens=1), None)
            == probabilities(logits, temperature=1.0, top_k=1).argmax()
            == 0
        )


def test_no_temperature_is_too_small_or_too_large():
    logits = torch.tensor([[3e4, -3e4, 0.0]])
    assert probabilities(logits, temperature=5e-324).tolist() == [[1, 0, 0]]
    assert torch.allclose(
        probabilities(logits, temperature=1e300), torch.full((1, 3), 1 / 3, dtype=torch.float64)
    )


@torch.no_grad()
def test_sampled_text_keeps_to_the_filters_at_every_step():
    model, ids = build(), text(40)
    drawn = model.generate(ids, max_new_tokens=40, temperature=2.0, top_k=3, seed=1).ids
    logits = model(torch.cat((ids, drawn), dim=1)).logits[:, 39:-1]
    ranks = (logits > logits.gather(-1, drawn[..., None])).sum(-1)
    assert sorted(set(ranks.flatten().tolist())) == [0, 1, 2]
    greedy = model.generate(ids, max_new_tokens=40).ids
    for options in (dict(top_k=1), dict(top_p=0.0)):
        assert torch.equal(
            model.generate(ids, max_new_tokens=40, temperature=2.0, **options).ids, greedy
        )


@torch.no_grad()
def test_decoding_ends_when_every_sequence_has_stopped():
    model, ids = build(), text(58)
    free = generate(model, ids, max_new_tokens=12).ids
    ends = [free[0, 2].item(), free[1, 7].item()]
    places = [next(i for i in range(12) if free[b, i].item() in ends) for b in (0, 1)]
    assert places[0] != places[1]
    got = generate(model, ids, max_new_tokens=12, stop=tuple(ends)).ids
    assert got.shape == (2, max(places) + 1)
    for b in (0, 1):  # whoever ends first repeats its stop token until the other has ended
        want = [
            *free[b, : places[b] + 1].tolist(),
            *[free[b, places[b]].item()] * (max(places) - places[b]),
        ]
        assert got[b].tolist() == want
    for b in (0, 1):
        alone = generate(model, ids[b : b + 1], max_new_tokens=12, stop=tuple(ends)).ids
        assert torch.equal(alone, free[b : b + 1, : places[b] + 1])
    never = next(i for i in range(DEBUG.vocab_size) if i not in free)
    assert torch.equal(generate(model, ids, max_new_tokens=12, stop=(never,)).ids, free)


@torch.no_grad()
def test_a_sequence_that_has_ended_changes_nothing_for_the_others():
    model, ids = build(), text(58)
    options = dict(max_new_tokens=30, temperature=1.5, seed=4)
    free = generate(model, ids, **options).ids
    for b in (0, 1):
        end = next(i for i in free[b].tolist() if i not in free[1 - b])
        got = generate(model, ids, stop=(end,), **options).ids
        assert torch.equal(got[1 - b], free[1 - b])
        assert torch.equal(got[b, free[b].tolist().index(end) :].unique(), torch.tensor([end]))


def test_a_stream_is_what_generate_returns_and_makes_a_token_when_it_is_asked_for():
    model, ids = build(), text(58)
    end = generate(model, ids[:1], max_new_tokens=4).ids[0, 3].item()
    for options in ({}, dict(temperature=1.0, top_k=50, top_p=0.9, seed=2), dict(stop=(end,))):
        want = generate(model, ids, max_new_tokens=12, **options)
        memory = ChunkMemory(DEBUG)
        tokens = stream(model, ids, max_new_tokens=12, memory=memory, **options)
        for i, token in enumerate(tokens):
            assert torch.equal(token, want.ids[:, i : i + 1]) and memory.position == 58 + i
            assert torch.is_grad_enabled() and not memory.chunks.k.requires_grad
        assert i + 1 == want.ids.shape[1] and want.memory.position == memory.position


@pytest.mark.parametrize("taken", [0, 1, 5, 11])
@torch.no_grad()
def test_a_stream_that_is_closed_early_can_be_gone_on_from(taken):
    model, ids = build("query block"), text(57)
    want = generate(model, ids, max_new_tokens=12)
    memory = ChunkMemory(model.config)
    tokens = stream(model, ids, max_new_tokens=12, memory=memory)
    got = [next(tokens) for _ in range(taken)]
    tokens.close()
    assert memory.position == 57 + max(taken - 1, 0)
    if taken:
        got.append(generate(model, got[-1], max_new_tokens=12 - taken, memory=memory).ids)
        assert torch.equal(torch.cat(got, dim=1), want.ids)
    after = text(20, seed=3)
    said = torch.cat((ids, want.ids[:, :11] if taken else ids[:, :0], after), dim=1)
    assert_close(model(after, memory).logits, model(said).logits[:, -20:], 1e-10)


@torch.no_grad()
def test_decoding_can_go_on_from_one_prefill_in_several_ways():
    model, ids = build(), text(58)
    output = prefill(model, ids)
    branch = output._replace(memory=output.memory.fork())
    free = continue_from(model, branch, max_new_tokens=9).ids
    assert torch.equal(continue_from(model, output, max_new_tokens=9).ids, free)


@pytest.mark.parametrize("query_block", [1, 2, 4])
def test_the_tail_begins_with_a_block_of_tokens_that_choose_together(query_block):
    model = build(query_block=query_block)
    for tokens in range(1, 80):
        start = model.config.tail_start(tokens)
        assert start % query_block == 0
        assert (
            start == 0 or tokens - start >= model.config.upper_tail > tokens - start - query_block
        )
        assert start > 0 or tokens <= model.config.upper_tail + query_block - 1


def test_progress_counts_every_token_once():
    model, seen = build(), []
    generate(model, text(50), max_new_tokens=3, segment=16, progress=seen.append)
    assert seen == [16, 16, 16, 2]


@pytest.mark.parametrize("batch, segments", [(1, [1024, 76]), (2, [512, 512, 76])])
def test_on_a_cpu_all_sequences_together_are_read_1024_tokens_at_a_time(batch, segments):
    model, seen = build(), []
    prefill(model, text(1100)[:batch], progress=seen.append)
    assert seen == segments


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_new_tokens=0), "max_new_tokens: got 0, accepted is an integer of at least 1"),
        (dict(max_new_tokens=2.0), "max_new_tokens: got 2.0"),
        (dict(temperature=-0.1), r"temperature: got -0.1, accepted is 0 \(greedy\) or more"),
        (dict(temperature=float("nan")), "temperature: got nan"),
        (dict(temperature=float("inf")), "temperature: got inf"),
        (dict(top_k=-1), "top_k: got -1, accepted is an integer of at least 0"),
        (dict(top_k=2.5), "top_k: got 2.5"),
        (dict(top_p=-0.1), "top_p: got -0.1, accepted is 0 to 1"),
        (dict(top_p=1.1), "top_p: got 1.1"),
        (dict(top_p=float("nan")), "top_p: got nan"),
        (dict(seed=-1), "seed: got -1, accepted is an integer of at least 0"),
        (dict(seed=1.0), "seed: got 1.0"),
        (dict(seed=1 << 63), r"seed: got 9223372036854775808, accepted is .* below 2\*\*63"),
        (dict(stop=5), "stop: got 5, accepted is a tuple of token ids"),
        (dict(stop=("a",)), r"stop: got \('a',\)"),
        (
            dict(ids=text(0)),
            r"ids: got \[2, 0\].*accepted is an int64 tensor .* at least one token",
        ),
        (dict(ids=[[1, 2]]), "ids: got list, accepted is"),
        (dict(ids=torch.tensor(3)), r"ids: got \[\]"),
        (dict(ids=text(9).int()), "ids: got .*int32"),
        (dict(ids=text(9) + 512), "ids: got 521 to 984, accepted are 0 to 511"),
        (dict(ids=text(9) - 512), "ids: got -.* accepted are 0 to 511"),
        (dict(ids=text(9)[:1]), r"memory: got a batch of 2, accepted is that of ids \(1\)"),
        (dict(segment=0), "segment: got 0, accepted is an integer of at least 1"),
        (dict(segment=8.0), "segment: got 8.0"),
    ],
)
@torch.no_grad()
def test_wrong_arguments_are_refused_before_anything_is_read(options, message):
    model, ids = build(), text(58)
    memory = prefill(model, ids[:, :40]).memory
    for function in (model.generate, lambda ids, **options: stream(model, ids, **options)):
        with pytest.raises(ValueError, match=f"^{message}") as caught:
            function(**{"ids": ids[:, 40:], "max_new_tokens": 2, "memory": memory, **options})
        assert "\n" not in str(caught.value) and memory.position == 40
    got = model.generate(
        ids[:, 40:], max_new_tokens=3, memory=memory
    ).ids  # as if nothing had happened
    assert torch.equal(got, model.generate(ids, max_new_tokens=3).ids)


@torch.no_grad()
def test_no_more_logits_than_tokens():
    for last in (0, 41, 1.0):
        with pytest.raises(
            ValueError, match=f"^last: got {last}, accepted is an integer of 1 to 40"
        ):
            prefill(build(), text(58), lengths=torch.tensor([40, 58]), last=last)


@torch.no_grad()
def test_a_memory_of_another_model_is_refused_and_stays_usable():
    model, other, ids = build(), build("bypass"), text(58)
    memory = prefill(model, ids[:, :40]).memory
    with pytest.raises(
        ValueError,
        match="^memory: got one of another configuration, accepted is one that this model made",
    ):
        other.generate(ids[:, 40:], max_new_tokens=3, memory=memory)
    assert_close(model(ids[:, 40:], memory).logits, model(ids).logits[:, 40:], 1e-10)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="top_a"):
        build().generate(text(9), max_new_tokens=2, top_a=1)
