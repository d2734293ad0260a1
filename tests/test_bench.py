"""`python kernels/bench`: every operation is timed once for each size, and what is written says where it comes from."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "kernels" / "bench"))  # as `python kernels/bench` does
    spec = importlib.util.spec_from_file_location("bench_main", ROOT / "kernels" / "bench" / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_measured_and_say_what_was_measured(bench, tmp_path, monkeypatch, capfd):
    small = dict(H=4, J=2, D=8, S=4, K=3, R=6, W=8)
    monkeypatch.setattr(bench, "CASES", (bench.Case(T=32, N=8, B=2, **small), bench.Case(T=5, N=300, **small)))
    monkeypatch.setattr("timing.SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    assert bench.main(["--device", "cpu"]) == 0
    result = json.loads(Path("out/bench.json").read_text())
    assert {"hardware", "versions", "commit", "command", "seed", "rows"} == result.keys()
    kinds = [(row["op"], row["pass"], row["B"], row["T"], row["N"]) for row in result["rows"]]
    assert len(kinds) == len(set(kinds)) == 11
    assert {op for op, *_ in kinds} == {"retrieve", "chunk_attention", "sliding_window_attention", "decode"}
    for row in result["rows"]:
        assert row["ms"] > 0 and row["peak_bytes"] is None and (row["choices"], row["dtype"]) == ("random", "float32")
        assert all(row[name] == size for name, size in small.items())
    out, _ = capfd.readouterr()
    assert out.count("float32") == 11 and "written to out/bench.json" in out


def test_every_token_chooses_different_chunks(bench):
    indices = bench.inputs(bench.Case(T=300, N=20, K=8), torch.device("cpu"))["indices"]
    assert indices.shape == (1, 300, 1, 8) and 0 <= indices.min() and indices.max() < 20
    assert all(len(set(row)) == 8 for row in indices[0, :, 0].tolist())


def test_pictures_are_drawn_from_the_stored_measurements(bench, tmp_path):
    stored = json.loads((ROOT / "data/results/kernels.json").read_text())
    paths = bench.draw(stored, tmp_path)
    assert [path.name for path in paths] == ["kernels_crossover.png", "kernels_roofline.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG") and (ROOT / "data/results" / path.name).exists()


@pytest.mark.parametrize("words, message", [(["--device", "x"], "--device: got 'x'"), (["--out", "."], "--out: got .")])
def test_wrong_input_is_one_line(bench, capfd, words, message):
    with pytest.raises(SystemExit) as stop:
        bench.main(words)
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith(f"kernels/bench: error: {message}") and err.count("\n") == 1
