"""The command `train` on several processes: it equals the command on one, and every process stops
when one of them does. The processes use gloo, on the CPU.
"""

import csv
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Ended, run_together
from safetensors.torch import load_file

from hsa_mini import HSAModel
from hsa_mini.checkpoint.training_state import load_progress
from hsa_mini.cli import main
from hsa_mini.training import run as training
from hsa_mini.training import run_folder, step
from hsa_mini.training.log import SPEED
from hsa_mini.training.parallel import processes
from hsa_mini.training.trainer import Trainer

EXPERTS = {"experts": 4, "experts_active": 2, "expert_width": 16}
STAGE = {"steps": 20, "batch": 4, "tokens": 32, "gumbel_noise": False}


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> Path:
    """A folder with text and the configurations of two models."""
    folder = tmp_path_factory.mktemp("configs")
    random = np.random.default_rng(0)
    ids = random.integers(0, 500, 20_000)
    ids.astype(np.uint16).tofile(folder / "text.bin")
    for name, fields in (("dense", {}), ("experts", EXPERTS)):
        values = {
            "model": {"preset": "debug", **fields},
            "train": {"stages": [STAGE], "warmup": 5, "eval_every": 10},
            "data": {"files": [str(folder / "text.bin")]},
        }
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def words(config: Path, run: Path, *options: str) -> list[str]:
    return ["train", str(config), "--run", str(run), *options]


def in_float64() -> None:
    """Train in float64, in which rounding never makes another chunk or expert the chosen one, and
    write the rows of the log, with all digits, to standard output.
    """
    training.HSAModel = functools.partial(HSAModel, dtype=torch.float64)
    write = run_folder.RunFolder.write_row

    def keep(self, row: dict[str, float]) -> None:
        print(json.dumps(row))
        write(self, row)

    run_folder.RunFolder.write_row = keep


def rows(ended: Ended) -> list[dict[str, float]]:
    return [json.loads(line) for line in ended.out.splitlines() if line.startswith("{")]


