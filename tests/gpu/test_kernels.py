"""The Triton kernels on a GPU: precision beside PyTorch's own, large offsets, equal runs, captured
graphs.

Dimensions: B batch, T tokens, H query heads, J key/value heads, G = H/J, D head dimension, R
retrieval dimension, N chunks, S chunk size, K kept.
"""

import pytest
import torch
from gpu_helpers import draw, relative_error
from helpers import with_special_scores

import hsa_kernels
from hsa_mini import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
RATIO = 1.1  # of the error that the same equation has in PyTorch, in the same dtype at every step


def choices(B, T, J, K, N, seed=0):
    """K different chunks a token, a tenth of the slots empty, and weights that add up to 1."""
    generator = torch.Generator("cuda").manual_seed(seed)
    order = torch.rand(B, T, J, N, generator=generator, device="cuda").argsort(-1)[..., :K]
    indices = order.masked_fill(
        torch.rand(order.shape, generator=generator, device="cuda") < 0.1, -1
    ).int()
    weights = torch.randn(order.shape, generator=generator, device="cuda").masked_fill(
        indices < 0, float("-inf")
    )
    return indices, weights.softmax(-1).nan_to_num(0.0)


def inputs(B=2, T=129, J=1, G=16, D=128, N=40, S=64, K=16, dtype=torch.bfloat16):
    tensors = draw(B, T, J * G, D), draw(B, N, S, J, D, seed=1), draw(B, N, S, J, D, seed=2)
    return [x.to(dtype) for x in tensors], *choices(B, T, J, min(K, N), N)


