"""The operations and the model on a GPU, against the float64 reference there.

Dimensions: as in `hsa_mini.ops.torch_backend`.
"""

from pathlib import Path

import pytest
import torch
from gpu_helpers import draw, relative_error

from hsa_mini import PRESETS, HSAModel, ops, reference
from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.inference.prefill import prefill
from hsa_mini.memory.chunk_source import DeviceChunks
from hsa_mini.paths import data_dir

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def gradients(operation, tensors, dtype, *fixed, **options):
    """Output and the gradient of every tensor, for an upstream gradient that differs everywhere."""
    leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in tensors]
    out = operation(*leaves, *fixed, **options)
    out.backward(torch.linspace(-1, 1, out.numel(), device="cuda", dtype=out.dtype).view_as(out))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.fixture(params=["torch", "auto"])
def backend(request):
    with ops.backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("T", "P", "W"),
    [
        (300, 50, 128),
        (1024, 0, 128),
        (1, 127, 128),
        (777, 900, 512),
        (2000, 63, 64),
        (1500, 700, 1000),
        (1280, 0, 2),
    ],
)
def test_sliding_window_equals_the_reference(backend, T, P, W, dtype):
    tensors = draw(2, T, 4, 64), draw(2, P + T, 2, 64, seed=1), draw(2, P + T, 2, 64, seed=2)
    ours = gradients(ops.sliding_window_attention, tensors, dtype, window=W)
    exact = gradients(reference.sliding_window_attention, tensors, torch.float64, window=W)
    for part, expected in zip(ours, exact):
        assert relative_error(part, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("T", "P", "W"), [(1024, 0, 128), (1500, 700, 1000), (1280, 0, 2000)])
def test_the_window_ends_at_the_border_of_the_document(backend, T, P, W, dtype):
    tensors = draw(2, T, 4, 64), draw(2, P + T, 2, 64, seed=1), draw(2, P + T, 2, 64, seed=2)
    for step in (100, 256, 400):  # new documents in every batch, as in training
        own = torch.arange(P, P + T, device="cuda")
        starts = torch.stack((own // step * step, (own + 37) // step * step - 37))
        options = dict(window=W, document_starts=starts)
        ours = gradients(ops.sliding_window_attention, tensors, dtype, **options)
        exact = gradients(reference.sliding_window_attention, tensors, torch.float64, **options)
        for part, expected in zip(ours, exact):
            assert relative_error(part, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("N", [15, 200])  # attend to all, gather
def test_chunk_attention_equals_the_reference(backend, N, dtype):
    tensors = draw(2, 500, 16, 64), draw(2, N, 64, 1, 64, seed=1), draw(2, N, 64, 1, 64, seed=2)
    queries, landmarks = draw(2, 500, 1, 128, seed=3), draw(2, N, 1, 128, seed=4)
    indices, weights = reference.retrieve(queries, landmarks, chunk_size=64, top_k=8, offset=64 * N)
    ours = gradients(ops.chunk_attention, tensors, dtype, indices, weights)
    exact = gradients(reference.chunk_attention, tensors, torch.float64, indices, weights.double())
    for part, expected in zip(ours, exact):
        assert relative_error(part, expected) < TOLERANCE[dtype]


def test_exploration_noise_is_that_of_the_processor():
    queries, landmarks = draw(1, 300, 1, 32), draw(1, 40, 1, 32, seed=1)
    options = {"chunk_size": 8, "top_k": 4, "gumbel_seed": 7}
    ours = reference.retrieve(queries.double(), landmarks.double(), **options)
    theirs = reference.retrieve(queries.double().cpu(), landmarks.double().cpu(), **options)
    assert torch.equal(ours[0].cpu(), theirs[0])


def test_early_exit_equals_the_full_model():
    torch.manual_seed(0)
    model = HSAModel(PRESETS["mini"], device="cuda").eval()
    ids = torch.randint(4096, (1, 3000), device="cuda")
    with torch.no_grad():
        full = model(ids).logits[:, -1]
    assert (prefill(model, ids, segment=777).logits[:, 0] - full).abs().max() < 1e-3


def test_a_block_of_the_model_compiles_whole():
    torch.manual_seed(0)
    model = HSAModel(PRESETS["mini"], device="cuda", dtype=torch.bfloat16)
    k, v, landmarks = (
        draw(1, 16, *shape, seed=i, dtype=torch.bfloat16)
        for i, shape in enumerate(((64, 1, 64), (64, 1, 64), (1, 256)))
    )

    source = DeviceChunks(k, v, landmarks)
    rope = model._rope(4096, 4096, "cuda")

    def attend_chunks(hsa, x):
        return hsa(x, source, position=4096)[0]

    def block(x):
        return model.upper[0](x, rope, None, 4096, attend_chunks)[0]

    x = draw(1, 4096, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        assert relative_error(torch.compile(block, fullgraph=True)(x), block(x).double()) < 2e-2


def test_the_shipped_model_answers_alike_in_bfloat16():
    folder = data_dir() / "checkpoints" / "mini"
    # a real text: among random tokens all chunks are equally good
    words = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    ids = torch.tensor([load_tokenizer().encode(words)[:2000]])
    half, full = (
        HSAModel.from_pretrained(folder, device="cuda"),
        HSAModel.from_pretrained(folder, device="cuda", dtype=torch.float32),
    )
    with torch.no_grad():
        ours, exact = (model(ids.cuda()).logits.double() for model in (half, full))
    assert relative_error(ours, exact) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("M", [3, 50])
@pytest.mark.parametrize("C, H", [(64, 7), (15, 8), (3, 5)])
def test_experts_of_any_size_run_and_are_captured(M, C, H, dtype):
    """PyTorch's grouped product takes only rows of whole 16 bytes, and no float64."""
    E = 6
    shapes = ((M, C), (E, C, 2 * H), (E, H, C))
    x, up_and_gate, down = (draw(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes))
    scores = draw(M, E, seed=3)

    def routed(x, up_and_gate, down):
        choice = ops.dispatch(scores, torch.zeros(E, device="cuda"), 2)
        return ops.grouped_experts(x, *choice, up_and_gate, down)

    with torch.no_grad():
        routed(x, up_and_gate, down)  # compiles what a graph cannot compile
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = routed(x, up_and_gate, down)
        graph.replay()
        want = routed(*(tensor.double() for tensor in (x, up_and_gate, down)))
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-6}[dtype]
    assert relative_error(got, want) < tolerance
