"""The operations by one name each: the choice of a backend, and the block mask of the window.

Dimensions: T tokens, P cached keys, W window.
"""

import contextlib
import io

import pytest
import torch
from helpers import assert_close, random, random_choice, results
from material import document_starts

from hsa_mini import ops, reference
from hsa_mini.cli.arguments import choose_device
from hsa_mini.ops import choice, flex_window


def attention_inputs() -> dict[str, torch.Tensor]:
    indices, weights = random_choice(2, 9, 1, 3, 5, dtype=torch.float32)
    q, k, v = (
        random(*shape, seed=i).float()
        for i, shape in enumerate(((2, 9, 4, 16), (2, 5, 16, 1, 16), (2, 5, 16, 1, 16)))
    )
    return dict(q=q, k=k, v=v, indices=indices, weights=weights)


def retrieval_inputs() -> dict[str, torch.Tensor]:
    return dict(
        retrieval_q=random(2, 9, 1, 16).float(), landmarks=random(2, 5, 1, 16, seed=1).float()
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are not interpreted")
@pytest.mark.parametrize(
    ("name", "inputs", "options"),
    [
        ("chunk_attention", attention_inputs, {}),
        ("retrieve", retrieval_inputs, dict(chunk_size=2, top_k=8)),
    ],
)
def test_kernels_and_torch_backend_are_the_same(monkeypatch, name, inputs, options):
    called = []
    monkeypatch.setattr(
        "hsa_mini.ops.choice.kernels",
        lambda kernels=choice.kernels: called.append(name) or kernels(),
    )
    with ops.backend("kernels"):
        got = results(getattr(ops, name), inputs(), **options)
    assert called == [name]
    with ops.backend("torch"):
        want = results(getattr(ops, name), inputs(), **options)
    assert called == [name]
    if name == "retrieve":  # slots may come in another order
        got, want = ({k: v for k, v in x.items() if "gradient" in k} for x in (got, want))
    assert_close(got, want, 1e-5)


def test_the_override_ends_with_its_block():
    with pytest.raises(RuntimeError), ops.backend("kernels"):
        raise RuntimeError
    assert choice.current() == "auto"
    with (
        pytest.raises(ValueError, match=r"^name: got 'fast', accepted are auto, kernels, torch$"),
        ops.backend("fast"),
    ):
        pass


@pytest.mark.parametrize(
    "capability, hip, kernels",
    [((9, 0), None, True), ((8, 0), None, True), ((7, 5), None, False), ((9, 4), "6.4", False)],
)
def test_the_kernels_are_for_gpus_of_nvidia_from_ampere_on(monkeypatch, capability, hip, kernels):
    """PyTorch calls AMD's GPUs cuda too, and gives them capabilities like those of NVIDIA's."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choice.runs_kernels(torch.device("cuda")) == kernels
    assert not choice.runs_kernels(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert choose_device("cuda") == torch.device("cuda")
    assert said.getvalue().count("\n") == (0 if kernels else 1)
    assert kernels or "on this GPU PyTorch does their work" in said.getvalue()


def test_a_chunk_that_is_too_large_for_the_gpu_goes_through_pytorch(monkeypatch):
    monkeypatch.setattr(ops, "use_kernels", lambda tensor, fits: fits)
    q = torch.empty(1, 1, 1, 256, dtype=torch.float16)
    k = torch.empty(1, 1, 128, 1, 256, dtype=torch.float16)
    assert ops.in_kernel(q, k)
    monkeypatch.setattr("hsa_kernels.common.tiles.capability", lambda x: (8, 9))
    assert not ops.in_kernel(q, k) and ops.in_kernel(q, k[:, :, :32])
    with ops.backend("kernels"):  # refuses by itself, and says why
        assert ops.in_kernel(q, k)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("T", "P", "W"),
    [
        (1, 0, 1),
        (300, 0, 128),
        (300, 63, 64),
        (512, 0, 512),
        (129, 399, 400),
        (700, 37, 129),
        (128, 5, 1000),
    ],
)
def test_the_mask_of_blocks_is_the_window(T, P, W):
    mask = flex_window.block_mask(T, P, W, torch.device("cpu"))
    side, rows, columns = (
        flex_window.BLOCK,
        -(-T // flex_window.BLOCK),
        -(-(P + T) // flex_window.BLOCK),
    )
    i, j = torch.arange(rows * side)[:, None], torch.arange(columns * side)
    seen = ((j <= i + P) & (j > i + P - W) & (i < T) & (j < P + T)).view(rows, side, columns, side)
    assert torch.equal(mask.to_dense()[0, 0].bool()[:rows, :columns], seen.any(3).any(1))
    for row in range(rows):
        full = mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].long()
        assert seen[row, : min(side, T - row * side)][:, full].all()
    q, k, v = (
        random(1, T, 2, 16).float(),
        random(1, P + T, 1, 16, seed=1).float(),
        random(1, P + T, 1, 16, seed=2).float(),
    )
    parts = (x.transpose(1, 2) for x in (q, k, v))
    out = flex_window.flex_attention(*parts, block_mask=mask, enable_gqa=True).transpose(1, 2)
    assert_close({"out": out}, {"out": reference.sliding_window_attention(q, k, v, window=W)}, 1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("P", "W"), [(0, 128), (300, 200), (37, 1000)])
def test_the_mask_of_blocks_keeps_to_the_document(P, W):
    T = 700
    starts = document_starts([P + 128, P + 500, P + 512], [50, P + 301], tokens=P + T)[:, P:]
    mask = flex_window.block_mask(T, P, W, torch.device("cpu"), starts)
    rows, columns = (-(-x // flex_window.BLOCK) for x in (T, P + T))
    i, j = torch.arange(T)[:, None], torch.arange(columns * flex_window.BLOCK)
    seen = (j <= i + P) & (j > i + P - W) & (j < P + T) & (j >= starts[..., None])
    late = rows * flex_window.BLOCK - T
    some = torch.nn.functional.pad(seen, (0, 0, 0, late))
    some = some.view(2, rows, flex_window.BLOCK, columns, flex_window.BLOCK)
    assert torch.equal(mask.to_dense()[:, 0].bool(), some.any(4).any(2))
    every = torch.nn.functional.pad(seen, (0, 0, 0, late), value=True).view(some.shape)
    for b in range(2):
        for row in range(rows):
            full = mask.full_kv_indices[b, 0, row, : mask.full_kv_num_blocks[b, 0, row]].long()
            assert every[b, row][:, full].all()
    q, k, v = random(2, T, 2, 16), random(2, P + T, 1, 16, seed=1), random(2, P + T, 1, 16, seed=2)
    parts = (x.float().transpose(1, 2) for x in (q, k, v))
    out = flex_window.flex_attention(*parts, block_mask=mask, enable_gqa=True).transpose(1, 2)
    want = reference.sliding_window_attention(q, k, v, window=W, document_starts=starts)
    assert_close(out.double(), want, 1e-5)


def window_inputs() -> dict[str, torch.Tensor]:
    q, k, v = (
        random(*shape, seed=i).float()
        for i, shape in enumerate(((2, 1, 4, 16), (2, 9, 2, 16), (2, 9, 2, 16)))
    )
    return dict(q=q, k=k, v=v, positions=torch.tensor([3, 12]))


@pytest.mark.parametrize("name", ["torch", "kernels"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(q=random(2, 2, 4, 16).float()),
            r"q: got shape \[2, 2, 4, 16\], accepted is \[B, 1, H, D\]",
        ),
        (
            dict(v=random(2, 8, 2, 16).float()),
            r"v: got shape \[2, 8, 2, 16\], accepted is \[B, W, J, D\] with W=9",
        ),
        (
            dict(k=random(2, 9, 2, 16)),
            r"k: got torch.float64, accepted is that of q \(torch.float32\)",
        ),
        (
            dict(positions=torch.tensor([3, 12]).int()),
            "positions: got torch.int32, accepted are int64",
        ),
        (
            dict(positions=torch.tensor([3])),
            r"positions: got shape \[1\], accepted is \[B\] with B=2",
        ),
        (
            dict(q=random(2, 1, 3, 16).float()),
            "q: got 3 heads, accepted are multiples of the 2 heads of k and v",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are not interpreted")
def test_wrong_arguments_of_window_decode_attention_are_one_line(name, changes, message):
    with ops.backend(name), pytest.raises(ValueError, match=f"^{message}$"):
        ops.window_decode_attention(**(window_inputs() | changes))
