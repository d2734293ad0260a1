"""What no kernel can do without: the products of an operation, and its inputs and outputs moved once."""


def needed(row: dict) -> tuple[float, float]:
    """FLOP and bytes of a measured row; attention over the slots that name a chunk, retrieval over the chunks behind a token."""
    T, H, J, D, S, K, N = *(row[key] for key in "THJDSK"), row["T"] // row["S"]
    if row["op"] == "retrieve":
        return T * N * J * row["R"], 2 * (T + N) * J * row["R"] + 8 * T * J * K
    if row["op"] == "decode":
        return 2 * (N * row["R"] + 2 * K * S * D * H), 2 * (N * row["R"] + 2 * K * S * D)
    # scores and mixture; with backward five products more, which read all again and write as many gradients
    products, passes = {"forward": (2, 1), "forward_backward": (7, 3)}[row["op"]]
    return products * 2 * row["chosen"] * (H // J) * S * D, passes * 2 * (
        2 * T * H * D + 2 * T * J * D + 4 * row["chosen"]
    )
