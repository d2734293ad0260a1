"""A question and its answer as the canvas takes it: numbers as bytes, and words that can be shown.

The canvas receives this once and then answers to keys and mouse by itself. It is bounded for any
text: columns of several chunks where there are millions of scores, and the
best kept chunks where a layer keeps very many.

Dimensions: T tokens of question and answer, L HSA layers, N chunks, C columns, S chunk size, K
chunks shown, H query heads, J key/value heads.
"""

import codecs
import unicodedata
from collections.abc import Iterable

import numpy as np

from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.viz.retrieval.asking import Asked
from hsa_mini.viz.retrieval.trace import LayerTrace

MAX_SCORES = 1 << 22  # that the canvas receives, of all tokens, layers and heads
MAX_SHOWN = 16  # kept chunks
NEXT = 5  # likeliest next tokens
PICTURES = {0x09: "→", 0x0A: "⏎", 0x0D: "↵", 0x7F: "␡"}
JOINERS = "\u200c\u200d"  # which scripts and emojis need


def make_picture(asked: Asked, chunk_size: int) -> dict:
    """All that the canvas shows of one question.

    Of each layer, float32 (int32 for `indices`) little-endian: scores [T, J, C], the best one in
    each column; indices, weights [T, J, K] of the kept chunks, the heaviest first; attention [T, H,
    K, S]; `others` [T, J], the weight of the kept chunks that are not shown; `kept_share` and
    `other_share` [T, J], how the softmax over all visible chunks is divided between the chunks that
    the layer keeps and all others. Of each token, `next`: the five likeliest next tokens and their
    shares, and the share of all others.
    """
    ids = asked.ids
    text = asked.text
    N = asked.trace.layers[0].scores.shape[2]
    scores = sum(layer.scores.size for layer in asked.trace.layers)
    width = min(-(-scores // MAX_SCORES), N)
    layers = [_layer(layer, width) for layer in asked.trace.layers]
    chosen, shares, rest = likeliest(asked.trace.logits)
    kept = {int(i) for layer in layers for i in np.unique(layer["indices"]) if i >= 0}
    everything = [*text.ids, *ids]
    words = {i: shown_words(everything, i * chunk_size, (i + 1) * chunk_size) for i in kept}
    needle = text.needle_tokens
    return {
        "chunk_size": chunk_size,
        "chunks": N,
        "text_chunks": len(text.ids) // chunk_size,
        "top_k": asked.trace.layers[0].indices.shape[2],
        "width": width,
        "tokens": shown_words(everything, len(text.ids), len(everything)),
        "text_tokens": len(text.ids),
        "answer_tokens": asked.answer_tokens,
        "answer": shown(asked.answer),
        "correct": asked.correct,
        "verdict": asked.verdict,
        "marks": asked.marks,
        "needle": [needle.start, needle.stop],
        "words": words,
        "next": {
            "words": [[shown_words([int(i)], 0, 1)[0] for i in row] for row in chosen],
            "shares": shares.astype("<f4").tobytes(),
            "others": rest.astype("<f4").tobytes(),
        },
        "shape": [len(ids), *asked.trace.layers[0].attention.shape[1:2], *layers[0]["shape"]],
        "layers": [{key: _bytes(value) for key, value in layer.items()} for layer in layers],
        "summaries": [
            [summary(asked, token, layer, chunk_size) for layer in range(len(layers))]
            for token in range(len(ids))
        ],
    }


def likeliest(logits: np.ndarray, count: int = NEXT) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """logits [T, V] -> the `count` likeliest tokens [T, count], the first one first, their shares,
    and the share [T] of all others.
    """
    shares = _softmax(logits.astype(np.float64))
    order = np.argsort(-shares, axis=-1, kind="stable")
    best = np.take_along_axis(shares, order, axis=-1)
    return order[:, :count], best[:, :count], best[:, count:].sum(axis=-1)


def shares_of_all(scores: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How a softmax over all visible chunks is divided: the share of the kept ones, and of all
    others, each [T, J]; both 0 where no chunk is visible. scores [T, J, N], indices [T, J, K].
    """
    if not scores.shape[2]:
        return np.zeros(scores.shape[:2]), np.zeros(scores.shape[:2])
    shares = _softmax(scores.astype(np.float64))
    kept = np.zeros(scores.shape[:2])
    for slot in np.moveaxis(indices, -1, 0)[..., None]:  # [T, J, 1]
        at = np.maximum(slot, 0)
        kept += np.where(slot < 0, 0, np.take_along_axis(shares, at, axis=-1))[..., 0]
        np.put_along_axis(shares, at, np.where(slot < 0, np.take_along_axis(shares, at, -1), 0), -1)
    return kept, shares.sum(axis=-1)


def columns(scores: np.ndarray, width: int) -> np.ndarray:
    """scores [..., N] -> [..., C]: the best of every `width` chunks."""
    missing = -scores.shape[-1] % max(width, 1)
    padding = [(0, 0)] * (scores.ndim - 1) + [(0, missing)]
    padded = np.pad(scores, padding, constant_values=-np.inf)
    return padded.reshape(*scores.shape[:-1], -1, max(width, 1)).max(axis=-1)


def shown(text: str) -> str:
    """The text on one line, with control characters visible, and none that changes the direction
    of what stands beside it.
    """
    return "".join(_shown(character) for character in text)


def shown_words(ids: list[int], first: int, last: int) -> list[str]:
    """One text for each of the tokens [first, last). A character whose bytes lie in several tokens
    stands with the last of them.
    """
    begin = max(first - 3, 0)  # UTF-8 has at most four bytes
    pieces = _pieces(ids[begin:last])
    return [shown(piece) for piece in pieces[first - begin :]]


def summary(asked: Asked, token: int, layer: int, chunk_size: int) -> str:
    """What the picture shows of a token in one HSA layer, in words."""
    T = len(asked.ids)
    found = asked.trace.layers[layer]
    N = found.scores.shape[2]
    question = T - asked.answer_tokens
    where = f"token {token + 1} of the question"
    if token >= question:
        where = f"token {token - question + 1} of the answer"
    everything = [*asked.text.ids[-3:], *asked.ids]
    word = shown_words(everything, len(everything) - T + token, len(everything) - T + token + 1)[0]
    chosen, shares, _ = likeliest(asked.trace.logits[token : token + 1], 1)
    following = f'next token "{shown_words([int(chosen[0, 0])], 0, 1)[0]}" ({shares[0, 0]:.3f})'
    begin = f'After "{word}" ({where}), HSA layer {layer} '
    kept = found.indices[token][found.indices[token] >= 0]
    if not len(kept):
        return f"{begin}keeps nothing, because no chunk is complete; {following}."
    weights = np.bincount(kept, found.weights[token][found.indices[token] >= 0], minlength=N) / len(
        found.indices[token]
    )  # the mean over key/value heads
    best = int(weights.argmax())
    needle = asked.text.needle_tokens
    holds = best * chunk_size < needle.stop and needle.start < (best + 1) * chunk_size
    return (
        f"{begin}keeps {len(np.unique(kept))} of {N:,} chunks. Chunk {best:,} has the largest "
        f"weight ({weights[best]:.3f}){' and holds the needle' * holds}; {following}."
    )


def _layer(layer: LayerTrace, width: int) -> dict:
    """One layer, as `make_picture` says, in arrays; `shape`: J, C, K and S."""
    order = np.argsort(-layer.weights, axis=-1, kind="stable")
    first = order[..., :MAX_SHOWN]
    weights = np.take_along_axis(layer.weights, order, axis=-1).astype(np.float64)
    heads = np.arange(layer.attention.shape[1]) * order.shape[1] // layer.attention.shape[1]
    attention = np.take_along_axis(layer.attention, first[:, heads, :, None], axis=2)
    kept, others = shares_of_all(layer.scores, layer.indices)
    scores = columns(layer.scores, width)
    J, K = first.shape[1:]
    return {
        "shape": [J, scores.shape[2], K, attention.shape[3]],
        "scores": scores,
        "indices": np.take_along_axis(layer.indices, first, axis=-1),
        "weights": weights[..., :MAX_SHOWN],
        "others": weights[..., MAX_SHOWN:].sum(axis=-1),
        "attention": attention,
        "kept_share": kept,
        "other_share": others,
    }


def _bytes(value):
    """An array as little-endian bytes of 32-bit numbers."""
    if not isinstance(value, np.ndarray):
        return value
    return value.astype("<i4" if value.dtype.kind == "i" else "<f4").tobytes()


def _softmax(scores: np.ndarray) -> np.ndarray:
    """Along the last axis; 0 where all scores are -inf."""
    highest = scores.max(axis=-1, keepdims=True)
    powers = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    return powers / np.maximum(powers.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)


def _pieces(ids: Iterable[int]) -> list[str]:
    """The text that each token completes."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    tokenizer = load_tokenizer()
    return [
        decoder.decode(tokenizer.decode_single_token_bytes(i))
        if i < tokenizer.n_vocab
        else "\N{REPLACEMENT CHARACTER}"
        for i in ids
    ]


def _shown(character: str) -> str:
    """The character, or what is shown in its place."""
    code = ord(character)
    if code in PICTURES:
        return PICTURES[code]
    if code < 0x20:
        return chr(0x2400 + code)
    if character not in JOINERS and unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp"):
        return f"⟨{code:04X}⟩"
    return character
