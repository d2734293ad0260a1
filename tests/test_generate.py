"""Early-exit prefill is the full forward pass, and decoding after it goes on as if everything had been read at once.

Dimensions: B=2 batch, T tokens, S=4 chunk size, W=8 window: the `debug` preset and each option of it. Its upper decoder
needs the last 29 tokens, and up to 6 more where tokens choose in blocks.
"""

import gc

import pytest
import torch
from helpers import assert_close
from test_model import DENSE, build, every_dense_option, text

from hsa_mini import PRESETS, ChunkMemory, HSAModel
from hsa_mini.generate import choose, continue_from, generate, prefill, tail_start

DEBUG = PRESETS["debug"]
S = DEBUG.chunk_size
SIZES = [(option, torch.float64, 1e-10) for option in DENSE] + [(o, torch.float32, 1e-5) for o in ("default", "experts")]


def steps(model: HSAModel, output, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last token read and after each of ids [B, n], decoded one by one on top of a prefill."""
    logits = [output.logits]
    for token in ids.split(1, dim=1):
        logits.append(model(token, output.memory).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("option, dtype, bound", SIZES)
@torch.no_grad()
def test_prefill_equals_the_full_forward_pass_and_so_does_what_is_decoded_after_it(option, dtype, bound):
    model = build(option, dtype)
    for T, segments in ((1, [1]), (3, [7]), (29, [1]), (30, [64]), (34, [7]), (61, [7, 61]), (100, [64, 100])):
        ids = text(T + 6)
        want = model(ids).logits[:, T - 1 :]
        for segment in segments:
            output = prefill(model, ids[:, :T], segment=segment)
            assert output.logits.shape[1] == 1 and output.memory.position == T
            assert_close(steps(model, output, ids[:, T:]), want, bound)


@pytest.mark.parametrize("size", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@torch.no_grad()
def test_prefill_equals_the_full_forward_pass_at_the_size_of_nano(size):
    dtype, bound = size
    torch.manual_seed(0)
    model = HSAModel(PRESETS["nano"], dtype=dtype).eval()
    ids = torch.randint(4096, (1, 333))
    want = model(ids).logits[:, 299:]
    for segment in (64, 300):
        assert_close(steps(model, prefill(model, ids[:, :300], segment=segment), ids[:, 300:]), want, bound)


@every_dense_option
@torch.no_grad()
def test_greedy_decoding_is_the_same_token_for_token(option):
    model = build(option)
    ids = text(58)
    want = ids
    for _ in range(8):
        want = torch.cat((want, model(want).logits[:, -1:].argmax(dim=-1)), dim=1)
    for segment in (7, 64):
        assert torch.equal(generate(model, ids, max_new_tokens=8, segment=segment).ids, want[:, 58:])
    assert torch.equal(model.generate(ids, max_new_tokens=8).ids, want[:, 58:])


@pytest.mark.parametrize("option", ["default", "query block", "query block, exclude window", "exclude window", "bypass"])
@torch.no_grad()
def test_a_second_turn_equals_one_long_prefill(option):
    model = build(option)
    ids = text(130)
    for T, first, segment in ((80, 3, 7), (80, 45, 64), (80, 79, 7), (120, 7, 64), (120, 60, 9), (31, 30, 64)):
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
    second = generate(model, torch.cat((first.ids[:, -1:], ids[:, 40:]), dim=1), max_new_tokens=5, memory=first.memory)
    whole = torch.cat((ids[:, :40], first.ids, ids[:, 40:]), dim=1)
    assert torch.equal(second.ids, generate(model, whole, max_new_tokens=5).ids)


def living_bytes() -> int:
    """Bytes of every tensor that is alive, storages counted once."""
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}.values())


@torch.no_grad()
def test_what_a_prefill_keeps_is_the_chunk_memory_and_nothing_else_that_grows():
    model = build(dtype=torch.float32)
    kept, alive = [], []
    look_up = model.look_up

    def watched(hidden, *arguments, **options):
        kept.append(hidden.shape[1])
        alive.append(living_bytes())
        return look_up(hidden, *arguments, **options)

    model.look_up = watched
    for T in (1000, 3000):
        output = prefill(model, text(T), segment=100)
        assert output.memory.partial.untyped_storage().nbytes() <= 2 * S * DEBUG.width * 4
        del output
    assert kept == [DEBUG.upper_tail] * 2
    chunk = S * DEBUG.hsa_kv_heads * DEBUG.hsa_head_dim * 2 + DEBUG.retrieval_heads * DEBUG.retrieval_dim
    memory = 2 * (2000 // S) * chunk * 4  # two sequences of float32
    ids = 2 * 2000 * 8
    assert alive[1] - alive[0] == memory + ids
    assert 2 * 2000 * DEBUG.width * 4 > 2 * (alive[1] - alive[0] - memory)  # keeping hidden states would be seen


@torch.no_grad()
def test_after_a_prefill_window_caches_hold_no_more_than_a_segment():
    model = build(dtype=torch.float32)
    memory = prefill(model, text(3000), segment=100).memory
    for cache in (*memory.lower, *memory.upper):
        for part in (cache.k, cache.v):
            assert part.shape[1] == DEBUG.window - 1
            assert part.untyped_storage().nbytes() <= 2 * (100 + DEBUG.window) * DEBUG.kv_heads * DEBUG.head_dim * 4


@torch.no_grad()
def test_chunks_complete_while_decoding_and_can_be_retrieved():
    model = build(top_k=100)
    output = prefill(model, text(30))
    for t in range(30, 30 + 3 * S):
        output = model(text(1, seed=t), output.memory)
        assert output.memory.chunks == (t + 1) // S
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


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    for temperature, want in ((1.0, [0.5, 0.3, 0.2]), (0.5, [25 / 38, 9 / 38, 4 / 38])):
        drawn = choose(logits, temperature, torch.Generator().manual_seed(0))
        assert torch.allclose(drawn.flatten().bincount() / 20_000, torch.tensor(want), atol=0.015)


@torch.no_grad()
def test_decoding_ends_when_every_sequence_has_stopped():
    model, ids = build(), text(58)
    free = generate(model, ids, max_new_tokens=12).ids
    ends = [free[0, 2].item(), free[1, 7].item()]
    places = [next(i for i in range(12) if free[b, i].item() in ends) for b in (0, 1)]
    got = generate(model, ids, max_new_tokens=12, stop=tuple(ends)).ids
    assert torch.equal(got, free[:, : max(places) + 1])
    for b in (0, 1):
        alone = generate(model, ids[b : b + 1], max_new_tokens=12, stop=tuple(ends)).ids
        assert torch.equal(alone, free[b : b + 1, : places[b] + 1])
    never = next(i for i in range(DEBUG.vocab_size) if i not in free)
    assert torch.equal(generate(model, ids, max_new_tokens=12, stop=(never,)).ids, free)


@torch.no_grad()
def test_decoding_can_go_on_from_one_prefill_in_several_ways():
    model, ids = build(), text(58)
    output = prefill(model, ids)
    branch = output._replace(memory=output.memory.branch())
    free = continue_from(model, branch, max_new_tokens=9).ids
    assert torch.equal(continue_from(model, output, max_new_tokens=9).ids, free)


@pytest.mark.parametrize("query_block", [1, 2, 4])
def test_the_tail_begins_with_a_block_of_tokens_that_choose_together(query_block):
    model = build(query_block=query_block)
    for tokens in range(1, 80):
        start = tail_start(model, tokens)
        assert start % query_block == 0
        assert start == 0 or tokens - start >= model.config.upper_tail > tokens - start - query_block
        assert start > 0 or tokens <= model.config.upper_tail + query_block - 1


def test_progress_counts_every_token_once():
    model, seen = build(), []
    generate(model, text(50), max_new_tokens=3, segment=16, progress=seen.append)
    assert seen == [16, 16, 16, 2]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_new_tokens=0), "max_new_tokens: got 0, accepted is an integer of at least 1"),
        (dict(max_new_tokens=2.0), "max_new_tokens: got 2.0"),
        (dict(temperature=-0.1), r"temperature: got -0.1, accepted is 0 \(greedy\) or more"),
        (dict(temperature=float("nan")), "temperature: got nan"),
        (dict(segment=0), "segment: got 0, accepted is an integer of at least 1"),
        (dict(segment=8.0), "segment: got 8.0"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        generate(build(), text(9), **{"max_new_tokens": 2, **options})


def test_wrong_ids_leave_the_memory_as_it_was():
    model = build()
    memory = ChunkMemory(DEBUG)
    for ids in (text(9).int(), text(9) + 512, text(0)):
        with pytest.raises(ValueError, match="^ids: got"):
            prefill(model, ids, memory)
    assert memory.position == 0 and memory.batch is None
