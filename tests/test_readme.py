"""What the READMEs tell in numbers is what files say. `python tests/test_readme.py` writes those parts anew."""

import json
import re
import sys
from pathlib import Path

import pytest

from hsa_mini.checkpoint.folder import fingerprint
from hsa_mini.evaluation.results import CONTROLS, LENGTHS, PUBLISHED, read_results
from hsa_mini.evaluation.statistics import by_length, wilson_interval
from hsa_mini.viz.plots import length_name
from hsa_mini.viz.results import TITLES

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "kernels" / "bench"))
from floors import needed  # noqa: E402

README, KERNELS = ROOT / "README.md", ROOT / "kernels" / "README.md"


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


MODELS = ("mini", "mini_moe", "small_moe")


def results(name: str) -> dict:
    return json.loads((ROOT / f"data/results/{name}.json").read_text())


def measured() -> str:
    """Answers right by model, task and length; the paper's; controls and intervals."""
    found = {
        (model, task): read_results(ROOT / f"data/results/{model}_{task}.json")
        for model in MODELS
        for task in TITLES
    }
    tables = {key: by_length(rows) for key, (rows, *_) in found.items()}
    lengths = sorted({entry["tokens"] for table in tables.values() for entry in table})
    lines = [f"| | | {' | '.join(map(length_name, lengths))} |", "|---" * (len(lengths) + 2) + "|"]
    for (model, task), table in tables.items():
        cells = {entry["tokens"]: f"{entry['correct']}/{entry['samples']}" for entry in table}
        lines.append(
            f"| `{model}` | {TITLES[task]} | {' | '.join(cells.get(tokens, '') for tokens in lengths)} |"
        )
    for task, title in TITLES.items():
        shares = dict(
            zip(
                LENGTHS,
                (
                    f"{low}%" if low == high else f"{low} to {high}%"
                    for low, high in PUBLISHED[task]
                ),
            )
        )
        lines.append(
            f"| paper's 8B | {title} | {' | '.join(shares.get(tokens, '') for tokens in lengths)} |"
        )
    perfect = sorted(
        {
            entry["samples"]
            for table in tables.values()
            for entry in table
            if entry["correct"] == entry["samples"]
        }
    )
    intervals = ", ".join(
        f"of {n} all right: {wilson_interval(n, n)[0]:.1%} to 100%" for n in perfect
    )
    controls = [row for _, rows, _ in found.values() for row in rows]
    counts = {
        name: [
            sum(getattr(row, n) for row in controls if row.control == name)
            for n in ("correct", "samples")
        ]
        for name in CONTROLS
    }
    told = " ".join(
        f"Control, {what}: {counts[name][0]} of {counts[name][1]} right."
        for name, what in CONTROLS.items()
    )
    cards = " and ".join(sorted({hardware for *_, hardware in found.values()}))
    distinct = max(row.distinct_tokens for rows, *_ in found.values() for row in rows)
    return "\n".join([
        *lines, "", f"95% intervals: {intervals}. {told} Longer texts than {distinct:,} tokens repeat that many. Asked on {cards}.", "", trained(),
    ])  # fmt: skip


def harder() -> str:
    """S-NIAH among further needles, and with every sentence across a border of chunks, as far as it was asked."""
    rows, cards = {}, set()
    for kind, name in {
        "distractors": "among {} further needles",
        "border": "sentences across borders of chunks",
    }.items():
        for path in sorted(
            (ROOT / "data/results").glob(f"*_s_niah_*{kind}.json"),
            key=lambda path: (len(path.stem), path.stem),
        ):
            model, more = re.fullmatch(rf"(\w+)_s_niah_(\d*)_?{kind}", path.stem).groups()
            asked, _, hardware = read_results(path)
            told = {
                entry["tokens"]: f"{entry['correct']}/{entry['samples']}"
                for entry in by_length(asked)
            }
            rows[f"| `{model}` | {name.format(more)} |"] = told
            cards.add(hardware)
    columns = sorted({tokens for cells in rows.values() for tokens in cells})
    lines = [
        f"| | S-NIAH | {' | '.join(map(length_name, columns))} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    lines += [
        f"{row} {' | '.join(cells.get(tokens, '') for tokens in columns)} |"
        for row, cells in rows.items()
    ]
    return "\n".join([*lines, "", f"Asked on {' and '.join(sorted(cards))}."])


