"""What commands write for people and for programs: reports, lines, generated text, JSON."""

import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

from hsa_mini.files.whole_file import write_file

MAX_LINE = 450  # characters of an error or a warning


def report(finding) -> str:
    """What `find_needle` found, in words: question, answer, chunks and times."""
    layers = "; ".join(
        f"layer {i}: {' '.join(map(str, chunks))}"
        for i, chunks in enumerate(finding.retrieved_chunks)
    )
    found = [
        chunk
        for chunk in finding.needle_chunks
        if any(chunk in chunks for chunks in finding.retrieved_chunks)
    ]
    verdict = "right" if finding.correct else f"wrong: it is {finding.expected}"
    needles = " and ".join(map(str, finding.needle_chunks))
    lines = [
        f"\nquestion   {finding.question}",
        f"answer     {finding.answer.rstrip('.')}   ({verdict})",
        f"needle in  chunk {needles} of {finding.scores.shape[1]:,}",
        f"retrieved  {layers}",
    ]
    for chunk in finding.needle_chunks:
        kind = "retrieved" if chunk in found else "not retrieved"
        text = finding.chunk_text(chunk).replace("\n", "\n  ")
        lines.append(f"\nchunk {chunk} ({kind}), the needle between >>> and <<<:\n  {text}")
    rate = finding.tokens / finding.prefill_seconds
    lines.append(
        f"\nprefill    {finding.prefill_seconds:.1f} s ({rate:,.0f} tokens/s), "
        f"answer {finding.decode_seconds:.2f} s, "
        f"peak memory {finding.peak_memory_bytes / 1e9:.2f} GB"
    )
    return "\n".join(lines)


def printable(text: str, accepted: str = "\n\t") -> str:
    """`text` with a dot in place of every character that could move a terminal's cursor."""
    return "".join(c if c.isprintable() or c in accepted else "\N{MIDDLE DOT}" for c in text)


def one_line(text: str) -> str:
    """`text` without line breaks; of a long one, the beginning and the end."""
    text = " ".join(text.split())
    if len(text) <= MAX_LINE:
        return text
    return f"{text[: MAX_LINE * 2 // 3]} ... {text[-MAX_LINE // 3 :]}"


class LineHandler(logging.Handler):
    """Shows every message of the library as one line on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        print(one_line(record.getMessage()), file=sys.stderr)


class Stream(io.TextIOWrapper):
    """Standard output or standard error while a command runs: the one place for what it prints.

    Every text becomes printable. If a write fails, the error is kept in `failure` and the rest is
    discarded, so that a command whose reader has gone still writes its files.
    """

    def __init__(self, stream: TextIO, accepted: str) -> None:
        super().__init__(
            stream.buffer, stream.encoding, errors="backslashreplace", line_buffering=True
        )
        self.accepted = accepted
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        try:
            super().write(printable(text, self.accepted))
        except OSError as error:
            self._discard(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        """Keep the error, and let what is written from now on go nowhere."""
        self.failure = self.failure or error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)

    def finish(self) -> None:
        """Raise the first error; nothing is left to be written."""
        self.flush()
        if self.failure:
            raise _named(self.failure)


@contextmanager
def standard_streams() -> Iterator[Stream]:
    """Inside the `with` block, sys.stdout (which is yielded) and sys.stderr are a `Stream`.

    A stream that this process got closed is opened first. Otherwise a file of ours would get its
    number and all that is printed. Writing to a closed standard output fails, as it must.
    """
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    output = Stream(sys.stdout, "\n\t")
    errors = Stream(sys.stderr, "\n\t\r")  # a progress bar returns to the start of its line
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            yield output
    finally:
        for stream in (output, errors):
            stream.flush()
            stream.detach()


def write_text(text: str) -> None:
    """Write generated text at once: printable to a terminal, and unchanged to anything else.

    Raises OSError if that fails, so that nothing more is generated.
    """
    if sys.stdout.isatty():
        print(text, end="", flush=True)
        return
    try:
        sys.stdout.buffer.write(text.encode(sys.stdout.encoding, "backslashreplace"))
        sys.stdout.buffer.flush()
    except OSError as error:
        raise _named(error) from None


def _named(error: OSError) -> OSError:
    """The error of a write to standard output; that its reader has gone is for `main` to see."""
    if isinstance(error, BrokenPipeError):
        return error
    return OSError(f"standard output: {error.strerror}")


def write_json(target: str | None, result: dict) -> None:
    """Write `result` to standard output ("-"), to a file, or not at all (None)."""
    text = json.dumps(result, indent=1) + "\n"
    if target == "-":
        sys.stdout.write(text)
    elif target is not None:
        write_file(Path(target), text.encode())
