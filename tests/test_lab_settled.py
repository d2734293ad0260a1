"""The second round of the laboratory: curves with intervals, schedules, claims and their seeds."""

import json
import math

import numpy as np
import pytest

from hsa_mini.lab.arms import ARMS
from hsa_mini.lab.claims import CLAIMS, DIFFERENT, NOT_RUN, REPRODUCED, judge
from hsa_mini.lab.rounds import arms_of
from hsa_mini.lab.scales import SCALES
from hsa_mini.lab.settled import curves
from hsa_mini.lab.settled.arms import SETTLED_ARMS
from hsa_mini.lab.settled.claims import NEW_CLAIMS, SETTLED_CLAIMS, touching
from hsa_mini.lab.settled.schedule import calls, format_schedule, schedule
from hsa_mini.tasks.forms import TASKS

SETTLED = SCALES["settled"]
FULL = "text_full_rope"
HSA = "text_window_4x"


def record(arm: str, seed: int, value: float = 0.5, *, gain: float = 0.0) -> dict:
    """A made-up record: the same accuracy everywhere, and losses that are `gain` lower at the end
    of the curve than at its beginning.
    """
    easy = np.random.default_rng(0).normal(3.0, 0.5, SETTLED.texts)  # texts differ much

    def row(tokens: int, better: float) -> dict:
        losses = easy - better + np.random.default_rng(seed).normal(0, 0.01, SETTLED.texts)
        return {"tokens": tokens, "losses": losses.tolist(), "perplexity": math.exp(losses.mean())}

    accuracies = [{"tokens": tokens, "accuracy": value} for tokens in SETTLED.lengths]
    found = dict.fromkeys(("s_niah", "mq_niah", "vt", "copy", "crowded"), accuracies)
    found["perplexity"] = [row(tokens, gain) for tokens in SETTLED.lengths]
    learning = [
        {"step": i, "seen": 1000 * i, "rows": [row(n, i * gain) for n in SETTLED.lengths[:2]]}
        for i in range(2)
    ]
    return {
        "arm": arm,
        "seed": seed,
        "settings": json.loads(json.dumps(arms_of("settled")[arm].settings(SETTLED))),
        "found": found,
        "learning": learning,
        "seconds": {"training": 600.0, "evaluation": 20.0},
    }


def test_an_interval_holds_the_true_ratio_as_often_as_it_says_and_pairs_texts():
    rng = np.random.default_rng(1)
    held = 0
    widths = []
    for trial in range(100):
        texts = rng.normal(3.0, 0.5, 32)  # what a text costs both arms
        mine = texts - 0.1 + rng.normal(0, 0.05, (3, 32)) + rng.normal(0, 0.01, (3, 1))
        theirs = texts + rng.normal(0, 0.05, (3, 32)) + rng.normal(0, 0.01, (3, 1))
        ratio, low, high = curves.ratio_interval(mine, theirs, seed=trial)
        assert ratio == pytest.approx(math.exp(mine.mean() - theirs.mean()))
        held += low <= math.exp(-0.1) <= high
        widths.append(high - low)
    assert 85 <= held <= 100
    unpaired = 2 * 1.96 * 0.5 / 32**0.5
    assert np.mean(widths) < unpaired / 5  # texts that are hard for both do not widen it


def test_curves_are_ratios_by_tokens_seen():
    records = [record(HSA, seed, gain=0.2) for seed in range(3)]
    records += [record(FULL, seed) for seed in range(3)]
    found = curves.ratio_curves(records)
    assert set(found) == {(HSA, FULL)} and set(found[HSA, FULL]) == set(SETTLED.lengths[:2])
    first, last = found[HSA, FULL][512]
    assert (first.seen, last.seen) == (0, 1000)
    assert first.ratio == pytest.approx(1.0) and first.low <= 1 <= first.high
    assert last.ratio == pytest.approx(math.exp(-0.2)) and last.high < 0.9
    assert "text_window_4x / text_full_rope, texts of 2,048" in curves.format_curves(records)
    records[0]["learning"][1]["rows"][0]["losses"][3] = None  # it diverged
    assert [point.seen for point in curves.ratio_curves(records)[HSA, FULL][512]] == [0]


