"""`python kernels/bench`.

Every operation is timed once for each size, and what is written says where it comes from.
"""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from hsa_mini import PRESETS, HSAModel

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "kernels" / "bench"))  # as `python kernels/bench` does
    spec = importlib.util.spec_from_file_location(
        "bench_main", ROOT / "kernels" / "bench" / "__main__.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_measured_and_say_what_was_measured(bench, tmp_path, monkeypatch, capfd):
    small = dict(H=4, J=2, D=8, S=4, K=3, R=6, W=8)
    monkeypatch.setattr(
        bench, "CASES", (bench.Case(T=32, N=8, B=2, **small), bench.Case(T=5, N=300, **small))
    )
    monkeypatch.setattr("timing.SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    assert bench.main(["--device", "cpu"]) == 0
    result = json.loads(Path("out/bench.json").read_text())
    assert {"hardware", "versions", "commit", "command", "seed", "rows"} == result.keys()
    kinds = [(row["op"], row["pass"], row["B"], row["T"], row["N"]) for row in result["rows"]]
    assert len(kinds) == len(set(kinds)) == 11
    assert {op for op, *_ in kinds} == {
        "retrieve",
        "chunk_attention",
        "sliding_window_attention",
        "decode",
    }
    for row in result["rows"]:
        assert (
            row["ms"] > 0
            and row["peak_bytes"] is None
            and (row["choices"], row["dtype"]) == ("random", "float32")
        )
        assert all(row[name] == size for name, size in small.items())
    out, _ = capfd.readouterr()
    assert out.count("float32") == 11 and "written to out/bench.json" in out


def test_a_whole_model_is_measured(bench, tmp_path, monkeypatch, capfd):
    """The sizes of a processor; near, long and longest differ, so that what is divided by what
    shows.
    """
    for name, value in dict(NEAR=300, LONG=900, LONGEST=1500, WARM=2, DECODED=6).items():
        monkeypatch.setattr(f"of_model.{name}", value)
    seconds = iter(range(1, 1000))
    monkeypatch.setattr("of_training.TOKENS", 96)
    # Every stretch takes two seconds more.
    monkeypatch.setattr("of_model.waited", lambda device: next(seconds) ** 2)
    monkeypatch.chdir(tmp_path)
    assert bench.main(["--device", "cpu", "--model", "debug"]) == 0
    result = json.loads(Path("out/bench.json").read_text())
    assert {"hardware", "versions", "commit", "command", "seed", "preset", "tokens"} < result.keys()
    # stretches: 64k twice, each read and decoded; 1m; 16m and decoding; 16m and decoding with K and
    # V in host memory
    lasted = [(2 * i + 2) ** 2 - (2 * i + 1) ** 2 for i in range(9)]
    assert (result["prefill_1m_seconds"], result["prefill_16m_seconds"]) == (lasted[4], lasted[5])
    assert result["prefill_16m_over_1m_per_token"] == pytest.approx(
        lasted[5] / 1500 / (lasted[4] / 900)
    )
    assert result["decode_64k_tokens_per_second"] == pytest.approx(6 / lasted[3])
    assert result["decode_16m_over_64k"] == pytest.approx(lasted[6] / lasted[3])
    assert result["offload_slowdown"] == pytest.approx(lasted[8] / lasted[6])
    bound = result["decode_64k_roofline_share"] * result["copy_bytes_per_second"] * lasted[3] / 6
    assert bound == pytest.approx(decode_bytes("debug", 300), rel=1e-9)
    assert {
        "train_16k_tokens_per_second",
        "train_16k_mfu",
        "train_16k_full_attention_tokens_per_second",
    } < result.keys()
    assert result["train_16k_peak_bytes"] is None and result["train_tokens"] == 96
    assert (
        result["offload_16m_device_bytes"] is None
        and "decode_16m_over_64k" in capfd.readouterr().out
    )


def test_a_step_that_computes_blocks_again_trains_as_a_plain_one(bench, monkeypatch):
    import of_training

    monkeypatch.setattr(of_training, "PREDICTED", 7)
    config = replace(PRESETS["debug"], experts=4, experts_active=2, expert_width=16)
    ids = torch.randint(512, (1, 41), generator=torch.Generator().manual_seed(0))
    models = []
    for again in (False, True):
        torch.manual_seed(0)
        models.append(HSAModel(config).train())
        if again:
            of_training.make_step(models[1], 40)
        torch.manual_seed(1)  # of the exploration noise
        loss = (
            of_training.loss_of(models[-1], ids)
            if again
            else cross_entropy(models[-1](ids[:, :-1]).logits[0], ids[0, 1:])
        )
        loss.backward()
    for (name, want), got in zip(models[0].named_parameters(), models[1].parameters()):
        assert (got.grad - want.grad).abs().max() < 1e-6, name


def test_a_step_lowers_the_loss_of_what_it_trains_on(bench):
    import of_training

    step = of_training.make_step(HSAModel(PRESETS["debug"]).train(), 40)
    losses = [step().item() for _ in range(12)]
    assert losses[-1] < losses[0] - 0.01 and losses == sorted(losses, reverse=True)


def decode_bytes(preset: str, tokens: int) -> int:
    """By hand, in float32.

    It is all weights but the encoder's, four windows of 7, and landmarks and 2 chunks for each of 2
    layers.
    """
    model, c = HSAModel(PRESETS[preset]), PRESETS[preset]
    weights = sum(
        p.numel() for name, p in model.named_parameters() if not name.startswith("encoder")
    )
    windows = (c.lower_layers + c.upper_layers) * (c.window - 1) * 2 * c.kv_heads * c.head_dim
    landmarks = tokens // c.chunk_size * c.retrieval_heads * c.retrieval_dim
    chosen = c.top_k * c.chunk_size * 2 * c.hsa_kv_heads * c.hsa_head_dim
    return 4 * (weights + windows + c.groups * (landmarks + chosen))


def test_every_token_chooses_different_chunks(bench):
    indices = bench.inputs(bench.Case(T=300, N=20, K=8), torch.device("cpu"))["indices"]
    assert indices.shape == (1, 300, 1, 8) and indices.min() >= 0 and indices.max() < 20
    assert all(len(set(row)) == 8 for row in indices[0, :, 0].tolist())


def test_pictures_are_drawn_from_the_stored_measurements(bench, tmp_path):
    stored = json.loads((ROOT / "data/results/kernels.json").read_text())
    paths = bench.draw(stored, tmp_path)
    assert [path.name for path in paths] == ["kernels_crossover.png", "kernels_roofline.png"]
    for path in paths:
        assert (
            path.read_bytes().startswith(b"\x89PNG")
            and (ROOT / "data/results" / path.name).exists()
        )


@pytest.mark.parametrize(
    "words, message",
    [
        (["--device", "x"], "--device: got 'x'"),
        (["--out", "."], "--out: got ."),
        (["--model", "big"], "--model: got 'big', accepted are debug"),
        (["--peers", "--device", "cpu"], "--peers: got the device cpu, accepted is a GPU"),
        (["--peers", "--model", "debug"], "--peers: got --model too"),
        (["--fsa", "x"], "--fsa: got x, accepted only with --peers"),
    ],
)
def test_wrong_input_is_one_line(bench, capfd, words, message):
    with pytest.raises(SystemExit) as stop:
        bench.main(words)
    out, err = capfd.readouterr()
    assert (
        stop.value.code == 2
        and out == ""
        and err.startswith(f"kernels/bench: error: {message}")
        and err.count("\n") == 1
    )


def test_a_training_step_moves_the_biases_of_experts(bench):
    import of_training

    config = replace(PRESETS["debug"], experts=4, experts_active=2, expert_width=16)
    model = HSAModel(config).train()
    of_training.make_step(model, 40)()
    assert all(block.mlp.bias.any() for block in model.upper)


def test_a_text_that_two_processes_read_is_timed_beside_one(bench, tmp_path, capfd):
    import of_prefill

    out = tmp_path / "scale.json"
    out.write_text('{"other": 1}')
    words = ["debug", "--tokens", "20000", "--device", "cpu", "--out", str(out)]
    assert of_prefill.main(words) == 0
    entries = json.loads(out.read_text())
    assert entries.keys() == {"other", "prefill_debug"}
    result = entries["prefill_debug"]
    assert {"hardware", "versions", "commit", "command", "preset", "dtype"} < result.keys()
    assert result["same_bits"] and result["largest_difference"] == 0
    assert result["speedup"] == result["seconds_of_one"] / result["seconds"]
    # Twenty segments, and one that the second process reads again, shared evenly.
    assert (result["tokens"], result["tokens_of_first_part"]) == (20000, 10 * 1024)
    assert f"written to {out}" in capfd.readouterr().out
    with pytest.raises(SystemExit) as stop:
        of_prefill.main(["big", "--device", "cpu", "--out", str(out)])
    assert stop.value.code == 2 and capfd.readouterr().err.count("\n") == 1


def peer_inputs(T: int, J: int, S: int = 16):
    """float32 inputs of 5 slots of T/16 chunks that lie before the token, -1 where there are
    fewer.
    """
    from peers import Inputs

    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(1, T, J, T // S, generator=generator)
    hidden = (torch.arange(T // S) + 1) * S > torch.arange(T)[:, None, None]
    best, indices = drawn.masked_fill(hidden, -1.0).topk(5, dim=-1)
    indices = indices.int().masked_fill(best < 0, -1)
    weights = torch.rand(indices.shape, generator=generator).masked_fill(indices < 0, 0.0)
    q, k, v = (torch.randn(1, T, heads, 8, generator=generator) for heads in (J * 2, J, J))
    return Inputs(q, k, v, indices, weights, S)


def by_hand(kind: str, inputs) -> torch.Tensor:
    """Token by token and head by head, over the list of keys, in float64."""
    q, k, v = (x[0].double() for x in inputs[:3])
    out = torch.zeros_like(q)
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            j = h // (q.shape[1] // k.shape[1])
            slots = inputs.indices[0, t, j].tolist()
            chunks = [range(c * inputs.S, (c + 1) * inputs.S) for c in slots if c >= 0]
            lists = {
                "hsa": chunks,
                "selected": [[key for keys in chunks for key in keys]],
                "full": [[*range(t + 1)]],
            }
            shares = inputs.weights[0, t, j].double() if kind == "hsa" else torch.ones(1)
            for keys, share in zip(lists[kind], shares):
                keys = list(keys)
                inside = (k[keys, j] @ q[t, h] / 8**0.5).softmax(0)
                out[t, h] += share * (inside @ v[keys, j])
    return out[None]


FILES_OF_PEERS = {  # the layouts of the originals, on the formula above
    "hsa.py": """
from test_bench import by_hand
from peers import Inputs
def HSA(q, k, v, weights, indices, dropout, S, mask):
    assert indices.min() >= 0 and (dropout, mask) == (0.0, None)
    return by_hand("hsa", Inputs(q, k, v, indices, weights, S)).to(q.dtype)
""",
    "nsa_ref/__init__.py": "raise ImportError('what this package needs is not there')",
    "nsa_ref/ops/__init__.py": "raise ImportError('neither here')",
    "nsa_ref/ops/topk_sparse_attention.py": """
from test_bench import by_hand
from peers import Inputs
def topk_sparse_attention(q, k, v, indices, S, lengths):
    assert lengths.tolist() == [0, len(q)] and indices.shape[:2] == (k.shape[1], len(q))
    indices = indices.transpose(0, 1)[None]
    return by_hand("selected", Inputs(q[None], k[None], v[None], indices, None, S))[0].to(q.dtype)
""",
}


@pytest.fixture
def copies(bench, tmp_path, monkeypatch):
    """A folder with stand-ins for the user's copies."""
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    monkeypatch.setitem(sys.modules, "test_bench", sys.modules[__name__])
    for name, text in FILES_OF_PEERS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    yield tmp_path
    for name in [
        name for name in sys.modules if name.split(".")[0] in ("nsa_ref", "published_hsa")
    ]:
        del sys.modules[name]


@pytest.mark.parametrize("kind", ["hsa", "selected", "full"])
@pytest.mark.parametrize("J", [1, 2])
def test_what_peers_should_return_is_what_a_loop_over_keys_gives(bench, kind, J):
    from of_peers import expected

    inputs = peer_inputs(96, J)
    assert (expected(kind, inputs, 64) - by_hand(kind, inputs)[:, -64:]).abs().max() < 1e-12


def test_peers_get_the_layouts_they_know_and_are_compared(bench, copies, monkeypatch):
    """Stand-ins for the user's copies and for packages; the kernel's place takes PyTorch's."""
    import of_peers
    from peers import Inputs, find_peers

    from hsa_mini.ops import torch_backend

    def selected(q, k, v, *, block_indices, block_counts, block_size):
        assert block_indices.dtype == torch.int64 and block_counts == 5
        return by_hand("selected", Inputs(q, k, v, block_indices, None, block_size)).to(q.dtype)

    flash = SimpleNamespace(
        flash_attn_func=lambda q, k, v, causal: (
            by_hand("full", Inputs(q, k, v, torch.full((1, 96, 2, 0), 0), None, 16)).to(q.dtype),
            None,
        )
    )
    nsa = SimpleNamespace(parallel_nsa=selected)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", flash)
    monkeypatch.setitem(sys.modules, "fla.ops.nsa.parallel", nsa)
    monkeypatch.setattr("hsa_kernels.chunk_attention", torch_backend.chunk_attention)
    monkeypatch.setattr("timing.SECONDS", 0.0)
    peers, missing = find_peers(copies / "hsa.py", copies)
    assert missing == []
    # cuDNN and FlashAttention-2 of PyTorch need a GPU.
    peers = [peer for peer in peers if peer.name not in ("cuDNN", "FlashAttention-2")]
    inputs = peer_inputs(96, 2)
    rows = {peer.name: of_peers.peer_row(peer, inputs) for peer in peers}
    assert len(rows) == 5
    for row in rows.values():
        assert row["failed"] is None and row["error"] < 1e-6, row
        assert row["forward_ms"] > 0 and row["forward_backward_ms"] > 0
    chosen = int((inputs.indices >= 0).sum())
    assert rows["hsa-mini"]["pairs"] == chosen * 2 * 16
    assert rows["published HSA"]["pairs"] == inputs.indices.numel() * 2 * 16
    assert rows["FlashAttention-3"]["pairs"] == 4 * 96 * 97 // 2


def test_a_wrong_and_a_failing_peer_are_named_and_not_timed(bench):
    from of_peers import peer_row
    from peers import Peer

    inputs = peer_inputs(96, 1)
    wrong = peer_row(Peer("x", "full", lambda inputs: inputs.q), inputs)
    assert wrong["forward_ms"] is None and wrong["failed"].startswith("error ")

    def fail(inputs):
        raise RuntimeError("no kernel\nfor this card")

    assert peer_row(Peer("y", "hsa", fail), inputs)["failed"] == "RuntimeError: no kernel"


def test_missing_peers_are_named(bench, monkeypatch):
    from peers import find_peers

    for name in ("flash_attn_interface", "fla"):
        monkeypatch.setitem(sys.modules, name, None)
    peers, missing = find_peers(None, None)
    assert [peer.name for peer in peers] == ["hsa-mini", "cuDNN", "FlashAttention-2"]
    assert missing == [
        "FlashAttention-3 (flash_attn_interface)",
        "NSA (pip install fla-core)",
        "published HSA (--published-hsa FILE)",
        "NSA reference of FSA (--fsa FOLDER)",
    ]


def test_a_copy_that_is_something_else_is_refused(bench, tmp_path):
    from peers import find_peers

    path = tmp_path / "x.py"
    path.write_text("A = 1")
    with pytest.raises(ValueError, match="--published-hsa: got .*, accepted is what defines HSA"):
        find_peers(path, None)
    with pytest.raises(ValueError, match="--fsa: got .*, accepted is what defines topk_sparse"):
        find_peers(None, tmp_path)
