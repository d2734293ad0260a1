"""The user's text as a corpus: encoded once into a folder of the cache, memory-mapped from then on.

tokens.bin   ids, uint16 or uint32 by the size of the model's vocabulary
starts.npy   int64, the first token of every document
"""

import hashlib
import json
import logging
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hsa_mini.data.corpus import Corpus
from hsa_mini.data.encoder import TextEncoder, load_encoder
from hsa_mini.data.own_text import OwnText, read_documents, readable_files
from hsa_mini.files.whole_folder import MANIFEST, read_folder, write_folder
from hsa_mini.paths import RANKS_FILE, TOKENIZER_CONFIG, TOKENIZER_FILE, cache_dir

TOKENS = "tokens.bin"
STARTS = "starts.npy"
FORMAT = 1  # raise it when the encoding changes, so that older caches are not used

log = logging.getLogger(__name__)


def load_own_corpus(text: OwnText, vocab_size: int) -> Corpus:
    """The tokens of the text that the user names, for a model of `vocab_size`.

    They are kept in the cache and used again as long as files and tokenizer are the same. Warnings
    say how many files were left out, and that a damaged folder is encoded anew. Raises ValueError
    before anything is written if the text is not accepted (see `readable_files`), or if its
    tokenizer has more tokens than the model.
    """
    encoder = load_encoder(None if text.tokenizer is None else Path(text.tokenizer))
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    files, skipped = readable_files(text, vocab_size, dtype)
    if skipped:
        log.warning(
            "data: %d of %d files are binary and were left out", skipped, skipped + len(files)
        )
    to_encode = any(path.suffix != ".bin" for path in files)
    if to_encode and encoder.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer: {text.tokenizer or 'the default one'} has {encoder.vocab_size} tokens, "
            f"accepted are at most those of the model's vocab_size ({vocab_size})"
        )
    known = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    source = [FORMAT, encoder.digest, text.column, text.end_token, str(dtype), known]
    name = hashlib.sha256(json.dumps(source).encode()).hexdigest()[:16]
    folder = cache_dir() / f"text-{name}"
    if folder.exists():
        try:
            return _read(folder, dtype)
        except ValueError as error:
            log.warning("%s; the text is encoded anew", error)
            for file in (TOKENS, STARTS, MANIFEST):
                (folder / file).unlink(missing_ok=True)
    _encode(files, text, encoder, dtype, folder)
    return _read(folder, dtype)


def tokenizer_files(text: OwnText | None) -> dict[str, str]:
    """The files of the user's own tokenizer, as the folder of the finished model holds them: name
    -> content, first that which `load_encoder` reads; empty for the course's tokenizer.
    """
    if text is None or text.tokenizer is None:
        return {}
    path = Path(text.tokenizer)
    files = {RANKS_FILE: path}
    if path.suffix == ".json":
        files = {TOKENIZER_FILE: path, TOKENIZER_CONFIG: path.with_name(TOKENIZER_CONFIG)}
    return {
        name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()
    }


def split_off(corpus: Corpus, share: float) -> tuple[Corpus, Corpus]:
    """The corpus without the last `share` of its tokens, and these tokens; two tokens at least.

    A document that lies across the border is cut.
    """
    cut = len(corpus) - max(round(share * len(corpus)), 2)
    starts = corpus.starts
    behind = np.concatenate(([0], starts[starts > cut] - cut))
    return (
        Corpus(corpus.name, corpus.tokens[:cut], starts[starts < cut]),
        Corpus(f"{corpus.name}/held-out", corpus.tokens[cut:], behind),
    )


def _read(folder: Path, dtype: np.dtype) -> Corpus:
    def mapped(files: dict[str, Path]) -> Corpus:
        tokens = np.memmap(files[TOKENS], dtype=dtype, mode="r")
        return Corpus("own text", tokens, np.load(files[STARTS]))

    return read_folder(folder, (TOKENS, STARTS), mapped)


def _encode(
    files: list[Path],
    text: OwnText,
    encoder: TextEncoder,
    dtype: np.dtype,
    folder: Path,
) -> None:
    """Encode all documents into `folder`, which appears complete or not at all."""
    starts = [0]

    def write_tokens(target: Path) -> None:
        with target.open("wb") as file:
            for path in tqdm(files, desc="encoding the text", unit="file", mininterval=0.5):
                for ids in read_documents(path, text, encoder, dtype):
                    if len(ids) > 1:  # the token that ends a document has something to end
                        file.write(ids.tobytes())
                        starts.append(starts[-1] + len(ids))
        if len(starts) == 1:
            raise ValueError(f"data: the {len(files)} files hold no text, accepted is some text")

    def write_starts(target: Path) -> None:
        np.save(target, np.array(starts[:-1], dtype=np.int64))

    write_folder(folder, {TOKENS: write_tokens, STARTS: write_starts}, kind={STARTS})
