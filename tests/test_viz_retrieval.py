"""The retrieval explorer shows what the model computed, and refuses in one line what it cannot ask.

Dimensions: T tokens, N chunks, S chunk size, K chunks kept, H query heads, J key/value heads.
"""

import dataclasses
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from material import OPTIONS, build, text, tiny, words

from hsa_mini import ChunkMemory, HSAModel
from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.index.build import build_index
from hsa_mini.index.prompts import make_prompt, right_answer
from hsa_mini.index.stored import read_index
from hsa_mini.inference.prefill import prefill
from hsa_mini.memory.host_chunks import HostChunks
from hsa_mini.viz.retrieval import asking, picture
from hsa_mini.viz.retrieval.stored import look_up, open_index
from hsa_mini.viz.retrieval.trace import trace
from hsa_mini.viz.retrieval.what_if import Change

NEEDLE = "The secret code of QXZB is 482913."
QUESTION = "What is the secret code of QXZB?"


@pytest.fixture(scope="module")
def model():
    return HSAModel.from_pretrained("mini")


@pytest.fixture(scope="module")
def read(model):
    return asking.read_text(model, words(3000), NEEDLE, 0.4)


@pytest.fixture(scope="module")
def asked(model, read):
    return asking.ask(model, read, QUESTION)


def traced(option: str, *, before: int = 45, tokens: int = 17, **memory):
    """A random model's trace of `tokens` tokens behind `before` others, and its plain forward."""
    model = build(option)
    ids = text(before + tokens)[:1]
    plain = model(ids).logits[0, before:].detach()
    memory = ChunkMemory(model.config, **memory)
    prefill(model, ids[:, :before], memory)
    return model, memory, trace(model, memory, ids[:, before:]), plain


# ---- The trace


@pytest.mark.parametrize("option", OPTIONS)
def test_the_blend_of_attention_and_weights_is_the_output_of_the_layer_before_its_projection(
    option,
):
    model, memory, found, _ = traced(option)
    v = memory.chunks.v[0].detach().double()  # [N, S, J, D]
    for layer in found.layers:
        T, H = layer.attention.shape[:2]
        J = layer.weights.shape[1]
        for t in range(T):
            for h in range(H):
                j = h * J // H
                blend = sum(
                    weight * torch.from_numpy(shares).double() @ v[chunk, :, j]
                    for weight, shares, chunk in zip(
                        layer.weights[t, j].tolist(), layer.attention[t, h], layer.indices[t, j]
                    )
                    if chunk >= 0
                )
                torch.testing.assert_close(
                    torch.as_tensor(blend) + torch.zeros(v.shape[-1]).double(),
                    torch.from_numpy(layer.blend[t, h]).double(), atol=2e-6, rtol=1e-5,
                )  # fmt: skip