def newest(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of the newest state of a run, by name."""
    state = load_progress(run)
    assert state is not None
    return state[0]


@functools.cache
def alone(config: Path, run: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The rows of a run of one process, and its last state, in float64."""
    (ended,) = run_together([words(config, run)], run.parent, in_float64)
    assert ended.status == 0, ended
    return rows(ended), newest(run)


def weights_differ(run: Path, state: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight of the model in the newest state of a run."""
    found = newest(run)
    assert found.keys() == state.keys()
    names = [name for name in found if name.startswith("model.")]
    return max(float((found[name] - state[name]).abs().max()) for name in names)


def bfloat16(run: Path) -> dict[str, torch.Tensor]:
    """The parameters in the newest state of a run, rounded to bfloat16, by name."""
    tensors = newest(run)
    names = [name for name in tensors if name.startswith("model.") and not name.endswith(".bias")]
    return {name.removeprefix("model."): tensors[name].bfloat16().float() for name in names}


def before_step(number: int, rank: int, do) -> None:
    """Let the process of a rank call `do()` before it takes a step, counted from 1."""
    take = Trainer.train_step

    def train_step(self, batch):
        if self.step == number - 1 and self.ranks.rank == rank:
            do()
        return take(self, batch)

    Trainer.train_step = train_step


def interrupt() -> None:
    in_float64()
    before_step(20, 1, lambda: os.kill(os.getpid(), signal.SIGINT))


def terminate() -> None:
    in_float64()
    before_step(12, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))


def assert_close(found: list[dict[str, float]], want: list[dict[str, float]]) -> None:
    """All figures of training are equal within 1e-6."""
    assert [row["step"] for row in found] == [row["step"] for row in want]
    for row, other in zip(found, want):
        for name in other.keys() - {"seconds"}:
            assert math.isclose(row[name], other[name], rel_tol=1e-6, abs_tol=1e-6), (name, row)


def test_a_run_with_shared_experts_equals_one_of_one_process(configs, tmp_path):
    config = configs / "experts.json"
    want, state = alone(config, configs / "experts")
    run = tmp_path / "run"
    first, second = run_together([words(config, run, "--mesh", "ep=2")] * 2, tmp_path, in_float64)
    assert (first.status, second.status) == (0, 0), (first, second)
    assert [row["loss"] for row in rows(first)] == [row["loss"] for row in rows(second)]
    assert_close(rows(first), want)
    assert weights_differ(run, state) < 1e-12
    text = f"the model is in {run / 'final'}, the log in {run / 'log.csv'}"
    assert first.out.splitlines()[-1] == text and text not in second.out
    whole = HSAModel.from_pretrained(run / "final").state_dict()
    assert all(torch.equal(x, whole[name]) for name, x in bfloat16(run).items())
    how = json.loads((run / "final" / "training.json").read_text())
    alone_how = json.loads((configs / "experts" / "final" / "training.json").read_text())
    assert how["mesh"] == "dp=1,cp=1,ep=2" and how["imbalance"] == alone_how["imbalance"]
    for row in csv.DictReader((run / "log.csv").open()):
        assert all(0 < float(row[name]) < math.inf for name in SPEED), row
        assert float(row["mfu"]) < 1


def test_torchrun_starts_a_run_that_equals_one_of_one_process(configs, tmp_path):
    # With every chunk kept, no rounding makes another one the chosen one.
    options = ["--set", "model.top_k=8"]
    config = configs / "dense.json"
    assert main(words(config, tmp_path / "alone", *options)) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = words(config, tmp_path / "run", "--mesh", "cp=2", *options)
    ended = subprocess.run(
        [*torchrun, "--standalone", "-m", "--", "hsa_mini", *command],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("the model is in") == 1 and "Warning" not in ended.stderr
    assert weights_differ(tmp_path / "run", newest(tmp_path / "alone")) < 4e-6


def test_a_signal_to_one_process_saves_and_stops_all_and_the_run_goes_on(configs, tmp_path):
    config = configs / "dense.json"
    want, state = alone(config, configs / "dense")
    run = tmp_path / "run"
    seen = []
    for mesh, prepare, status, done in (("dp=2", terminate, 0, 12), ("cp=2", interrupt, 130, 20)):
        both = run_together([words(config, run, "--mesh", mesh)] * 2, tmp_path, prepare)
        assert [ended.status for ended in both] == [status] * 2, both
        stopped = f"stopped after step {done}; the same command goes on from there"
        assert stopped in both[0].out and "stopped" not in both[1].out
        assert (run / f"step-{done}").is_dir() and not (run / ".lock").exists()
        seen += rows(both[0])
    assert_close(seen, want)
    assert weights_differ(run, state) < 1e-12


def nan_in_one_process() -> None:
    real = step.mixture_loss
    calls = []

    def loss(*arguments, **options):
        value, *others = real(*arguments, **options)
        calls.append(None)
        bad = len(calls) == 2 and os.environ["RANK"] == "1"
        return value * (math.nan if bad else 1), *others

    step.mixture_loss = loss


def test_a_loss_that_is_not_finite_on_one_process_stops_all_and_the_whole_batch_is_kept(
    configs, tmp_path
):
    run = tmp_path / "run"
    command = words(configs / "dense.json", run, "--mesh", "dp=2")
    both = run_together([command] * 2, tmp_path, nan_in_one_process)
    batch = run / "batch-2.safetensors"
    for ended in both:
        assert ended.status == 2
        line = ended.err.splitlines()[-1]
        assert line.startswith("hsa-mini train: error: step 2 made the loss or the gradient not")
        assert str(batch) in line
    assert load_file(batch)["ids"].shape == (4, 33) and not list(run.glob("step-*"))


def other_code() -> None:
    if os.environ["RANK"] == "1":
        processes.provenance.code = lambda: "other"


@pytest.mark.parametrize(
    "own, other, prepare, what",
    [
        (["--mesh", "dp=2"], ["--learning-rate", "0.5", "--mesh", "dp=2"], int, "recipe"),
        (["--mesh", "dp=2"], ["--mesh", "cp=2"], int, "mesh"),
        (["--mesh", "dp=2"], ["--mesh", "dp=2"], other_code, "code"),
    ],
)
def test_processes_that_differ_are_refused_and_nothing_is_written(
    configs, tmp_path, own, other, prepare, what
):
    commands = [words(configs / "dense.json", tmp_path / "run", *more) for more in (own, other)]
    message = f"mesh: got another {what} on rank 1 than on rank 0, accepted is the same on all"
    for ended in run_together(commands, tmp_path, prepare):
        assert ended.status == 2 and message in ended.err, ended
    assert not (tmp_path / "run").exists()


def quickly() -> None:
    processes.BEAT = 0.1
    processes.MAX_SILENCE = 5.0
    processes.GRACE = 1.0


def die_first() -> None:
    quickly()
    before_step(1, 0, lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail() -> None:
    def no_luck() -> None:
        raise OSError("no luck")

    quickly()
    before_step(1, 1, no_luck)


def hang() -> None:
    quickly()
    before_step(1, 0, signal.pause)
    before_step(1, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize(
    "prepare, dead, message",
    [
        (die_first, 0, "rank 0, or torchrun on its host, has ended"),
        (fail, 1, "rank 1 stopped: no luck"),
        (hang, 1, "rank 1 gave no sign of life for 5 s"),
    ],
)
def test_a_process_that_dies_ends_the_others_which_name_it(
    configs, tmp_path, prepare, dead, message
):
    command = words(configs / "dense.json", tmp_path / "run", "--mesh", "dp=2")
    both = run_together([command] * 2, tmp_path, prepare)
    assert both[dead].status == (2 if prepare is fail else -signal.SIGKILL)
    other = both[1 - dead]
    assert other.status == 2 and message in other.err.splitlines()[-1], other
    assert "Traceback" not in other.err


@pytest.mark.parametrize(
    "started, options, message",
    [
        (1, ["--mesh", "dp=2"], "mesh: got dp=2,.* is 2 processes, .* product is the 1 started"),
        (2, [], "--mesh: got none for the 2 processes started, .*, such as dp=2"),
        (2, ["--mesh", "tp=2"], "mesh: got 'tp=2', accepted are sizes of dp, cp and ep"),
        (2, ["--mesh", "ep=2"], "mesh: got ep=2, accepted for this model are 1"),
        (3, ["--mesh", "dp=3"], "mesh: got dp=3 and ep=1 for batches of 4 rows"),
        (2, ["--mesh", "dp=2", "--set", "train.muon=1"], "mesh: got dp=2,.* with muon=1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_any_work(
    configs, tmp_path, monkeypatch, capsys, started, options, message
):
    monkeypatch.setenv("WORLD_SIZE", str(started))
    assert main(words(configs / "dense.json", tmp_path / "run", *options)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"hsa-mini train: error: {message}", line)
    assert not list(tmp_path.iterdir())


def test_one_process_needs_no_torchrun(configs, tmp_path):
    command = words(configs / "dense.json", tmp_path / "run", "--steps", "2")
    assert main([*command, "--mesh", "dp=1"]) == 0
    assert main([*command[:2], "--run", str(tmp_path / "alone"), "--steps", "2"]) == 0
    assert weights_differ(tmp_path / "run", newest(tmp_path / "alone")) < 1e-6
