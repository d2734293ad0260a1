"""How long a training step takes: computing, from what one GPU was measured to do, and exchanging,
from the rates of links.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hsa_mini.config import PRESETS, HSAConfig
from hsa_mini.model.cost_estimate import attention_flops
from hsa_mini.training.scale.shares import ONE_GPU, TrainingRun, sequence_flops
from hsa_mini.training.scale.traffic import OVERLAPPED, Transfer, traffic

MEASURED = "ul_8b_a1b"  # the preset of which a whole step was measured
SHAPE = {"H": 16, "J": 1, "D": 128, "S": 64, "K": 64, "choices": "random"}  # of its HSA layers


@dataclass(frozen=True)
class Links:
    """What connects the GPUs; the defaults are those of an HGX H100 or H200.

    nvlink, network: bytes per second that a GPU receives: half of the 900 GB/s that NVIDIA states
    for NVLink 4 in both directions, and one port of 400 Gb/s (InfiniBand NDR) for each GPU. start,
    nvlink_hop, network_hop: seconds of a collective, and of each of its steps from GPU to GPU; the
    defaults are the constants with which NCCL itself predicts a ring.
    """

    nvlink: float = 450e9
    network: float = 50e9
    gpus_per_host: int = 8
    start: float = 8.4e-6
    nvlink_hop: float = 3.4e-6
    network_hop: float = 14e-6


@dataclass(frozen=True)
class Measured:
    """Seconds on one GPU. step: a whole step of `MEASURED` on one sequence of `tokens`, with
    recomputed blocks. attention, attention_forward, retrieval: length -> one HSA layer on the whole
    sequence, with backward and without, and the choice of its chunks. product: FLOP per second of a
    matrix product. sources: which figure comes from which file and which hardware.
    """

    tokens: int
    step: float
    product: float
    attention: dict[int, float]
    attention_forward: dict[int, float]
    retrieval: dict[int, float]
    sources: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> "Measured":
        """From `ul_8b_a1b.json` and `kernels.json` in a folder of results."""
        model = json.loads((folder / f"{MEASURED}.json").read_text(encoding="utf-8"))
        kernels = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))

        def seconds(op: str) -> dict[int, float]:
            rows = [row for row in kernels["rows"] if row["op"] == op and row.items() >= shape]
            return {row["T"]: row["ms"] / 1e3 for row in rows}

        shape: Any = SHAPE.items()
        attention = seconds("forward_backward")
        forward = seconds("forward")
        retrieval = seconds("retrieve")
        sources = {
            f"{MEASURED}.json": "train_16k_tokens_per_second and product_flops_per_second on "
            + model["hardware"],
            "kernels.json": "ms of forward_backward, forward and retrieve on "
            + kernels["hardware"],
        }
        tokens = model["train_tokens"]
        step = tokens / model["train_16k_tokens_per_second"]
        product = model["product_flops_per_second"]
        return cls(tokens, step, product, attention, forward, retrieval, sources)


def at_length(seconds: dict[int, float], tokens: int) -> float:
    """Seconds at a length between those measured, or beyond: a line through the two nearest on
    logarithmic axes.
    """
    lengths = sorted(seconds)
    i = min(max(int(np.searchsorted(lengths, tokens)), 1), len(lengths) - 1)
    x0, x1 = np.log(lengths[i - 1 : i + 1])
    y0, y1 = np.log([seconds[n] for n in lengths[i - 1 : i + 1]])
    return float(np.exp(y0 + (y1 - y0) * (np.log(tokens) - x0) / (x1 - x0)))


def compute_seconds(run: TrainingRun, measured: Measured) -> float:
    """Computing alone, of the process with the last part of each sequence: the slowest, because it
    scores most landmarks.

    HSA takes what its kernels were measured to take at this length. All else takes the time that
    was measured at `measured.tokens`, for each FLOP. Both include what is recomputed.
    """
    known = TrainingRun(PRESETS[MEASURED], measured.tokens)
    rest = measured.step - hsa_seconds(known, measured)
    rate = rest_flops(known) / rest
    share = run.part / run.tokens
    if not run.checkpoint_blocks:
        rate *= 4 / 3
    return run.rows * (share * rest_flops(run) / rate + hsa_seconds(run, measured))


def hsa_seconds(run: TrainingRun, measured: Measured) -> float:
    """All HSA layers on a process's part of one sequence."""
    config = run.config
    again = run.checkpoint_blocks
    attention = at_length(measured.attention, run.tokens)
    attention += again * at_length(measured.attention_forward, run.tokens)
    retrieval = (1 + again) * at_length(measured.retrieval, run.tokens)
    # A token of the last part sees the landmarks of all parts; on average it is half of them.
    retrieval *= 2 - 1 / run.sizes.cp
    known = PRESETS[MEASURED]
    attention *= _reading(config) / _reading(known)
    retrieval *= _scoring(config) / _scoring(known)
    return config.groups * run.part / run.tokens * (attention + retrieval)


