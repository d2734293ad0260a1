"""What the programs of a Triton kernel load and store is recorded from their addresses."""

import base64
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("anywidget")
pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.interpreter import interpreter_builder

from hsa_mini.viz import make_figure
from hsa_mini.viz.programs.explorer import explore_programs, packed
from hsa_mini.viz.programs.picture import KINDS, OTHERS, program_map
from hsa_mini.viz.programs.record import record


@triton.jit
def largest(b_x):
    return tl.max(b_x, 0)


@triton.jit
def shift_kernel(x, out, N, D: tl.constexpr, WIDTH: tl.constexpr):
    """One program subtracts the largest number of a row of x [T, N]."""
    row = tl.program_id(0) * 2 + tl.program_id(1)
    o_n = tl.arange(0, WIDTH)
    b_x = tl.load(x + row * D + o_n, mask=o_n < N, other=-float("inf"))
    tl.store(out + row * D + o_n, b_x - largest(b_x), mask=o_n < N)


def launch(N=3, D=3):
    x = torch.arange(18.0).view(6, 3)
    return x, record(shift_kernel, (3, 2), x=x, out=torch.zeros_like(x), N=N, D=D, WIDTH=4)


def test_a_record_has_the_result_and_who_moved_what():
    x, found = launch()
    assert torch.equal(found.arrays["out"], x - x.amax(dim=1, keepdim=True))
    assert (
        found.programs == 6 and found.masked == [2] * 6
    )  # one address of the load, one of the store
    own = torch.zeros(6, 3, dtype=torch.int64)
    own[5] = 1
    assert found.counts("x", "load", 5).tolist() == own.tolist()
    assert found.counts("out", "store", 5).tolist() == own.tolist()
    assert found.bytes_moved("load", 5) == 12 and found.bytes_moved("store") == x.nbytes
    assert found.bytes_moved("load") == x.nbytes and found.counts("x", "store").sum() == 0


def test_overlapping_rows_are_counted_for_each_program():
    _, found = launch(N=3, D=2)
    assert found.counts("x", "load").flatten().tolist() == [1, 1, *[2, 1] * 5, 1, *[0] * 5]


def test_the_arguments_of_a_record_stay_as_they_are():
    x = torch.arange(18.0).view(6, 3)
    out = torch.zeros_like(x)
    record(shift_kernel, (3, 2), x=x, out=out, N=3, D=3, WIDTH=4)
    assert not out.any() and x.sum() == 153


def test_an_address_outside_of_every_tensor_is_refused_and_recording_ends():
    with pytest.raises(Exception, match="outside of every tensor: is a mask missing"):
        launch(N=4, D=1000)
    assert not {"create_masked_load", "create_masked_store"} & vars(interpreter_builder).keys()


def test_a_picture_shows_the_record():
    figure = make_figure()
    summary = program_map(figure, launch()[1], 4)
    cells = [ax.collections[0].get_array().tolist() for ax in figure.axes]
    for grid, color in zip(cells, (2, 3)):
        assert grid == [[color if row == 4 else OTHERS] * 3 for row in range(6)]
    assert [ax.get_title() for ax in figure.axes] == ["x\nloads 12 bytes", "out\nstores 12 bytes"]
    assert summary == (
        "Program 4 of 6 loads 12 bytes, stores 12 and computes 4 FLOP; masks keep out 2 addresses. "
        "All programs load 72 and store 72."
    )


def test_a_kernel_that_a_gpu_would_compile_is_recorded_too_and_still_compiles():
    """Without TRITON_INTERPRET the kernel is a compiled one, as on a machine with a GPU."""
    script = """
import sys
sys.path.insert(0, "tests")
import test_viz_programs as here
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

x, found = here.launch()
assert found.bytes_moved("load") == x.nbytes
signature = dict(x="*fp32", out="*fp32", N="i32", D="constexpr", WIDTH="constexpr")
source = ASTSource(here.shift_kernel, signature, dict(D=3, WIDTH=4))
assert here.triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@triton.jit
def scores_kernel(q, k, out, M: tl.constexpr, D: tl.constexpr):
    """One program scores M rows of q against M rows of k, and sums each row of scores."""
    o_m = tl.program_id(0) * M + tl.arange(0, M)
    o_k = tl.arange(0, M)[None, :] * D + tl.arange(0, D)[:, None]
    b_q = tl.load(q + o_m[:, None] * D + tl.arange(0, D)[None, :])
    b_s = tl.dot(b_q, tl.load(k + o_k), input_precision="ieee")
    tl.store(out + o_m, tl.sum(tl.exp(b_s), 1))


def scores_record():
    q = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    return q, record(scores_kernel, (2,), q=q, k=q.clone(), out=q.new_zeros(32), M=16, D=16)


def test_flop_are_those_of_the_formula():
    """2 M N D for the scores, one for each exp, N - 1 for the sum of each row."""
    q, found = scores_record()
    assert torch.allclose(found.arrays["out"], (q @ q[:16].T).exp().sum(dim=1), rtol=1e-4)
    scores = 16 * 16
    assert found.flop == [2 * 16 * scores + scores + scores - 16] * 2
    assert [move.flop for move in found.moves] == [0, 0, found.flop[0]] * 2


@pytest.mark.parametrize("found", [launch()[1], launch(N=3, D=2)[1], scores_record()[1]])
def test_the_browser_gets_the_whole_record(found):
    sent = packed("kernel", found)
    places = np.split(
        np.frombuffer(sent["positions"], "<i4"), np.cumsum([move[3] for move in sent["moves"]])
    )
    for program in range(found.programs):
        for kind, what in enumerate(KINDS):
            for array, (name, shape, size) in enumerate(sent["arrays"]):
                again = np.zeros(found.arrays[name].numel(), dtype=int)
                for move, own in zip(sent["moves"], places):
                    if move[:3] == [program, kind, array]:
                        np.add.at(again, own, 1)
                assert again.reshape(shape).tolist() == found.counts(name, what, program).tolist()
                assert size == found.arrays[name].element_size()
    assert sent["flop"] == found.flop and sent["programs"] == found.programs


def test_readers_without_a_kernel_see_the_program_that_was_chosen():
    explorer = explore_programs(dict(shift=launch()[1]), alt="Rows.", launch="shift", program=4)
    data, metadata = explorer._repr_mimebundle_()
    assert data["text/plain"].startswith("Rows. Program 4 of 6 loads 12 bytes")
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert metadata["needs_background"] == "light"
