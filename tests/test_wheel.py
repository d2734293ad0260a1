"""The built distributions: what is in them, and that an installed wheel needs nothing else."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from hsa_mini.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
MAX_WHEEL_BYTES = 14_000_000
GENERATED = {"PKG-INFO", "setup.cfg"}  # by the build, besides *.egg-info


def run(*words: str | Path, folder: Path, **variables: str) -> str:
    """The standard output of a command that must succeed, in an environment without our paths."""
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HSA_MINI"))}
    done = subprocess.run(
        list(map(str, words)), cwd=folder, env=outside | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files of this checkout that git does not ignore."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("the list of files comes from git")
    words = "git ls-files -z --cached --others --exclude-standard".split()
    return [name for name in run(*words, folder=ROOT).split("\0") if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory) -> Path:
    """A folder with the source archive, and with the wheel that was built from it."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "-o", target, source, folder=target)
    return target


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(file.read(name).decode())


def test_the_source_archive_is_complete(built, tracked):
    with tarfile.open(next(built.glob("*.tar.gz"))) as file:
        names = {entry.name.partition("/")[2] for entry in file if entry.isfile()}
    assert {name for name in names if ".egg-info/" not in name} == {*tracked, *GENERATED}


def test_the_wheel_is_small_and_holds_the_data_of_one_model(wheel):
    assert wheel.stat().st_size <= MAX_WHEEL_BYTES
    with zipfile.ZipFile(wheel) as file:
        shipped = [name for name in file.namelist() if name.startswith("hsa_mini/shipped/")]
        for name in shipped:
            original = ROOT / "data" / name.removeprefix("hsa_mini/shipped/")
            assert file.read(name) == original.read_bytes(), name
        tops = {name.partition("/")[0] for name in file.namelist()}
    mini = [f"checkpoints/mini/{path.name}" for path in (ROOT / "data/checkpoints/mini").iterdir()]
    assert {name.removeprefix("hsa_mini/shipped/") for name in shipped} == {
        "PROVENANCE.md", "tokenizer.tiktoken", *mini
    }  # fmt: skip
    assert {top for top in tops if ".dist-info" not in top} == {"hsa_mini", "hsa_kernels"}


def test_the_metadata_tells_a_stranger_what_this_is(metadata):
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).startswith("# hsa-mini\n")
    assert metadata["License-Expression"] == "MIT" and metadata["Requires-Python"] == ">=3.11"
    assert "https://arxiv.org/abs/2511.23319" in metadata["Project-URL"]
    versions = [line for line in metadata.get_all("Classifier", []) if ":: Python :: 3." in line]
    assert [line.rpartition(" ")[2] for line in versions] == ["3.11", "3.12", "3.13", "3.14"]


def test_extras_are_named_and_none_of_them_is_needed(metadata):
    extras = metadata.get_all("Provides-Extra", [])
    assert sorted(extras) == ["dev", "eval", "hf", "notebooks", "train"]
    lines = metadata.get_all("Requires-Dist", [])
    needed = [line.partition(">")[0] for line in lines if "extra ==" not in line]
    assert needed == ["numpy", "safetensors", "tiktoken", "torch", "tqdm"]
    assert "hsa-mini[eval,hf,notebooks,train]; extra == \"dev\"" in lines  # fmt: skip


USE = """
import hsa_mini, json, sys, torch
from hsa_mini import HSAModel
from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.paths import data_dir

ids = torch.tensor([load_tokenizer().encode_ordinary("To be, or not to be")])
generated = HSAModel.from_pretrained("mini").generate(ids, max_new_tokens=4).ids[0].tolist()
print(json.dumps([hsa_mini.__file__, str(data_dir()), generated]))
"""


def test_an_installed_wheel_works_in_an_empty_folder(wheel, tmp_path):
    """The environment has only the dependencies of the one that runs this test, and none of the
    widgets: the demo's picture needs matplotlib alone.
    """
    home = tmp_path / "venv"
    venv.create(home)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", wheel, folder=tmp_path)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (packages / "anywidget.py").write_text("raise ImportError('blocked')\n")
    (packages / "data").mkdir()  # a stranger's, with the name of our own file
    (packages / "data" / "tokenizer.tiktoken").write_text("altered")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "text.txt").write_text("It was a bright cold day in April. " * 300)

    where, data, generated = json.loads(run(python, "-c", USE, folder=empty))
    assert Path(where).is_relative_to(packages) and Path(data) == packages / "hsa_mini/shipped"
    command = home / "bin" / "hsa-mini"
    versions = run(command, "--version", folder=empty)
    assert versions.startswith(f"hsa-mini {wheel.name.split('-')[1]}, torch ")
    words = ("demo", "--tokens", "2048", "--haystack", "text.txt", "--json", "found.json")
    assert "(right)" in run(command, *words, folder=empty)
    assert json.loads((empty / "found.json").read_text())["correct"]
    assert [path.name for path in (empty / "out").iterdir()] == ["needle_2048_0.png"]
    (empty / "prompt.txt").write_text("To be, or not to be")
    words = ("generate", "--prompt-file", "prompt.txt", "--max-new-tokens", "4")
    text = run(command, *words, folder=empty)
    assert text == load_tokenizer().decode(generated) + "\n"
    assert not (packages / "hsa_mini" / "shipped" / "results").exists()
