"""Checks of the arguments of the operations.

An error is one line: what was given, and what is accepted. Shapes, dtypes and devices are
checked. Values of tensors are never read.
"""

import torch

from hsa_mini.checks import check_integer, quoted

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(
    name: str, tensor: torch.Tensor, shape: str, sizes: dict[str, int], dtypes: tuple = FLOATS
) -> None:
    """Check `tensor` against a shape such as "B T J R".

    `sizes` holds the size of every letter seen so far; new letters are added.
    """
    letters = shape.split()
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(
            f"{name}: got {type(tensor).__name__}, accepted is a tensor [{', '.join(letters)}]"
        )
    if tensor.dim() != len(letters):
        raise ValueError(
            f"{name}: got shape {list(tensor.shape)}, accepted is [{', '.join(letters)}]"
        )
    for letter, size in zip(letters, tensor.shape):
        if sizes.setdefault(letter, size) != size:
            known = "" if letter.isdigit() else f" with {letter}={sizes[letter]}"
            raise ValueError(
                f"{name}: got shape {list(tensor.shape)}, accepted is [{', '.join(letters)}]{known}"
            )
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: got {tensor.dtype}, accepted are {names}")


def check_same(
    name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor, *, dtype: bool = True
) -> None:
    """Check that two tensors have the same device and, unless `dtype` is False, the same dtype."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name}: got device {tensor.device}, accepted is that of {other_name} ({other.device})"
        )
    if dtype and tensor.dtype != other.dtype:
        raise ValueError(
            f"{name}: got {tensor.dtype}, accepted is that of {other_name} ({other.dtype})"
        )


def check_retrieve(
    retrieval_q,
    landmarks,
    chunk_size,
    top_k,
    offset,
    weighting,
    gumbel_seed,
    exclude_window,
    query_block,
    document_starts=None,
) -> None:
    """The arguments of `retrieve`."""
    sizes: dict[str, int] = {}
    check_tensor("retrieval_q", retrieval_q, "B T J R", sizes)
    check_tensor("landmarks", landmarks, "B N J R", sizes)
    check_same("landmarks", landmarks, "retrieval_q", retrieval_q)
    for name, value, minimum in (
        ("chunk_size", chunk_size, 1),
        ("top_k", top_k, 1),
        ("exclude_window", exclude_window, 0),
        ("query_block", query_block, 1),
    ):
        check_integer(name, value, minimum)
    if isinstance(offset, torch.Tensor):
        check_tensor("offset", offset, "B", sizes, (torch.int32, torch.int64))
        check_same("offset", offset, "retrieval_q", retrieval_q, dtype=False)
    else:
        check_integer("offset", offset, 0)
    if weighting not in ("softmax", "stick_breaking"):
        raise ValueError(
            f"weighting: got {quoted(weighting)}, accepted are softmax and stick_breaking"
        )
    if isinstance(gumbel_seed, torch.Tensor):
        check_tensor("gumbel_seed", gumbel_seed, "", sizes, (torch.int64,))
        check_same("gumbel_seed", gumbel_seed, "retrieval_q", retrieval_q, dtype=False)
    elif gumbel_seed is not None:
        check_integer("gumbel_seed", gumbel_seed, 0)
    check_document_starts(document_starts, "retrieval_q", retrieval_q, sizes)


def check_chunk_attention(q, k, v, indices, weights) -> None:
    """The arguments of `chunk_attention`."""
    sizes: dict[str, int] = {}
    check_tensor("q", q, "B T H D", sizes)
    check_tensor("k", k, "B N S J D", sizes)
    check_tensor("v", v, "B N S J D", sizes)
    check_tensor("indices", indices, "B T J K", sizes, (torch.int32, torch.int64))
    check_tensor("weights", weights, "B T J K", sizes, (torch.float32, torch.float64))
    check_same("k", k, "q", q)
    check_same("v", v, "q", q)
    check_same("indices", indices, "q", q, dtype=False)
    check_same("weights", weights, "q", q, dtype=False)
    check_heads(sizes["H"], sizes["J"])


def check_decode(retrieval_q, landmarks, q, k, v, chunk_size) -> None:
    """What `decode` requires beyond its parts: one token, and sizes that agree."""
    check_integer("chunk_size", chunk_size, 1)
    sizes = {"1": 1, "S": chunk_size}
    check_tensor("retrieval_q", retrieval_q, "B 1 J R", sizes)
    check_tensor("landmarks", landmarks, "B N J R", sizes)
    check_tensor("q", q, "B 1 H D", sizes)
    check_tensor("k", k, "B N S J D", sizes)
    check_tensor("v", v, "B N S J D", sizes)


def check_document_starts(document_starts, name, other, sizes: dict[str, int]) -> None:
    """Document starts [B, T], or None, for `other`, the argument `name`, of B and T in `sizes`."""
    if document_starts is not None:
        check_tensor("document_starts", document_starts, "B T", sizes, (torch.int32, torch.int64))
        check_same("document_starts", document_starts, name, other, dtype=False)


def check_heads(heads: int, kv_heads: int) -> None:
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"q: got {heads} heads, accepted are multiples of the {kv_heads} heads of k and v"
        )


def check_sliding_window(q, k, v, window, document_starts=None) -> None:
    """The arguments of `sliding_window_attention`."""
    sizes: dict[str, int] = {}
    check_tensor("q", q, "B T H D", sizes)
    check_tensor("k", k, "B P+T J D", sizes)
    check_tensor("v", v, "B P+T J D", sizes)
    check_same("k", k, "q", q)
    check_same("v", v, "q", q)
    check_integer("window", window, 1)
    check_heads(sizes["H"], sizes["J"])
    if sizes["P+T"] < sizes["T"]:
        raise ValueError(
            f"k: got {sizes['P+T']} keys, accepted are at least the {sizes['T']} tokens of q"
        )
    check_document_starts(document_starts, "q", q, sizes)


def check_window_decode(q, k, v, positions) -> None:
    """The arguments of `window_decode_attention`."""
    sizes: dict[str, int] = {"1": 1}
    check_tensor("q", q, "B 1 H D", sizes)
    check_tensor("k", k, "B W J D", sizes)
    check_tensor("v", v, "B W J D", sizes)
    check_tensor("positions", positions, "B", sizes, (torch.int64,))
    check_same("k", k, "q", q)
    check_same("v", v, "q", q)
    check_same("positions", positions, "q", q, dtype=False)
    check_heads(sizes["H"], sizes["J"])


def check_update_window_cache(q, k, v, cache_k, cache_v, slots) -> None:
    """The arguments of `update_window_cache` that change from token to token."""
    sizes: dict[str, int] = {"1": 1}
    for name, tensor, shape in (
        ("q", q, "B 1 H D"),
        ("k", k, "B 1 J D"),
        ("v", v, "B 1 J D"),
        ("cache_k", cache_k, "B W J D"),
        ("cache_v", cache_v, "B W J D"),
    ):
        check_tensor(name, tensor, shape, sizes)
        check_same(name, tensor, "q", q)
    check_tensor("slots", slots, "B", sizes, (torch.int64,))
    check_same("slots", slots, "q", q, dtype=False)