def large() -> str:
    """The 8B configuration alive: what `python kernels/bench --model ul_8b_a1b` measured."""
    result = results("ul_8b_a1b")
    near = result["decode_64k_tokens_per_second"]
    far = near / result["decode_16m_over_64k"]
    mfu, full = result["train_16k_mfu"], result["train_16k_full_attention_tokens_per_second"]
    rows = {
        f"read {length_name(result['tokens'][n])} tokens": f"{result[f'prefill_{n}_seconds']:.1f} s, {result[f'prefill_{n}_peak_bytes'] / 1e9:.1f} GB"
        for n in ("1m", "16m")
    } | {
        "a token of 16M over a token of 1M": f"{result['prefill_16m_over_1m_per_token']:.2f}",
        "go on behind 64K tokens": f"{near:.0f} tokens/s, {result['decode_64k_roofline_share']:.0%} of what memory allows",
        "go on behind 16M tokens": f"{far:.0f} tokens/s",
        "the same with K and V in host memory": f"{far / result['offload_slowdown']:.0f} tokens/s, {result['offload_16m_device_bytes'] / 1e9:.1f} GB",
        "train on 16K tokens": f"{result['train_16k_tokens_per_second']:,.0f} tokens/s, {result['train_16k_peak_bytes'] / 1e9:.1f} GB, {mfu:.0%} of a matrix product's rate",
        "the same with full attention instead": f"{full:,.0f} tokens/s, {result['train_16k_full_attention_peak_bytes'] / 1e9:.1f} GB",
    }
    return "\n".join(
        [
            "| | |",
            "|---|---|",
            *(f"| {what} | {how} |" for what, how in rows.items()),
            "",
            source(result),
        ]
    )


def trained() -> str:
    told = []
    for model in MODELS:
        path = ROOT / f"data/checkpoints/{model}/training.json"
        how = json.loads(path.read_text()) if path.is_file() else results(f"{model}_training")
        longest = max(stage["tokens"] for stage in how["recipe"]["stages"])
        told.append(
            f"`{model}` in {how['seconds']:.0f} s on {how['hardware']}, on sequences of at most {longest:,} tokens"
        )
        if "imbalance" in how:
            told[-1] += (
                f", its busiest expert asked {max(how['imbalance']):.2f} times as often as the mean"
            )
    return f"Trained: {'; '.join(told)}."


def predicted() -> str:
    """Perplexity of the same held-out tokens behind more and more text."""
    tables = {model: results(f"{model}_perplexity")["rows"] for model in MODELS}
    lines = [
        f"| tokens read | {' | '.join(length_name(row['tokens']) for row in tables['mini'])} |"
    ]
    lines.append("|---" * (len(tables["mini"]) + 1) + "|")
    for model, rows in tables.items():
        lines.append(
            f"| `{model}` | {' | '.join('{:.2f}'.format(row['perplexity']) for row in rows)} |"
        )
    return "\n".join(lines)


def bench() -> dict:
    return results("kernels")


def source(result: dict) -> str:
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "triton"))
    return f"Measured on {result['hardware']} ({versions}; commit {result['commit'][:7]}) by `{result['command']}`."


def by_length_of(rows: list[dict]) -> list[str]:
    """Milliseconds of chunk attention beside full attention, a line for each length."""
    lines = [
        "| tokens | forward | cuDNN | FA2 | forward + backward | cuDNN | FA2 | memory |",
        "|" + "---|" * 8,
    ]
    of = {(row["op"], row["T"]): row for row in rows}
    for T in sorted({T for _, T in of}):
        cells = [length_name(T)]
        for op in ("forward", "forward_backward"):
            cells += [
                "" if (ms := of[op, T][key]) is None else f"{ms:,.2f}"
                for key in ("ms", "cudnn_ms", "fa2_ms")
            ]
        lines.append(
            f"| {' | '.join(cells)} | {of['forward_backward', T]['peak_bytes'] / 1e9:.1f} GB |"
        )
    return lines


