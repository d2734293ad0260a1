"""Runs of the laboratory: each missing run runs once, records are complete, verdicts follow the
rule.
"""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from material import small_corpus

from hsa_mini.inference.cuda_graph import WARM_UP
from hsa_mini.lab import claims as judging
from hsa_mini.lab import harness
from hsa_mini.lab.arms import ARMS
from hsa_mini.lab.claims import (
    CLAIMS,
    DIFFERENT,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    Measure,
    Spread,
    format_findings,
    judge,
    verdict,
)
from hsa_mini.lab.harness import run_missing
from hsa_mini.lab.records import append_record, current, read_records
from hsa_mini.lab.scales import SCALES

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
LAB = SCALES["lab"]


def record(
    arm: str, seed: int, value: float = 0.5, *, scale: str = "lab", perplexity: float | None = 20.0
) -> dict:
    """A made-up record with the same accuracy everywhere."""
    rows = [
        {"tokens": tokens, "samples": 32, "correct": 0, "accuracy": value}
        for tokens in SCALES[scale].lengths
    ]
    found = dict.fromkeys(("s_niah", "mq_niah", "vt", "copy"), rows)
    found["perplexity"] = [
        {"tokens": tokens, "scored": 1, "perplexity": perplexity}
        for tokens in SCALES[scale].lengths
    ]
    return {
        "arm": arm,
        "seed": seed,
        "settings": json.loads(json.dumps(ARMS[arm].settings(SCALES[scale]))),
        "found": found,
    }


class Worker:
    """Stands in for a process: a thread that sends a record at once, or an error, or just ends."""

    alive, most = 0, 0

    def __init__(self, link, dies) -> None:
        self.link = link
        self.dies = dies
        Worker.alive += 1
        Worker.most = max(Worker.most, Worker.alive)
        threading.Thread(target=self.work, daemon=True).start()

    def work(self) -> None:
        try:
            while True:
                arm, seed = self.link.recv()
                if (arm, seed) in self.dies:
                    if seed:
                        self.link.send("RuntimeError: too hot")
                    return self.link.close()
                self.link.send(7)
                self.link.send(record(arm, seed))
        except (EOFError, OSError):
            self.link.close()

    def terminate(self) -> None:
        Worker.alive -= 1

    def join(self) -> None: ...


@pytest.fixture
def workers(monkeypatch):
    """Threads replace the processes; returns the set of (arm, seed) whose worker dies."""
    dies: set = set()

    def start(*_):
        link, other = Pipe()
        return link, Worker(other, dies)

    monkeypatch.setattr(harness, "_start", start)
    Worker.alive = 0
    Worker.most = 0
    return dies


def test_what_is_missing_is_run_and_nothing_else(workers, tmp_path):
    path = tmp_path / "new" / "lab.jsonl"
    assert run_missing(["hsa", "window"], [0, 1], path=path, device=CPU, jobs=3) == (4, 0)
    assert Worker.most == 3 and Worker.alive == 0
    lines = path.read_text().splitlines()
    assert sorted((r["arm"], r["seed"]) for r in map(json.loads, lines)) == [
        (a, s) for a in ("hsa", "window") for s in (0, 1)
    ]
    assert {"hardware", "versions", "commit", "command"} <= json.loads(lines[0]).keys()
    before = path.read_bytes()
    assert (
        run_missing(["hsa", "window"], [0, 1], path=path, device=CPU) == (0, 0)
        and path.read_bytes() == before
    )
    assert run_missing(["window", "no_noise"], [1, 2], path=path, device=CPU) == (3, 0)
    assert path.read_bytes().startswith(before) and len(read_records(path)) == 7
    # Other settings make another run.
    assert run_missing(["hsa"], [0], path=path, device=CPU, steps=5) == (1, 0)