def test_the_layer_projects_the_recorded_blend():
    model = build()
    layers = [block.hsa for block in model.upper if block.hsa is not None]
    outputs = []
    for layer in layers:
        layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output[0][0]))
    found = trace(model, ChunkMemory(model.config), text(40)[:1])
    for layer, output, traced_layer in zip(layers, outputs, found.layers, strict=True):
        blend = torch.from_numpy(traced_layer.blend).double().flatten(1)
        torch.testing.assert_close(layer.out(blend), output, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_recorded_forward_is_the_plain_one(option):
    _, _, found, plain = traced(option)
    np.testing.assert_allclose(found.logits, plain.numpy(), atol=1e-5)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_scores_are_those_by_which_the_layer_chose_and_weighed(option):
    model, _, found, _ = traced(option)
    for layer in found.layers:
        T, J, N = layer.scores.shape
        for t in range(T):
            for j in range(J):
                kept = layer.indices[t, j][layer.indices[t, j] >= 0]
                visible = np.isfinite(layer.scores[t, j]).sum()
                assert len(kept) == min(visible, model.config.top_k)
                best = np.sort(layer.scores[t, j])[::-1][: len(kept)]
                chosen = layer.scores[t, j, kept]
                np.testing.assert_allclose(np.sort(chosen)[::-1], best)
                if model.config.weighting == "softmax" and not model.config.recency and len(kept):
                    weights = torch.from_numpy(chosen).softmax(dim=0)
                    np.testing.assert_allclose(layer.weights[t, j, : len(kept)], weights, atol=1e-6)


def test_attention_shares_of_every_kept_chunk_add_up_to_1():
    for option in OPTIONS:
        _, _, found, _ = traced(option)
        for layer in found.layers:
            group = np.arange(layer.attention.shape[1]) * layer.indices.shape[1]
            filled = layer.indices[:, group // layer.attention.shape[1]] >= 0
            np.testing.assert_allclose(layer.attention.sum(axis=-1), filled, atol=1e-6)


def test_chunks_in_host_memory_are_traced_alike():
    _, memory, found, _ = traced("default", offload=True)
    _, _, other, _ = traced("default")
    assert isinstance(memory.chunks.source(), HostChunks)
    for layer, same in zip(found.layers, other.layers):
        for name in ("scores", "indices", "weights", "attention", "blend"):
            np.testing.assert_allclose(getattr(layer, name), getattr(same, name), atol=1e-6)


def test_before_the_first_complete_chunk_nothing_is_kept_and_nothing_added():
    _, _, found, _ = traced("default", before=1, tokens=2)
    for layer in found.layers:
        assert layer.scores.shape[2] == 0 and (layer.indices == -1).all()
        assert not layer.attention.any() and not layer.blend.any()


# ---- The picture


def test_the_shares_over_all_chunks_add_up_to_1_and_split_at_the_kept_ones(asked):
    for layer in asked.trace.layers:
        kept, others = picture.shares_of_all(layer.scores, layer.indices)
        np.testing.assert_allclose(kept + others, 1, atol=1e-12)
        # The weights are the shares of the kept chunks, divided by their sum.
        share = np.exp(layer.scores[-1, 0].astype(np.float64))
        share /= share.sum()
        chosen = layer.indices[-1, 0]
        np.testing.assert_allclose(layer.weights[-1, 0], share[chosen] / kept[-1, 0], rtol=1e-4)
        np.testing.assert_allclose(share[chosen].sum(), kept[-1, 0], rtol=1e-9)


def test_the_likeliest_tokens_are_those_of_the_logits(asked):
    chosen, shares, others = picture.likeliest(asked.trace.logits)
    want = torch.from_numpy(asked.trace.logits).double().softmax(dim=-1).topk(5)
    np.testing.assert_allclose(shares, want.values, rtol=1e-9)
    np.testing.assert_allclose(shares.sum(axis=-1) + others, 1, atol=1e-12)
    # The answer is greedy: each of its tokens was the likeliest one.
    first = len(asked.ids) - asked.answer_tokens
    assert chosen[first - 1 : -1, 0].tolist() == asked.ids[first:]


def unpacked(sent: dict, layer: int) -> dict:
    """The arrays of one layer as the browser reads them."""
    T, H, J, C, K, S = sent["shape"]
    shapes = dict(scores=(T, J, C), weights=(T, J, K), indices=(T, J, K), attention=(T, H, K, S))
    shapes |= dict.fromkeys(("others", "kept_share", "other_share"), (T, J))
    return {
        name: np.frombuffer(sent["layers"][layer][name], "<i4" if name == "indices" else "<f4")
        .reshape(shape)
        for name, shape in shapes.items()
    }  # fmt: skip


def test_what_is_sent_is_the_trace_with_the_heaviest_chunk_first(asked, model):
    sent = picture.make_picture(asked, model.config.chunk_size)
    for number, layer in enumerate(asked.trace.layers):
        found = unpacked(sent, number)
        np.testing.assert_array_equal(found["scores"], layer.scores)
        assert (np.diff(found["weights"], axis=-1) <= 0).all()
        for t, h in ((0, 0), (20, 2), (-1, 3)):
            for k, chunk in enumerate(found["indices"][t, 0]):
                (slot,) = np.flatnonzero(layer.indices[t, 0] == chunk)
                assert found["weights"][t, 0, k] == layer.weights[t, 0, slot]
                np.testing.assert_array_equal(
                    found["attention"][t, h, k], layer.attention[t, h, slot]
                )
    all_words = picture.shown("".join(sent["words"][min(sent["words"])]))
    S = model.config.chunk_size
    first = min(sent["words"]) * S
    assert all_words == picture.shown(
        load_tokenizer().decode([*asked.text.ids, *asked.ids][first : first + S])
    )


def test_more_kept_chunks_than_are_shown_lose_no_weight(monkeypatch, asked, model):
    monkeypatch.setattr(picture, "MAX_SHOWN", 3)
    tokens, layers = len(asked.ids), len(asked.trace.layers)
    monkeypatch.setattr(picture, "MAX_SCORES", 10 * tokens * layers)
    sent = picture.make_picture(asked, model.config.chunk_size)
    found = unpacked(sent, 0)
    np.testing.assert_allclose(found["weights"].sum(axis=-1) + found["others"], 1, atol=1e-6)
    scores = asked.trace.layers[0].scores
    assert found["scores"].shape[2] <= 10
    best = [
        scores[..., i : i + sent["width"]].max(axis=-1)
        for i in range(0, sent["chunks"], sent["width"])
    ]
    np.testing.assert_array_equal(found["scores"], np.stack(best, axis=-1))


def test_heads_that_retrieve_by_themselves_keep_their_own_chunks_and_attention():
    _, _, found, _ = traced("default")
    layer = found.layers[0]
    J, H = layer.weights.shape[1], layer.attention.shape[1]
    assert J > 1
    packed = picture._layer(layer, 1)
    for h in range(H):
        j = h * J // H
        for k, chunk in enumerate(packed["indices"][-1, j]):
            (slot,) = np.flatnonzero(layer.indices[-1, j] == chunk)
            np.testing.assert_array_equal(
                packed["attention"][-1, h, k], layer.attention[-1, h, slot]
            )


def test_every_character_stands_with_the_token_that_completes_it():
    tokenizer = load_tokenizer()
    for line in (
        "plain words",
        "naïve 漢字 🦆 שלום",
        "a\x00b\x1b[31m\u202ec\r\n\t",
        "<img src=x>&amp;",
    ):
        ids = tokenizer.encode_ordinary(line)
        for first in range(len(ids)):
            shown = picture.shown_words(ids, first, len(ids))
            assert len(shown) == len(ids) - first
            assert "".join(picture.shown_words(ids, 0, len(ids))[first:]) == "".join(shown)
        assert "".join(picture.shown_words(ids, 0, len(ids))) == picture.shown(line)
    assert picture.shown("a\x00b\x1b\u202ec\n\x85") == "a␀b␛⟨202E⟩c⏎⟨0085⟩"
    assert picture.shown("<b>\u200d") == "<b>\u200d"  # markup and joiners are text like any other


# ---- Asking


def test_the_model_finds_the_needle_and_the_picture_says_so(asked, model):
    assert (asked.answer, asked.correct, asked.verdict) == ("482913", True, "Right.")
    assert asked.marks == [True] * 6 + [None]
    first = len(asked.ids) - asked.answer_tokens - 1
    lines = [picture.summary(asked, first, layer, model.config.chunk_size) for layer in (0, 1)]
    assert any("holds the needle" in line and 'next token "4"' in line for line in lines)


def test_the_needle_stands_where_it_was_hidden(model):
    haystack = words(400)
    for depth in (0, 0.3, 1):
        read = asking.read_text(model, haystack, f"  {NEEDLE}\n", depth)
        place = read.needle_tokens
        tokenizer = load_tokenizer()
        assert tokenizer.decode(read.ids[place.start : place.stop]) == f" {NEEDLE}"
        before = tokenizer.decode(read.ids[: place.start])
        assert before + tokenizer.decode(read.ids[place.stop :]) == haystack
        assert abs(len(before) - depth * len(haystack)) <= asking.MAX_WORD
        assert read.memory.position == len(read.ids)


def test_questions_leave_the_memory_as_it_is(model, read, asked):
    landmarks = read.memory.chunks.landmarks.clone()
    other = asking.ask(model, read, "What is the secret code of WQNH?")
    again = asking.ask(model, read, QUESTION)
    assert torch.equal(read.memory.chunks.landmarks, landmarks)
    assert read.memory.position == len(read.ids)
    assert again.ids == asked.ids
    np.testing.assert_array_equal(again.trace.logits, asked.trace.logits)
    assert other.correct is False and "made up" in other.verdict
    assert set(other.marks) == {False}


def test_a_wrong_digit_is_marked_and_the_right_answer_said(read):
    made = load_tokenizer().encode_ordinary("482914.")
    correct, verdict, marks = asking.judge(QUESTION, "482914", made, read)
    assert (correct, verdict) == (False, "Wrong: the text says 482913.")
    assert marks == [True] * 5 + [False, None]


def test_an_answer_to_any_other_question_is_wrong_unless_the_needle_holds_it(read):
    made = load_tokenizer().encode_ordinary("Bob")
    correct, verdict, marks = asking.judge("Who?", "Bob", made, read)
    assert correct is False and verdict.startswith("Wrong: the needle does not say this")
    assert set(marks) == {False}
    assert asking.judge("Which code?", "482913", made, read)[0] is None


@pytest.mark.parametrize(
    "question, said, want",
    [
        (QUESTION, NEEDLE, "482913"),
        (QUESTION, "The secret code of WQNH is 482913.", None),
        (
            "What are the secret codes of WQNH and QXZB?",
            f"{NEEDLE} The secret code of WQNH is 394149.",
            "394149. The secret code of QXZB is 482913",
        ),
        ("What are the secret codes of WQNH and QXZB?", NEEDLE, None),
        (
            "Which names are given the number 48291307?",
            "The number of QXZB is given to WQNH. The number 48291307 is given to QXZB. "
            "The number of WQNH is given to QXZB.",
            "QXZB, WQNH",
        ),
        ("Which names are given the number 48291307?", NEEDLE, None),
        ("Who?", NEEDLE, None),
    ],
)
def test_the_right_answer_is_what_the_text_says(question, said, want):
    assert right_answer(question, said) == want
    if want and make_prompt(question).end:
        ids = load_tokenizer().encode_ordinary(f"{want}.")
        assert make_prompt(question).in_words(ids) == want


HAYSTACK = "word " * 100
BAD = {
    "empty haystack": (dict(haystack=" \n"), "haystack: got no text"),
    "one token": (dict(haystack="a", needle="b"), "haystack: got 2 tokens with the needle"),
    "10 million characters": (dict(haystack="a" * 10_000_000), "haystack: got 10,000,000 bytes"),
    "half a character": (dict(haystack="\ud800" + HAYSTACK), "haystack: got half a character"),
    "empty needle": (dict(needle="  "), "needle: got no text"),
    "endless needle": (dict(needle="code " * 1_000_000), "needle: got "),
    "depth": (dict(depth=1.5), "depth: got 1.5"),
    "empty question": (dict(question=""), "question: got no text"),
    "endless question": (dict(question="why? " * 1_000_000), "question: got "),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_asked_is_refused_in_one_line_and_the_picture_stays(explorer, case):
    changed, want = BAD[case]
    arguments = dict(haystack=HAYSTACK, needle=NEEDLE, question=QUESTION, depth=0.5) | changed
    before = explorer.data
    with pytest.raises(ValueError, match=want) as error:
        explorer.ask(**arguments)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
    haystack = arguments.pop("haystack")
    explorer._receive(None, {"request": 7, **arguments}, [haystack.encode("utf-8", "replace")])
    if case != "half a character":
        assert explorer.status.startswith(f"The picture shows the last question. {want}")
        assert explorer.data is before
    assert explorer.done == 7


def test_a_model_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="model: got a vocabulary of "):
        asking.read_text(build(), HAYSTACK, NEEDLE, 0.5)


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b""], ids=["missing", "not UTF-8", "empty"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, content):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="haystack: "):
        asking.haystack_of(file)


