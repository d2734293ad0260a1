"""Every kernel compiles, as it is launched, for each generation of GPUs that it supports.

Shared memory fits. On Hopper registers do not spill, and tensor cores are used.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# bytes per program
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# without chunks of 128 tokens of 256 numbers, and without float32
USUAL = ("8B", "mini", "H/J of 1", "float16, odd sizes")


def compile_all(capability: int) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, Path(__file__).with_name("compile_kernels.py"), str(capability)]
    run = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return compile_all(90)


def kernels() -> set[str]:
    """The names of all kernels in the sources."""
    sources = (Path(__file__).parent.parent / "kernels" / "hsa_kernels").rglob("*.py")
    functions = [
        part for source in sources for part in source.read_text().split("@triton.jit\ndef ")[1:]
    ]
    return {part.split("(")[0] for part in functions if "tl.program_id" in part.split("\n\n\n")[0]}


def check(compiled: list[dict], capability: int) -> None:
    assert kernels() == {row["kernel"] for row in compiled}
    for row in compiled:
        assert row["shared"] <= SHARED_MEMORY[capability], row


def test_every_kernel_compiles_for_hopper_and_fits(compiled):
    check(compiled, 90)


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_every_kernel_compiles_for_other_gpus_and_fits(capability):
    """A100, RTX 4090, B200 and RTX 5090. What is larger is refused there (`checks.tile_fits`)."""
    check(compile_all(capability), capability)


# Bytes per thread. These kernels were measured to be faster with spills, because more programs
# share a multiprocessor.
SPILLS = {"retrieve_fwd_kernel": 256, "chunk_attention_bwd_kernel": 128}


def test_nothing_else_spills_at_usual_sizes(compiled):
    for row in compiled:
        if row["case"] in USUAL:
            assert row["spilled"] <= SPILLS.get(row["kernel"], 0), row


TENSOR_CORES = (
    "chunk_attention_fwd_by_token_block_kernel",
    "chunk_attention_fwd_by_chunk_kernel",
    "chunk_attention_bwd_kernel",
)


def test_tensor_cores_by_warpgroup_where_a_tile_has_64_rows(compiled):
    for row in compiled:
        if row["kernel"] in TENSOR_CORES and row["case"] in ("8B", "mini"):
            assert row["wgmma"] > 0, row
