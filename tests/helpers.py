"""Random tensors, results and gradients by name, error ratios, living bytes, one command."""

import gc

import torch


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normally distributed numbers. Shape and seed decide them, whatever the dtype."""
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def random_choice(B: int, T: int, J: int, K: int, N: int, *, seed: int = 0, dtype=torch.float64):
    """Indices int32 [B, T, J, K] and weights [B, T, J, K].

    A row of K indices names a chunk at most once. A third of the indices are -1, with weight 0.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(B, T, J, max(N, K), generator=generator).argsort(-1)[..., :K]
    empty = (order >= N) | (torch.rand(B, T, J, K, generator=generator) < 1 / 3)
    return order.masked_fill(empty, -1).int(), random(
        B, T, J, K, seed=seed + 1, dtype=dtype
    ).masked_fill(empty, 0.0)


def with_special_scores(
    B: int, T: int, J: int, R: int, N: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """retrieval_q [B, T, J, R], landmarks [B, N, J, R] and their scores [B, T, J, N], up to a
    factor: a third of the scores of every token are NaN (of either sign), inf or -inf.
    """
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf")])
    chosen = special[torch.randint(4, (B, N, J), generator=generator)].to(dtype)
    plain = torch.rand(B, N, J, generator=generator) < 2 / 3
    landmarks = torch.zeros(B, N, J, R, dtype=dtype)
    landmarks[..., 0] = torch.where(plain, random(B, N, J, seed=seed, dtype=dtype), chosen)
    retrieval_q = torch.zeros(B, T, J, R, dtype=dtype)
    retrieval_q[..., 0] = 1 + random(B, T, J, seed=seed + 1, dtype=dtype).abs()
    scores = retrieval_q[..., :1] * landmarks[:, None, :, :, 0].transpose(2, 3)
    return retrieval_q, landmarks, scores


def results(
    operation, inputs: dict[str, torch.Tensor], *fixed, **options
) -> dict[str, torch.Tensor]:
    """The outputs of `operation(**inputs, **options)` and the gradient of every input, by name.

    The loss is the sum of all outputs times random factors. Integers have no gradient. An input
    that the output does not depend on has gradient 0.
    """
    leaves = {
        name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()
    }
    out = operation(*fixed, **leaves, **options)
    out = out if isinstance(out, tuple) else (out,)
    named = {f"output {i}": x.detach() for i, x in enumerate(out)}
    loss = sum(
        (x * random(*x.shape, seed=99, dtype=x.dtype).to(x.device)).sum()
        for x in out
        if x.is_floating_point()
    )
    if loss.requires_grad:
        loss.backward()
    for name, leaf in leaves.items():
        if leaf.is_floating_point():
            named[f"gradient of {name}"] = (
                torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            )
    return named


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want| in float64.

    If the root mean square of `want` is below 1e-3, it counts as 1e-3, since it may be 0.
    """
    got = got.detach().double()
    want = want.detach().double()
    return (got - want).norm().item() / max(want.norm().item(), 1e-3 * max(want.numel(), 1) ** 0.5)


def assert_close(got, want, tolerance: float) -> None:
    """Compare two tensors, or two dicts of tensors.

    Names, shapes, dtypes and integers must be equal. Floating-point tensors must be finite, with an
    error ratio within `tolerance`.
    """
    if isinstance(want, torch.Tensor):
        got = {"result": got}
        want = {"result": want}
    assert got.keys() == want.keys()
    for name, expected in want.items():
        actual = got[name]
        assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
        if not expected.is_floating_point():
            assert torch.equal(actual, expected), name
            continue
        assert actual.isfinite().all(), f"{name}: not finite"
        assert error(actual, expected) <= tolerance, (
            f"{name}: error {error(actual, expected):.2e} above {tolerance:.0e}"
        )


def living_bytes() -> int:
    """Bytes of all living tensors. Tensors that share a storage count once.

    Tensors on the meta device and a compiler's fake tensors have no bytes.
    """
    tensors = [
        x
        for x in gc.get_objects()
        if type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta
    ]
    return sum({s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}.values())


def call(capfd, *words: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one command."""
    from hsa_mini import cli

    try:
        status = cli.main(list(words))
    except SystemExit as stop:
        status = stop.code
    return status, *capfd.readouterr()
