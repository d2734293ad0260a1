"""Settings of `make lab`."""

from pathlib import Path

c = get_config()  # noqa: F821
c.ServerApp.contents_manager_class = "hsa_mini.viz.jupyter.contents.CourseContentsManager"
c.ContentsManager.hide_globs = ["[0-9][0-9]_*.py", "ruff.toml", "__pycache__", "*.pyc", ".*", "*~"]
# custom/custom.css, instead of the one in the reader's own folder of settings
c.LabApp.custom_css = True
c.ServerApp.tornado_settings = {"static_custom_path": [str(Path(__file__).parent / "custom")]}
