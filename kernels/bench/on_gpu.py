"""The measurements on a GPU: the kernels, and for comparison cuDNN and FlashAttention-2 from
PyTorch.

Dimensions: B batch, T tokens, N chunks in memory, S chunk size, K chunks kept, H query heads, J
key/value heads, D head dimension, R retrieval dimension, W window.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from timing import measure
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

import hsa_kernels
from hsa_mini import ops
from hsa_mini.data.corpus import load_corpus
from hsa_mini.hsa_model import HSAModel
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.ops import torch_backend
from hsa_mini.paths import data_dir
from hsa_mini.tasks.placement import tile

LENGTHS = tuple(1024 * thousands for thousands in (4, 8, 16, 24, 32, 48, 64, 128, 256, 512, 1024))
MAX_FULL = 131072  # tokens; a call of full attention over more takes seconds
RETRIEVED = (32768, 131072, 524288)
REMEMBERED = (65536, 1 << 20, 1 << 24)  # tokens before the one that is decoded
# W, H, J, D
WINDOWS = (
    (64, 16, 4, 128),
    (128, 4, 2, 64),
    (1024, 16, 4, 128),
    (4096, 16, 4, 128),
    (8192, 16, 4, 128),
)
WINDOW_TOKENS = 65536
REPLAYS = 20  # calls in a captured graph; with a single call the launch would be measured
DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Shape:
    """The sizes of a row. The defaults are those that the published kernel is measured with."""

    T: int
    B: int = 1
    H: int = 16
    J: int = 1
    D: int = 128
    S: int = 64
    K: int = 64

    @property
    def N(self) -> int:
        return self.T // self.S


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def random_choices(shape: Shape) -> torch.Tensor:
    """Every token chooses K of its visible chunks at random.

    Returns int32 [1, T, J, K], -1 where it sees fewer.
    """
    parts = []
    for start in range(0, shape.T, 4096):
        position = torch.arange(start, min(start + 4096, shape.T), device=DEVICE)[:, None, None]
        hidden = (torch.arange(shape.N, device=DEVICE) + 1) * shape.S > position
        drawn = torch.rand(len(position), shape.J, shape.N, device=DEVICE).masked_fill(hidden, -1.0)
        best, chosen = drawn.topk(min(shape.K, shape.N), dim=-1)
        parts.append(
            pad(chosen.masked_fill(best < 0, -1).int(), (0, shape.K - chosen.shape[-1]), value=-1)
        )
    return torch.cat(parts)[None]


class Trained:
    """Choices of the shipped mini model in held-out text.

    A token has K chunks, chosen by the scores of the model's first HSA layer.
    """

    def __init__(self) -> None:
        self.model = HSAModel.from_pretrained(data_dir() / "checkpoints" / "mini", device=DEVICE)
        self.text = load_corpus("validation").tokens

    @torch.no_grad()
    def choices(self, shape: Shape) -> torch.Tensor:
        ids = torch.from_numpy(tile(self.text, shape.T, 0).astype("int64")).to(DEVICE)[None]
        memory = ChunkMemory(self.model.config, reserve_tokens=shape.T)
        queries = []
        for part in ids.split(8192, dim=1):
            queries.append(self.model(part, memory).aux.retrievals[0].queries)
        indices, _ = ops.retrieve(
            torch.cat(queries, dim=1), memory.chunks.landmarks, chunk_size=shape.S, top_k=shape.K
        )
        return indices


def attention_calls(
    shape: Shape, indices: torch.Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The calls `forward` and `forward_backward` of chunk attention over these choices."""
    q = normal(shape.B, shape.T, shape.H, shape.D)
    k, v = (normal(shape.B, shape.N, shape.S, shape.J, shape.D) for _ in "kv")
    weights = (
        torch.rand(indices.shape, device=DEVICE)
        .masked_fill(indices < 0, float("-inf"))
        .softmax(-1)
        .nan_to_num(0.0)
    )
    yield "forward", lambda: hsa_kernels.chunk_attention(q, k, v, indices, weights)
    gradient = normal(*q.shape)
    leaves = [x.requires_grad_() for x in (q, k, v, weights)]
    yield (
        "forward_backward",
        lambda: torch.autograd.grad(
            hsa_kernels.chunk_attention(q, k, v, indices, weights), leaves, gradient
        ),
    )


def full_attention(shape: Shape, backend: SDPBackend, op: str) -> float:
    """Milliseconds of causal attention over all tokens, 16 heads each of q, k and v."""
    q, k, v = leaves = [
        normal(shape.B, shape.H, shape.T, shape.D).requires_grad_(op != "forward") for _ in "qkv"
    ]
    gradient = normal(*q.shape)
    with sdpa_kernel(backend):
        if op == "forward":
            return measure(lambda: scaled_dot_product_attention(q, k, v, is_causal=True), DEVICE)[0]
        return measure(
            lambda: torch.autograd.grad(
                scaled_dot_product_attention(q, k, v, is_causal=True), leaves, gradient
            ),
            DEVICE,
        )[0]


