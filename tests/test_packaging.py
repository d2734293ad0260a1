"""The files around the package: pinned versions, imports, `make help`, a clone with CRLF."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hsa_mini.files.whole_folder import read_folder

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {
    "README.md", "Makefile", "environment.yml", "pyproject.toml", "LICENSE", ".gitignore", ".ci",
    "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", ".gitattributes",
    "MANIFEST.in", "Dockerfile", ".dockerignore", ".pre-commit-config.yaml", ".github", "notebooks",
    "hsa_mini", "kernels", "tests", "data",
}  # fmt: skip
OPTIONAL = (
    "triton",
    "matplotlib",
    "IPython",
    "ipywidgets",
    "anywidget",
    "ipykernel",
    "jupyterlab",
    "jupyter_core",
    "nbclient",
    "nbformat",
    "accelerate",
    "lm_eval",
    "nltk",
    "pyarrow",
    "tensorboard",
    "transformers",
    "wonderwords",
)


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def direct_dependencies() -> list[Requirement]:
    """Every requirement of pyproject.toml, extras included, without the package's own name."""
    project = pyproject()["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    requirements = [Requirement(line) for line in lines]
    return [
        requirement
        for requirement in requirements
        if canonicalize_name(requirement.name) != project["name"]
    ]


def pip_section() -> list[str]:
    """The entries below `- pip:` in environment.yml, which is simple enough to split by lines."""
    _, section = (ROOT / "environment.yml").read_text().split("- pip:\n")
    lines = [line.strip() for line in section.splitlines()]
    return [line.removeprefix("- ") for line in lines if line and not line.startswith("#")]


def pins() -> list[Requirement]:
    return [Requirement(line) for line in pip_section()[:-1]]


def test_every_direct_dependency_is_pinned_once_and_nothing_else_is():
    pinned = [canonicalize_name(pin.name) for pin in pins()]
    assert len(pinned) == len(set(pinned))
    assert set(pinned) == {
        canonicalize_name(requirement.name) for requirement in direct_dependencies()
    }


def test_pins_are_exact_and_satisfy_the_ranges():
    exact = {canonicalize_name(pin.name): pin for pin in pins()}
    for name, pin in exact.items():
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), (
            f"{name}: {pin} is not an exact pin"
        )
    for requirement in direct_dependencies():
        pin = exact[canonicalize_name(requirement.name)]
        version = str(pin.specifier).removeprefix("==")
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{pin} is outside {requirement}"
        )
        assert str(pin.marker) == str(requirement.marker), (
            f"{pin} and {requirement} name different systems"
        )


def test_versions_are_pinned_in_environment_yml_alone():
    for requirement in direct_dependencies():
        operators = {part.operator for part in requirement.specifier}
        assert operators and not operators & {"==", "==="}, f"{requirement} should be a range"
    assert "==" not in re.sub(r"s/.*?/p'", "", (ROOT / "Makefile").read_text())
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"- repo: (\S+)", hooks)) == {"local"} and "rev:" not in hooks


def test_conda_installs_the_same_package_last():
    text = (ROOT / "environment.yml").read_text()
    assert pip_section()[-1] == "-e .[dev]"
    assert re.search(r"channels:\n  - conda-forge\ndependencies:", text), (
        "conda-forge is the one channel"
    )
    python = re.search(r"- python=(3\.\d+)\n", text).group(1)
    assert python in Requirement("python" + pyproject()["project"]["requires-python"]).specifier


