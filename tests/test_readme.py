"""What README tells in numbers is what files say. `python tests/test_readme.py` writes those parts anew."""

import json
import re
from pathlib import Path

from hsa_mini.evaluate import Row, by_length
from hsa_mini.viz.plots import length_name

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def demo() -> str:
    """What `make demo` printed, as kept in data/results."""
    return f"```\n{(ROOT / 'data/results/demo.txt').read_text().strip()}\n```"


def course() -> str:
    """Title and minutes of every notebook, from its first cell."""
    lines = ["| notebook | the question it answers | to read |", "|---|---|---|"]
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.py")):
        text = path.read_text()
        title = re.search(r"^# # \d+ · (.+)$", text, re.MULTILINE)[1]
        minutes = re.search(r"\*\*Time:\*\* (\d+) minutes", text)[1]
        lines.append(f"| [{path.stem}](notebooks/{path.stem}.ipynb) | {title} | {minutes} min |")
    return "\n".join(lines)


def measured() -> str:
    """Accuracy by length, from the results of the shipped model."""
    result = json.loads((ROOT / "data/results/mini_s_niah.json").read_text())
    rows = [Row(**row) for row in result["rows"]]
    lines = ["| tokens | right | accuracy (95% interval) | needle's chunk retrieved | distinct tokens |", "|---|---|---|---|---|"]
    for entry in by_length(rows):
        distinct = next(row.distinct_tokens for row in rows if row.tokens == entry["tokens"])
        lines.append(
            f"| {length_name(entry['tokens'])} | {entry['correct']} of {entry['samples']} | {entry['accuracy']:.1%} "
            f"({entry['low']:.1%} to {entry['high']:.1%}) | {entry['retrieved']} of {entry['samples']} | {distinct:,} |"
        )
    training = json.loads((ROOT / "data/checkpoints/mini/training.json").read_text())
    controls = [row["correct"] for row in result["control_rows"]], [row["samples"] for row in result["control_rows"]]
    lines += [
        "",
        f"Control, a key that is nowhere in the text: {sum(controls[0])} of {sum(controls[1])} right. Asked on {result['hardware']}; "
        f"trained on {training['hardware']} in {training['seconds']:.0f} s, on sequences of {training['recipe']['tokens']:,} tokens.",
    ]
    return "\n".join(lines)


def rewritten(text: str) -> str:
    for name, make in (("demo", demo), ("course", course), ("measured", measured)):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        assert re.search(pattern, text, re.DOTALL), name
        text = re.sub(pattern, lambda found: f"{found[1]}{make()}\n{found[2]}", text, flags=re.DOTALL)
    return text


def test_readme_says_what_the_files_say():
    text = README.read_text()
    assert rewritten(text) == text


def test_the_python_of_readme_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.+?)```", README.read_text(), re.DOTALL)[1]
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip().endswith("parameters")


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
