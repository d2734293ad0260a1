"""Attention of other people, timed on the same inputs as ours, in the same process.

There are three kinds: "hsa" (a softmax in each chosen chunk, and a weighted sum), "selected" (one
softmax over all chosen chunks, as NSA has it) and "full" (causal attention over all tokens). They
compute different numbers of pairs of a query head and a key, so every row says how many.

A call takes the choices as they come from a search. What it builds from them is timed with it.

Dimensions: B batch, T tokens, N chunks, S chunk size, K chunks kept, H query heads, J key/value
heads, D head dimension.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


class Inputs(NamedTuple):
    """q [1, T, H, D], k and v [1, T, J, D], indices int32 [1, T, J, K] (-1: none) and weights
    float32 [1, T, J, K]; S is the chunk size.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    S: int

    def chunks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [1, N, S, J, D]."""
        return self.k.unflatten(1, (-1, self.S)), self.v.unflatten(1, (-1, self.S))


Attend = Callable[[Inputs], torch.Tensor]  # -> [1, T, H, D]


@dataclass(frozen=True)
class Peer:
    """fills: whether a slot without a chunk is computed like one with a chunk."""

    name: str
    kind: str
    attend: Attend
    fills: bool = False

    def pairs(self, inputs: Inputs) -> int:
        """Pairs of a query head and a key that a forward pass computes."""
        _, T, H, _ = inputs.q.shape
        if self.kind == "full":
            return H * T * (T + 1) // 2
        slots = inputs.indices.numel() if self.fills else int((inputs.indices >= 0).sum())
        return slots * (H // inputs.k.shape[2]) * inputs.S


def ours(inputs: Inputs) -> torch.Tensor:
    import hsa_kernels

    return hsa_kernels.chunk_attention(inputs.q, *inputs.chunks(), inputs.indices, inputs.weights)


def full_attention(backend: SDPBackend) -> Attend:
    """Causal attention of PyTorch."""

    def attend(inputs: Inputs) -> torch.Tensor:
        heads = (x.transpose(1, 2) for x in inputs[:3])
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    return attend


def flash_attention_3() -> Peer:
    """Raises ImportError if it is not installed."""
    attend = importlib.import_module("flash_attn_interface").flash_attn_func

    def call(inputs: Inputs) -> torch.Tensor:
        out = attend(*inputs[:3], causal=True)
        return out[0] if isinstance(out, tuple) else out  # older versions return the sums too

    return Peer("FlashAttention-3", "full", call)


def native_sparse_attention() -> Peer:
    """The selected branch of fla-core's NSA. Raises ImportError if it is not installed."""
    attend = importlib.import_module("fla.ops.nsa.parallel").parallel_nsa

    def call(inputs: Inputs) -> torch.Tensor:
        return attend(
            *inputs[:3],
            block_indices=inputs.indices.long(),
            block_counts=inputs.indices.shape[-1],
            block_size=inputs.S,
        )

    return Peer(f"fla-core {_version('fla-core')} NSA", "selected", call)


def published_hsa(path: Path) -> Peer:
    """The Triton kernel that the paper's authors published, in the user's own copy.

    Raises ValueError for a file that does not define `HSA`.
    """
    attend = _attribute("--published-hsa", path, "HSA", lambda: _module(path))

    def call(inputs: Inputs) -> torch.Tensor:
        indices = inputs.indices.clamp(min=0)  # it knows no empty slot: chunk 0 with weight 0
        return attend(*inputs[:3], inputs.weights, indices, 0.0, inputs.S, None)

    return Peer("published HSA", "hsa", call, fills=True)


def fsa_reference(path: Path) -> Peer:
    """The Triton reference that FSA compares itself with, in the user's own copy of its repository.

    Raises ValueError for a folder without it.
    """
    name = "nsa_ref.ops.topk_sparse_attention"
    attend = _attribute("--fsa", path, "topk_sparse_attention", lambda: _submodule(path, name))

    def call(inputs: Inputs) -> torch.Tensor:
        T = inputs.q.shape[1]
        lengths = torch.tensor([0, T], dtype=torch.int32, device=inputs.q.device)
        # [1, T, J, K] -> [J, T, K]
        indices = inputs.indices[0].transpose(0, 1).contiguous()
        return attend(*(x[0] for x in inputs[:3]), indices, inputs.S, lengths)[None]

    return Peer("NSA reference of FSA", "selected", call)


def find_peers(hsa: Path | None, fsa: Path | None) -> tuple[list[Peer], list[str]]:
    """Ours and all others that are there, and the names of those that are missing.

    hsa, fsa: the user's copies. Raises ValueError for a path that does not hold what it should.
    """
    found = [
        Peer("hsa-mini", "hsa", ours),
        Peer("cuDNN", "full", full_attention(SDPBackend.CUDNN_ATTENTION)),
        Peer("FlashAttention-2", "full", full_attention(SDPBackend.FLASH_ATTENTION)),
    ]
    missing = []
    for name, make in (
        ("FlashAttention-3 (flash_attn_interface)", flash_attention_3),
        ("NSA (pip install fla-core)", native_sparse_attention),
    ):
        try:
            found.append(make())
        except ImportError:
            missing.append(name)
    for name, path, make in (
        ("published HSA (--published-hsa FILE)", hsa, published_hsa),
        ("NSA reference of FSA (--fsa FOLDER)", fsa, fsa_reference),
    ):
        if path is None:
            missing.append(name)
        else:
            found.append(make(path))
    return found, missing


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _attribute(option: str, path: Path, name: str, load: Callable[[], ModuleType]) -> Callable:
    """The function `name` of the module that `load` returns."""
    try:
        return getattr(load(), name)
    except Exception as error:  # executing other people's code may raise anything
        raise ValueError(
            f"{option}: got {path}, accepted is what defines {name}: {error}"
        ) from error


def _module(path: Path) -> ModuleType:
    """The module of one Python file."""
    spec = importlib.util.spec_from_file_location("published_hsa", path)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Triton looks the source of a kernel up there
    spec.loader.exec_module(module)
    return module


def _submodule(path: Path, name: str) -> ModuleType:
    """A module below packages whose `__init__` would import what is not needed."""
    above = name.split(".")[:-1]
    for depth in range(1, len(above) + 1):
        package = ModuleType(".".join(above[:depth]))
        package.__path__ = [str(path.joinpath(*above[:depth]))]
        sys.modules[package.__name__] = package
    return importlib.import_module(name)
