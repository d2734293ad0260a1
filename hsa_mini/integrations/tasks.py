"""The tasks of lm-eval that need no download: those of RULER, and those of the user's own.

RULER's tasks have texts of any length. lm-eval's YAML files end at 131,072 tokens, so the
configuration for a length is made here.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hsa_mini.checks import quoted
from hsa_mini.integrations.lm_eval import HSALM  # which says what to install if lm-eval is missing
from hsa_mini.tasks.long.ruler import Whole
from hsa_mini.tasks.long.ruler_lists import ruler_texts

# isort: split
import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.registry import metric_registry
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks.manager import TaskDict, TaskManager

RULER = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
)
FILES = ("json", "csv", "parquet", "arrow", "text")  # what `datasets` reads from local files
RULER_FOLDER = Path(lm_eval.tasks.__file__).parent / "ruler"


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task.

    tokens: the length of the task's texts, or 0 for a task with texts of its own. longest: tokens
    of the longest text that the model has read. stderr: None where lm-eval has no estimate.
    """

    task: str
    tokens: int
    samples: int
    metric: str
    value: float
    stderr: float | None
    longest: int
    seed: int


def libraries() -> dict[str, str]:
    """The versions of the packages that decide the texts and the metrics."""
    return {name: version(name) for name in ("lm_eval", "wonderwords", "datasets")}


def own_tasks(names: Collection[str], folder: Path | None) -> dict[str, Task]:
    """Tasks by name, from the YAML files below `folder`.

    Raises ValueError, which names the argument of the command, for a task that does not exist,
    needs a download or cannot be loaded.
    """
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--include-path: got {quoted(str(folder))}, accepted is a folder")
    manager = TaskManager(include_defaults=False, include_path=folder)
    for name in names:
        if name not in manager.all_subtasks:
            raise ValueError(
                f"--tasks: got {quoted(name)}, accepted are tasks that need no download: "
                f"{', '.join(RULER)}, and those of the folder --include-path"
            )
        _check_needs_no_download(name, manager.task_index[name].cfg or {})
    tasks = {}
    for name in names:
        try:
            tasks |= manager.load(name)["tasks"]
        except Exception as error:  # the task's own code may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"--tasks: {name} cannot be loaded: {reason}") from None
    return tasks


def _check_needs_no_download(name: str, config: dict[str, Any]) -> None:
    """Raise ValueError if the texts or a metric of a task would be downloaded."""
    path = str(config.get("dataset_path", ""))
    files = json.dumps((config.get("dataset_kwargs") or {}).get("data_files"), default=str)
    here = (path in FILES and "://" not in files) or Path(path).is_dir()
    if not here and not config.get("custom_dataset"):
        got = path if "://" not in files else files
        raise ValueError(
            f"--tasks: {name} would download {quoted(got)}, accepted is a dataset_path of "
            f"{', '.join(FILES)} with local data_files"
        )
    for metric in config.get("metric_list") or []:
        name_or_function = str(metric.get("metric"))  # a function is the path of its file
        known = name_or_function in metric_registry or Path(name_or_function).is_absolute()
        if metric.get("hf_evaluate") or not (known or config.get("process_results")):
            raise ValueError(
                f"--tasks: {name} would download the metric {quoted(name_or_function)}, "
                "accepted are lm-eval's own metrics"
            )


def digest(task: Task) -> str:
    """The sha256 of a task's configuration and texts, in hexadecimal."""
    content = [task.dump_config(), list(task.eval_docs)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def ruler_task(name: str, tokens: int, *, samples: int, seed: int) -> Task:
    """One of RULER's tasks with `samples` texts of at most `tokens` tokens."""
    from lm_eval.tasks.ruler import common_utils

    manager = TaskManager(include_defaults=False, include_path=RULER_FOLDER)
    texts = ruler_texts(name.removeprefix("ruler_"), tokens, samples=samples, seed=seed)
    documents = Dataset.from_list([_document(text, tokens) for text in texts])
    metrics = [
        {
            "metric": length,
            "aggregation": common_utils.aggregate_metrics,
            "higher_is_better": True,
        }
        for length in dict.fromkeys((str(common_utils.DEFAULT_SEQ_LENGTHS[0]), str(tokens)))
    ]
    changes = {
        "custom_dataset": lambda **_: {"test": documents},
        "process_results": common_utils.process_results,
        "metric_list": metrics,
    }
    return ConfigurableTask(config={**(manager.task_index[name].cfg or {}), **changes})


def _document(text: Whole, tokens: int) -> dict[str, Any]:
    """A text with its first question, under lm-eval's names."""
    asked = text.questions[0]
    return {
        "input": text.text + asked.question,
        "outputs": list(asked.answers),
        "gen_prefix": asked.prefix.strip(),
        "max_length": tokens,
    }


def measure(lm: HSALM, task: Task, *, tokens: int, samples: int, seed: int) -> list[TaskRow]:
    """The metrics of a task over its first `samples` texts."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)
    tasks = TaskDict(tasks={task.task_name: task})
    results: Any = evaluate(lm, tasks, limit=samples, bootstrap_iters=1000, log_samples=False)
    found = results["results"][task.task_name]
    rows = []
    for key, value in found.items():
        metric, comma, filter_ = key.partition(",")
        # RULER's metrics are called as the lengths are. That of another length is -1.
        if not comma or metric.endswith("_stderr") or (tokens and metric != str(tokens)):
            continue
        error = found[f"{metric}_stderr,{filter_}"]
        rows.append(
            TaskRow(
                task=task.task_name,
                tokens=tokens,
                samples=found["sample_len"],
                metric="string_match" if tokens else key.removesuffix(",none"),
                value=float(value),
                stderr=None if error == "N/A" else float(error),
                longest=lm.longest,
                seed=seed,
            )
        )
    return rows
