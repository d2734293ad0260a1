"""The numbers in the READMEs are those in the result files, and their Python runs.

`python tests/test_readme.py` writes the generated parts again.
"""

import argparse
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

from hsa_mini.cli.entry import build_parser
from hsa_mini.evaluation.results import CONTROLS, LENGTHS, PUBLISHED, read_results
from hsa_mini.evaluation.statistics import by_length, wilson_interval
from hsa_mini.files.whole_folder import fingerprint
from hsa_mini.viz.plots import length_name
from hsa_mini.viz.results import TITLES

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "kernels" / "bench"))
from floors import needed  # noqa: E402

README, KERNELS = ROOT / "README.md", ROOT / "kernels" / "README.md"
GUIDE = ROOT / "hsa_mini" / "README.md"


def demo() -> str:
    """The output of `make demo`, stored in data/results."""
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
    """Correct answers by model, task and length, beside the paper's; controls and intervals."""
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
        shown = " | ".join(cells.get(tokens, "") for tokens in lengths)
        lines.append(f"| `{model}` | {TITLES[task]} | {shown} |")
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
    intervals = ", ".join(f"{n} of {n}: {wilson_interval(n, n)[0]:.1%} to 100%" for n in perfect)
    controls = [row for _, rows, _ in found.values() for row in rows]
    counts = {
        name: [
            sum(getattr(row, n) for row in controls if row.control == name)
            for n in ("correct", "samples")
        ]
        for name in CONTROLS
    }
    checks = " ".join(
        f"Control, {what}: {counts[name][0]} of {counts[name][1]} correct."
        for name, what in CONTROLS.items()
    )
    cards = " and ".join(sorted({hardware for *_, hardware in found.values()}))
    distinct = max(row.distinct_tokens for rows, *_ in found.values() for row in rows)
    notes = (
        f"95% intervals: {intervals}. {checks} Texts longer than {distinct:,} tokens repeat those "
        f"tokens. Measured on {cards}."
    )
    return "\n".join([*lines, "", notes, "", trained()])


def harder() -> str:
    """S-NIAH among more needles, and with every sentence across a chunk border, where measured."""
    rows, cards = {}, set()
    for kind, name in {
        "distractors": "among {} more needles",
        "border": "every sentence lies across a chunk border",
    }.items():
        for path in sorted(
            (ROOT / "data/results").glob(f"*_s_niah_*{kind}.json"),
            key=lambda path: (len(path.stem), path.stem),
        ):
            model, more = re.fullmatch(rf"(\w+)_s_niah_(\d*)_?{kind}", path.stem).groups()
            answers, _, hardware = read_results(path)
            rows[f"| `{model}` | {name.format(more)} |"] = {
                entry["tokens"]: f"{entry['correct']}/{entry['samples']}"
                for entry in by_length(answers)
            }
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
    return "\n".join([*lines, "", f"Measured on {' and '.join(sorted(cards))}."])


def large() -> str:
    """The 8B configuration with random weights, from `python kernels/bench --model ul_8b_a1b`."""
    result = results("ul_8b_a1b")
    near = result["decode_64k_tokens_per_second"]
    far = near / result["decode_16m_over_64k"]
    mfu, full = result["train_16k_mfu"], result["train_16k_full_attention_tokens_per_second"]
    gigabytes = {key: value / 1e9 for key, value in result.items() if key.endswith("_bytes")}
    rows = {}
    for n in ("1m", "16m"):
        seconds = f"{result[f'prefill_{n}_seconds']:.1f} s"
        memory = f"{gigabytes[f'prefill_{n}_peak_bytes']:.1f} GB"
        rows[f"prefill, {length_name(result['tokens'][n])} tokens"] = f"{seconds}, {memory}"
    ratio = result["prefill_16m_over_1m_per_token"]
    share = result["decode_64k_roofline_share"]
    offloaded = far / result["offload_slowdown"]
    rows["prefill, time per token at 16M / at 1M"] = f"{ratio:.2f}"
    rows["decode after 64K tokens"] = f"{near:.0f} tokens/s, {share:.0%} of the bandwidth limit"
    rows["decode after 16M tokens"] = f"{far:.0f} tokens/s"
    rows["the same with K and V in host memory"] = (
        f"{offloaded:.0f} tokens/s, {gigabytes['offload_16m_device_bytes']:.1f} GB"
    )
    rows["training, 16K tokens"] = (
        f"{result['train_16k_tokens_per_second']:,.0f} tokens/s, "
        f"{gigabytes['train_16k_peak_bytes']:.1f} GB, {mfu:.0%} of the rate of a matrix product"
    )
    rows["the same with full attention instead of HSA"] = (
        f"{full:,.0f} tokens/s, {gigabytes['train_16k_full_attention_peak_bytes']:.1f} GB"
    )
    return "\n".join(
        [
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            source(result),
        ]
    )


