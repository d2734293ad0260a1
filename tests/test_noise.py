"""The noise generator: published vectors of Philox-4x32-10, Triton's own Philox, and the law of
Gumbel(0, 1).

Dimensions: B batch, T tokens, J retrieval heads, N chunks.
"""

import math
import os
import subprocess
import sys

import pytest
import torch

from hsa_mini.reference.noise import gumbel_noise, philox

ONES = 0xFFFFFFFF
# Random123's kat_vectors for philox4x32-10: counter, key, first word of the result.
VECTORS = {
    "zeros": ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
    "ones": ((ONES, ONES, ONES, ONES), (ONES, ONES), 0x408F276D),
    "pi": ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
}


@pytest.mark.parametrize("counter, key, word", VECTORS.values(), ids=VECTORS)
def test_philox_gives_the_published_words(counter, key, word):
    assert philox(key[0] | key[1] << 32, tuple(torch.tensor(c) for c in counter)).item() == word


TRITON_PHILOX = """
import torch, triton, triton.language as tl

@triton.jit
def first_words(p_out, seed, N: tl.constexpr):
    o_n = tl.arange(0, N)
    # counter: chunk, position, head, batch
    c0, c1, c2, c3 = tl.philox(seed, o_n, o_n * 0 + 1000003, o_n * 0 + 3, o_n * 0 + 2)
    tl.store(p_out + o_n, c0.to(tl.int64))

out = torch.zeros(8, dtype=torch.int64)
for seed in (0, 12345, 5000000000):
    first_words[(1,)](out, seed, 8)
    print(*out.tolist())
"""


def test_triton_philox_with_counter_chunk_position_head_batch_gives_the_same_words(tmp_path):
    """`tl.philox(seed, chunk, position, head, batch)`: the order that a kernel has to keep."""
    pytest.importorskip("triton")
    script = tmp_path / "words.py"  # a file, because triton reads the source of its functions
    script.write_text(TRITON_PHILOX)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    chunk = torch.arange(8)
    for seed, line in zip((0, 12345, 5_000_000_000), run.stdout.splitlines(), strict=True):
        words = philox(seed, (chunk, *(torch.full((8,), x) for x in (1_000_003, 3, 2))))
        assert words.tolist() == [int(word) for word in line.split()]


def test_noise_is_the_gumbel_of_each_counters_word():
    noise = gumbel_noise(9, torch.tensor([[5, 1_000_003], [70, 16_777_216]]), 3, 6)
    for b, t, j, n in ((0, 0, 0, 0), (0, 1, 2, 5), (1, 1, 1, 3), (1, 0, 2, 4)):
        position = ((5, 1_000_003), (70, 16_777_216))[b][t]
        word = philox(9, tuple(torch.tensor(c) for c in (n, position, j, b))).item()
        assert noise[b, t, j, n].item() == pytest.approx(
            -math.log(-math.log((word + 0.5) / 2**32)), rel=1e-6
        )


def test_noise_of_a_position_does_not_depend_on_how_much_else_is_asked():
    positions = torch.arange(40)[None].expand(3, -1)
    whole = gumbel_noise(1, positions, 4, 50)
    assert torch.equal(gumbel_noise(1, positions[:2, 13:20], 2, 7), whole[:2, 13:20, :2, :7])
    assert torch.equal(gumbel_noise(1, positions, 4, 50), whole)
    assert whole.unique().numel() > 0.999 * whole.numel()  # no two counters share their noise
    assert (gumbel_noise(2, positions, 4, 50) != whole).float().mean() > 0.999


def test_noise_follows_the_gumbel_law():
    """Bounds of four standard errors: variance pi^2/6, kurtosis 27/5."""
    noise = gumbel_noise(0, torch.arange(500)[None], 4, 100).double().flatten()
    n, variance = noise.numel(), math.pi**2 / 6
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=4 * math.sqrt(variance / n))
    assert noise.var().item() == pytest.approx(variance, abs=4 * variance * math.sqrt(4.4 / n))
    law = torch.exp(-torch.exp(-noise.sort().values))
    # Kolmogorov-Smirnov, 1 %.
    assert (law - (torch.arange(n) + 0.5) / n).abs().max() < 1.63 / math.sqrt(n)
    for lag in (1, 100, 400):  # the next chunk, the next head, the next position
        assert abs(torch.corrcoef(torch.stack((noise[lag:], noise[:-lag])))[0, 1]) < 4 / math.sqrt(
            n
        )


@pytest.mark.parametrize("word, least, most", [(0, -3.2, -3.0), (2**32 - 1, 22.0, 23.5)])
def test_noise_is_finite_at_both_ends(word, least, most, monkeypatch):
    monkeypatch.setattr(
        "hsa_mini.reference.noise.philox", lambda seed, counter: torch.full_like(counter[0], word)
    )
    noise = gumbel_noise(0, torch.zeros(1, 1, dtype=torch.int64), 1, 1).item()
    assert least < noise < most
