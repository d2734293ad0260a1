"""A change of the retrieval explorer is one of the model: where nothing changes every number stays,
and a changed layer is the layer of a model that is made so.

Dimensions: T tokens, N chunks, K chunks kept, J key/value heads.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from material import OPTIONS, build, text, words

from hsa_mini import ChunkMemory, HSAModel
from hsa_mini.inference.prefill import prefill
from hsa_mini.lab.reading import concatenated
from hsa_mini.viz.retrieval import asking
from hsa_mini.viz.retrieval.trace import trace
from hsa_mini.viz.retrieval.what_if import Change, changed, rechosen, what_if

NONE = Change()
BEFORE = 45
TOKENS = text(BEFORE + 17)[:1]
NEEDLE = "The secret code of QXZB is 482913."
QUESTION = "What is the secret code of QXZB?"


@pytest.fixture(scope="module")
def model():
    return HSAModel.from_pretrained("mini")


@pytest.fixture(scope="module")
def asked(model):
    return asking.ask(model, asking.read_text(model, words(800), NEEDLE, 0.4), QUESTION)


def read(model) -> ChunkMemory:
    memory = ChunkMemory(model.config)
    prefill(model, TOKENS[:, :BEFORE], memory)
    return memory


def traced(model, change: Change = NONE, memory=None):
    """The trace of some tokens behind others that were read without the change."""
    memory = read(model) if memory is None else memory
    with changed(model, change):
        return trace(model, memory, TOKENS[:, BEFORE:])


def taken_by(model, memory: ChunkMemory) -> ChunkMemory:
    """The memory as if the model had read it."""
    memory.config = memory.chunks.config = model.config
    memory.origin = model
    return memory


def assert_same(found, want):
    for layer, other in zip(found.layers, want.layers, strict=True):
        np.testing.assert_array_equal(np.sort(layer.indices), np.sort(other.indices))
        np.testing.assert_allclose(layer.blend, other.blend, atol=1e-5)
    np.testing.assert_allclose(found.logits, want.logits, atol=1e-5)


@pytest.mark.parametrize("option", OPTIONS)
def test_no_change_is_every_number_and_the_same_choice_made_anew_is_close(option):
    model = build(option)
    want = trace(model, read(model), TOKENS[:, BEFORE:])
    np.testing.assert_array_equal(traced(model).logits, want.logits)
    assert_same(traced(model, Change(top_k=model.config.top_k)), want)


def test_without_a_change_the_answer_has_its_probabilities_bit_by_bit(model, asked):
    effect = what_if(model, asked, Change())
    assert effect.before == effect.after
    assert (effect.answer, effect.correct) == ("482913", True)
    shares = torch.from_numpy(asked.trace.logits).double().softmax(dim=-1)
    first = len(asked.ids) - asked.answer_tokens
    want = [float(shares[t - 1, asked.ids[t]]) for t in range(first, len(asked.ids))]
    assert effect.before == want


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_another_k_is_a_model_of_this_k(option, top_k):
    model = build(option)
    other = build(option, top_k=top_k)
    other.load_state_dict(model.state_dict())
    found = traced(model, Change(top_k=top_k))
    assert_same(found, traced(other, memory=taken_by(other, read(model))))


def test_the_answer_under_another_k_is_that_of_a_model_of_this_k(model, asked):
    config = dataclasses.replace(model.config, top_k=1)
    other = HSAModel(config).eval()
    other.load_state_dict(model.state_dict())
    memory = taken_by(other, asked.text.memory.fork())
    want = asking.ask(other, dataclasses.replace(asked.text, memory=memory), QUESTION)
    effect = what_if(model, asked, Change(top_k=1))
    assert (effect.answer, effect.correct) == (want.answer, want.correct)
    at = len(asked.ids) - asked.answer_tokens - 1  # the first token of both answers
    shares = torch.from_numpy(want.trace.logits[at]).double().softmax(dim=-1)
    assert effect.after[0] == pytest.approx(float(shares[asked.ids[at + 1]]), abs=1e-5)


# ---- Which chunks, and their weights

SCORES = torch.randn(5, 2, 9, generator=torch.Generator().manual_seed(0))
SCORES[0, :, 4:] = float("-inf")
KEPT = rechosen(SCORES, torch.zeros(5, 2, 4), Change(top_k=4), "softmax")


def weights_of(found, chunks: int = 9) -> torch.Tensor:
    """The weights [T, J, N] of all chunks."""
    indices, weights = found
    empty = torch.zeros(*indices.shape[:2], chunks + 1)
    return empty.scatter_add(-1, torch.where(indices < 0, chunks, indices), weights)[..., :chunks]


@pytest.mark.parametrize("drop", [(1,), (0, 2, 3), tuple(range(8))])
def test_without_some_chunks_the_others_have_their_weights_divided_by_the_sum(drop):
    found = weights_of(rechosen(SCORES, KEPT[0], Change(drop=drop), "softmax"))
    want = weights_of(KEPT)
    want[..., list(drop)] = 0
    want = (want / want.sum(dim=-1, keepdim=True)).nan_to_num(0.0)
    torch.testing.assert_close(found, want)


def test_one_chunk_that_is_left_has_all_the_weight_and_none_is_as_without_hsa():
    first = KEPT[0][3, 1, 0]
    others = tuple(set(range(9)) - {int(first)})
    found = rechosen(SCORES, KEPT[0], Change(drop=others), "softmax")
    assert weights_of(found)[3, 1, first] == 1
    model = build()
    every = tuple(range((BEFORE + TOKENS.shape[1]) // model.config.chunk_size))
    without = traced(model, Change(hsa=False))
    np.testing.assert_array_equal(traced(model, Change(drop=every)).logits, without.logits)
    cut = copy.deepcopy(model)
    for block in cut.upper:
        if block.hsa is not None:
            torch.nn.init.zeros_(block.hsa.out.weight)
    found = traced(cut, memory=taken_by(cut, read(model)))
    np.testing.assert_allclose(found.logits, without.logits, atol=1e-6)


def test_stick_breaking_weighs_what_is_left_as_if_no_more_were_kept():
    kept = rechosen(SCORES, torch.zeros(5, 2, 4), Change(top_k=4), "stick_breaking")
    gone = kept[0][:, :, 0].flatten().unique().tolist()
    found = weights_of(rechosen(SCORES, kept[0], Change(drop=tuple(gone)), "stick_breaking"))
    for t in range(5):
        for j in range(2):
            left = [i for i in sorted(kept[0][t, j].tolist(), reverse=True) if i not in gone]
            share = 1.0
            for chunk in left:
                part = torch.sigmoid(SCORES[t, j, chunk])
                torch.testing.assert_close(found[t, j, chunk], share * part)
                share *= 1 - part


def test_a_pinned_chunk_takes_the_place_of_the_worst_and_keeps_its_score():
    pinned = rechosen(SCORES, KEPT[0], Change(pin=(7,)), "softmax")
    for t in range(1, 5):
        for j in range(2):
            best = SCORES[t, j].topk(4).indices.tolist()
            want = {*best} if 7 in best else {*best[:3], 7}
            assert {*pinned[0][t, j].tolist()} == want
            shares = SCORES[t, j, pinned[0][t, j]].softmax(dim=0)
            torch.testing.assert_close(pinned[1][t, j], shares)
    later = rechosen(SCORES, KEPT[0], Change(pin=(7, 99)), "softmax")  # not yet complete
    assert torch.equal(later[0], pinned[0])
    assert 7 not in pinned[0][0]  # which cannot see it
    torch.testing.assert_close(weights_of(pinned)[0], weights_of(KEPT)[0])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_weight_that_is_set_leaves_the_rest_to_the_others_in_proportion(share):
    before = weights_of(KEPT)
    found = weights_of(rechosen(SCORES, KEPT[0], Change(shares={2: share}), "softmax"))
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(5, 2))
    keeps = before[..., 2] > 0
    torch.testing.assert_close(found[..., 2], torch.where(keeps, share, 0.0))
    want = before * torch.where(keeps, (1 - share) / (1 - before[..., 2]), 1.0)[..., None]
    others = [i for i in range(9) if i != 2]
    torch.testing.assert_close(found[..., others], want[..., others])
    alone = Change(drop=tuple(i for i in range(9) if i != 2), shares={2: share})
    lost = weights_of(rechosen(SCORES, KEPT[0], alone, "softmax"))
    torch.testing.assert_close(lost[..., 2], torch.where(keeps, share, 0.0))


def test_swapped_chunks_are_those_of_a_memory_in_which_they_stand_so():
    model = build()
    memory = read(model)
    for part in memory.chunks.buffers[:2]:  # K and V, and not the landmarks
        part[:, [2, 6]] = part[:, [6, 2]]
    want = traced(model, memory=memory)
    found = traced(model, Change(swap=((2, 6),)))
    np.testing.assert_allclose(found.logits, want.logits, atol=1e-6)
    assert not np.allclose(found.logits, traced(model).logits, atol=1e-3)


# ---- How they are read


@pytest.mark.parametrize("option", [x for x in OPTIONS if x != "stick breaking"])
def test_one_chunk_is_read_alike_fused_and_concatenated(option):
    model = build(option)  # with softmax weights: its weight is 1
    assert_same(traced(model, Change(top_k=1, concatenated=True)), traced(model, Change(top_k=1)))


def test_concatenated_chunks_share_one_softmax():
    model = build()
    queries = []
    layer = model.upper[0].hsa
    memory = read(model)
    with changed(model, Change(concatenated=True)):
        hook = layer.q_norm.register_forward_hook(lambda *call: queries.append(call[2]))
        found = trace(model, memory, TOKENS[:, BEFORE:]).layers[0]
        hook.remove()
    indices = torch.from_numpy(found.indices)[None]
    want = concatenated(queries[0], memory.chunks.k, memory.chunks.v, indices)[0]
    np.testing.assert_allclose(found.blend, want.detach().numpy(), atol=1e-6)


def test_a_window_that_is_off_adds_nothing():
    model = build()
    cut = copy.deepcopy(model)
    for block in (*cut.lower, *cut.upper):
        torch.nn.init.zeros_(block.swa.out.weight)
    want = traced(cut, memory=taken_by(cut, read(model)))
    found = traced(model, Change(window=False))
    np.testing.assert_allclose(found.logits, want.logits, atol=1e-6)


def test_a_change_of_one_layer_leaves_those_below_as_they_are_and_ends():
    model = build()
    plain = traced(model)
    found = traced(model, Change(layer=1, hsa=False))
    np.testing.assert_array_equal(found.layers[0].blend, plain.layers[0].blend)
    assert not found.layers[1].blend.any() and plain.layers[1].blend.any()
    with pytest.raises(RuntimeError), changed(model, Change(window=False, hsa=False)):
        raise RuntimeError
    np.testing.assert_array_equal(traced(model).logits, plain.logits)


def test_the_needle_is_what_the_answer_comes_from(model, asked):
    S = model.config.chunk_size
    place = asked.text.needle_tokens
    needle = tuple(range(place.start // S, (place.stop - 1) // S + 1))
    for change in (Change(drop=needle), Change(hsa=False), Change(shares=dict.fromkeys(needle, 0))):
        effect = what_if(model, asked, change)
        assert effect.correct is False and min(effect.before[:6]) > 0.9 > 0.5 > effect.after[0]
    elsewhere = (max(needle) + 2,)
    assert what_if(model, asked, Change(drop=elsewhere)).answer == asked.answer


BAD = {
    "layer": (Change(layer=2), "layer: got 2, accepted is an integer from 0 to 1"),
    "no chunk": (Change(drop=(99999,)), "drop: got 99999, accepted is an integer from 0 to "),
    "swap": (Change(swap=((0, 99999),)), "swap: got 99999, accepted is an integer from 0 to "),
    "K": (Change(top_k=0), "top_k: got 0"),
    "pins": (Change(pin=(1, 2), top_k=1), "pin: got 2 chunks, accepted are at most K"),
    "one place": (Change(swap=((3, 3),)), "swap: got "),
    "share": (Change(shares={1: 1.5}), "shares: got 1.5, accepted is a number from 0 to 1"),
    "shares": (Change(shares={1: 0.75, 2: 0.5}), "shares: got 1.25"),
    "NaN": (Change(shares={1: float("nan")}), "shares: got nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_changed_is_refused_in_one_line(model, asked, case):
    change, want = BAD[case]
    with pytest.raises(ValueError, match=want) as error:
        what_if(model, asked, change)
    assert "\n" not in str(error.value)
