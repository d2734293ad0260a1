"""The tables of the start page, in Markdown: what each notebook says of itself, the symbols, the
paper, and its claims.

`data/course.json` holds what cannot be computed. Titles, minutes and needs come from the first
cells of the notebooks, and the verdicts on claims from the result files.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa_mini.evaluation.results import LENGTHS, PUBLISHED, read_results
from hsa_mini.evaluation.statistics import by_length
from hsa_mini.lab.claims import DIFFERENT, NOT_REPRODUCED, NOT_RUN, REPRODUCED, judge
from hsa_mini.lab.records import read_records
from hsa_mini.paths import data_dir

NOT_ATTEMPTED = "not attempted"
VERDICTS = (REPRODUCED, DIFFERENT, NOT_REPRODUCED, NOT_RUN, NOT_ATTEMPTED)
CELL = re.compile(r"^# %% \[markdown\]\n(.*?)(?=^# %%)", re.MULTILINE | re.DOTALL)
ABLE = "you will be able to"


@dataclass(frozen=True)
class Header:
    """What the first cell of a notebook says.

    name: of the file, without its ending. able: what a reader can do afterwards. minutes: to read.
    run: the time to run, in words. needs: the names of the notebooks that it builds on.
    """

    name: str
    question: str
    able: tuple[str, ...]
    minutes: int
    run: str
    needs: tuple[str, ...]

    @property
    def number(self) -> str:
        return self.name[:2]


def read_headers(folder: Path) -> list[Header]:
    """The headers of all notebooks of a folder, by number.

    Raises ValueError that names a notebook whose first cell lacks a part.
    """
    return [_header(path) for path in sorted(folder.glob("[0-9][0-9]_*.py"))]


def _header(path: Path) -> Header:
    cell = CELL.search(path.read_text(encoding="utf-8"))
    text = re.sub(r"^# ?", "", cell[1] if cell else "", flags=re.MULTILINE)
    title = re.match(rf"# {path.stem[:2]} · (.+)\n", text)
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    able = next((p for p in paragraphs if p.startswith("* ")), "")
    last = next((p for p in paragraphs if p.startswith("**Time:**")), "")
    time = re.match(r"\*\*Time:\*\* (\d+) minutes to read, (.+?) to run on two CPU cores", last)
    needs = last.partition("**Needs:** ")[2]
    if not (title and ABLE in text and able and time and needs):
        raise ValueError(f"notebook: the first cell of {path.name} lacks a part of its header")
    links = re.findall(r"\((\d\d_\w+)\.ipynb\)", needs)
    promises = [entry.strip(" ,.") for entry in re.split(r"(?:^| )\* ", able) if entry.strip()]
    return Header(path.stem, title[1], tuple(promises), int(time[1]), time[2], tuple(links))


def way(headers: list[Header], name: str) -> str:
    """The last line of a header: links to the notebook before, to the start page, and onward."""
    names = [header.name for header in headers]
    i = names.index(name)
    links = [f"[← {short_name(before)}]({before}.ipynb)" for before in names[max(i - 1, 0) : i]]
    links += [f"[map of the course]({names[0]}.ipynb)"] if i > 1 else []
    links += [f"[{short_name(after)} →]({after}.ipynb)" for after in names[i + 1 : i + 2]]
    return " · ".join(links)


def short_name(name: str) -> str:
    """`02 chunks` for the notebook `02_chunks`."""
    return name.replace("_", " ")


def read_course() -> dict[str, Any]:
    """What `data/course.json` holds."""
    return json.loads((data_dir() / "course.json").read_text(encoding="utf-8"))


def part_of(number: str) -> str:
    """The part of the course to which a notebook with this number belongs."""
    return next(part for part, numbers in read_course()["parts"].items() if number in numbers)


def table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    lines = [list(heads), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def link(notebook: str, heading: str = "") -> str:
    """A link to a notebook, or to a heading in it as JupyterLab names it."""
    anchor = f"#{heading.replace(' ', '-')}" if heading else ""
    words = f"{notebook[:2]} {heading}" if heading else short_name(notebook)
    return f"[{words}]({notebook}.ipynb{anchor})"


def notebook_table(headers: Iterable[Header]) -> str:
    """One line per notebook: its part, its question, minutes, and what one can do afterwards."""
    heads = ("part", "notebook", "the question", "to read", "to run", "afterwards you can")
    rows = (
        (part_of(h.number), link(h.name), h.question, f"{h.minutes} min", h.run, "; ".join(h.able))
        for h in headers
    )
    return table(heads, rows)


def size_table() -> str:
    """The letters of sizes, each with its field of `HSAConfig` if it has one."""
    rows = ((f"**{a}**", b, f"`config.{c}`" if c else "") for a, b, c in read_course()["sizes"])
    return table(("letter", "what it counts", "in code"), rows)


def tensor_table() -> str:
    """The paper's symbols, and the arguments of the operations that hold them."""
    rows = (
        (symbol, f"`{argument}` of `{operation}`", f"`{shape}`", what)
        for symbol, what, operation, argument, shape in read_course()["tensors"]
    )
    return table(("paper", "in code", "shape", "what it is"), rows)


def paper_table() -> str:
    """Equation or section -> notebook -> module -> test."""
    rows = (
        (
            entry["place"],
            entry["what"],
            link(entry["notebook"], entry["heading"]),
            f"`{entry['code'].replace(':', '.')}`",
            f"`{entry['test']}`",
        )
        for entry in read_course()["paper"]
    )
    return table(("paper", "what", "notebook", "code", "test"), rows)


def claim_rows() -> list[tuple[str, str, str, str | None]]:
    """(claim, verdict, link to the cell that shows it, test) for every entry of the ledger."""
    findings = {
        finding.claim.name: finding
        for finding in judge(read_records(data_dir() / "results" / "lab.jsonl"))
    }
    rows = []
    for entry in read_course()["claims"]:
        if "lab" in entry:
            claim = findings[entry["lab"]].claim.statement
            verdict = findings[entry["lab"]].verdict
        else:
            claim = entry["claim"]
            verdict = entry.get("verdict") or verdict_of_task(entry["task"])
        rows.append((claim, verdict, link(entry["notebook"], entry["heading"]), entry["test"]))
    return rows


def verdict_of_task(task: str) -> str:
    """Whether `mini` gives at least the (lowest) share of right answers at the greatest length that
    the paper prints for its 8B.
    """
    rows, _, _ = read_results(data_dir() / "results" / f"mini_{task}.json")
    share = {row["tokens"]: 100 * row["accuracy"] for row in by_length(rows)}
    lowest, _ = PUBLISHED[task][-1]
    return REPRODUCED if share[LENGTHS[-1]] >= lowest else NOT_REPRODUCED


def claim_table() -> str:
    """The ledger: every claim of the paper with its verdict, those that hold first."""
    found = sorted(claim_rows(), key=lambda row: VERDICTS.index(row[1]))
    rows = (
        (f"**{verdict}**", claim, where, f"`{test}`" if test else "")
        for claim, verdict, where, test in found
    )
    return table(("verdict", "the paper's claim", "the cell that shows it", "test"), rows)