def test_a_run_that_dies_is_named_in_a_line_and_all_others_are_kept(workers, tmp_path, capfd):
    path = tmp_path / "lab.jsonl"
    workers |= {("window", 0), ("hsa", 1)}
    with pytest.raises(
        ChildProcessError,
        match=r"^2 of 4 runs failed \(window with seed 0, hsa with seed 1\); all others are in",
    ):
        run_missing(["hsa", "window"], [0, 1], path=path, device=CPU)
    assert [(r["arm"], r["seed"]) for r in read_records(path)] == [
        ("hsa", 0),
        ("window", 1),
    ] and Worker.alive == 0
    lines = re.findall(r"[^\r\n]*failed: [^\r\n]*", capfd.readouterr().err)
    assert lines == [
        "window with seed 0 failed: its process ended",
        "hsa with seed 1 failed: RuntimeError: too hot",
    ]


def test_what_is_wrong_in_a_run_is_sent_in_a_line(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("CUDA error:\n\nout of\nhope")

    monkeypatch.setattr(harness, "run_arm", broken)
    link, other = Pipe()
    link.send(("hsa", 0))
    threads = torch.get_num_threads()
    harness._work(other, "tiny", None, CPU, 1, tmp_path / "lab.jsonl", math.inf)
    torch.set_num_threads(threads)
    assert link.recv() == "RuntimeError: CUDA error: out of hope"


def test_a_worker_makes_itself_ready_with_a_few_steps_of_every_stage(monkeypatch):
    seen = []
    monkeypatch.setattr(
        harness,
        "run_arm",
        lambda arm, scale, seed, **options: seen.append(
            (arm.recipe(scale, options["steps"]), scale)
        ),
    )
    harness.prepare(LAB, CPU)
    [(recipe, scale)] = seen
    assert min(stage.steps for stage in recipe.stages) > WARM_UP  # a step is recorded after these
    assert [dataclasses.replace(stage, steps=0) for stage in recipe.stages] == [
        dataclasses.replace(stage, steps=0) for stage in ARMS["hsa"].recipe(LAB).stages
    ]
    assert scale.lengths == LAB.lengths


def test_commands_that_write_at_once_lose_no_line(tmp_path):
    path = tmp_path / "lab.jsonl"
    code = "import sys, pathlib; from hsa_mini.lab.records import append_record\n"
    code += "path, arm = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
    code += "for i in range(20): append_record(path, dict(arm=arm, seed=i, settings={}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, "-c", code, path, arm], env=environment)
        for arm in ("hsa", "window")
    ]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert sorted((r["arm"], r["seed"]) for r in read_records(path)) == [
        (arm, i) for arm in ("hsa", "window") for i in range(20)
    ]


def test_a_record_that_is_cut_off_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "lab.jsonl"
    append_record(path, record("hsa", 0))
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        append_record(path, record("hsa", 1))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["lab.jsonl"]
    with pytest.raises(ValueError):  # NaN is not JSON
        append_record(path, record("hsa", 1, float("nan")))
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["{", "[]", "1", '{"arm": "hsa"}', ""])
def test_a_file_of_other_things_is_refused(tmp_path, line):
    path = tmp_path / "lab.jsonl"
    append_record(path, record("hsa", 0))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(
        ValueError,
        match=f"^path: line 2 of {path} is no record of a run, accepted is a file of them$",
    ):
        read_records(path)


def test_records_of_other_settings_are_left_out_and_younger_options_do_not_matter():
    same, other, older, gone = (record("hsa", seed) for seed in range(4))
    other["settings"]["recipe"]["stages"][0]["batch"] += 1
    del older["settings"]["config"]["exclude_window"]  # as in a record older than the option
    gone["settings"]["recipe"]["of_old"] = 1
    assert set(current([same, other, older, gone, record("window", 0, scale="tiny")])) == {
        ("hsa", 0),
        ("hsa", 2),
    }
    assert set(current([same, record("window", 0, scale="tiny")], "tiny")) == {("window", 0)}
    # The newest record counts.
    assert current([same, record("hsa", 0, 0.7)])["hsa", 0]["found"]["vt"][0]["accuracy"] == 0.7


# The command, with real runs


