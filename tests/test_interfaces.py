"""The signatures that must not drift, and the error of every wrong argument.

Dimensions: B=2 batch, T=3 tokens, H=4 query heads, J=2 key/value heads, D=8 head dimension, R=6
retrieval dimension, N=5 chunks, S=4 chunk size, K=3 kept.
"""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import random

from hsa_mini import ops, reference
from hsa_mini.ops import torch_backend

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    )
}


def retrieve(
    retrieval_q, landmarks, *, chunk_size, top_k, offset=0, weighting="softmax", gumbel_seed=None,
    exclude_window=0,
    query_block=1, document_starts=None,
): ...  # fmt: skip


def chunk_attention(q, k, v, indices, weights, *, scale=None): ...


def decode(retrieval_q, landmarks, q, k, v, *, chunk_size, top_k, offset, scale=None): ...


def sliding_window_attention(q, k, v, *, window, document_starts=None): ...


PROMISED = (retrieve, chunk_attention, decode, sliding_window_attention)


SIGNATURES = [
    *(("hsa_mini.reference", promised) for promised in PROMISED),
    *(("hsa_mini.ops", promised) for promised in PROMISED),
    # no kernel of its own for the sliding window: PyTorch's FlexAttention serves there
    *(("hsa_kernels", promised) for promised in (retrieve, chunk_attention, decode)),
]
# Operations without a twin in the reference: the kernel is compared with the torch backend.
TWINS = ["grouped_experts", "update_window_cache", "window_decode_attention"]


def parameters(function) -> list[tuple]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(
    "module, promised", SIGNATURES, ids=lambda x: x if isinstance(x, str) else x.__name__
)
def test_signature(module, promised):
    function = getattr(importlib.import_module(module), promised.__name__)
    assert parameters(function) == parameters(promised)


@pytest.mark.parametrize("name", TWINS)
def test_signature_of_a_twin(name):
    want = parameters(getattr(torch_backend, name))
    for module in ("hsa_mini.ops", "hsa_kernels"):
        assert parameters(getattr(importlib.import_module(module), name)) == want, module


def test_every_dispatch_has_one_signature():
    want = parameters(reference.dispatch)
    for module in ("hsa_mini.ops", "hsa_kernels"):
        assert parameters(importlib.import_module(module).dispatch) == want, module


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh Python has loaded after `statement`."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_kernels_load_the_reference_and_no_model():
    loaded = {name for name in loaded_by("import hsa_kernels") if name.startswith("hsa_mini")}
    assert "hsa_mini.reference" in loaded
    loaded -= {"hsa_mini", "hsa_mini.checks"}
    assert all(f"{name}.".startswith("hsa_mini.reference.") for name in loaded)


def test_importing_hsa_mini_loads_neither_triton_nor_matplotlib_nor_jupyter():
    loaded = {name.partition(".")[0] for name in loaded_by("import hsa_mini")}
    assert "hsa_mini" in loaded
    assert not loaded & {
        "triton",
        "matplotlib",
        "jupyterlab",
        "jupyter_core",
        "IPython",
        "ipywidgets",
    }


def test_departures_from_the_paper_are_marked():
    sources = (ROOT / "hsa_mini").rglob("*.py")
    marked = [
        path for path in sources if "NOTE: differs from the paper because" in path.read_text()
    ]
    assert ROOT / "hsa_mini" / "reference" / "retrieval.py" in marked


def arguments(operation: str) -> dict:
    """Right arguments, which every row of the tables below makes wrong in one place."""
    retrieval = dict(retrieval_q=random(2, 3, 2, 6), landmarks=random(2, 5, 2, 6))
    attention = dict(q=random(2, 3, 4, 8), k=random(2, 5, 4, 2, 8), v=random(2, 5, 4, 2, 8))
    if operation == "retrieve":
        return retrieval | dict(chunk_size=4, top_k=3)
    if operation == "chunk_attention":
        return attention | dict(
            indices=torch.zeros(2, 3, 2, 3, dtype=torch.int32), weights=random(2, 3, 2, 3)
        )
    if operation == "decode":
        one = dict(retrieval_q=random(2, 1, 2, 6), q=random(2, 1, 4, 8))
        return retrieval | attention | one | dict(chunk_size=4, top_k=3, offset=20)
    return dict(q=random(2, 3, 4, 8), k=random(2, 7, 2, 8), v=random(2, 7, 2, 8), window=4)


