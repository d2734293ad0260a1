"""Random tensors, results with every gradient by name, comparison by error ratio, and what is alive."""

import gc

import torch


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal numbers, the same for the same shape and seed in every dtype."""
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def random_choice(B: int, T: int, J: int, K: int, N: int, *, seed: int = 0, dtype=torch.float64):
    """Indices int32 [B, T, J, K] that name a chunk at most once a row, a third of them -1, and weights, 0 where -1."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(B, T, J, max(N, K), generator=generator).argsort(-1)[..., :K]
    empty = (order >= N) | (torch.rand(B, T, J, K, generator=generator) < 1 / 3)
    return order.masked_fill(empty, -1).int(), random(
        B, T, J, K, seed=seed + 1, dtype=dtype
    ).masked_fill(empty, 0.0)


def results(
    operation, inputs: dict[str, torch.Tensor], *fixed, **options
) -> dict[str, torch.Tensor]:
    """Outputs of `operation(**inputs, **options)`, and the gradient of their sum with random factors by every input.

    Integer inputs and outputs take part without a gradient. An input that the output does not depend on has gradient 0.
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
    """|got - want| / |want| in float64; a root mean square of `want` below 1e-3 counts as 1e-3 (it may be 0)."""
    got, want = got.detach().double(), want.detach().double()
    return (got - want).norm().item() / max(want.norm().item(), 1e-3 * max(want.numel(), 1) ** 0.5)


def assert_close(got, want, tolerance: float) -> None:
    """Tensors or dicts of tensors: same names, shapes and dtypes, finite, error ratio within tolerance; integers equal."""
    if isinstance(want, torch.Tensor):
        got, want = {"result": got}, {"result": want}
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
    """Bytes of every tensor that is alive, storages counted once; those on the meta device and a compiler's fakes have none."""
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
