"""One needle in any haystack: the report is true, and the shipped model finds it in every text.

Dimensions: T tokens, S chunk size, N chunks.
"""

import json

import numpy as np
import pytest
import torch
from material import KEYS, TINY, tiny, word_tokens, words

from hsa_mini import HSAModel
from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.evaluation.demo import find_needle
from hsa_mini.paths import data_dir
from hsa_mini.tasks.needles import draw_needles
from hsa_mini.tasks.sentences import DEMO, encode, is_held_out

TOKENIZER = load_tokenizer()
S = TINY.chunk_size
MODEL = tiny()
rng = np.random.default_rng(0)
HAYSTACKS = {
    "English": words(9000),
    "digits only": "".join(map(str, rng.integers(0, 10, 20_000))),
    "one repeated character": "a" * 20_000,
    "Chinese": "".join(map(chr, rng.integers(0x4E00, 0x9FFF, 4000))),
    "random bytes": rng.bytes(20_000).decode("latin-1"),
    "64 tokens repeated": TOKENIZER.decode(word_tokens()[:64].tolist()),
    "source code": (data_dir().parent / "hsa_mini" / "model" / "core.py").read_text(
        encoding="utf-8"
    ),
    "NUL characters": "\0" * 3000 + "a\0b\0" * 3000,
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈🤖 " * 1500,
}


def tokens_of(text: str) -> np.ndarray:
    return np.array(TOKENIZER.encode_ordinary(text), dtype=np.uint16)


@pytest.fixture(scope="module")
def mini():
    return HSAModel.from_pretrained(data_dir() / "checkpoints" / "mini")


@pytest.mark.parametrize("name", HAYSTACKS)
def test_the_shipped_model_finds_the_needle_in_any_text(mini, name):
    text = tokens_of(HAYSTACKS[name])
    assert len(text) == 64 or name != "64 tokens repeated"
    tokens = 8192 if name == "English" else 4096
    finding = find_needle(mini, text, tokens=tokens, depth=0.3, seed=1)
    assert (finding.correct, finding.retrieved) == (True, True), finding.answer
    assert finding.answer == finding.expected


@pytest.mark.parametrize("depth", [0.0, 1.0])
def test_the_shipped_model_finds_the_needle_at_both_ends(mini, depth):
    finding = find_needle(mini, tokens_of(HAYSTACKS["English"]), tokens=5001, depth=depth, seed=2)
    assert finding.correct and finding.retrieved
    last = (5001 - mini.config.window) // mini.config.chunk_size - 1
    assert (finding.needle_chunks[0] if depth == 0 else finding.needle_chunks[-1]) == (
        0 if depth == 0 else last
    )


@pytest.fixture(scope="module")
def finding():
    return find_needle(MODEL, word_tokens(), tokens=1501, depth=0.4, seed=3, first=700)


def test_the_report_has_exactly_the_promised_keys_and_is_json(finding):
    result = finding.to_json()
    assert tuple(result) == KEYS
    assert json.loads(json.dumps(result)) == result
    assert result["correct"] == (result["answer"] == result["expected"])
    assert (result["tokens"], result["depth"], result["seed"], result["device"]) == (
        1501,
        0.4,
        3,
        "cpu",
    )
    assert result["prefill_seconds"] >= 0 and result["decode_seconds"] >= 0
    assert result["peak_memory_bytes"] > 50e6  # at least this Python and torch


