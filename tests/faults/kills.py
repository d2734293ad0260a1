"""Signals at random moments of training, saving, evaluating, indexing and encoding a corpus.

Afterwards nothing that was finished is lost, the next run finishes with the result of an
undisturbed one, and no debris stays.
"""

import dataclasses
import functools
import hashlib
import json
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from material import tiny, words
from safetensors.torch import load_file

from faults.processes import Counter, Outcome, in_child
from faults.report import Progress, Report
from faults.writers import (
    BY_NAME,
    STEPS,
    archives_in,
    index_model,
    load_corpus,
    names_in,
    put_archives,
    tiny_preset,
)
from hsa_mini import cli
from hsa_mini.checkpoint.training_state import load_progress
from hsa_mini.data.corpus import SPLITS
from hsa_mini.evaluation import runner
from hsa_mini.index import build, stored
from hsa_mini.training import run, run_folder, trainer

SECONDS = 120  # for a run that nobody disturbs
MAX_KILLS = 4  # of one run, before it may finish
SIGNALS = (signal.SIGKILL,) * 3 + (signal.SIGTERM, signal.SIGINT)
LENGTHS = (300, 400, 500)
QUESTIONS = 12  # of one length: ten depths and two controls
VERSIONS = 12  # that are written in a row
REWRITTEN = ("weights", "weights in shards", "memory", "training state", "results", "records")


@dataclasses.dataclass
class Work:
    """What is killed.

    prepare: makes what it reads. run: runs to the end, from where it was stopped. result: what an
    undisturbed run and a disturbed one have in common. kept: after a kill, what is wrong, or
    nothing.
    """

    name: str
    prepare: Callable[[Path], object]
    run: Callable[[Path], object]
    result: Callable[[Path], object]
    kept: Callable[[Path], str | None]


def attack(count: int, seed: int, progress: Progress, only: Sequence[str] = ()) -> Report:
    """`count` kills, equally many of each kind of work."""
    report = Report("kills")
    with tiny_preset():
        works = [Training(), Evaluating(), Indexing(), Encoding(), *map(Rewriting, REWRITTEN)]
        chosen = [work for work in works if not only or work.name in only]
        for i, work in enumerate(chosen):
            share = count // len(chosen) + (i < count % len(chosen))
            _kill_often(work, share, random.Random(f"{seed} {work.name}"), report, progress)
    return report


def _kill_often(work, count: int, rng: random.Random, report: Report, progress: Progress) -> None:
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        work.prepare(folder)
        began = time.monotonic()
        outcome = in_child(lambda: work.run(folder), seconds=SECONDS)
        seconds = time.monotonic() - began
        if not _ended_well(outcome):
            report.fault(work.name, f"undisturbed: {outcome}")
            return
        want, names = work.result(folder), _names(folder)
    killed = 0
    while killed < count:
        with TemporaryDirectory() as scratch:
            folder = Path(scratch)
            work.prepare(folder)
            for _ in range(rng.randint(1, MAX_KILLS)):
                hit = _kill_once(work, folder, rng, seconds, report)
                killed += hit
                report.tried += hit
                progress(hit)
            outcome = in_child(lambda: work.run(folder), seconds=SECONDS)
            if not _ended_well(outcome):
                report.fault(work.name, f"the run after the kills: {outcome}")
            elif (found := work.result(folder)) != want:
                report.fault(work.name, f"another result: {found} instead of {want}")
            elif surplus := sorted(_names(folder) ^ names):
                report.fault(work.name, f"left {surplus}")


def _kill_once(work, folder: Path, rng: random.Random, seconds: float, report: Report) -> bool:
    """Whether the signal met the work while it ran."""
    number = rng.choice(SIGNALS)
    after = rng.uniform(0, seconds)
    outcome = in_child(
        lambda: work.run(folder), seconds=SECONDS, kill_after=after, kill_with=number
    )
    when = f"{number.name} after {after:.3f} s"
    if outcome.signalled and (what := _ended_badly(outcome, number)):
        report.fault(work.name, f"{when}: {what}")
    try:
        what = work.kept(folder)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
    if what:
        report.fault(work.name, f"{when}: {what}; files: {names_in(folder)}")
    return outcome.signalled