def rest_flops(run: TrainingRun) -> float:
    """FLOP of training on one sequence, without those of reading and choosing chunks."""
    config = run.config
    chunks = run.tokens // config.chunk_size
    kept = min(config.top_k, chunks)
    fusion = 2 * config.hsa_heads * config.hsa_head_dim * kept
    keys = attention_flops(config.hsa_heads, config.hsa_head_dim, kept * config.chunk_size)
    scores = _scoring(config) * (chunks // 2) * config.chunk_size / config.query_block
    hsa = config.groups * (keys + fusion + scores)
    return sequence_flops(config, run.tokens) - 3 * run.tokens * hsa


def _reading(config: HSAConfig) -> float:
    """FLOP of a token that reads its K chunks."""
    keys = config.top_k * config.chunk_size
    return attention_flops(config.hsa_heads, config.hsa_head_dim, keys)


def _scoring(config: HSAConfig) -> float:
    """FLOP of a token that scores the chunks of a text, for each token of the text."""
    return 2 * config.retrieval_heads * config.retrieval_dim / config.chunk_size


def transfer_seconds(transfer: Transfer, links: Links) -> float:
    """One transfer of a step, when nothing else uses the links.

    Gathers go around a ring: all GPUs of the group in a host bring in what comes from other hosts
    together. Of experts' tokens, every GPU brings in its own.
    """
    together = max(links.gpus_per_host // transfer.stride, 1)  # of the group, in one host
    inside = min(together, transfer.processes)
    hosts = -(-transfer.processes // inside)
    hops = transfer.processes - 1
    if transfer.kind in ("experts", "halo"):
        hops = 1
        far = hosts > 1
        share = 1.0 if transfer.kind == "halo" else 1 - (inside - 1) / (transfer.processes - 1)
        rate = links.network / share if far else links.nvlink
    else:
        far = hosts - 1
        rate = min(links.nvlink, inside * links.network) if far else links.nvlink
    hop = (hops - far) * links.nvlink_hop + far * links.network_hop
    return transfer.bytes / rate + transfer.messages * (links.start + hop)


def step_seconds(run: TrainingRun, measured: Measured, links: Links) -> dict[str, float]:
    """What a step consists of: "compute", one entry for each kind of transfer, and their sums
    "step" and "step without overlap".

    Weights and gradients travel while other parts compute, and a step takes the longer of the two;
    all else waits for what it exchanges, and so does the first gather. Without overlap everything
    waits: a real step lies between the two.
    """
    transfers = traffic(run)
    found = {"compute": compute_seconds(run, measured)}
    for transfer in transfers:
        kind = transfer.kind
        found[kind] = found.get(kind, 0.0) + transfer_seconds(transfer, links)
    waiting = sum(t for kind, t in found.items() if kind not in OVERLAPPED)
    beside = sum(found.get(kind, 0.0) for kind in OVERLAPPED)
    # The first gather of a row, in which nothing computes yet: that of the embedding.
    first = [t for t in transfers if t.kind == "weights"][-1:]
    first = sum(transfer_seconds(t, links) for t in first)
    return found | {
        "step": max(waiting + first, beside),
        "step without overlap": waiting + beside,
    }


def alone(run: TrainingRun) -> TrainingRun:
    """The same sequences on one GPU, as if it had the memory."""
    return replace(run, sizes=ONE_GPU)
