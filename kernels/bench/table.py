"""The measured rows as tables to read: which columns, and how each is formatted."""

COLUMNS = {
    "op": "",
    "pass": "",
    **dict.fromkeys("BTNHDK", ","),
    "dtype": "",
    "ms": ",.3f",
    "peak_bytes": ",.1f",
}
COLUMNS_ON_GPU = {
    "op": "", "choices": "", **dict.fromkeys("THJK", ","), "ms": ",.3f", "cudnn_ms": ",.3f",
    "fa2_ms": ",.3f",
    "portable_ms": ",.3f", "floor_ms": ",.3f", "peak_bytes": ",.1f",
}  # fmt: skip
COLUMNS_OF_PEERS = {
    "T": ",", "peer": "", "kind": "", "pairs": ",", "error": ".4f", "forward_ms": ",.3f",
    "forward_backward_ms": ",.3f", "failed": "",
}  # fmt: skip
COLUMNS_OF_WINDOWS = {"op": "", **dict.fromkeys("TWHJD", ",")} | {
    f"{which}{passes}_ms": ",.3f"
    for which in ("", "portable_")
    for passes in ("forward", "forward_backward")
}


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """The rows as a table to read; columns: key and format of each."""
    cells = [[*columns]]
    for row in rows:
        values = {
            **row,
            "peak_bytes": None if row.get("peak_bytes") is None else row["peak_bytes"] / 1e6,
        }
        cells.append(
            [
                "" if values.get(key) is None else format(values[key], how)
                for key, how in columns.items()
            ]
        )
    cells[0] = [
        "peak MB" if key == "peak_bytes" else key.removesuffix("_ms") + " ms" * key.endswith("_ms")
        for key in columns
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells
    )