def test_text_needles_and_question_are_where_they_are_said_to_be(finding):
    assert finding.ids.shape == (1501,)
    text = TOKENIZER.decode(finding.ids.tolist())
    key = finding.question.removeprefix("What is the secret code of ").removesuffix("?")
    assert text.endswith(f"\nWhat is the secret code of {key}?\nThe secret code of {key} is ")
    sentence = f" The secret code of {key} is {finding.expected}"
    assert text.count(sentence) == 1 and finding.needle_text == sentence
    start = len(TOKENIZER.encode_ordinary(text[: text.index(sentence)]))
    assert finding.needle_chunks == list(
        range(start // S, (start + len(encode(sentence)) - 1) // S + 1)
    )
    untouched = finding.ids == np.resize(np.roll(word_tokens(), -700), 1501)
    question = text[text.rindex("\nWhat is") :]
    assert untouched.sum() >= 1501 - 6 * len(encode(sentence)) - len(encode(question))
    assert is_held_out(key)


def test_a_chunk_shows_the_part_of_the_needle_that_it_holds(finding):
    shown = [finding.chunk_text(chunk) for chunk in finding.needle_chunks]
    assert len(shown) > 2  # the needle spans chunks of 4 tokens
    assert (
        "".join(text[text.index(">>>") + 3 : text.index("<<<")] for text in shown)
        == finding.needle_text
    )
    for chunk in range(len(finding.ids) // S):
        plain = finding.chunk_text(chunk, marks=("", ""))
        assert plain == TOKENIZER.decode(finding.ids[chunk * S : (chunk + 1) * S].tolist())
        assert (">>>" in finding.chunk_text(chunk)) == (chunk in finding.needle_chunks)


@torch.no_grad()
def test_scores_and_retrieved_chunks_are_those_of_the_last_prompt_token(finding):
    output = MODEL(torch.from_numpy(finding.ids)[None])
    memory = output.memory
    assert finding.scores.shape == (TINY.groups, 1501 // S) and finding.scores.dtype == np.float32
    for row, kept, retrieval in zip(
        finding.scores, finding.retrieved_chunks, output.aux.retrievals
    ):
        scores = (
            torch.einsum("jr,njr->jn", retrieval.queries[0, -1], memory.chunks.landmarks[0])
            / TINY.retrieval_dim**0.5
        )
        assert np.allclose(row, scores.amax(0).numpy(), atol=1e-4)
        assert kept == sorted(set(retrieval.indices[0, -1].flatten().tolist()) - {-1})
        assert int(row.argmax()) in kept
    assert finding.retrieved == any(
        set(finding.needle_chunks) & set(kept) for kept in finding.retrieved_chunks
    )


def test_a_chunk_that_the_last_token_completes_has_no_score():
    finding = find_needle(MODEL, word_tokens(), tokens=1500)
    assert np.isneginf(finding.scores[:, -1]).all() and np.isfinite(finding.scores[:, :-1]).all()
    assert finding.scores.shape[1] == 375 and all(
        374 not in kept for kept in finding.retrieved_chunks
    )


def test_a_finding_is_a_function_of_its_arguments(finding):
    again = find_needle(MODEL, word_tokens(), tokens=1501, depth=0.4, seed=3, first=700)
    timed = ("prefill_seconds", "decode_seconds", "peak_memory_bytes")
    assert {k: v for k, v in again.to_json().items() if k not in timed} == {
        k: v for k, v in finding.to_json().items() if k not in timed
    }
    assert (
        find_needle(MODEL, word_tokens(), tokens=1501, depth=0.4, seed=4).question
        != finding.question
    )


def test_no_key_stands_in_the_haystack():
    """Even if the haystack is repeated, or has sentences of the needle's own form."""
    needles = draw_needles(np.random.default_rng((DEMO, 5)), 60, held_out=True)
    text = "".join(needle.sentence for needle in needles) + words(200)
    finding = find_needle(MODEL, tokens_of(text), tokens=6000, seed=5)
    assert finding.question not in {
        f"What is the secret code of {needle.key}?" for needle in needles
    }


def test_progress_reports_every_token():
    seen = []
    find_needle(MODEL, word_tokens(), tokens=1024, progress=seen.append)
    assert sum(seen) == 1024


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tokens=1023), "tokens: got 1023, accepted are 1024 to 1073741824"),
        (dict(tokens=(1 << 30) + 1), "tokens: got 1073741825"),
        (dict(depth=1.5), "depth: got 1.5, accepted is a number from 0 to 1"),
        (dict(depth=float("nan")), "depth: got nan"),
        (dict(seed=-1), "seed: got -1, accepted is 0 or more"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        find_needle(MODEL, word_tokens(), **{"tokens": 1024, **options})


def test_a_haystack_that_is_too_short():
    with pytest.raises(
        ValueError, match=r"^haystack: got 63 tokens of text, accepted are at least 64$"
    ):
        find_needle(MODEL, word_tokens()[:63], tokens=1024)
    find_needle(MODEL, word_tokens()[:64], tokens=1024)