def attention_rows(
    shape: Shape, choices: str, indices: torch.Tensor, *, compare: bool
) -> Iterator[dict]:
    chosen = int((indices >= 0).sum())
    for op, call in attention_calls(shape, indices):
        ms, peak = measure(call, DEVICE)
        full = compare and shape.T <= MAX_FULL
        yield {
            "op": op, **asdict(shape), "dtype": "bfloat16", "choices": choices, "ms": ms,
            "cudnn_ms": full_attention(shape, SDPBackend.CUDNN_ATTENTION, op) if full else None,
            "fa2_ms": full_attention(shape, SDPBackend.FLASH_ATTENTION, op) if full else None,
            "peak_bytes": peak, "chosen": chosen,
        }  # fmt: skip


def retrieve_row(shape: Shape, R: int = 128) -> dict:
    queries = normal(1, shape.T, shape.J, R)
    landmarks = normal(1, shape.N, shape.J, R)
    ms, peak = measure(
        lambda: hsa_kernels.retrieve(queries, landmarks, chunk_size=shape.S, top_k=shape.K), DEVICE
    )
    plain, _ = measure(
        lambda: torch_backend.retrieve(queries, landmarks, chunk_size=shape.S, top_k=shape.K),
        DEVICE,
    )
    row = {
        "op": "retrieve",
        **asdict(shape),
        "R": R,
        "dtype": "bfloat16",
        "choices": "random",
        "ms": ms,
    }
    return row | {"cudnn_ms": None, "fa2_ms": None, "portable_ms": plain, "peak_bytes": peak}


def captured(call: Callable[[int], object]) -> float:
    """Milliseconds of one of the `REPLAYS` calls in a CUDA graph; call(i) gets its number."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(REPLAYS):
            call(i)
    return measure(graph.replay, DEVICE)[0] / REPLAYS


def decode_row(tokens: int, bytes_per_second: float, R: int = 128) -> dict:
    """One new token after `tokens` others.

    `floor_ms` is the time of reading the landmarks once at the measured rate of a copy.
    """
    shape = Shape(T=tokens)
    query = normal(1, 1, 1, R)
    q = normal(1, 1, shape.H, shape.D)
    # More landmarks than the cache holds, read in turn.
    copies = max(1, (1 << 28) // (shape.N * R * 2))
    landmarks = [normal(1, shape.N, 1, R) for _ in range(copies)]
    k, v = (normal(1, shape.N, shape.S, 1, shape.D) for _ in "kv")
    offset = torch.full((1,), tokens, device=DEVICE)
    options = dict(chunk_size=shape.S, top_k=shape.K, offset=offset)
    ms = captured(lambda i: hsa_kernels.decode(query, landmarks[i % copies], q, k, v, **options))
    row = {
        "op": "decode",
        **asdict(shape),
        "R": R,
        "dtype": "bfloat16",
        "choices": "random",
        "ms": ms,
    }
    return row | {
        "cudnn_ms": None,
        "fa2_ms": None,
        "floor_ms": shape.N * R * 2 / bytes_per_second * 1e3,
        "peak_bytes": None,
    }


def window_rows() -> Iterator[dict]:
    """Sliding-window attention through `ops`, and in plain PyTorch."""
    for W, H, J, D in WINDOWS:
        q, k, v = (normal(1, WINDOW_TOKENS, heads, D) for heads in (H, J, J))
        row = {
            "op": "sliding_window_attention",
            "T": WINDOW_TOKENS,
            "B": 1,
            "H": H,
            "J": J,
            "D": D,
            "W": W,
            "dtype": "bfloat16",
        }
        for name, attend in (
            ("", ops.sliding_window_attention),
            ("portable_", torch_backend.sliding_window_attention),
        ):
            row[f"{name}forward_ms"], row[f"{name}forward_backward_ms"] = _window_times(
                partial(attend, window=W), q, k, v
            )
        yield row


def _window_times(
    attend: Callable[..., torch.Tensor], *tensors: torch.Tensor
) -> tuple[float, float]:
    """Milliseconds of forward, and of forward with backward."""
    forward, _ = measure(lambda: attend(*tensors), DEVICE)
    leaves = [x.detach().requires_grad_() for x in tensors]
    gradient = normal(*tensors[0].shape)
    both, _ = measure(lambda: torch.autograd.grad(attend(*leaves), leaves, gradient), DEVICE)
    return forward, both


def steps(bytes_per_second: float) -> Iterator[tuple[str, Callable[[], Iterator[dict]]]]:
    """The measurements in order: a name to show, and a call that yields rows.

    `bytes_per_second` is the rate of a copy.
    """
    for T in LENGTHS:
        shape = Shape(T)
        yield (
            f"random choices, {T:,} tokens",
            lambda shape=shape: attention_rows(
                shape, "random", random_choices(shape), compare=True
            ),
        )
    for J in (2, 4, 8, 16):
        for T in (16384, 65536):
            shape = Shape(T, J=J)
            yield (
                f"H/J of {shape.H // J}, {T:,} tokens",
                lambda shape=shape: attention_rows(
                    shape, "random", random_choices(shape), compare=False
                ),
            )
    trained = Trained()
    for T in (16384, 32768, 65536, 131072):
        shape = Shape(T)
        yield (
            f"trained choices, {T:,} tokens",
            lambda shape=shape: attention_rows(
                shape, "trained", trained.choices(shape), compare=False
            ),
        )
    for T in RETRIEVED:
        yield f"retrieve, {T:,} tokens", lambda T=T: iter([retrieve_row(Shape(T))])
    for T in REMEMBERED:
        yield f"decode behind {T:,} tokens", lambda T=T: iter([decode_row(T, bytes_per_second)])
    yield "windows", window_rows
