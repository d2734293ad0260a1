"""The kernels of other people beside ours: what is asked of them, and their times.

Dimensions: B batch, T tokens, N chunks, S chunk size, K chunks kept, H query heads, J key/value
heads, D head dimension.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict

import torch
from peers import Inputs, Peer, find_peers
from table import COLUMNS_OF_PEERS, table
from timing import measure
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from hsa_mini import reference

LENGTHS = (16384, 32768, 65536, 131072)
COMPARED = 64  # last tokens whose outputs are compared with the reference
MAX_ERROR = 0.02  # of the outputs, relative; rounding to bfloat16 gives 0.003


def chosen_peers(
    arguments: argparse.Namespace, device: torch.device
) -> tuple[list[Peer], list[str]] | None:
    """The peers to run and the names of the missing ones; None without `--peers`. Raises
    ValueError.
    """
    if not arguments.peers:
        for option, given in (
            ("--published-hsa", arguments.published_hsa),
            ("--fsa", arguments.fsa),
        ):
            if given is not None:
                raise ValueError(f"{option}: got {given}, accepted only with --peers")
        return None
    if arguments.model:
        raise ValueError("--peers: got --model too, accepted is one of them")
    if device.type == "cpu":
        raise ValueError("--peers: got the device cpu, accepted is a GPU")
    return find_peers(arguments.published_hsa, arguments.fsa)


def expected(kind: str, inputs: Inputs, tokens: int) -> torch.Tensor:
    """What a peer of this kind should return for the last `tokens` tokens, float64 [1, tokens, H,
    D]; each must have a chunk.
    """
    q, k, v, indices, weights, S = (
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs
    )
    last = slice(q.shape[1] - tokens, None)
    q, indices = q[:, last], indices[:, last]
    if kind == "hsa":
        chunks = (x.unflatten(1, (-1, S)) for x in (k, v))
        return reference.chunk_attention(q, *chunks, indices, weights[:, last])
    position = torch.arange(k.shape[1], device=q.device)
    if kind == "full":
        mask = position <= position[last, None]
    else:
        # [1, tokens, J, K] -> [1, J, tokens, N] -> [1, H, tokens, T]; slot -1 falls off the end
        chosen = torch.zeros(*indices.shape[:3], len(position) // S + 1, device=q.device)
        chosen = chosen.scatter(3, indices.long() % chosen.shape[3], 1.0)[..., :-1].bool()
        mask = chosen.transpose(1, 2).repeat_interleave(S, dim=3)
        mask = mask.repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


def peer_row(peer: Peer, inputs: Inputs) -> dict:
    """Milliseconds of forward, and of forward with backward, after a comparison with the reference.

    A peer that fails or is wrong has None in place of milliseconds, and `failed` says why.
    """
    row = {
        "peer": peer.name,
        "kind": peer.kind,
        "pairs": peer.pairs(inputs),
        "error": None,
        "forward_ms": None,
        "forward_backward_ms": None,
        "failed": None,
    }
    device = inputs.q.device
    try:
        with torch.no_grad():
            got = peer.attend(inputs)[:, -COMPARED:].double()
            want = expected(peer.kind, inputs, COMPARED)
            row["error"] = ((got - want).norm() / want.norm()).item()
            if not row["error"] <= MAX_ERROR:
                return row | {"failed": f"error {row['error']:.3g}, accepted is {MAX_ERROR}"}
            row["forward_ms"], _ = measure(lambda: peer.attend(inputs), device)
        learnt = ("q", "k", "v", "weights") if peer.kind == "hsa" else ("q", "k", "v")
        leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in learnt}
        own = inputs._replace(**leaves)
        gradient = torch.randn_like(inputs.q)
        row["forward_backward_ms"], _ = measure(
            lambda: torch.autograd.grad(peer.attend(own), list(leaves.values()), gradient), device
        )
    except Exception as error:  # other people's code may raise anything
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return row


def draw_inputs(shape, indices: torch.Tensor) -> Inputs:
    """Random tensors in bfloat16 for these choices; shape: `on_gpu.Shape`."""

    def normal(heads: int) -> torch.Tensor:
        size = (shape.B, shape.T, heads, shape.D)
        return torch.randn(size, device=indices.device, dtype=torch.bfloat16)

    drawn = torch.rand(indices.shape, device=indices.device)
    weights = drawn.masked_fill(indices < 0, float("-inf")).softmax(-1).nan_to_num(0.0)
    return Inputs(normal(shape.H), normal(shape.J), normal(shape.J), indices, weights, shape.S)


def rows_at(shape, indices: torch.Tensor, peers: list[Peer]) -> Iterator[dict]:
    """One row for each peer, all over the same inputs."""
    inputs = draw_inputs(shape, indices)
    for peer in peers:
        yield asdict(shape) | {"dtype": "bfloat16", "choices": "random"} | peer_row(peer, inputs)
        if inputs.q.is_cuda:
            torch.cuda.empty_cache()


def run_peers(peers: list[Peer], missing: list[str]) -> tuple[dict, str]:
    """Ours and the kernels of other people, over the same random choices."""
    import on_gpu  # loads Triton

    rows = []
    with tqdm(total=len(LENGTHS) * len(peers), unit="peer") as bar:
        for T in LENGTHS:
            shape = on_gpu.Shape(T)
            for row in rows_at(shape, on_gpu.random_choices(shape), peers):
                rows.append(row)
                bar.update()
    text = table(rows, COLUMNS_OF_PEERS)
    if missing:
        text += f"\nleft out: {', '.join(missing)}"
    return {"rows": rows, "left_out": missing}, text
