"""One token at a time equals the forward pass: every option, sequences of one length and of
different lengths, offloaded, saved, branched, selected, and chunks that lie beyond 2**31 bytes.

Dimensions: B batch, T tokens, S=4 chunk size, W=8 window: the `debug` preset and each option of it.
"""

import dataclasses

import pytest
import torch
from helpers import assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from material import DEBUG, DENSE, OPTIONS, build, every_option, text

from hsa_mini import PRESETS, ChunkMemory, HSAConfig, HSAModel, ops
from hsa_mini.inference.cuda_graph import CUDAGraphRunner
from hsa_mini.inference.decode_step import DecodeStep
from hsa_mini.inference.generate import generate, stream
from hsa_mini.inference.prefill import prefill
from hsa_mini.memory.memory_budget import free_bytes

SIZES = [
    *((option, torch.float64, 1e-10) for option in DENSE),
    *((option, torch.float32, 1e-5) for option in OPTIONS),
]


def spoken(model: HSAModel, memory: ChunkMemory, ids: torch.Tensor) -> torch.Tensor:
    """Logits after each of ids [B, n], one step each."""
    steps = DecodeStep(model, memory)
    return torch.stack([steps(token) for token in ids.split(1, dim=1)], dim=1)


def padded(texts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, T] with junk in front of the shorter texts, and lengths [B]."""
    longest = max(map(len, texts))
    junk = torch.randint(
        DEBUG.vocab_size, (len(texts), longest), generator=torch.Generator().manual_seed(9)
    )
    for row, words in zip(junk, texts):
        row[longest - len(words) :] = words
    return junk, torch.tensor([len(words) for words in texts])


def largest(got: torch.Tensor, want: torch.Tensor) -> float:
    return (got - want).abs().max().item()


@pytest.mark.parametrize("option, dtype, bound", SIZES)
@torch.no_grad()
def test_steps_equal_the_forward_pass_from_the_first_token_on(option, dtype, bound):
    model, ids = build(option, dtype), text(61)
    want = model(ids).logits
    for start in (1, 30):
        memory = prefill(model, ids[:, :start]).memory
        assert_close(spoken(model, memory, ids[:, start:]), want[:, start:], bound)
        assert memory.position == 61 and len(memory.chunks) == 61 // DEBUG.chunk_size


@every_option
@torch.no_grad()
def test_steps_and_segments_follow_each_other_in_any_order(option):
    model, ids = build(option, torch.float32), text(90)
    want, memory, got, start = model(ids).logits, ChunkMemory(build(option).config), [], 0
    for n, by_steps in (
        (3, False),
        (5, True),
        (9, False),
        (1, True),
        (30, False),
        (13, True),
        (1, False),
        (28, True),
    ):
        part = ids[:, start : start + n]
        got.append(spoken(model, memory, part) if by_steps else model(part, memory).logits)
        start += n
    assert start == 90 and largest(torch.cat(got, dim=1), want) <= 1e-5


@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "offloaded"])
@every_option
@torch.no_grad()
def test_texts_of_different_lengths_are_read_as_if_each_were_alone(option, offload):
    model = build(option, torch.float32)
    texts = [text(n, seed=n)[0] for n in (1, 3, 8, 37, 61, 62)]
    after = torch.stack([text(30, seed=50 + n)[0] for n in range(len(texts))])
    ids, lengths = padded(texts)
    output = prefill(
        model, ids, ChunkMemory(model.config, offload=offload), lengths=lengths, segment=7
    )
    assert output.memory.lengths == tuple(lengths.tolist()) and output.memory.position == 62
    got = torch.cat((output.logits, spoken(model, output.memory, after)), dim=1)
    for b, words in enumerate(texts):
        want = model(torch.cat((words, after[b]))[None]).logits[:, len(words) - 1 :]
        assert largest(got[b : b + 1], want) <= 1e-5
        assert torch.equal(
            output.memory.chunks.landmarks[b, : (len(words) + 30) // 4].isfinite().all(),
            torch.tensor(True),
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are not interpreted")
@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "offloaded"])
@torch.no_grad()
def test_steps_in_kernels_equal_the_forward_pass(offload):
    """All that a step does on a GPU, in Triton's interpreter."""
    torch.manual_seed(0)
    model = HSAModel(
        dataclasses.replace(PRESETS["nano"], experts=6, experts_active=2, expert_width=16)
    ).eval()
    texts = [text(n, seed=n)[0] for n in (10, 60)]
    ids, lengths = padded(texts)
    output, after = (
        prefill(model, ids, ChunkMemory(model.config, offload=offload), lengths=lengths),
        text(7, seed=1),
    )
    with ops.backend("kernels"):
        got = spoken(model, output.memory, after)
    for b, words in enumerate(texts):
        assert (
            largest(
                got[b : b + 1], model(torch.cat((words, after[b]))[None]).logits[:, len(words) :]
            )
            <= 1e-5
        )