def test_a_schedule_counts_steps_of_recorded_runs_and_guesses_the_others():
    done = [record("hsa", 0), record("window", 0)]
    done[1]["seconds"] = {"training": 300.0, "evaluation": 10.0}
    tiny = record("hils", 0)
    tiny["settings"]["recipe"]["stages"][-1]["batch"] = 2  # no steps of this scale
    missing = [("hsa", 1), ("hils", 0), ("hsa", 2)]
    known, guessed = schedule([*done, tiny], missing, "settled")
    assert (known.arm, known.seeds, known.seconds, known.measured) == ("hsa", (1, 2), 620, True)
    assert (guessed.arm, guessed.seeds, guessed.measured) == ("hils", (0,), False)
    assert guessed.seconds == pytest.approx(450 + 20)
    (short,) = schedule(done, [("hsa", 1)], "settled", 60)
    assert short.seconds == pytest.approx(600 * 60 / 6000 + 20)
    assert calls([known, guessed], jobs=1, minutes=9) == math.ceil((1240 + 470) / 495)
    assert calls([known, guessed], jobs=3, minutes=9) == math.ceil((1240 + 470) / 3 / 495)
    text = format_schedule(done, missing, "settled", None, jobs=3, minutes=9)
    assert (
        "2 x 10.3 min" in text
        and "(as other arms)" in text
        and text.endswith("3 runs are missing, 3 at once: 10 min, 2 calls of 9 min")
    )
    with pytest.raises(ValueError, match="^--plan: got no recorded run"):
        schedule([tiny], missing, "settled")


def test_every_claim_names_arms_and_measures_of_the_settled_scale():
    assert SETTLED_CLAIMS[: len(CLAIMS)] == CLAIMS
    assert len({claim.name for claim in SETTLED_CLAIMS}) == len(SETTLED_CLAIMS)
    assert {arm for claim in SETTLED_CLAIMS for arm in claim.arms} == set(ARMS | SETTLED_ARMS)
    for claim in NEW_CLAIMS:
        for measure in claim.measures:
            assert measure.read(record("hsa", 0)) > 0
            multiples = (
                SETTLED.crowded_multiples if measure.what == "crowded" else SETTLED.multiples
            )
            assert measure.multiple in multiples


def test_the_settled_scale_is_the_first_one_for_longer():
    lab = SCALES["lab"]
    assert SETTLED.config == lab.config and SETTLED.growth == lab.growth
    assert ARMS["hsa"].recipe(SETTLED).steps == 6000 == 4 * ARMS["hsa"].recipe(lab).steps
    assert SETTLED.texts >= 20 and SETTLED.lengths == lab.lengths
    crowd = TASKS["s_niah"](np.random.default_rng(0), distractors=SETTLED.distractors)
    assert crowd.min_tokens(64, SETTLED.config.window) <= 16 * SETTLED.stage.tokens
    assert arms_of("lab") is ARMS and set(SETTLED_ARMS) < set(arms_of("settled"))


def test_arms_that_overlap_get_more_seeds():
    def judged(hils: float, seeds: int = 3):
        records = [
            record(arm, seed, value + seed / 100)
            for arm, value in (("hils", hils), ("dash_attention", 0.4), ("hsa", 0.5))
            for seed in range(seeds)
        ]
        records += [record(arm, s, gain=g) for arm, g in (("text_hils", 0.1), ("text", 0.0))
                    for s in range(seeds)]  # fmt: skip
        return judge(records, SETTLED_CLAIMS, "settled")

    def verdict(findings) -> str:
        return next(f.verdict for f in findings if f.claim.name == "HiLS")

    apart = judged(0.9)
    assert verdict(apart) == REPRODUCED and touching(apart) == []
    assert verdict(judged(0.1)) == DIFFERENT
    assert touching(judged(0.41)) == ["hils", "dash_attention"]
    assert touching(judged(0.41, seeds=5)) == []
    # Records of the settled scale are none of the first.
    assert {f.verdict for f in judge([record("hsa", 0)])} == {NOT_RUN}


def test_the_picture_of_a_ratio_has_its_points_and_its_band():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from hsa_mini.viz.training import ratio_curves

    points = [
        curves.Ratio(2_000_000, 512, 1.1, 1.0, 1.2),
        curves.Ratio(4_000_000, 512, 0.9, 0.8, 1),
    ]
    ax = Figure().subplots()
    ratio_curves(ax, {"HSA / full attention": points})
    assert ax.lines[0].get_xydata().tolist() == [[2.0, 1.1], [4.0, 0.9]]
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 0.8 and band[:, 1].max() == 1.2