def _names(folder: Path) -> set[str]:
    """The paths in a folder, with N for every number."""
    return {re.sub(r"\d+", "N", name) for name in names_in(folder)}


def _ended_well(outcome: Outcome) -> bool:
    return (outcome.kind, outcome.value) in (("returned", 0), ("returned", None))


def _ended_badly(outcome: Outcome, number: signal.Signals) -> str | None:
    """What is wrong with how a process ended that got a signal."""
    ours = "/hsa_mini/" in outcome.errors and "Traceback" in outcome.errors
    if outcome.kind == "hung" or (ours and outcome.kind != "raised"):
        return str(outcome)
    if outcome.kind == "raised" and not isinstance(outcome.value, KeyboardInterrupt):
        return str(outcome)
    accepted = {0, None, 128 + number}
    if outcome.kind in ("returned", "exited") and outcome.value not in accepted:
        return f"status {outcome.value}: {outcome.errors[-300:]}"
    return None


class Training:
    """`train`, which saves its state after every step."""

    name = "training"

    def __init__(self) -> None:
        self.started = Counter()  # the last step that was begun
        self.saved = Counter()  # the last state that was written

    def prepare(self, folder: Path) -> None:
        self.started.value = 0
        self.saved.value = 0

    def run(self, folder: Path) -> int:
        step = trainer.Trainer.train_step
        save = run_folder.save_progress
        own = run.train
        first = [True]

        def counted_step(self_, *arguments):
            if first.pop() if first else False:
                repeated = self.started.value - self_.step
                assert repeated <= 1, f"{repeated} steps are repeated"
            self.started.value = self_.step + 1
            return step(self_, *arguments)

        def counted_save(folder, number, *arguments, **options):
            save(folder, number, *arguments, **options)
            self.saved.value = number

        options = {"checkpoint_seconds": 0.0, "log_every": 1}
        with (
            mock.patch.object(trainer.Trainer, "train_step", counted_step),
            mock.patch.object(run_folder, "save_progress", counted_save),
            mock.patch.object(run, "train", functools.partial(own, **options)),
        ):
            words = ["train", "tiny", "--run", str(folder / "run"), "--steps", str(STEPS)]
            return cli.main([*words, "--device", "cpu"])

    def result(self, folder: Path) -> object:
        weights = load_file(folder / "run" / "final" / "model.safetensors")
        digest = hashlib.sha256()
        for name in sorted(weights):
            digest.update(weights[name].view(torch.uint8).numpy().tobytes())
        rows = (folder / "run" / "log.csv").read_text().splitlines()
        shipped = (folder / "run" / "final" / "log.csv").read_text().splitlines()
        log = [[row.rpartition(",")[0] for row in lines] for lines in (rows, shipped)]
        return digest.hexdigest(), log

    def kept(self, folder: Path) -> str | None:
        found = load_progress(folder / "run")
        step = found[1]["step"] if found else 0
        if step < self.saved.value:
            return f"step {self.saved.value} was saved, step {step} is found"
        return None