def plain(q, k, v, indices, weights):
    """The equation in PyTorch, every product and every intermediate in the dtype of q (weights are
    float32).
    """
    B = q.shape[0]
    H, D = q.shape[2:]
    J = k.shape[3]
    b = torch.arange(B, device="cuda")[:, None, None, None]
    j = torch.arange(J, device="cuda")[:, None]
    k_kept, v_kept = (
        x.transpose(2, 3)[b, indices.clamp(min=0).long(), j] for x in (k, v)
    )  # [B, T, J, K, S, D]
    scores = torch.einsum("btjgd,btjksd->btjgks", q.unflatten(2, (J, H // J)), k_kept) * D**-0.5
    out = torch.einsum("btjgks,btjksd->btjgkd", scores.softmax(-1), v_kept)
    weights = weights.masked_fill(indices < 0, 0.0)
    return torch.einsum("btjgkd,btjk->btjgd", out, weights.to(out.dtype)).flatten(2, 3)


def with_gradients(operation, tensors, indices, weights) -> dict[str, torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (*tensors, weights)]
    out = operation(*leaves[:3], indices, leaves[3])
    out.backward(draw(*out.shape, seed=9).to(out.dtype))
    names = ("dq", "dk", "dv", "dweights")
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in zip(names, leaves)}}


SHAPES = [
    *(dict(G=G, J=J) for G, J in ((1, 2), (2, 1), (3, 2), (4, 1), (8, 1), (16, 1), (16, 2), (64,
    1))),
    *(dict(D=D) for D in (16, 64, 80, 256)),
    *(dict(S=S) for S in (16, 48, 128)),
    *(dict(K=K) for K in (1, 3, 40)),
    dict(T=1), dict(T=1000, N=300, K=64), dict(B=3, T=7, J=3, G=5, D=24, S=24, N=9, K=4),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunk_attention_is_as_precise_as_pytorch(shape, dtype):
    tensors, indices, weights = inputs(**shape, dtype=dtype)
    ours, theirs = (
        with_gradients(f, tensors, indices, weights) for f in (hsa_kernels.chunk_attention, plain)
    )
    exact = with_gradients(
        reference.chunk_attention, [x.double() for x in tensors], indices, weights.double()
    )
    errors = {
        name: (relative_error(ours[name], exact[name]), relative_error(theirs[name], exact[name]))
        for name in exact
    }
    print(shape, dtype, {name: f"{a:.2e} / {b:.2e}" for name, (a, b) in errors.items()})
    for name, (error, allowed) in errors.items():
        assert error <= RATIO * max(allowed, 1e-7), f"{name}: {error:.2e}, PyTorch's {allowed:.2e}"


def test_dweights_is_the_slope():
    tensors, indices, weights = inputs(T=20, N=9, K=5, D=64, dtype=torch.float32)
    grads = with_gradients(hsa_kernels.chunk_attention, tensors, indices, weights)
    factor, step = draw(*grads["out"].shape, seed=9), draw(*weights.shape, seed=10)

    def loss(weights):
        return (hsa_kernels.chunk_attention(*tensors, indices, weights) * factor).double().sum()

    up, down = loss(weights + step), loss(weights - step)
    assert ((up - down) / 2).item() == pytest.approx(
        (grads["dweights"] * step).double().sum().item(), rel=1e-4
    )


def test_fifty_runs_give_the_same_bits():
    tensors, indices, weights = inputs(T=3000, N=60, K=16)
    first = with_gradients(hsa_kernels.chunk_attention, tensors, indices, weights)
    for _ in range(50):
        again = with_gradients(hsa_kernels.chunk_attention, tensors, indices, weights)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_offsets_beyond_31_bits():
    """q of 2.3e9 numbers, k and v of 2.2e9 each.

    The last tokens and chunks are where they should be.
    """
    T, N = (1 << 20) + (1 << 17), 1 << 18
    q = draw(1, 2048, 16, 128, dtype=torch.bfloat16).repeat(1, T // 2048, 1, 1)
    k, v = (
        draw(1, 256, 64, 1, 128, seed=s, dtype=torch.bfloat16).repeat(1, N // 256, 1, 1, 1)
        for s in (1, 2)
    )
    assert q.numel() > 1 << 31 and k.numel() >= 1 << 31
    k[:, -1] *= 2
    indices = torch.randint(N - 300, N, (1, T, 1, 2), device="cuda", dtype=torch.int32)
    weights = torch.full((1, T, 1, 2), 0.5, device="cuda")
    out = hsa_kernels.chunk_attention(q, k, v, indices, weights)
    last = slice(T - 64, T)

    def twin(k):
        moved = indices[:, last] - (N - 300)
        return reference.chunk_attention(
            q[:, last].double(), k, v[:, -300:].double(), moved, weights[:, last].double()
        )

    assert relative_error(out[:, last], twin(k[:, -300:].double())) < 8e-3
    grad = torch.zeros_like(out)
    grad[:, last] = draw(1, 64, 16, 128, seed=5, dtype=torch.bfloat16)
    k.requires_grad_()
    hsa_kernels.chunk_attention(q, k, v, indices, weights).backward(grad)
    exact = k.detach()[:, -300:].double().requires_grad_()
    twin(exact).backward(grad[:, last].double())
    assert relative_error(k.grad[:, -300:], exact.grad) < 8e-3 and not k.grad[:, :1000].any()


@pytest.mark.parametrize(
    ("T", "N", "R", "K"),
    [(300, 64, 128, 64), (1000, 2048, 128, 64), (77, 5000, 256, 8), (64, 700, 64, 130)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [None, 11])
def test_retrieve_keeps_the_best(T, N, R, K, dtype, seed):
    """Chunks that the float64 reference keeps and we do not score no more than rounding below those
    we keep instead.
    """
    q, landmarks = draw(2, T, 2, R, dtype=dtype), draw(2, N, 2, R, seed=1, dtype=dtype)
    options = dict(chunk_size=64, top_k=K, offset=N * 64, gumbel_seed=seed)
    indices, weights = hsa_kernels.retrieve(q, landmarks, **options)
    exact, exact_weights = reference.retrieve(q.double(), landmarks.double(), **options)
    ours, theirs = (x.sort(-1).values for x in (indices, exact))
    rows = (ours != theirs).any(-1)
    assert rows.float().mean() < 0.01  # near ties are rare
    assert (
        relative_error(weights.sort(-1).values[~rows], exact_weights.sort(-1).values[~rows]) < 1e-5
    )
    if seed is None:
        scores = torch.einsum("btjr,bnjr->btjn", q.double(), landmarks.double()) / R**0.5
        kept = [scores.gather(-1, x.long()).min(-1).values for x in (indices, exact)]
        assert (kept[1] - kept[0]).max() < 1e-5


def test_gradients_of_retrieve():
    def gradients(retrieve, dtype):
        q, landmarks = (
            draw(*shape).to(dtype).requires_grad_() for shape in ((2, 500, 1, 128), (2, 70, 1, 128))
        )
        indices, weights = retrieve(q, landmarks, chunk_size=8, top_k=16)
        factor = (
            draw(2, 500, 1, 70).to(weights.dtype).gather(-1, indices.clamp(min=0).long())
        )  # by chunk: slots are in any order
        (weights * factor.masked_fill(indices < 0, 0.0)).sum().backward()
        return q.grad, landmarks.grad

    exact = gradients(reference.retrieve, torch.float64)
    for got, want in zip(gradients(hsa_kernels.retrieve, torch.float32), exact):
        assert relative_error(got, want) < 1e-4


@pytest.mark.parametrize(
    ("B", "J", "G", "N", "K"),
    [(1, 1, 16, 4096, 64), (2, 2, 4, 1000, 8), (1, 1, 16, 262144, 64), (3, 1, 1, 5, 8)],
)
def test_decode_and_its_replay_in_a_graph(B, J, G, N, K):
    q, asked = (
        draw(B, 1, J * G, 128, dtype=torch.bfloat16),
        draw(B, 1, J, 128, seed=1, dtype=torch.bfloat16),
    )
    landmarks = draw(B, N, J, 128, seed=2, dtype=torch.bfloat16)
    k, v = (draw(B, N, 64, J, 128, seed=s, dtype=torch.bfloat16) for s in (3, 4))
    offset = torch.full((B,), N * 64, device="cuda")

    def run():
        return hsa_kernels.decode(asked, landmarks, q, k, v, chunk_size=64, top_k=K, offset=offset)

    def want(position):
        indices, weights = reference.retrieve(
            asked.double(), landmarks.double(), chunk_size=64, top_k=K, offset=position
        )
        chunks = indices.clamp(min=0).unique()  # of a long memory, those that are read
        among = torch.searchsorted(chunks, indices.long()).masked_fill(indices < 0, -1)
        return reference.chunk_attention(
            q.double(), k[:, chunks].double(), v[:, chunks].double(), among, weights
        )

    assert relative_error(run(), want(N * 64)) < 8e-3
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for position in (N * 64 - 70, N * 32, 64):
        offset.fill_(position)
        graph.replay()
        assert relative_error(out, want(position)) < 8e-3


def test_a_whole_block_compiles():
    q, k, v = inputs(T=256, N=4, K=2)[0]
    asked, landmarks = (
        draw(2, 256, 1, 128, dtype=torch.bfloat16),
        draw(2, 4, 1, 128, seed=1, dtype=torch.bfloat16),
    )

    def layer(asked, landmarks, q, k, v):
        indices, weights = hsa_kernels.retrieve(asked, landmarks, chunk_size=64, top_k=2)
        return torch.nn.functional.silu(hsa_kernels.chunk_attention(q, k, v, indices, weights))

    leaves = [x.detach().requires_grad_() for x in (asked, landmarks, q, k, v)]
    want = torch.autograd.grad(layer(*leaves).float().square().sum(), leaves)
    got = torch.autograd.grad(
        torch.compile(layer, fullgraph=True)(*leaves).float().square().sum(), leaves
    )
    for a, b in zip(got, want):
        assert relative_error(a, b.double()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "N, K, gumbel_seed", [(3, 8, None), (40, 4, None), (900, 16, None), (40, 4, 5)]
)
def test_retrieve_shows_nan_and_infinite_scores(N, K, gumbel_seed, dtype):
    """Kernel, GPU and processor keep the same chunks, none of them twice; NaN is the largest."""
    q, landmarks, _ = with_special_scores(2, 70, 2, 16, N, seed=K, dtype=torch.float32)
    inputs = [x.to("cuda", dtype) for x in (q, landmarks)]
    options = dict(chunk_size=4, top_k=K, offset=4 * N - 9, gumbel_seed=gumbel_seed)
    results = [
        hsa_kernels.retrieve(*inputs, **options),
        reference.retrieve(*inputs, **options),
        reference.retrieve(*(x.cpu() for x in inputs), **options),
    ]
    found = []
    for indices, weights in results:
        indices, order = indices.cpu().sort(dim=-1, descending=True)
        assert ((indices[..., 1:] != indices[..., :-1]) | (indices[..., 1:] < 0)).all()
        found.append((indices, weights.cpu().gather(-1, order)))
    for indices, weights in found[1:]:
        assert torch.equal(indices, found[0][0]) and weights.isnan().any()
        torch.testing.assert_close(weights, found[0][1], equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("N, share", [(5, 0.5), (3000, 0.001), (70, 1.0)])
def test_decode_shows_nan_and_infinite_scores(N, share, value):
    shapes = ((2, 1, 2, 16), (2, N, 2, 16), (2, 1, 4, 64), (2, N, 16, 2, 64), (2, N, 16, 2, 64))
    inputs = [draw(*shape, seed=i, dtype=torch.bfloat16) for i, shape in enumerate(shapes)]
    for x in inputs[:2]:
        x[..., 1:] = 0.0
    inputs[0].abs_()
    inputs[1][..., 0].masked_fill_(torch.rand(2, N, 2, device="cuda") < share, value)
    options = dict(chunk_size=16, top_k=4, offset=16 * N)
    got, want = (f(*inputs, **options) for f in (hsa_kernels.decode, reference.decode))
    torch.testing.assert_close(got, want, equal_nan=True, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_dispatch_chooses_no_expert_twice_whatever_the_scores(value):
    M, E, A = 50, 9, 4
    scores = draw(M, E)
    scores[1] = value
    scores[2:40, :3] = value
    offsets, _, inverse_order, _ = hsa_kernels.dispatch(scores, torch.zeros(E, device="cuda"), A)
    experts = torch.searchsorted(offsets, inverse_order, right=True).sort(-1).values
    assert (experts[:, 1:] > experts[:, :-1]).all()
    assert torch.equal(inverse_order.flatten().sort().values, torch.arange(M * A, device="cuda"))