def kernels() -> str:
    """For everyone: chunk attention beside full attention."""
    result = bench()
    rows = [
        row
        for row in result["rows"]
        if row["op"].startswith("forward") and row["choices"] == "random" and row["J"] == 1
    ]
    return "\n".join([*by_length_of(rows), "", source(result)])


def floors() -> str:
    """What no kernel can be faster than: FLOP that have to be done, bytes read and written once; and where ours stand."""
    result = bench()
    flops, rate = (result["ceilings"][name] for name in ("flops_per_second", "bytes_per_second"))
    lines = [
        "| kernel | arithmetic | traffic | measured | over the larger |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        of_table = row["op"] in ("retrieve", "decode") or row["T"] in (
            16384,
            65536,
            131072,
            1 << 20,
        )
        if not of_table or (row["J"], row["choices"]) != (1, "random"):
            continue
        work, moved = needed(row)
        arithmetic, traffic = work / flops * 1e3, moved / rate * 1e3
        name = f"{row['op'].replace('_', ' + ')}, {length_name(row['T'])}"
        ratio = row["ms"] / max(arithmetic, traffic)
        lines.append(
            f"| {name} | {arithmetic:.3f} ms | {traffic:.3f} ms | {row['ms']:.3f} ms | {ratio:.1f} |"
        )
    ceilings = f"{flops / 1e12:.0f} TFLOP/s of matrix products, {rate / 1e12:.2f} TB/s copied, both measured in the same run"
    return "\n".join([*lines, "", f"{source(result)} Ceilings: {ceilings}."])


def ratios() -> str:
    """Other ratios of heads, and choices of the trained model."""
    result = bench()
    lines = [
        "| choices | H | J | tokens | forward | forward + backward |",
        "|---|---|---|---|---|---|",
    ]
    of = {
        (row["choices"], row["H"], row["J"], row["T"], row["op"]): row["ms"]
        for row in result["rows"]
    }
    for (choices, H, J, T, op), ms in of.items():
        if (
            op == "forward"
            and T in (16384, 32768, 65536, 131072)
            and (choices == "trained" or J > 1)
        ):
            lines.append(
                f"| {choices} | {H} | {J} | {length_name(T)} | {ms:.2f} | {of[choices, H, J, T, 'forward_backward']:.2f} |"
            )
    return "\n".join(lines)


def rewritten(path: Path) -> str:
    text = path.read_text()
    for name in re.findall(r"<!-- /(\w+) -->", text):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(
            pattern,
            lambda found: f"{found[1]}{globals()[name]()}\n{found[2]}",
            text,
            flags=re.DOTALL,
        )
    return text


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        (README, {"demo", "course", "measured", "harder", "predicted", "kernels", "large"}),
        (KERNELS, {"floors", "ratios"}),
    ],
)
def test_readme_says_what_the_files_say(path, parts):
    assert set(re.findall(r"<!-- /(\w+) -->", path.read_text())) == parts
    assert rewritten(path) == path.read_text()


def test_results_are_those_of_the_shipped_models():
    """Where a result says what was asked; those of earlier versions only name the commit."""
    asked = {
        path: json.loads(path.read_text()).get("checkpoint")
        for path in (ROOT / "data/results").glob("*.json")
    }
    shipped = {fingerprint(folder) for folder in (ROOT / "data/checkpoints").iterdir()}
    assert {
        checkpoint for path, checkpoint in asked.items() if path.name.startswith("mini_")
    } <= shipped | {None}


def test_the_python_of_readme_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.+?)```", README.read_text(), re.DOTALL)[1]
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip().endswith("parameters")


if __name__ == "__main__":
    for path in (README, KERNELS):
        path.write_text(rewritten(path))
