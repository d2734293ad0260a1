"""Compile every kernel for a compute capability (80, 89, 90, 100 or 120), without a card, as its
launch code does; print one JSON line per kernel.

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
from hsa_kernels.common import checks, tiles  # noqa: E402
from hsa_mini import reference  # noqa: E402

CUOBJDUMP = next(Path(triton.__file__).parent.rglob("cuobjdump"), None)


CAPABILITY = int(sys.argv[1])


class NoCard:
    """A driver without a card: it names the GPU to compile for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

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
triton.runtime.driver.set_active(NoCard())
for module in (tiles, checks):
    module.capability = lambda x: divmod(CAPABILITY, 10)

CASES = {
    "8B": dict(H=16, J=1, D=128, R=128, S=64, K=64, dtype=torch.bfloat16),
    "mini": dict(H=4, J=1, D=64, R=256, S=64, K=8, dtype=torch.bfloat16),
    "H/J of 1": dict(H=2, J=2, D=128, R=128, S=64, K=64, dtype=torch.bfloat16),
    "largest": dict(H=16, J=1, D=256, R=256, S=128, K=64, dtype=torch.bfloat16),
    "64 heads": dict(H=64, J=1, D=256, R=128, S=128, K=8, dtype=torch.bfloat16),
    "float32": dict(H=16, J=1, D=128, R=128, S=64, K=8, dtype=torch.float32),
    "float32, largest": dict(H=16, J=1, D=256, R=128, S=64, K=8, dtype=torch.float32),
    "float32, 64 heads": dict(H=64, J=1, D=128, R=128, S=64, K=8, dtype=torch.float32),
    "float16, odd sizes": dict(H=6, J=2, D=80, R=48, S=48, K=5, dtype=torch.float16),
}
# For the other GPUs: a usual size, and the largest ones that `checks` accepts there.
CASES = {
    80: {
        "8B": CASES["8B"],
        "largest": dict(H=32, J=1, D=256, R=256, S=64, K=64, dtype=torch.bfloat16),
        "64 heads": dict(H=64, J=1, D=128, R=128, S=64, K=8, dtype=torch.bfloat16),
        "float32, largest": CASES["float32"],
        "float32, 64 heads": dict(H=64, J=1, D=64, R=128, S=64, K=8, dtype=torch.float32),
    },
    89: {
        "8B": CASES["8B"],
        "long chunks": dict(H=16, J=1, D=64, R=128, S=128, K=8, dtype=torch.float16),
        "64 heads": dict(H=64, J=1, D=128, R=128, S=64, K=8, dtype=torch.bfloat16),
        "float32, largest": dict(H=16, J=1, D=256, R=128, S=16, K=8, dtype=torch.float32),
        "float32, 64 heads": dict(H=64, J=1, D=64, R=128, S=32, K=8, dtype=torch.float32),
    },
    90: CASES,
    100: {name: CASES[name] for name in ("8B", "largest", "float32")},
}[89 if CAPABILITY == 120 else CAPABILITY]  # both have 99 KB of shared memory

for case, sizes in CASES.items():
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
    assert checks.tile_fits(q, k), case
    # The other kernels use little shared memory, so for the other GPUs one case is enough.
    every_kernel = CAPABILITY == 90 or case == "8B"
    if every_kernel:
        _, weights = hsa_kernels.retrieve(
            retrieval_q, landmarks, chunk_size=S, top_k=K, offset=N * S
        )
        weights.sum().backward()
        hsa_kernels.retrieve(retrieval_q, landmarks, chunk_size=S, top_k=K, gumbel_seed=1)
        starts = torch.zeros(1, T, dtype=torch.int32)
        hsa_kernels.retrieve(retrieval_q, landmarks, chunk_size=S, top_k=K, document_starts=starts)
    indices = torch.zeros(1, T, J, K, dtype=torch.int32)
    weights = torch.randn(1, T, J, K, requires_grad=True)
    hsa_kernels.chunk_attention(q, k, v, indices, weights).backward(torch.ones_like(q))
    with torch.no_grad():
        by_chunk.forward(q, k, v, indices, weights, 1.0)
        hsa_kernels.decode(
            retrieval_q[:, :1], landmarks, q[:, :1], k, v, chunk_size=S, top_k=K, offset=N * S
        )
        hsa_kernels.window_decode_attention(q[:, :1], k[:, 0], v[:, 0], torch.tensor([30]))
        if not every_kernel:
            continue
        hsa_kernels.fetch(k[0], torch.tensor([3, 1]))
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