def start(folder: Path, *words: str) -> subprocess.Popen:
    small_corpus(folder / "cache")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HSA_MINI_CACHE": str(folder / "cache"),
    }
    options = ("--scale", "tiny", "--out", "lab.jsonl", "--device", "cpu")
    return subprocess.Popen(
        [sys.executable, "-m", "hsa_mini", "lab", *options, *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_two_arms_from_the_command_line(tmp_path):
    words = ("--arms", "hsa", "window", "--seeds", "3", "--steps", "2", "--jobs", "2")
    process = start(tmp_path, *words)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == "2 runs were missing and are now in lab.jsonl\n" and "2 runs: 100%" in err
    records = read_records(tmp_path / "lab.jsonl")
    assert sorted((r["arm"], r["seed"]) for r in records) == [("hsa", 3), ("window", 3)]
    for r in records:
        arm = ARMS[r["arm"]]
        assert r["settings"] == json.loads(json.dumps(arm.settings(SCALES["tiny"], 2))) and r[
            "curve"
        ]["step"] == [1, 2]
        assert r["parameters"] == arm.parameters(SCALES["tiny"])["parameters"] and r[
            "command"
        ].startswith("python -m hsa_mini lab")
        assert [row["tokens"] for row in r["found"]["mq_niah"]] == [512, 2048]
        assert all(
            row["samples"] == 2 for task in ("s_niah", "mq_niah", "vt") for row in r["found"][task]
        )
    before = (tmp_path / "lab.jsonl").read_bytes()
    process = start(tmp_path, *words)
    assert process.communicate(timeout=60)[0] == "0 runs were missing and are now in lab.jsonl\n"
    assert process.returncode == 0 and (tmp_path / "lab.jsonl").read_bytes() == before


def test_runs_that_are_out_of_time_go_on_with_the_same_command(tmp_path):
    words = ("--arms", "hsa", "hils", "--seeds", "3", "--steps", "3")
    process = start(tmp_path, *words, "--minutes", "0")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == (
        "2 runs were missing, 0 are now in lab.jsonl; the same command goes on with the other 2\n"
    )
    (states,) = (tmp_path / "lab.runs").iterdir()
    assert states.name.startswith("hsa-3-") and (states / "step-1").is_dir()
    process = start(tmp_path, *words)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == "2 runs were missing and are now in lab.jsonl\n"
    assert not (tmp_path / "lab.runs").exists()
    records = {record["arm"]: record for record in read_records(tmp_path / "lab.jsonl")}
    assert records["hsa"]["curve"]["step"] == [1, 2, 3] and "hils" in records
    process = start(tmp_path, "--arms", "hsa", "dash_attention", "--seeds", "4", "--plan")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    hsa, dash, total = out.splitlines()
    assert re.fullmatch(r"  hsa +1 x [\d.]+ min", hsa) and dash.endswith("(as other arms)")
    assert re.fullmatch(r"2 runs are missing, 3 at once: \d+ min, \d+ calls of 9 min", total)


def descendants(pid: int) -> set[int]:
    listed = subprocess.run(
        ["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True
    ).stdout.split("\n")[1:]
    parents = {int(child): int(parent) for child, parent in map(str.split, filter(None, listed))}
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill"])
def test_a_run_that_is_cut_off_leaves_no_line_and_no_process(tmp_path, how):
    append_record(tmp_path / "lab.jsonl", record("hsa", 0, scale="tiny"))
    before = (tmp_path / "lab.jsonl").read_bytes()
    process = start(tmp_path, "--arms", "hsa", "--seeds", "1", "--steps", "100000")
    shown = ""
    while not re.search(r"[1-9]\d*/100000", shown) and process.poll() is None:  # while it trains
        shown += process.stderr.read(1)
    children = descendants(process.pid)
    assert children
    os.killpg(process.pid, how) if how == signal.SIGINT else os.kill(process.pid, how)
    process.wait(timeout=60)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    shown += process.stderr.read()
    assert (tmp_path / "lab.jsonl").read_bytes() == before
    assert "Traceback" not in shown and (
        how == signal.SIGKILL or (process.returncode == 130 and "interrupted" in shown)
    )


# Claims


S = Measure("s_niah", 64)
PERPLEXITY = Measure("perplexity", 1)


@pytest.mark.parametrize(
    "measure, better, worse, want",
    [
        (S, (0.9, 0.8, 1.0), (0.1, 0.0, 0.2), REPRODUCED),
        (S, (0.1, 0.0, 0.2), (0.9, 0.8, 1.0), DIFFERENT),
        (S, (0.9, 0.8, 0.1), (0.1, 0.0, 0.2), NOT_REPRODUCED),  # one seed is no better
        (S, (0.59, 0.58, 0.57), (0.50, 0.51, 0.52), NOT_REPRODUCED),  # less than the margin
        (S, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), NOT_REPRODUCED),
        (S, (1.0, 1.0), (0.0, 0.0, 0.0), NOT_RUN),
        (S, (1.0, 1.0, 1.0), None, NOT_RUN),
        (PERPLEXITY, (19.0, 19.1, 19.2), (20.0, 20.1, 20.2), REPRODUCED),  # lower is better
        (PERPLEXITY, (20.0, 20.1, 20.2), (19.0, 19.1, 19.2), DIFFERENT),
        (PERPLEXITY, (19.98, 19.97, 19.96), (20.0, 20.01, 20.02), NOT_REPRODUCED),
        (PERPLEXITY, (20.0, 20.0, 20.0), (float("inf"),) * 3, REPRODUCED),
    ],
)
def test_the_rule_of_a_verdict(measure, better, worse, want):
    assert verdict(measure, Spread(better), worse and Spread(worse)) == want


def test_every_claim_names_arms_that_are_there_and_measures_that_are_taken():
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS) == 10
    for claim in CLAIMS:
        assert set(claim.arms) <= set(ARMS) and {m.multiple for m in claim.measures} <= set(
            LAB.multiples
        )
        assert all(measure.read(record("hsa", 0)) in (0.5, 20.0) for measure in claim.measures)
    assert {arm for claim in CLAIMS for arm in claim.arms} == set(ARMS)


def all_records(**accuracy: float) -> list[dict]:
    """Three seeds of every arm; the accuracy is 0.5 except for the arms named."""
    return [
        record(arm, seed, accuracy.get(arm, 0.5) + seed / 1000) for arm in ARMS for seed in range(3)
    ]


def test_claims_from_records_of_all_arms():
    verdicts = {
        f.claim.name: f.verdict
        for f in judge(all_records(hsa=0.9, hsa_rope=0.1, full_rope=0.2, mean_landmark=0.95))
    }
    assert verdicts["positions"] == verdicts["blindness"] == verdicts["fusion"] == REPRODUCED
    assert verdicts["encoder"] == verdicts["scale"] == verdicts["QK norm"] == NOT_REPRODUCED
    verdicts = {f.claim.name: f.verdict for f in judge(all_records(hsa=0.3, mean_key=0.0))}
    assert verdicts["fusion"] == DIFFERENT  # better than one, worse than the other
    assert verdicts["positions"] == DIFFERENT


def test_claims_wait_for_every_seed_and_for_records_of_now():
    assert {f.verdict for f in judge([])} == {NOT_RUN}
    records = [r for r in all_records(hsa=0.9) if (r["arm"], r["seed"]) != ("window", 2)]
    verdicts = {f.claim.name: f.verdict for f in judge(records)}
    assert verdicts["blindness"] == NOT_RUN and verdicts["encoder"] == REPRODUCED
    for r in records:
        r["settings"]["recipe"]["stages"][0]["steps"] += 1
    assert {f.verdict for f in judge(records)} == {NOT_RUN}


def test_the_table_says_mean_lowest_highest_and_verdict():
    records = [record("hsa", seed, value) for seed, value in enumerate((0.25, 0.5, 0.9))]
    records += [record("window", seed, 0.0, perplexity=None) for seed in range(3)]
    text = format_findings(judge(records))
    assert (
        re.search(r"^blindness: reproduced$", text, re.MULTILINE) and text.count("not yet run") == 9
    )
    assert re.search(r"s_niah at 1x +hsa +55\.0% +\(25\.0% to 90\.0%, 3 seeds\)", text)
    assert re.search(r"perplexity at 1x +window +inf", text)
    assert judging.SEEDS == 3