def test_make_hands_every_pin_to_pip():
    script = (
        re.search(r"sed -n '(.*)' environment\.yml", (ROOT / "Makefile").read_text())
        .group(1)
        .replace("$$", "$")
    )
    run = subprocess.run(
        ["sed", "-n", script, "environment.yml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == [line for line in pip_section() if "==" in line]


def test_the_distribution_lists_every_package():
    listed = set(pyproject()["tool"]["setuptools"]["packages"])
    folders = {
        path.parent
        for path in [*ROOT.glob("hsa_mini/**/*.py"), *ROOT.glob("kernels/hsa_kernels/**/*.py")]
    }
    for folder in folders:
        assert (folder / "__init__.py").is_file(), (
            f"{folder} has no __init__.py: an editable install would not find it"
        )
    relative = {
        folder.relative_to(ROOT / "kernels" if "hsa_kernels" in folder.parts else ROOT)
        for folder in folders
    }
    shipped = {"hsa_mini.shipped"}  # data/, which is no package in a checkout
    assert listed == {".".join(folder.parts) for folder in relative} | shipped


def test_kernels_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_needs_no_extra():
    code = f"""
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Missing())
import hsa_mini
from hsa_mini import HSAConfig, HSAModel, PRESETS
import hsa_mini.ops
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_alone_lists_every_target_with_its_description():
    targets = (
        re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        .group(1)
        .split()
    )
    run = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    described = dict(re.findall(r"^  (\S+) +(\S.*)$", run.stdout, re.MULTILINE))
    assert list(described) == targets
    explicit = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert explicit.stdout == run.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_test_checks_the_code_before_it_runs_the_tests():
    run = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    order = ("ruff check .", "ruff format --check .", "-m pyright", "-m pytest -q -n auto", "nbval")
    places = [run.stdout.index(command) for command in order]
    assert places == sorted(places)


def test_the_workflow_runs_the_commands_of_readme_without_secrets():
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    assert re.findall(r"run: (make \w+)", text) == ["make setup", "make lint", "make test"]
    assert "docker build --tag hsa-mini ." in text and "secrets" not in text and "http" not in text
    versions = [
        line.rpartition(" ")[2]
        for line in pyproject()["project"]["classifiers"]
        if ":: Python :: 3." in line
    ]
    oldest, newest = versions[0], versions[-1]
    assert f'python: ["{oldest}", "{newest}"]' in text
    torch = next(line for line in pyproject()["project"]["dependencies"] if line[:5] == "torch")
    for python, rest in ((oldest, ".0"), (newest, "")):  # 2.11.0 stays at 2.11, and 2.11 does not
        pair = f'{{ python: "{python}", torch: "{torch.removeprefix("torch>=")}{rest}" }}'
        assert pair in text


def test_the_image_is_built_as_the_guide_says_and_takes_no_local_builds_in():
    text = (ROOT / "Dockerfile").read_text()
    python = re.search(r"- python=(3\.\d+)\n", (ROOT / "environment.yml").read_text())[1]
    assert f"FROM python:{python}-slim\n" in text and "RUN make setup\n" in text
    left_out = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().split()}
    assert set((ROOT / ".gitignore").read_text().split()) <= left_out
    guide = (ROOT / "hsa_mini" / "README.md").read_text()
    assert "docker build --tag hsa-mini .\n" in guide
    assert "conda env create -f environment.yml" in guide


def git(*words: str, folder: Path = ROOT) -> str:
    """The output of a git command. Skips the test where git is missing or ROOT is no checkout."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    run = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"git {words[0]}: {run.stderr.strip()}")
    return run.stdout


def test_top_level_holds_only_what_the_design_names():
    assert {line.partition("/")[0] for line in git("ls-files").splitlines()} <= TOP_LEVEL


def test_nothing_but_fetch_uses_the_network():
    """Only the module of `fetch` opens connections; JupyterLab listens on this machine only."""
    uses = re.compile(r"^ *(import|from) +(socket|ssl|http|urllib|ftplib|requests|aiohttp)\b", re.M)
    sources = [
        path for folder in ("hsa_mini", "kernels") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    found = [path.name for path in sources if uses.search(path.read_text(encoding="utf-8"))]
    assert found == ["archives.py"]
    assert "jupyterlab --ip=127.0.0.1" in (ROOT / "Makefile").read_text()


def test_every_promise_names_tests_and_attacks_that_exist():
    promises = [row for row in (ROOT / "SECURITY.md").read_text().splitlines() if row[:4] == "| **"]
    assert len(promises) > 10
    for row in promises:
        tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        attacks = re.findall(r"`([a-z_]+)`", row.rpartition("attack")[2]) if "attack" in row else []
        assert tests or attacks, row
        for file, name in tests:
            assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), name
        for attack in attacks:
            assert "\ndef attack(" in (ROOT / "tests" / "faults" / f"{attack}.py").read_text()


def test_both_packages_ship_their_type_marker():
    shipped = pyproject()["tool"]["setuptools"]["package-data"]
    for package, folder in (
        ("hsa_mini", ROOT / "hsa_mini"),
        ("hsa_kernels", ROOT / "kernels" / "hsa_kernels"),
    ):
        assert (folder / "py.typed").is_file() and "py.typed" in shipped[package]


def test_a_clone_with_autocrlf_keeps_every_byte_and_loads_its_checkpoints(tmp_path):
    """On Windows git turns LF into CRLF by default. The manifests hold sha256 of text files too."""
    stored = git("ls-tree", "-r", "-z", "HEAD").split("\0")
    clone = tmp_path / "clone"
    git("clone", "--quiet", "-c", "core.autocrlf=true", str(ROOT), str(clone))
    blobs = dict(reversed(re.split(r"[ \t]", entry, maxsplit=3)[2:]) for entry in stored if entry)
    names = list(blobs)
    found = git("hash-object", "--no-filters", "--", *names, folder=clone).split()
    assert [name for name, digest in zip(names, found, strict=True) if blobs[name] != digest] == []
    checkpoints = sorted((clone / "data" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["mini", "mini_moe"]
    for checkpoint in checkpoints:
        read_folder(checkpoint, ["config.json"], dict)
