"""The floor of a kernel: the products of its operation, and its inputs and outputs moved once."""


def needed(row: dict) -> tuple[float, float]:
    """FLOP and bytes of a measured row.

    Attention is counted over the slots that name a chunk. Retrieval is counted over the chunks
    before each token, on average half of all.
    """
    T, H, J, D, S, K = (row[key] for key in "THJDSK")
    N = T // S
    if row["op"] == "retrieve":
        return T * N * J * row["R"], 2 * (T + N) * J * row["R"] + 8 * T * J * K
    if row["op"] == "decode":
        return 2 * (N * row["R"] + 2 * K * S * D * H), 2 * (N * row["R"] + 2 * K * S * D)
    # Forward: the products for scores and output. Backward: five more, which read everything again
    # and write as many gradients.
    products, passes = {"forward": (2, 1), "forward_backward": (7, 3)}[row["op"]]
    work = products * 2 * row["chosen"] * (H // J) * S * D
    return work, passes * 2 * (2 * T * H * D + 2 * T * J * D + 4 * row["chosen"])
