"""The folders of shipped data and of the cache: what the environment may say, and what is ours."""

import os
import pwd
from pathlib import Path

import pytest

from hsa_mini import paths
from hsa_mini.paths import (
    RANKS_FILE,
    cache_dir,
    checkpoint_folder,
    data_dir,
    results_dir,
    shipped_models,
)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder, and none of our variables."""
    for name in ("HSA_MINI_CACHE", "HSA_MINI_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("value", [None, "", "relative", "./here", ".."])
def test_an_empty_or_relative_xdg_cache_home_is_ignored(home, monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_dir() == home / ".cache" / "hsa-mini"


def test_the_cache_is_where_the_variables_say(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "~/caches")
    assert cache_dir() == home / "caches" / "hsa-mini"
    monkeypatch.setenv("HSA_MINI_CACHE", "")
    assert cache_dir() == home / "caches" / "hsa-mini"
    monkeypatch.setenv("HSA_MINI_CACHE", "~/ours")
    assert cache_dir() == home / "ours"
    monkeypatch.setenv("HSA_MINI_CACHE", "/somewhere")
    assert cache_dir() == Path("/somewhere")


def test_without_a_home_folder_only_the_default_is_refused(home, monkeypatch):
    def unknown(_):
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ValueError, match="^HSA_MINI_CACHE: not set, and there is no home folder"):
        cache_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    assert cache_dir() == home / "hsa-mini"
    monkeypatch.setenv("HSA_MINI_CACHE", str(home))
    assert cache_dir() == home
    monkeypatch.setenv("HSA_MINI_CACHE", "~/ours")
    with pytest.raises(ValueError, match="^HSA_MINI_CACHE: got '~/ours', accepted is an absolute"):
        cache_dir()


@pytest.mark.parametrize(
    "variable, folder", [("HSA_MINI_CACHE", cache_dir), ("HSA_MINI_DATA", data_dir)]
)
def test_a_relative_folder_of_ours_is_refused(home, monkeypatch, variable, folder):
    """It would be another folder in every working directory."""
    monkeypatch.chdir(home)
    (home / "data").mkdir()
    (home / "data" / RANKS_FILE).touch()
    monkeypatch.setenv(variable, "data")
    with pytest.raises(ValueError, match=f"^{variable}: got 'data', accepted is an absolute path"):
        folder()


def test_the_data_folder_is_where_the_variable_says(home, monkeypatch):
    default = data_dir()
    (home / "own").mkdir()
    (home / "own" / RANKS_FILE).touch()
    monkeypatch.setenv("HSA_MINI_DATA", "~/own")
    assert data_dir() == home / "own"
    monkeypatch.setenv("HSA_MINI_DATA", "")
    assert data_dir() == default


def test_a_folder_with_the_name_of_ours_is_not_taken_for_ours(home, monkeypatch):
    """Beside an installed package, data/ belongs to another package."""
    (home / "data" / "results").mkdir(parents=True)
    monkeypatch.setattr(paths, "__file__", str(home / "hsa_mini" / "paths.py"))
    with pytest.raises(
        FileNotFoundError, match=f"^HSA_MINI_DATA: {home}/data has no {RANKS_FILE};"
    ):
        data_dir()
    monkeypatch.setenv("HSA_MINI_DATA", os.path.join(home, "nowhere"))
    with pytest.raises(FileNotFoundError, match="^HSA_MINI_DATA: .*nowhere has no"):
        data_dir()


def test_an_installed_package_has_its_data_inside_and_none_beside_it(home, monkeypatch):
    """`site-packages/data` is a stranger's, even if it has a file with the name of ours."""
    for folder in ("data", "hsa_mini/shipped"):
        (home / folder / "checkpoints" / folder.rpartition("/")[2]).mkdir(parents=True)
        (home / folder / RANKS_FILE).touch()
    monkeypatch.setattr(paths, "__file__", str(home / "hsa_mini" / "paths.py"))
    assert data_dir() == home / "hsa_mini" / "shipped"
    assert list(shipped_models()) == ["shipped"]
    assert results_dir() == Path()  # nothing is written among installed files
    monkeypatch.setenv("HSA_MINI_DATA", str(home / "data"))
    assert data_dir() == home / "data" and results_dir() == home / "data" / "results"


def test_a_name_means_the_shipped_model_wherever_it_is_used(home, monkeypatch, caplog):
    """What a command does must not depend on a folder that happens to have that name."""
    monkeypatch.chdir(home)
    shipped = data_dir() / "checkpoints" / "mini"
    assert checkpoint_folder("mini") == shipped and caplog.text == ""
    (home / "mini").mkdir()
    assert checkpoint_folder("mini") == shipped
    assert "mini is the shipped model; write ./mini for the folder that is here" in caplog.text
    for path in ("./mini", "mini/", Path("mini"), str(home / "mini"), "other", "", ".", ".."):
        assert checkpoint_folder(path) == Path(path)
