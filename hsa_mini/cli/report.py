"""What commands write for people and for programs: reports, text for terminals, JSON."""

import json
import sys
from pathlib import Path

from hsa_mini.files.whole_file import write_file


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
        f"answer     {printable(finding.answer.rstrip('.'))}   ({verdict})",
        f"needle in  chunk {needles} of {finding.scores.shape[1]:,}",
        f"retrieved  {layers}",
    ]
    for chunk in finding.needle_chunks:
        kind = "retrieved" if chunk in found else "not retrieved"
        text = printable(finding.chunk_text(chunk)).replace("\n", "\n  ")
        lines.append(f"\nchunk {chunk} ({kind}), the needle between >>> and <<<:\n  {text}")
    rate = finding.tokens / finding.prefill_seconds
    lines.append(
        f"\nprefill    {finding.prefill_seconds:.1f} s ({rate:,.0f} tokens/s), "
        f"answer {finding.decode_seconds:.2f} s, "
        f"peak memory {finding.peak_memory_bytes / 1e9:.2f} GB"
    )
    return "\n".join(lines)


def printable(text: str) -> str:
    """`text` with a dot in place of every character that could move a terminal's cursor."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{MIDDLE DOT}" for c in text)


def write_json(target: str | None, result: dict) -> None:
    """Write `result` to standard output ("-"), to a file, or not at all (None)."""
    text = json.dumps(result, indent=1) + "\n"
    if target == "-":
        sys.stdout.write(text)
    elif target is not None:
        write_file(Path(target), text.encode())
