"""What the tasks in long texts yield: a row for every task and text, and sums of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from hsa_mini.evaluation.statistics import cluster_interval, wilson_interval

COUNTS = ("questions", "right", "found", "whole", "whole_right", "absent", "absent_right",
          "shuffled", "shuffled_right")  # fmt: skip


@dataclass(frozen=True)
class TextRow:
    """The questions of one task about one text of `tokens` tokens.

    text: its number. haystack: what it consists of, real text by its name; start: the first token
    of that which it holds. right: questions whose answer is wholly right. found: the sum of the
    shares of each answer that are right (RULER's score). whole: questions whose first needed
    sentence lies in a single chunk. absent: questions whose needed sentences are not in the text;
    shuffled: questions of another text of the same task.
    """

    task: str
    tokens: int
    text: int
    haystack: str
    start: int
    questions: int
    right: int
    found: float
    whole: int
    whole_right: int
    absent: int
    absent_right: int
    shuffled: int
    shuffled_right: int
    seed: int


def summarise(rows: Sequence[TextRow]) -> list[dict]:
    """A summary per task and length, in the order of the rows: the sums of all counts over `texts`
    texts; the share of right answers (accuracy) and RULER's score (score); the 95% interval of the
    accuracy if all questions were independent (low, high), and with each text as one cluster
    (cluster_low, cluster_high).
    """
    groups: dict[tuple[str, int], list[TextRow]] = {}
    for row in rows:
        groups.setdefault((row.task, row.tokens), []).append(row)
    return [_summary(task, tokens, some) for (task, tokens), some in groups.items()]


def _summary(task: str, tokens: int, rows: list[TextRow]) -> dict:
    sums = {name: sum(getattr(row, name) for row in rows) for name in COUNTS}
    low, high = wilson_interval(sums["right"], sums["questions"])
    cluster_low, cluster_high = cluster_interval([(row.right, row.questions) for row in rows])
    return {
        "task": task,
        "tokens": tokens,
        "texts": len(rows),
        **sums,
        "accuracy": sums["right"] / sums["questions"],
        "score": sums["found"] / sums["questions"],
        "low": low,
        "high": high,
        "cluster_low": cluster_low,
        "cluster_high": cluster_high,
    }