def trained() -> str:
    """Time, hardware and length of training for each model."""
    sentences = []
    for model in MODELS:
        path = ROOT / f"data/checkpoints/{model}/training.json"
        how = json.loads(path.read_text()) if path.is_file() else results(f"{model}_training")
        longest = max(stage["tokens"] for stage in how["recipe"]["stages"])
        sentence = (
            f"`{model}` in {how['seconds']:.0f} s on {how['hardware']}, "
            f"on sequences of at most {longest:,} tokens"
        )
        if "imbalance" in how:
            sentence += f" (its busiest expert got {max(how['imbalance']):.2f} times the mean load)"
        sentences.append(sentence)
    return f"Training times: {'; '.join(sentences)}."


def predicted() -> str:
    """Perplexity of the same held-out tokens after more and more preceding text."""
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
    commit = result["commit"][:7]
    return (
        f"Measured on {result['hardware']} ({versions}; commit {commit}) by `{result['command']}`."
    )


def by_length_of(rows: list[dict]) -> list[str]:
    """Milliseconds of chunk attention beside full attention, one line per length."""
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
    """Chunk attention beside full attention."""
    result = bench()
    rows = [
        row
        for row in result["rows"]
        if row["op"].startswith("forward") and row["choices"] == "random" and row["J"] == 1
    ]
    return "\n".join([*by_length_of(rows), "", source(result)])


def floors() -> str:
    """The floor of each kernel beside its measured time.

    The floor is the larger of two times: the FLOP of the operation at the rate of a matrix product,
    and its bytes, each read or written once, at the rate of a copy.
    """
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
        arithmetic = work / flops * 1e3
        traffic = moved / rate * 1e3
        name = f"{row['op'].replace('_', ' + ')}, {length_name(row['T'])}"
        ratio = row["ms"] / max(arithmetic, traffic)
        cells = (f"{ms:.3f} ms" for ms in (arithmetic, traffic, row["ms"]))
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio:.1f} |")
    ceilings = (
        f"{flops / 1e12:.0f} TFLOP/s of matrix products, {rate / 1e12:.2f} TB/s copied, "
        "both measured in the same run"
    )
    return "\n".join([*lines, "", f"{source(result)} Ceilings: {ceilings}."])


def peers() -> str:
    """Our kernel and those of other people, if they have been measured."""
    path = ROOT / "data/results/peers.json"
    if not path.exists():
        return "They have not been measured with this command yet."
    result = json.loads(path.read_text())
    lines = [
        "| tokens | kernel | computes | pairs | forward | forward + backward |",
        "|" + "---|" * 6,
    ]
    for row in result["rows"]:
        times = (row["forward_ms"], row["forward_backward_ms"])
        shown = ["failed" if ms is None else f"{ms:,.2f}" for ms in times]
        lines.append(
            f"| {length_name(row['T'])} | {row['peer']} | {row['kind']} "
            f"| {row['pairs'] / 1e9:,.1f} G | {' | '.join(shown)} |"
        )
    return "\n".join([*lines, "", source(result)])


