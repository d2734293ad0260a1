"""The audit of forms: a text holds its problem, and one pass judges as generation does."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from material import tiny, word_corpus, word_tokens

from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.evaluation import audit as module
from hsa_mini.evaluation.audit import audit, read, write
from hsa_mini.evaluation.audit_forms import FORMS
from hsa_mini.tasks.frames import asked_frames, told_frames
from hsa_mini.tasks.sentences import encode

TEXT = np.resize(word_tokens(), 3000)
SHORT = [form for form in FORMS if form != "1,024 further"]


@pytest.mark.parametrize("form", SHORT)
def test_a_text_holds_its_sentences_in_order_and_ends_with_question_and_answer(form):
    for seed in range(8):
        told = FORMS[form](Random(seed))
        written = write(Random(seed), told, TEXT)
        assert len(written.ids) == len(TEXT)
        text = load_tokenizer().decode(written.ids.tolist())
        places = [text.index(sentence) for sentence in told.sentences]
        assert places == sorted(places)
        (question,) = told.questions
        assert text.endswith(question.text + question.answer)
        first, last = written.place
        sentence = load_tokenizer().decode(written.ids[first : last + 1].tolist())
        assert sentence == question.needed[0]


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match=r"^text: got 100 tokens, accepted are at least \d+$"):
        write(Random(0), FORMS["trained form"](Random(0)), TEXT[:100])


@pytest.mark.parametrize("form", ["sentence reworded", "question paraphrased", "all held out"])
def test_held_out_forms_use_no_frame_of_training(form):
    training = {
        *told_frames.TOLD.training, *told_frames.TOLD_IN_DIGITS.training,
        *asked_frames.QUESTION.training,
    } - {told_frames.SENTENCE, asked_frames.ASKED}  # fmt: skip
    fixed = [frame.split("{")[0] for frame in training if "«" not in frame]
    fixed = [start for start in fixed if len(start) > 14]
    for seed in range(30):
        told = FORMS[form](Random(seed))
        for text in (*told.sentences, told.questions[0].text):
            assert not any(start in text for start in fixed)


def test_one_pass_judges_as_greedy_generation_does():
    """The model's own continuation is the right answer, and no other is."""
    model = tiny().eval()
    ids = torch.from_numpy(TEXT[:300].astype(np.int64))[None]
    with torch.no_grad():
        continued = model.generate(ids, max_new_tokens=6).ids[0].numpy()
    written = write(Random(0), FORMS["trained form"](Random(0)), TEXT)
    whole = np.concatenate((TEXT[:300], continued))
    own = replace(written, ids=whole, answer_tokens=6, value_tokens=6)
    other = replace(own, ids=whole.copy())
    other.ids[-3] += 1
    assert [correct for correct, _ in read(model, [own, other, own])] == [True, False, True]


def test_what_ends_the_value_does_not_matter_but_it_has_to_end():
    model = tiny().eval()
    written = write(Random(0), FORMS["trained form"](Random(0)), TEXT)
    digit, stop = encode("7")[0], encode("!")[0]

    class Fixed:
        config = model.config
        parameters = model.parameters

    for token, right in ((stop, True), (digit, False)):
        logits = torch.zeros(1, written.answer_tokens, 4096)
        answer = written.ids[-written.answer_tokens :].copy()
        answer[-1] = token
        logits[0, torch.arange(len(answer)), torch.from_numpy(answer)] = 1.0
        output = type("Output", (), dict(logits=logits, aux=type("Aux", (), dict(retrievals=()))))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "prefill", lambda *_, **__: output)
            assert [correct for correct, _ in read(model, [written])] == [right]


def test_rows_count_every_question_and_forms_that_do_not_fit_are_left_out(monkeypatch):
    monkeypatch.setattr(module, "load_corpus", word_corpus)
    seen = []
    rows = audit(
        tiny().eval(), forms=["trained form", "1,024 further"], lengths=[600], questions=3,
        report=seen.append,
    )  # fmt: skip
    assert rows == seen and [row.form for row in rows] == ["trained form"]
    assert (rows[0].samples, rows[0].correct) == (3, 0) and 0 <= rows[0].whole <= 3
    again = audit(tiny().eval(), forms=["trained form"], lengths=[600], questions=3)
    assert again == rows


def test_an_unknown_form_is_refused(monkeypatch):
    monkeypatch.setattr(module, "load_corpus", word_corpus)
    with pytest.raises(ValueError, match="^forms: got 'anything', accepted are trained form, "):
        audit(tiny(), forms=["anything"], lengths=[600])