class Evaluating:
    """`eval`, which keeps every finished length."""

    name = "evaluating"

    def __init__(self) -> None:
        self.asked = Counter()

    def prepare(self, folder: Path) -> None:
        tiny().save_pretrained(folder / "model")
        self.asked.value = 0
        self.before = 0
        self.allowed = QUESTIONS * len(LENGTHS)

    def run(self, folder: Path) -> int:
        ask = runner.ask_one

        def counted(*arguments, **options):
            self.asked.value += 1
            return ask(*arguments, **options)

        with mock.patch.object(runner, "ask_one", counted):
            words = ["eval", str(folder / "model"), "--texts", "1", "--device", "cpu"]
            lengths = ["--lengths", *map(str, LENGTHS)]
            return cli.main([*words, *lengths, "--out", str(folder / "r.json")])

    def result(self, folder: Path) -> object:
        found = json.loads((folder / "r.json").read_text())
        return found["rows"], found["control_rows"], self.asked.value <= self.allowed

    def kept(self, folder: Path) -> str | None:
        """The questions of the length that was not finished may be asked again. After a run that
        was complete when the signal came, the next one asks all of them anew.
        """
        asked = self.asked.value - self.before
        self.before = self.asked.value
        if (folder / "r.json").exists() and not (folder / "r.json.unfinished").exists():
            self.allowed += QUESTIONS * len(LENGTHS)
        else:
            self.allowed += asked and (asked % QUESTIONS or QUESTIONS)
        return None


class Indexing:
    """`index`, which saves after every block."""

    name = "indexing"

    def __init__(self) -> None:
        self.saved = Counter()  # the tokens that the last index had read

    def prepare(self, folder: Path) -> None:
        self.saved.value = 0
        index_model().save_pretrained(folder / "model")
        (folder / "text.txt").write_text(words(1000))

    def run(self, folder: Path) -> int:
        save = stored.Index.save

        def counted(index, *arguments):
            save(index, *arguments)
            self.saved.value = index.memory.position

        often = functools.partial(build.build_index, save_seconds=0.0)
        with (
            mock.patch.object(stored.Index, "save", counted),
            mock.patch.object(build, "build_index", often),
            mock.patch.object(build, "BLOCK", 200),
        ):
            model = ["--checkpoint", str(folder / "model"), "--device", "cpu"]
            return cli.main(["index", str(folder / "text.txt"), str(folder / "index"), *model])

    def result(self, folder: Path) -> object:
        index = stored.read_index(folder / "index", torch.device("cpu"))
        chunks = index.memory.chunks
        caches = (x for cache in (*index.memory.lower, *index.memory.upper) for x in cache)
        digest = hashlib.sha256()
        for part in (chunks.k, chunks.v, chunks.landmarks, index.memory.tail, *caches):
            digest.update(part.numpy().tobytes())
        return index.complete, index.text.tokens.tolist(), digest.hexdigest()

    def kept(self, folder: Path) -> str | None:
        found = 0
        if self.saved.value or (folder / "index" / "index").exists():
            found = stored.read_index(folder / "index", torch.device("cpu")).memory.position
        if found < self.saved.value:
            return f"an index of {self.saved.value} tokens was saved, one of {found} is found"
        return None


class Encoding:
    """The first use of the corpus, which encodes it."""

    name = "encoding"

    def prepare(self, folder: Path) -> None:
        put_archives(folder)

    def run(self, folder: Path) -> None:
        with archives_in(folder):
            load_corpus("train")

    def result(self, folder: Path) -> object:
        with archives_in(folder):
            texts = [load_corpus(split).tokens.tobytes() for split in SPLITS]
        return [hashlib.sha256(text).hexdigest() for text in texts]

    def kept(self, folder: Path) -> str | None:
        return None


class Rewriting:
    """A writer that replaces what it wrote again and again."""

    def __init__(self, name: str) -> None:
        self.name = f"saving: {name}"
        self.writer = BY_NAME[name]
        self.written = Counter()

    def prepare(self, folder: Path) -> None:
        self.written.value = 0

    def run(self, folder: Path) -> None:
        found = self.writer.read(folder) or 0
        for version in range(found + 1, found + 1 + VERSIONS):
            self.writer.write(folder, version)
            self.written.value = version

    def result(self, folder: Path) -> object:
        return self.writer.read(folder) == self.written.value

    def kept(self, folder: Path) -> str | None:
        found = self.writer.read(folder) or 0
        if not self.written.value <= found <= self.written.value + 1:
            return f"version {self.written.value} was written, {found} is found"
        self.written.value = found
        return None