STRANGE = {
    "scripts": "שלום עולם 漢字仮名 नमस्ते 🦆 " * 30,
    "control characters": "a\x00b\x1b[2J\u202e\x07\r " * 50,
    "markup": "<img src=x onerror=alert(1)><script>alert(1)</script>&lt;" * 20,
    "one endless word": "x" * 3000,
}


@pytest.mark.parametrize("name", STRANGE)
def test_any_text_can_be_asked(name):
    model = tiny()
    read = asking.read_text(model, STRANGE[name], NEEDLE, 0.5)
    sent = picture.make_picture(
        asking.ask(model, read, STRANGE[name][:20]), model.config.chunk_size
    )
    shown = "".join(["".join(sent["tokens"]), *("".join(x) for x in sent["words"].values())])
    assert shown.isprintable() or name == "scripts"


# ---- A text that an index holds


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The index of a text that holds the needle once, between characters of several bytes."""
    home = tmp_path_factory.mktemp("stored")
    file = home / "text.txt"
    file.write_text(f"{words(900)}漢字 ü. {NEEDLE} 漢字. {words(300)}", encoding="utf-8")
    build_index(model, file, home / "index", checkpoint="mini")
    return home / "index"


def test_a_stored_text_is_asked_as_one_that_is_read(model, folder):
    stored = open_index(model, folder)
    memory = ChunkMemory(model.config)
    prefill(model, torch.tensor([stored.ids]), memory)
    assert stored.memory.position == len(stored.ids)
    found = asking.ask(model, stored, QUESTION)
    want = asking.ask(model, dataclasses.replace(stored, memory=memory), QUESTION)
    assert (found.answer, found.correct) == ("482913", True) == (want.answer, want.correct)
    np.testing.assert_allclose(found.trace.logits, want.trace.logits, atol=1e-3)


def test_the_needle_is_looked_up_in_a_stored_text(model, folder):
    stored = open_index(model, folder)
    tokenizer = load_tokenizer()
    for needle in (NEEDLE, "漢字 ü", stored.haystack[:9], stored.haystack[-9:].strip()):
        found = look_up(stored, f" {needle}\n")
        place = found.needle_tokens
        around = tokenizer.decode_bytes(stored.ids[place.start : place.stop])
        assert needle.encode() in around
        for smaller in (place[1:], place[:-1]):
            assert needle.encode() not in tokenizer.decode_bytes([stored.ids[i] for i in smaller])
    for needle in ("nowhere in it", " "):
        nowhere = look_up(stored, needle)
        assert (nowhere.needle, len(nowhere.needle_tokens)) == ("", 0)
        # What the text does not hold is no right answer.
        asked = asking.ask(model, nowhere, "What is the secret code of WQNH?")
        assert asked.correct is False and "made up" in asked.verdict


def test_the_explorer_opens_an_index_and_reads_nothing_again(model, folder, monkeypatch):
    pytest.importorskip("anywidget")
    from hsa_mini.viz import explore_retrieval

    explorer = explore_retrieval(model, folder, needle=NEEDLE)
    monkeypatch.setattr("hsa_mini.viz.retrieval.explorer.read_text", None)
    content = dict(request=1, needle="nowhere", question="Who?", depth=0.1)
    explorer._receive(None, content, [])
    assert explorer.data["needle"] == [0, 0] and "The needle is not in it" in explorer.status
    explorer._receive(None, content | dict(needle=NEEDLE, question=QUESTION), [])
    assert explorer.data["correct"] and "looked up" in explorer.status
    ids = [*explorer.asked[0].text.ids, *explorer.asked[0].ids]
    S = model.config.chunk_size
    for chunk in (0, 7, len(ids) // S - 1):
        explorer._receive(None, dict(request=chunk, chunk=chunk, model=0), [])
        want = picture.shown_words(ids, chunk * S, (chunk + 1) * S)
        assert explorer.opened == {"chunk": chunk, "model": 0, "words": want}
    explorer._receive(None, dict(request=9, chunk=len(ids) // S, model=0), [])
    assert "chunk: got" in explorer.status
    with pytest.raises(ValueError, match="other: got a second model"):
        explore_retrieval(model, folder, other=model)


def test_an_index_that_cannot_be_opened_is_refused(model, folder, tmp_path):
    with pytest.raises(ValueError, match="^text: .* holds no index"):
        open_index(model, tmp_path)
    with pytest.raises(ValueError, match="^text: .* other weights made"):
        open_index(tiny(), folder)
    index = read_index(folder, torch.device("cpu"))
    tokens = np.concatenate([index.text.tokens, index.text.tokens])
    unfinished = dataclasses.replace(index.text, tokens=tokens)
    dataclasses.replace(index, text=unfinished).save(tmp_path / "unfinished")
    with pytest.raises(ValueError, match="^text: .* is not read to its end"):
        open_index(model, tmp_path / "unfinished")
    file = tmp_path / "short.txt"
    file.write_text("short")
    build_index(model, file, tmp_path / "short", checkpoint="mini")
    with pytest.raises(ValueError, match="^text: .* accepted is at least one chunk"):
        open_index(model, tmp_path / "short")


# ---- The widget


@pytest.fixture(scope="module")
def explorer():
    pytest.importorskip("anywidget")
    pytest.importorskip("matplotlib")
    from hsa_mini.viz import explore_retrieval

    return explore_retrieval(tiny(), HAYSTACK, needle=NEEDLE)


def test_a_question_of_the_browser_changes_the_picture_and_reads_the_text_once(
    explorer, monkeypatch
):
    explorer.ask(HAYSTACK, NEEDLE, QUESTION, 0.5)
    before = explorer.asked[0].text
    content = dict(request=8, needle=NEEDLE, question="What is the secret code of WQNH?", depth=0.5)
    explorer._receive(None, content, [])
    assert explorer.done == 8 and explorer.asked[0].text is before
    assert explorer.form["question"] == content["question"]
    assert explorer.data["verdict"].startswith("Wrong")
    explorer._receive(None, content | dict(request=9, depth=0.6), [])
    assert explorer.done == 9 and explorer.asked[0].text is not before


def test_a_change_of_the_browser_shows_its_effect_and_a_wrong_one_keeps_the_last(explorer):
    explorer.ask(HAYSTACK, NEEDLE, QUESTION, 0.5)
    sent = dict(
        layer=None, top_k=None, pin=[], drop=[], shares=[], swap=[], concatenated=False, hsa=True,
        window=True,
    )  # fmt: skip
    explorer._receive(None, dict(request=11, model=0, change=sent), [])
    assert explorer.done == 11 and explorer.effect["before"] == explorer.effect["after"]
    assert len(explorer.effect["words"]) == explorer.asked[0].answer_tokens
    more = dict(pin=[0], drop=[1], shares=[[2, 0.5]], swap=[[0, 3]])
    explorer._receive(None, dict(request=12, model=0, change=sent | more), [])
    changed = Change(pin=(0,), drop=(1,), shares={2: 0.5}, swap=((0, 3),))
    assert explorer.effect["after"] == explorer.what_if(changed).after
    assert f"is {np.prod(explorer.effect['after']):.3f}" in explorer.effect["line"]
    last = explorer.effect
    explorer._receive(None, dict(request=13, model=0, change=sent | dict(drop=[99999])), [])
    assert explorer.done == 13 and explorer.effect["after"] == last["after"]
    assert explorer.effect["error"].startswith("The bars show the last change. drop: got 99999")
    explorer.ask(None, NEEDLE, QUESTION, 0.5)
    assert explorer.effect == {}  # of another question


def test_two_models_are_asked_the_same_and_change_by_themselves(model):
    pytest.importorskip("anywidget")
    from hsa_mini.viz import explore_retrieval

    other = HSAModel(model.config).eval()
    other.load_state_dict(model.state_dict())
    torch.nn.init.zeros_(other.upper[0].hsa.out.weight)
    explorer = explore_retrieval(model, HAYSTACK * 5, needle=NEEDLE, other=other)
    for sent, asked, one in zip((explorer.data, explorer.second), explorer.asked, (model, other)):
        want = asking.ask(one, asking.read_text(one, HAYSTACK * 5, NEEDLE, 0.5), QUESTION)
        np.testing.assert_array_equal(asked.trace.logits, want.trace.logits)
        assert sent["answer"] == want.answer
    assert not np.array_equal(explorer.asked[0].trace.logits, explorer.asked[1].trace.logits)
    off = Change(layer=0, hsa=False)
    effect = explorer.what_if(off, 1)
    assert effect.before == pytest.approx(effect.after, abs=1e-6)  # it was off
    assert explorer.what_if(off).after != effect.after
    with pytest.raises(ValueError, match="other: got chunks of 4 tokens, accepted are 64"):
        explore_retrieval(model, HAYSTACK, other=tiny())


def test_a_question_waits_for_the_cell_or_the_picture_that_has_its_turn(explorer):
    from hsa_mini.viz.jupyter.turns import TURNS

    content = dict(request=10, needle=NEEDLE, question=QUESTION, depth=0.5)
    thread = threading.Thread(target=explorer._receive, args=(None, content, []))
    with TURNS.lock:
        thread.start()
        thread.join(0.1)
        assert thread.is_alive() and explorer.done != 10
    thread.join()
    assert explorer.done == 10


def test_readers_without_a_kernel_get_a_picture_and_its_summary(explorer):
    data, metadata = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["image/png"].startswith("iVBOR")
    assert "HSA layer" in data["text/plain"]
    assert metadata["image/png"]["alt"] == data["text/plain"].replace("\n", " ")


def test_the_data_need_no_jupyter():
    code = "import sys; import hsa_mini.viz.retrieval.picture; print('anywidget' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
