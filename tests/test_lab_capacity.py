"""The capacity of landmarks: crowded texts, the grid, what is measured, and the law."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from material import word_corpus, word_tokens

from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.lab.arms import ARMS
from hsa_mini.lab.capacity.crowds import Crowds, crowded_text
from hsa_mini.lab.capacity.grid import GRID, grid_arm
from hsa_mini.lab.capacity.law import Law, Point, fit, format_law, points
from hsa_mini.lab.capacity.measure import measure_capacity
from hsa_mini.lab.rounds import arms_of
from hsa_mini.lab.run import run_arm
from hsa_mini.lab.scales import SCALES

CPU = torch.device("cpu")
CAPACITY = SCALES["capacity"]


def test_a_crowded_text_holds_its_needles_and_asks_for_one_of_them():
    rng = np.random.default_rng(0)
    decode = load_tokenizer().decode
    seen = set()
    for needles in (1, 20, 50):
        text = crowded_text(rng, word_tokens(), 1024, needles, near=100)
        words = decode(text.ids.tolist())
        assert len(text.ids) == 1024 and words.count("The secret code of") == needles + 1
        question = words[words.rindex("\nWhat is the secret code of ") :]
        key = question.split()[6].rstrip("?")
        start = text.starts[text.asked]
        assert key in decode(text.ids[start : start + text.length].tolist())
        value = decode(text.answer.tolist())
        assert f"The secret code of {key} is {value}" in words and start + text.length <= 924
        seen.add((text.starts[1:] - text.starts[:-1]).min(initial=99) >= text.length)
    assert seen == {True}  # no needle covers another
    with pytest.raises(ValueError, match="^needles: got 60 in 1024 tokens, accepted are at most"):
        crowded_text(rng, word_tokens(), 1024, 60, near=100)


def test_needles_of_a_chunk_are_counted_and_cuts_noticed():
    text = crowded_text(np.random.default_rng(3), word_tokens(), 1024, 40, near=100)
    taken = [range(start, start + text.length) for start in text.starts]
    last_digit = taken[text.asked][-2]
    for S in (16, 32, 64):
        inside = [any(t // S == last_digit // S for t in tokens) for tokens in taken]
        assert text.together(S) == sum(inside)
        chunks = {t // S for t in taken[text.asked]}
        assert text.is_cut(S) == (len(chunks) > 1)


def test_the_grid_reads_equally_many_tokens_and_changes_nothing_else():
    assert len(GRID) == 27 and arms_of("capacity") is GRID
    for S, R, M in ((16, 64, 1), (32, 256, 2), (64, 128, 4)):
        config = grid_arm(S, R, M).config(CAPACITY)
        assert config.chunk_size * config.top_k == 256 and config.retrieval_dim == M * R
        base = dataclasses.replace(CAPACITY.config, chunk_size=S, top_k=256 // S)
        assert config == dataclasses.replace(base, retrieval_dim=M * R, mlp_width=config.mlp_width)
    assert GRID["s32_r256_m1"].config(CAPACITY) == ARMS["hsa"].config(CAPACITY)
    assert GRID["s32_r256_m1"].recipe(CAPACITY) == ARMS["hsa"].recipe(SCALES["lab"])


def test_a_run_of_the_grid_holds_a_row_for_each_density_and_k(monkeypatch):
    for module in ("training.mixture", "lab.run", "lab.capacity.measure"):
        monkeypatch.setattr(f"hsa_mini.{module}.load_corpus", word_corpus)
    crowds = Crowds(tokens=512, needles=(2, 12), top_k=(1, 4), questions=2)
    scale = dataclasses.replace(SCALES["tiny"], crowds=crowds)
    record = run_arm(grid_arm(16, 16, 2), scale, 0, device=CPU, steps=3)
    rows = record["found"]["capacity"]
    assert [(row["needles"], row["top_k"]) for row in rows] == [(2, 1), (2, 4), (12, 1), (12, 4)]
    assert all(row["samples"] == len(row["together"]) == len(row["cut"]) == 2 for row in rows)
    assert rows[0]["together"] == rows[1]["together"]  # the same texts for every K
    assert json.loads(json.dumps(record)) and record["settings"]["evaluation"]["crowds"]


def test_right_answers_are_those_of_a_model_that_keeps_k_chunks(monkeypatch):
    monkeypatch.setattr("hsa_mini.lab.capacity.measure.load_corpus", word_corpus)
    kept = []

    def says(model, ids, answers):
        kept.append(model.config.top_k)
        return [bool(answer[0] % 2) for answer in answers]

    monkeypatch.setattr("hsa_mini.lab.capacity.measure.right_answers", says)
    model = ARMS["hsa"].model(ARMS["hsa"].config(SCALES["tiny"]))
    found = measure_capacity(model, Crowds(tokens=512, needles=(4,), top_k=(2, 8), questions=5))
    two, eight = found["capacity"]
    assert kept == [2, 8] and two["right"] == eight["right"]
    assert two["correct"] == sum(two["right"])


def test_the_law_finds_the_coefficients_that_made_the_answers():
    true = Law((2.0, -1.5, 0.0, 0.8, 0.5, 0.6), ())
    rng = np.random.default_rng(0)
    made = []
    for n in (0.1, 0.3, 1.0, 3.0):
        for S, R, K, M in [(S, R, K, M) for S in (16, 64) for R in (64, 256) for K in (4, 32)
                           for M in (1, 4)]:  # fmt: skip
            share = true.accuracy(n, S, R, K, M)
            made.append(Point(n, S, R, K, M, int(rng.binomial(400, share)), 400))
    found = fit(made)
    for got, want, error in zip(found.coefficients, true.coefficients, found.errors):
        assert abs(got - want) < 4 * error + 0.01
    n = found.capacity(64, 256, 8, 2, 0.9)
    assert found.accuracy(n, 64, 256, 8, 2) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="^measured: got no point"):
        fit([])
    perfect = fit([dataclasses.replace(point, correct=400) for point in made])
    assert np.isfinite(perfect.coefficients).all()


def test_the_law_of_records_is_printed():
    def record(arm: str, slope: float) -> dict:
        rows = [
            {"tokens": 4096, "needles": n, "top_k": 8, "samples": 100,
             "correct": round(100 / (1 + (n / 64) ** slope))}
            for n in CAPACITY.crowds.needles
        ]  # fmt: skip
        settings = json.loads(json.dumps(GRID[arm].settings(CAPACITY)))
        return {"arm": arm, "seed": 0, "settings": settings, "found": {"capacity": rows}}

    records = [record("s32_r64_m1", 2.0), record("s32_r64_m2", 2.0)]
    measured = points(records)
    assert {(p.S, p.R, p.K, p.M) for p in measured} == {(32, 64, 8, 1), (32, 64, 8, 2)}
    assert measured[0].n == 8 * 32 / 4096
    text = format_law(records)
    # Half of the answers are right with 64 needles, half a needle in a chunk; 90% with a third.
    assert fit(measured).capacity(32, 64, 8, 1, 0.5) == pytest.approx(0.5, rel=0.1)
    assert "S 32  R 64   K 8   M 2" in text and "10 points" in text
    assert format_law([]) == "no run of the grid yet"


def test_the_picture_shows_measured_shares_and_the_law():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from hsa_mini.viz.training import capacity

    measured = [Point(n, 32, 64, 8, M, round(60 / (1 + n)), 60) for M in (1, 2) for n in (0.1, 1.0)]
    law = fit(measured)
    ax = Figure().subplots()
    capacity(ax, measured, law)
    marks, line, *_ = ax.lines
    assert marks.get_xdata().tolist() == [0.1, 1.0]
    assert marks.get_ydata().tolist() == [round(60 / 1.1) / 60, 0.5]
    assert line.get_ydata()[-1] == pytest.approx(law.accuracy(1.0, 32, 64, 8, 1))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "S 32, R 64, K 8, M 1",
        "S 32, R 64, K 8, M 2",
    ]
