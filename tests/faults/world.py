"""The small world of the fuzzed calls: models, texts, and paths of every awkward kind."""

import dataclasses
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import torch
from material import tiny, words
from safetensors.torch import save_file

from faults import sandbox
from hsa_mini import ChunkMemory
from hsa_mini.checkpoint.training_state import save_progress
from hsa_mini.data.tokenizer import RANKS_FILE
from hsa_mini.index.build import build_index
from hsa_mini.paths import data_dir
from hsa_mini.training.trainer import model_state

Seen = dict[str, tuple]  # path -> kind, and size and time of a file or the target of a link


VOCABULARY = {"</s>": 0, "<unk>": 1} | {f"word{i}": i for i in range(2, 30)}
ADDED = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 30, "hidden_size": 16,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "intermediate_size": 24, "eos_token_id": 0,
}  # fmt: skip
LAYER = {
    "input_layernorm": (16,), "post_attention_layernorm": (16,),
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16), "mlp.up_proj": (24, 16), "mlp.gate_proj": (24, 16),
    "mlp.down_proj": (16, 24),
}  # fmt: skip


class World:
    """A folder in the sandbox that every call finds as it was made.

    It holds mount points, a folder that is full and one that is read-only.
    """

    def __init__(self, scratch: Path) -> None:
        self.folder = scratch / "world"
        self.template = scratch / "template"
        for path in (self.folder, self.template, scratch / "home", scratch / "tmp"):
            path.mkdir()
        os.environ |= {
            "HOME": str(scratch / "home"),
            "TMPDIR": str(scratch / "tmp"),
            "HSA_MINI_CACHE": str(scratch / "cache"),
            "HSA_MINI_DATA": str(self.template / "data"),
            "MPLCONFIGDIR": str(scratch / "home"),
        }
        os.chdir(self.folder)
        self._make_template()
        self._mount(scratch)
        self.restore()

    def _make_template(self) -> None:
        """Everything that can be copied."""
        data = self.template / "data"
        (data / "checkpoints").mkdir(parents=True)
        shutil.copy(_RANKS, data / RANKS_FILE)
        model = tiny()
        model.save_pretrained(self.template / "model")
        tiny(vocab_size=512).save_pretrained(self.template / "few")
        weights = {f"model.{name}": x for name, x in model_state(model).items()}
        settings = {"config": dataclasses.asdict(model.config)}
        progress = {"step": 3, "seconds": 1.0, "settings": settings}
        save_progress(self.template / "trained", 3, weights, progress)
        memory = ChunkMemory(model.config)
        with torch.no_grad():
            model(torch.arange(30)[None], memory)
        memory.save(self.template / "memory")
        texts = {
            "good.txt": words(3000),
            "short.txt": "a few words",
            "empty.txt": "",
            "thesis.tex": "years of work",
            "out.json": "{}",
            "lab.jsonl": json.dumps({"arm": "a", "seed": 1, "settings": {}}) + "\n",
            "\x1b[31mred": "red",
        }
        for name, text in texts.items():
            (self.template / name).write_text(text)
        index = self.template / "index"
        build_index(model, self.template / "good.txt", index, checkpoint="model")
        (self.template / "latin.txt").write_bytes(b"caf\xe9" * 200)
        (self.template / "proj").mkdir()
        (self.template / "proj" / "thesis.tex").write_text("years of work")
        (self.template / "proj" / "manifest.json").write_text('{"name": "web app"}')
        (self.template / "empty").mkdir()
        self._make_own()
        links = {"link": "good.txt", "loop": "loop", "nowhere": "nothing", "models": "model"}
        for name, target in links.items():
            (self.template / name).symlink_to(target)

    def _make_own(self) -> None:
        """What comes from elsewhere: a pretrained checkpoint, a model with a tokenizer of its own,
        a configuration, and further kinds of text to train on.
        """
        tokenizer = {
            "added_tokens": [ADDED | {"id": 0, "content": "</s>"}],
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "model": {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "<unk>"},
        }
        texts = {"tokenizer.json": json.dumps(tokenizer)}
        tiny(vocab_size=len(VOCABULARY)).save_pretrained(self.template / "own", texts=texts)
        shutil.copy(_RANKS, self.template / "ranks")
        folder = self.template / "pretrained"
        folder.mkdir()
        texts["config.json"] = json.dumps(LLAMA)
        for name, text in texts.items():
            (folder / name).write_text(text)
        shapes = {f"model.layers.{i}.{name}": x for i in range(3) for name, x in LAYER.items()}
        shapes |= {"model.norm": (16,), "model.embed_tokens": (30, 16), "lm_head": (30, 16)}
        weights = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
        save_file(weights, folder / "model.safetensors")
        settings = {
            "model": {"preset": "tiny"},
            "train": {"stages": [{"steps": 2, "batch": 2, "tokens": 64}], "warmup": 1},
            "data": {"files": ["good.txt"]},
        }
        (self.template / "my.json").write_text(json.dumps(settings))
        lines = [json.dumps({"text": words(40, str(i))}) for i in range(9)]
        (self.template / "lines.jsonl").write_text("\n".join(lines))
        (self.template / "ids.bin").write_bytes(bytes(range(1, 3)) * 900)

    def _mount(self, scratch: Path) -> None:
        """A mounted folder and file, a folder that is full, and one that is read-only."""
        for name in ("mounted", "full", "readonly"):
            (self.folder / name).mkdir()
        (self.folder / "mounted.json").write_text("{}")
        (scratch / "behind").mkdir()
        (scratch / "behind.json").write_text("{}")
        sandbox.mount(scratch / "behind", self.folder / "mounted")
        sandbox.mount(scratch / "behind.json", self.folder / "mounted.json")
        sandbox.mount_memory(self.folder / "full", "4k")
        (self.folder / "full" / "thesis.tex").write_text("x" * 4096)
        sandbox.mount_memory(self.folder / "readonly", "64k", files={"thesis.tex": "years of work"})
        self.mounted = {"mounted", "mounted.json", "full", "readonly"}

    def restore(self) -> None:
        """Make every file as it was."""
        for entry in self.folder.iterdir():
            if entry.name not in self.mounted:
                _remove(entry)
        for entry in (self.folder / "mounted").iterdir():
            _remove(entry)
        for entry in (self.folder / "full").iterdir():
            if entry.name != "thesis.tex":
                _remove(entry)
        (self.folder / "mounted.json").write_text("{}")
        shutil.copytree(self.template, self.folder, symlinks=True, dirs_exist_ok=True)
        os.mkfifo(self.folder / "fifo")
        self.before = self.look()

    def look(self) -> Seen:
        """What is there now."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            status = path.lstat()
            content: object = None
            if stat.S_ISREG(status.st_mode):
                content = status.st_size, status.st_mtime_ns
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            found[str(path.relative_to(self.folder))] = (stat.S_IFMT(status.st_mode), content)
        return found

    def changed(self) -> list[str]:
        """The paths that are new, gone or other than before."""
        now = self.look()
        return sorted(
            name
            for name in self.before.keys() | now.keys()
            if self.before.get(name) != now.get(name)
        )

    def wrong(self, name: str, given: set[str]) -> str | None:
        """What is wrong with a changed path, or nothing. given: real paths that the call named."""
        path = self.folder / name
        kind = self.before.get(name, (None,))[0]
        if path.name.startswith((".tmp-", "tmp")):
            return f"debris {name}"
        if kind is not None and not os.path.lexists(path):
            inside = any(str(path).startswith(f"{folder}/") for folder in given)
            return None if inside and "proj" not in name else f"{name} is gone"
        status = path.lstat()
        if kind is not None and kind != stat.S_IFMT(status.st_mode):
            return f"{name} is of another kind"
        if not stat.S_ISREG(status.st_mode):
            return None
        if kind is not None and not _named(path, given):
            return f"{name} was changed"
        return _half_written(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _named(path: Path, given: set[str]) -> bool:
    """Whether the call named the file, or a folder that holds it."""
    return any(str(path) == name or str(path).startswith(f"{name}/") for name in given)


def _half_written(path: Path) -> str | None:
    """What is wrong with a file that a call wrote, or nothing."""
    content = path.read_bytes()
    if path.name == "manifest.json":
        for name, entry in json.loads(content).items():
            file = path.parent / name
            if hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]:
                return f"{file} does not match its manifest"
        return None
    if content.startswith(b"\x89PNG"):
        return None if content.endswith(b"IEND\xaeB`\x82") else f"{path} is half a picture"
    is_text = content.startswith(b"{") and path.suffix != ".bin"
    if is_text and not (_is_json([content]) or _is_json(content.splitlines())):
        return f"{path} is half a JSON file"
    return None if content or path.name == ".lock" else f"{path} is empty"


def _is_json(texts: list[bytes]) -> bool:
    try:
        return all(isinstance(json.loads(text), dict) for text in texts)
    except ValueError:
        return False


_RANKS = data_dir() / RANKS_FILE
