"""What the commands show a person: a finding in words, and text that a terminal can take."""


def report(finding) -> str:
    """What a person wants to know of a finding."""
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
    lines = [
        f"\nquestion   {finding.question}",
        f"answer     {printable(finding.answer.rstrip('.'))}   ({verdict})",
        f"needle in  chunk {' and '.join(map(str, finding.needle_chunks))} of {finding.scores.shape[1]:,}",
        f"retrieved  {layers}",
    ]
    for chunk in finding.needle_chunks:
        kind = "retrieved" if chunk in found else "not retrieved"
        text = printable(finding.chunk_text(chunk)).replace("\n", "\n  ")
        lines.append(f"\nchunk {chunk} ({kind}), the needle between >>> and <<<:\n  {text}")
    rate = finding.tokens / finding.prefill_seconds
    lines.append(
        f"\nprefill    {finding.prefill_seconds:.1f} s ({rate:,.0f} tokens/s), answer {finding.decode_seconds:.2f} s, "
        f"peak memory {finding.peak_memory_bytes / 1e9:.2f} GB"
    )
    return "\n".join(lines)


def printable(text: str) -> str:
    """`text` with dots for what would upset a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{MIDDLE DOT}" for c in text)