@torch.no_grad()
def test_what_stands_in_the_padding_changes_nothing():
    model, (ids, lengths) = build(), padded([text(n, seed=n)[0] for n in (2, 40)])
    other = ids.clone()
    other[0, :-2] = 0
    first, second = (
        generate(model, x, lengths=lengths, max_new_tokens=9).ids for x in (ids, other)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("options", [{}, dict(temperature=1.0, top_k=1)], ids=str)
@torch.no_grad()
def test_a_batch_of_different_lengths_says_what_each_says_alone(options):
    model, texts = build("query block"), [text(n, seed=n)[0] for n in (50, 3, 31)]
    ids, lengths = padded(texts)
    said = generate(model, ids, lengths=lengths, max_new_tokens=12, **options)
    for b, words in enumerate(texts):
        assert torch.equal(said.ids[b : b + 1], generate(model, words[None], max_new_tokens=12).ids)
    streamed = stream(model, ids, lengths=lengths, max_new_tokens=12, **options)
    assert torch.equal(torch.cat(list(streamed), dim=1), said.ids)


@torch.no_grad()
def test_the_first_retrieval_of_a_batch_of_different_lengths_is_that_of_each_alone():
    model, texts = build(), [text(n, seed=n)[0] for n in (50, 31)]
    ids, lengths = padded(texts)
    first = generate(model, ids, lengths=lengths, max_new_tokens=1).first
    for b, words in enumerate(texts):
        for got, want in zip(
            first.retrievals,
            generate(model, words[None], max_new_tokens=1).first.retrievals,
            strict=True,
        ):
            assert torch.equal(
                got.indices[b, -1].sort(-1).values, want.indices[0, -1].sort(-1).values
            )
            assert_close(got.queries[b, -1], want.queries[0, -1], 1e-10)


@pytest.mark.parametrize("option", ["default", "query block", "one retrieval head"])
@torch.no_grad()
def test_a_second_turn_of_different_lengths_goes_on_from_the_first(option):
    model, texts = build(option), [text(n, seed=n)[0] for n in (5, 44, 30)]
    turns = [text(n, seed=70 + n)[0] for n in (40, 1, 15)]
    output = prefill(model, *padded(texts)[:1], lengths=padded(texts)[1])
    said = spoken(model, output.memory, ids := text(6, seed=3)[[0, 0, 0]])
    assert said.shape[:2] == (3, 6)
    more, lengths = padded(turns)
    output = prefill(model, more, output.memory, lengths=lengths, segment=7)
    assert output.memory.lengths == (51, 51, 51)  # of one length again: segments go on
    after = text(9, seed=4)[[0, 1, 0]]
    got = torch.cat((output.logits, model(after, output.memory).logits), dim=1)
    for b in range(3):
        whole = torch.cat((texts[b], ids[b], turns[b], after[b]))[None]
        assert_close(got[b : b + 1], model(whole).logits[:, -10:], 1e-10)


@pytest.mark.parametrize("change", ["saved", "branched", "selected", "one selected"])
@pytest.mark.parametrize("option", ["default", "query block"])
@torch.no_grad()
def test_a_memory_that_is_stepping_goes_on_after(change, option, tmp_path):
    model, texts = build(option), [text(n, seed=n)[0] for n in (5, 44, 30)]
    ids, lengths = padded(texts)
    before, after, rows = text(7, seed=3)[[0, 1, 0]], text(9, seed=4)[[0, 1, 0]], [0, 1, 2]
    for equal in (False, True):
        memory = prefill(model, ids, lengths=None if equal else lengths).memory
        spoken(model, memory, before)
        if change == "saved":
            memory.save(tmp_path / "memory")
            memory = ChunkMemory.load(tmp_path / "memory")
        elif change == "branched":
            branch = memory.fork()
            spoken(model, branch, after.flip(1))
        else:
            rows = [2, 0, 2] if change == "selected" else [2]
            memory.reorder(torch.tensor(rows))
        got = spoken(model, memory, after[rows])
        for b, row in enumerate(rows):
            words = ids[row] if equal else texts[row]
            want = model(torch.cat((words, before[row], after[row]))[None]).logits[:, -9:]
            assert_close(got[b : b + 1], want, 1e-10)


@torch.no_grad()
def test_segments_for_sequences_of_different_lengths_are_refused_and_change_nothing():
    model, (ids, lengths) = build(), padded([text(n, seed=n)[0] for n in (5, 20)])
    memory = prefill(model, ids, lengths=lengths).memory
    with pytest.raises(
        ValueError, match=r"^memory: got sequences of \[5, 20\] tokens, accepted are equal lengths"
    ):
        model(text(3), memory)
    twin = prefill(model, ids, lengths=lengths).memory
    assert torch.equal(spoken(model, memory, text(9)), spoken(model, twin, text(9)))


@pytest.mark.parametrize(
    "lengths",
    [
        torch.tensor([3]),
        torch.tensor([0, 3]),
        torch.tensor([3, 10]),
        torch.tensor([3.0, 3.0]),
        [3, 3],
        torch.tensor(3),
    ],
)
def test_wrong_lengths_are_refused(lengths):
    with pytest.raises(
        ValueError, match=r"^lengths: got .*, accepted is an int64 tensor \[2\] of 1 to 9$"
    ):
        generate(build(), text(9), lengths=lengths, max_new_tokens=2)


@every_option
@torch.no_grad()
def test_a_recorded_step_sees_no_more_than_it_should(option, monkeypatch):
    """On a processor nothing is recorded, but the step is the same: it looks at all the room there
    is, filled with junk.
    """
    recorded = []
    monkeypatch.setattr(
        "hsa_mini.inference.decode_step.CUDAGraphRunner",
        lambda function: recorded.append(CUDAGraphRunner(function)) or recorded[-1],
    )
    model = build(option, torch.float32)
    texts = [text(n, seed=n)[0] for n in (3, 20, 37)]
    after = torch.stack([text(50, seed=n)[0] for n in range(3)])
    ids, lengths = padded(texts)
    monkeypatch.setattr("hsa_mini.memory.chunk_store.SPARE", 5)
    memory = ChunkMemory(model.config)
    memory.reserve(8192 + 37, batch=3, dtype=torch.float32, device=ids.device)
    for store in memory.chunks.buffers:
        store.fill_(50)
    output = prefill(model, ids, memory, lengths=lengths)
    steps = DecodeStep(model, output.memory, graph=True)
    got = [output.logits]
    for i, token in enumerate(after.split(1, dim=1)):
        if i == 20:  # as if the room had come to its end
            memory.reorder(torch.arange(3))
            memory.chunks.buffers = tuple(
                store[:, : len(memory.chunks)].clone() for store in memory.chunks.buffers
            )
        got.append(steps(token).clone()[:, None])
    assert len(recorded) == 4  # at first, when its rows were selected, and when it grew, twice
    for b, words in enumerate(texts):
        want = model(torch.cat((words, after[b]))[None]).logits[:, len(words) - 1 :]
        assert largest(torch.cat(got, dim=1)[b : b + 1], want) <= 1e-5


@torch.no_grad()
def test_a_step_for_which_there_is_no_room_is_refused_and_can_be_repeated(monkeypatch):
    model, ids = build(), text(40)
    memory, want = ChunkMemory(model.config), model(ids).logits
    model(ids[:, :39], memory)
    with monkeypatch.context() as patch:
        patch.setattr("hsa_mini.memory.memory_budget.free_bytes", lambda device: 100)
        with pytest.raises(MemoryError, match="accepted are up to 36 tokens$"):
            DecodeStep(model, memory)(ids[:, 39:])
    assert memory.position == 39
    assert_close(spoken(model, memory, ids[:, 39:]), want[:, 39:], 1e-10)


@st.composite
def configurations(draw) -> HSAConfig:
    block = draw(st.sampled_from([1, 1, 2, 3]))
    heads, J = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    experts = draw(st.sampled_from([0, 0, 3]))
    return HSAConfig(
        vocab_size=50, width=16,
        lower_layers=draw(st.integers(1, 2)), groups=draw(st.integers(1, 2)),
        layers_per_group=draw(st.integers(1, 2)), mlp_width=16,
        window=block * draw(st.integers(1, 6)),
        heads=heads * draw(st.integers(1, 2)), kv_heads=heads, head_dim=8,
        chunk_size=block * draw(st.integers(1, 4)), top_k=draw(st.integers(1, 5)),
        hsa_heads=J * draw(st.integers(1, 3)), hsa_kv_heads=J, hsa_head_dim=8, retrieval_dim=8,
        retrieval_heads=draw(st.sampled_from([1, J])), query_block=block,
        weighting=draw(st.sampled_from(["softmax", "stick_breaking"])),
        exclude_window=draw(st.booleans()),
        retrieval_norm=draw(st.booleans()), residual=draw(st.sampled_from(["add", "bypass"])),
        experts=experts, experts_active=min(experts, 2), expert_width=8 if experts else 0,
    )  # fmt: skip


@given(
    config=configurations(), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    new=st.integers(1, 15), segment=st.integers(1, 50), offload=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
@torch.no_grad()
def test_forward_equals_prefill_equals_steps_for_any_configuration(
    config, lengths, new, segment, offload, seed
):
    torch.manual_seed(seed)
    model = HSAModel(config).eval()
    ids = torch.randint(50, (len(lengths), max(lengths) + new))
    whole = [
        model(row[max(lengths) - n :][None]).logits[:, n - 1 :] for row, n in zip(ids, lengths)
    ]
    memory = ChunkMemory(config, offload=offload)
    prompt = ids[:, : max(lengths)]
    output = prefill(model, prompt, memory, lengths=torch.tensor(lengths), segment=segment)
    got = torch.cat((output.logits, spoken(model, memory, ids[:, max(lengths) :])), dim=1)
    # a choice so near a tie that another order of summation turns it is no error: see that none of
    # these is
    assume(all(settled(model, row[max(lengths) - n :][None]) for row, n in zip(ids, lengths)))
    for b, want in enumerate(whole):
        assert largest(got[b : b + 1], want) <= 1e-5


def settled(model: HSAModel, ids: torch.Tensor) -> bool:
    """Whether float64 chooses the same chunks."""
    if model.config.experts:
        return True
    twin = HSAModel(model.config, dtype=torch.float64).eval()
    twin.load_state_dict(model.state_dict())
    pairs = zip(model(ids).aux.retrievals, twin(ids).aux.retrievals)
    return all(torch.equal(a.indices.sort(-1).values, b.indices.sort(-1).values) for a, b in pairs)


LARGE = dataclasses.replace(
    DEBUG,
    chunk_size=64,
    window=16,
    hsa_head_dim=256,
    hsa_kv_heads=4,
    hsa_heads=4,
    retrieval_heads=1,
)


@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "offloaded"])
@pytest.mark.skipif(free_bytes(torch.device("cpu")) < 6 << 30, reason="needs 6 GB")
@torch.no_grad()
def test_chunks_beyond_31_bits_are_written_and_read(offload):
    """Of nine sequences in stores of 2.4 GB the last lies behind 2**31 bytes."""
    torch.manual_seed(0)
    model, tokens = HSAModel(LARGE).eval(), (1 << 31) // 8 // (256 * 4 * 4)  # a token is 4 KB of K
    ids = torch.randint(DEBUG.vocab_size, (9, 300))
    memory = ChunkMemory(LARGE, offload=offload)
    memory.reserve(tokens, batch=9, dtype=torch.float32, device=ids.device)
    room = memory.chunks.buffers[0].data_ptr()
    output = prefill(model, ids[:, :230], memory, segment=100)
    got = torch.cat((output.logits, spoken(model, memory, ids[:, 230:])), dim=1)
    assert memory.chunks.k.data_ptr() == room and memory.chunks.k[8].data_ptr() - room == 1 << 31
    assert largest(got, model(ids).logits[:, 229:]) <= 1e-5
