"""Compile every kernel for Hopper, without a card, as its launch code does; print one JSON line per
kernel.

It is a program of its own, because the tests turn on Triton's interpreter, which compiles nothing.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import hsa_kernels  # noqa: E402
from hsa_kernels.attention import by_chunk  # noqa: E402
from hsa_mini import reference  # noqa: E402

CUOBJDUMP = next(Path(triton.__file__).parent.rglob("cuobjdump"), None)


class Hopper:
    """A driver without a card: it names the GPU to compile for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(self: JITFunction, *args, grid, warmup, **options):
    kernel = launch(self, *args, grid=grid, warmup=True, **options)
    # Nothing ran, so tensors that serve as indices afterwards get a valid value.
    for tensor in args:
        if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int64:
            tensor.zero_()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL")
    )
    print(json.dumps({
        "kernel": self.fn.__name__, "case": case, "shared": kernel.metadata.shared,
        "registers": registers,
        "spilled": stack + local, "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
    }))  # fmt: skip


launch, JITFunction.run = JITFunction.run, compile_only
triton.runtime.driver.set_active(Hopper())

for case, sizes in {  # noqa: B007 (`compile_only` reads `case`)
    "8B": dict(H=16, J=1, D=128, R=128, S=64, K=64, dtype=torch.bfloat16),
    "mini": dict(H=4, J=1, D=64, R=256, S=64, K=8, dtype=torch.bfloat16),
    "H/J of 1": dict(H=2, J=2, D=128, R=128, S=64, K=64, dtype=torch.bfloat16),
    "largest": dict(H=16, J=1, D=256, R=256, S=128, K=64, dtype=torch.bfloat16),
    "64 heads": dict(H=64, J=1, D=256, R=128, S=128, K=8, dtype=torch.bfloat16),
    "float32": dict(H=16, J=1, D=128, R=128, S=64, K=8, dtype=torch.float32),
    "float32, largest": dict(H=16, J=1, D=256, R=128, S=64, K=8, dtype=torch.float32),
    "float32, 64 heads": dict(H=64, J=1, D=128, R=128, S=64, K=8, dtype=torch.float32),
    "float16, odd sizes": dict(H=6, J=2, D=80, R=48, S=48, K=5, dtype=torch.float16),
}.items():
    H, J, D, R, S, K, dtype = sizes.values()
    T, N = 8, 100
    q, k, v = (
        torch.randn(shape, dtype=dtype, requires_grad=True)
        for shape in ((1, T, H, D), (1, N, S, J, D), (1, N, S, J, D))
    )
    retrieval_q, landmarks = (
        torch.randn(shape, dtype=dtype, requires_grad=True)
        for shape in ((1, T, J, R), (1, N, J, R))
    )
    indices, weights = hsa_kernels.retrieve(
        retrieval_q, landmarks, chunk_size=S, top_k=K, offset=N * S
    )
    weights.sum().backward()
    hsa_kernels.retrieve(retrieval_q, landmarks, chunk_size=S, top_k=K, gumbel_seed=1)
    weights = torch.randn(1, T, J, K, requires_grad=True)
    hsa_kernels.chunk_attention(q, k, v, indices, weights).backward(torch.ones_like(q))
    with torch.no_grad():
        by_chunk.forward(q, k, v, indices, weights, 1.0)
        hsa_kernels.decode(
            retrieval_q[:, :1], landmarks, q[:, :1], k, v, chunk_size=S, top_k=K, offset=N * S
        )
        hsa_kernels.fetch(k[0], torch.tensor([3, 1]))
        hsa_kernels.window_decode_attention(q[:, :1], k[:, 0], v[:, 0], torch.tensor([30]))
        cache_k, cache_v, gain, angles = (
            k[:, 0],
            v[:, 0],
            torch.ones(D, dtype=dtype),
            (torch.ones(1, 1, D // 2),) * 2,
        )
        fresh = q[:, :1], cache_k[:, :1].contiguous(), cache_v[:, :1].contiguous()
        for gains in ((gain, gain), (None, None)):
            hsa_kernels.update_window_cache(
                *fresh, cache_k, cache_v, torch.tensor([3]), *gains, angles, eps=1e-6
            )
        for M, E, A in ((1, 64, 1), (2, 64, 4), (3, 8, 2), (8, 8, 4), (32, 64, 4)):
            scores = torch.randn(M, E, dtype=dtype)
            hsa_kernels.dispatch(scores, torch.zeros(E), A)
            up_and_gate, down = (
                torch.zeros(E, *shape, dtype=dtype) for shape in ((2048, 1344), (672, 2048))
            )
            hsa_kernels.grouped_experts(
                torch.randn(M, 2048, dtype=dtype),
                *reference.dispatch(scores, torch.zeros(E), A),
                up_and_gate,
                down,
            )