@pytest.mark.parametrize("operation", [f.__name__ for f in PROMISED])
def test_right_arguments_are_taken(operation):
    for module in (reference, ops):
        getattr(module, operation)(**arguments(operation))


META = torch.device("meta")
WRONG = {  # argument, what is given, what the message says was given, what it says is accepted
    "retrieve": [
        ("retrieval_q", None, "NoneType", "[B, T, J, R]"),
        ("retrieval_q", random(3, 2, 6), "[3, 2, 6]", "[B, T, J, R]"),
        ("retrieval_q", torch.zeros(2, 3, 2, 6, dtype=torch.int64), "int64", "float32"),
        ("landmarks", random(2, 5, 2, 6).tolist(), "list", "[B, N, J, R]"),
        ("landmarks", random(5, 2, 6), "[5, 2, 6]", "[B, N, J, R]"),
        ("landmarks", random(1, 5, 2, 6), "[1, 5, 2, 6]", "B=2"),
        ("landmarks", random(2, 5, 1, 6), "[2, 5, 1, 6]", "J=2"),
        ("landmarks", random(2, 5, 2, 7), "[2, 5, 2, 7]", "R=6"),
        ("landmarks", random(2, 5, 2, 6).float(), "float32", "float64"),
        ("landmarks", random(2, 5, 2, 6).to(META), "meta", "cpu"),
        ("chunk_size", 0, "0", "integer of at least 1"),
        ("chunk_size", 4.0, "4.0", "integer of at least 1"),
        ("top_k", 0, "0", "integer of at least 1"),
        ("top_k", True, "True", "integer of at least 1"),
        ("offset", -1, "-1", "integer of at least 0"),
        ("offset", 1.5, "1.5", "integer of at least 0"),
        ("offset", torch.zeros(3, dtype=torch.int64), "[3]", "B=2"),
        ("offset", torch.tensor(3), "[]", "[B]"),
        ("offset", torch.zeros(2), "float32", "int32, int64"),
        ("offset", torch.zeros(2, dtype=torch.int64, device=META), "meta", "cpu"),
        ("weighting", "sigmoid", "'sigmoid'", "softmax and stick_breaking"),
        ("gumbel_seed", -1, "-1", "integer of at least 0"),
        ("gumbel_seed", 0.5, "0.5", "integer of at least 0"),
        ("exclude_window", -1, "-1", "integer of at least 0"),
        ("query_block", 0, "0", "integer of at least 1"),
        ("document_starts", [0, 0, 0], "list", "[B, T]"),
        ("document_starts", torch.zeros(2, 4, dtype=torch.int32), "[2, 4]", "T=3"),
        ("document_starts", torch.zeros(2, 3), "float32", "int32, int64"),
        ("document_starts", torch.zeros(2, 3, dtype=torch.int32, device=META), "meta", "cpu"),
    ],
    "chunk_attention": [
        ("q", random(2, 3, 32), "[2, 3, 32]", "[B, T, H, D]"),
        ("q", random(2, 3, 3, 8), "3 heads", "multiples of the 2"),
        ("q", torch.zeros(2, 3, 4, 8, dtype=torch.int32), "int32", "float32"),
        ("k", random(2, 5, 4, 8), "[2, 5, 4, 8]", "[B, N, S, J, D]"),
        ("k", random(2, 5, 4, 2, 9), "[2, 5, 4, 2, 9]", "D=8"),
        ("k", random(2, 5, 4, 2, 8).half(), "float16", "float64"),
        ("v", random(2, 6, 4, 2, 8), "[2, 6, 4, 2, 8]", "N=5"),
        ("v", random(2, 5, 5, 2, 8), "[2, 5, 5, 2, 8]", "S=4"),
        ("v", random(2, 5, 4, 2, 8).float(), "float32", "float64"),
        ("indices", random(2, 3, 2, 3), "float64", "int32, int64"),
        ("indices", torch.zeros(2, 4, 2, 3, dtype=torch.int32), "[2, 4, 2, 3]", "T=3"),
        ("indices", torch.zeros(2, 3, 1, 3, dtype=torch.int32), "[2, 3, 1, 3]", "J=2"),
        ("indices", torch.zeros(2, 3, 2, 3, dtype=torch.int32, device=META), "meta", "cpu"),
        ("weights", random(2, 3, 2, 4), "[2, 3, 2, 4]", "K=3"),
        ("weights", random(2, 3, 2, 3).bfloat16(), "bfloat16", "float32, float64"),
    ],
    "decode": [
        ("retrieval_q", None, "NoneType", "[B, 1, J, R]"),
        ("retrieval_q", random(2, 3, 2, 6), "[2, 3, 2, 6]", "[B, 1, J, R]"),
        ("landmarks", random(2, 5, 2, 7), "[2, 5, 2, 7]", "R=6"),
        ("q", random(2, 2, 4, 8), "[2, 2, 4, 8]", "[B, 1, H, D]"),
        ("k", random(2, 5, 4, 2, 9), "[2, 5, 4, 2, 9]", "D=8"),
        ("k", random(2, 6, 4, 2, 8), "[2, 6, 4, 2, 8]", "N=5"),
        ("k", random(2, 5, 8, 2, 8), "[2, 5, 8, 2, 8]", "S=4"),
        ("v", random(2, 5, 4, 1, 8), "[2, 5, 4, 1, 8]", "J=2"),
        ("chunk_size", 0, "0", "integer of at least 1"),
        ("top_k", -3, "-3", "integer of at least 1"),
        ("offset", -1, "-1", "integer of at least 0"),
    ],
    "sliding_window_attention": [
        ("q", random(3, 4, 8), "[3, 4, 8]", "[B, T, H, D]"),
        ("q", random(2, 3, 3, 8), "3 heads", "multiples of the 2"),
        ("k", random(1, 7, 2, 8), "[1, 7, 2, 8]", "B=2"),
        ("k", random(2, 7, 2, 8).float(), "float32", "float64"),
        ("v", random(2, 6, 2, 8), "[2, 6, 2, 8]", "P+T=7"),
        ("v", random(2, 7, 2, 8).to(META), "meta", "cpu"),
        ("window", 0, "0", "integer of at least 1"),
        ("window", 2.5, "2.5", "integer of at least 1"),
        ("document_starts", torch.zeros(1, 3, dtype=torch.int64), "[1, 3]", "B=2"),
        ("document_starts", torch.zeros(2, 3).bool(), "bool", "int32, int64"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("module", [reference, ops], ids=["reference", "ops"])
@pytest.mark.parametrize(
    "operation, name, value, given, accepted", [(op, *row) for op,
    rows in WRONG.items() for row in rows],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_a_wrong_argument_is_refused_by_name(module, operation, name, value, given, accepted):
    with pytest.raises(ValueError) as caught:
        getattr(module, operation)(**arguments(operation) | {name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}: got "), message
    assert "\n" not in message
    got, _, takes = message.partition("accepted ")
    assert given in got and accepted in takes, message


def test_fewer_keys_than_tokens_are_refused():
    short = dict(k=random(2, 2, 2, 8), v=random(2, 2, 2, 8))
    for function in (reference.sliding_window_attention, torch_backend.sliding_window_attention):
        with pytest.raises(
            ValueError, match=r"^k: got 2 keys, accepted are at least the 3 tokens of q"
        ):
            function(**arguments("sliding_window_attention") | short)


def test_a_size_that_is_written_as_a_number_is_named_once():
    """`accepted is [B, 1, J, R]` says it already; "with 1=1" would be odd."""
    with pytest.raises(ValueError, match=r"accepted is \[B, 1, J, R\]$"):
        reference.decode(**arguments("decode") | {"retrieval_q": random(2, 3, 2, 6)})
