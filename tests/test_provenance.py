"""Where results come from: the commit is that of this project and of no other."""

import subprocess
from pathlib import Path

import pytest

from hsa_mini import provenance
from hsa_mini.provenance import commit


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", "-C", str(folder), *who, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


def repository(folder: Path) -> str:
    """Make a repository with one commit; returns the commit."""
    folder.mkdir(exist_ok=True)
    git(folder, "init", "--quiet")
    (folder / "file").write_text(folder.name)
    git(folder, "add", "file")
    git(folder, "commit", "--quiet", "--message", "one")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project inside a folder that is a repository of its own."""
    for name in ("HSA_MINI_COMMIT", "GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "project/hsa_mini/provenance.py"))
    repository(tmp_path)
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


def test_a_surrounding_repository_is_not_ours(project):
    assert commit() == "unknown"


def test_the_commit_is_that_of_our_own_repository(project, tmp_path, monkeypatch):
    ours = repository(project)
    assert commit() == ours
    other = repository(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    assert commit() == ours != other
    (project / "file").write_text("edited")
    assert commit() == f"{ours}+changes"
    monkeypatch.setenv("HSA_MINI_COMMIT", "given")
    assert commit() == "given"


def test_a_linked_worktree_is_ours_too(project, tmp_path):
    repository(tmp_path / "other")
    project.rmdir()
    git(tmp_path / "other", "worktree", "add", "--quiet", str(project))
    assert commit() == git(project, "rev-parse", "HEAD")