def ratios() -> str:
    """Times with other ratios of heads, and with the chunks that the trained model chooses."""
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
            both = of[choices, H, J, T, "forward_backward"]
            lines.append(f"| {choices} | {H} | {J} | {length_name(T)} | {ms:.2f} | {both:.2f} |")
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
        (KERNELS, {"floors", "ratios", "peers"}),
    ],
)
def test_readme_says_what_the_files_say(path, parts):
    assert set(re.findall(r"<!-- /(\w+) -->", path.read_text())) == parts
    assert rewritten(path) == path.read_text()


def test_results_are_those_of_the_shipped_models():
    """A result names its checkpoint. Results of earlier versions name only the commit."""
    checkpoints = {
        path: json.loads(path.read_text()).get("checkpoint")
        for path in (ROOT / "data/results").glob("*.json")
    }
    shipped = {fingerprint(folder) for folder in (ROOT / "data/checkpoints").iterdir()}
    assert {
        checkpoint for path, checkpoint in checkpoints.items() if path.name.startswith("mini_")
    } <= shipped | {None}


def test_the_python_of_both_guides_runs(capsys, monkeypatch, tmp_path):
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    text = README.read_text() + GUIDE.read_text()
    first, *others = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    exec(compile(first, "README.md", "exec"), names)
    assert capsys.readouterr().out.strip().endswith("parameters")
    for code in others:
        exec(compile(code, "hsa_mini/README.md", "exec"), names)


def table(header: str) -> tuple[str, str]:
    """The columns of the table of GUIDE that begins with this cell: theirs, ours."""
    rows = re.search(
        rf"^\| {header} \| here \|\n.*\n((?:\|.*\n)+)", GUIDE.read_text(), re.MULTILINE
    )
    assert rows
    columns = zip(*(row.strip("|").split("|") for row in rows[1].splitlines()))
    theirs, ours = map("\n".join, columns)
    return theirs, ours


def options(parser: argparse.ArgumentParser, command: str) -> set[str]:
    """The options of a subcommand."""
    (commands,) = (x for x in parser._actions if isinstance(x, argparse._SubParsersAction))
    return {name for action in commands.choices[command]._actions for name in action.option_strings}


def test_what_the_guide_says_of_transformers_is_there():
    transformers = pytest.importorskip("transformers")
    from hsa_mini.integrations import huggingface
    from hsa_mini.integrations.huggingface.model import UNSUPPORTED

    theirs, ours = table("transformers")
    model = huggingface.HSAForCausalLM
    loading = inspect.getsource(transformers.PreTrainedModel.from_pretrained)
    known = UNSUPPORTED | inspect.signature(model.forward).parameters.keys() | {"copy"}
    for name in re.findall(r"`(\w+)", theirs):
        places = (transformers, model)
        assert any(hasattr(x, name) for x in places) or name in known or name in loading, name
    refused = next(row for row in theirs.splitlines() if "inputs_embeds" in row)
    assert {*re.findall(r"`(\w+)`", refused)} <= UNSUPPORTED
    assert issubclass(huggingface.HSACache, transformers.Cache) and "`HSACache`" in ours


def test_the_options_that_the_guide_compares_are_there():
    pytest.importorskip("lm_eval")
    from lm_eval._cli.harness import HarnessCLI

    theirs, ours = table("lm-eval")
    assert {*re.findall(r"--\w+", theirs)} <= options(HarnessCLI()._parser, "run")
    assert {*re.findall(r"--[\w-]+", ours)} <= options(build_parser(), "lm-eval")
    _, ours = table("nanochat")
    assert {*re.findall(r"--[\w-]+", ours)} <= options(build_parser(), "train")
    for command in re.findall(r"`([\w-]+)(?: [^`]*)?`", ours.replace("`tokenizer.json`", "")):
        assert command.startswith("--") or options(build_parser(), command), command


DOCUMENTS = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")


@pytest.mark.parametrize("path", [README, GUIDE, KERNELS, *map(ROOT.joinpath, DOCUMENTS)])
def test_links_lead_to_files(path):
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    files = [target for target in targets if "://" not in target]
    assert [target for target in files if not (path.parent / target).exists()] == []


if __name__ == "__main__":
    for path in (README, KERNELS):
        path.write_text(rewritten(path))
