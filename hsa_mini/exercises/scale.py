"""The exercises of notebook 14: how many GPUs, which bytes, and how many tokens hide them.

Dimensions: T tokens of a sequence, which is cut into `parts`, W window.
"""

import math

from hsa_mini.exercises.check import Check


def _gpus_needed(parameters, memory, kept, *, bytes_each=16, power=True) -> int:
    least = math.ceil(parameters * bytes_each / (memory - kept))
    return 1 << (least - 1).bit_length() if power else least


check_gpus_needed = Check(
    name="gpus_needed",
    answer=_gpus_needed,
    examples=(
        (1000, 16_000, 0),
        (8 * 10**9, 80 * 10**9, 20 * 10**9),
        (8 * 10**9, 80 * 10**9, 48 * 10**9),
        (70 * 10**9, 80 * 10**9, 10 * 10**9),
        (540 * 10**6, 24 * 10**9, 4 * 10**9),
        (40 * 10**9, 80 * 10**9, 16 * 10**9),
    ),
    usual_mistakes={
        "Adam keeps two averages for each weight, not one.": lambda *sizes: _gpus_needed(
            *sizes, bytes_each=12
        ),
        "you counted bfloat16. The shares are float32: 4 bytes for each number.": lambda *sizes: (
            _gpus_needed(*sizes, bytes_each=8)
        ),
        "you counted weights alone. Training keeps a gradient and two averages besides.": (
            lambda *sizes: _gpus_needed(*sizes, bytes_each=4)
        ),
        "activations take memory on every GPU. Subtract `kept` from its memory first.": (
            lambda parameters, memory, kept: _gpus_needed(parameters, memory, 0)
        ),
        "the number of GPUs should be a power of two.": lambda *sizes: _gpus_needed(
            *sizes, power=False
        ),
    },
)


def _share_of_full(
    T, parts, W, layers, key_bytes, memory_bytes, *, halo=1, own=0, once=False
) -> float:
    """halo: tokens that the window does not need. own: 1 counts the own part too. once: the halo is
    fetched in one block only.
    """
    others = T * (parts - 1 + own) / parts
    border = min(W - halo, T * (parts - 1) / parts) * key_bytes * (1 if once else layers)
    return (border + others * memory_bytes) / (T * (parts - 1) / parts * key_bytes * layers)


check_share_of_full = Check(
    name="share_of_full",
    answer=_share_of_full,
    examples=(
        (64, 2, 9, 1, 4, 2),
        (1 << 14, 8, 4096, 28, 2048, 516),
        (1 << 20, 8, 4096, 28, 2048, 516),
        (256, 4, 1000, 6, 64, 36),
    ),
    usual_mistakes={
        "a token is one of its W tokens, so only W - 1 lie in front of a part.": (
            lambda *sizes: _share_of_full(*sizes, halo=0)
        ),
        "a process has its own part of the memory already.": lambda *sizes: _share_of_full(
            *sizes, own=1
        ),
        "every block has a window of its own: the halo travels once for each of the layers.": (
            lambda *sizes: _share_of_full(*sizes, once=True)
        ),
        "each block of full attention has keys and values of its own. You counted one block.": (
            lambda T, parts, W, layers, *sizes: _share_of_full(T, parts, W, layers, *sizes) * layers
        ),
        "you left out the halo of the windows.": lambda T, parts, W, *sizes: _share_of_full(
            T, parts, 1, *sizes
        ),
        "you left out the memory that all HSA layers share.": (
            lambda T, parts, W, layers, key_bytes, memory_bytes: _share_of_full(
                T, parts, W, layers, key_bytes, 0
            )
        ),
        "the first part of a short sequence has fewer than W - 1 tokens in front of the others.": (
            lambda T, parts, W, layers, key_bytes, memory_bytes: (
                (W - 1) * layers * key_bytes / (T * (parts - 1) / parts * layers * key_bytes)
                + memory_bytes / (layers * key_bytes)
            )
        ),
    },
)


def _tokens_to_hide(parameters, active, rate, link, *, moved=8, flop=6) -> int:
    return math.ceil(moved * parameters / link / (flop * active / rate))


check_tokens_to_hide = Check(
    name="tokens_to_hide",
    answer=_tokens_to_hide,
    examples=(
        (100, 10, 60, 8),
        (8 * 10**9, 13 * 10**8, 200 * 10**12, 400 * 10**9),
        (8 * 10**9, 8 * 10**9, 300 * 10**12, 50 * 10**9),
        (540 * 10**6, 540 * 10**6, 400 * 10**12, 450 * 10**9),
    ),
    usual_mistakes={
        "6 bytes a weight are too few: it travels twice as bfloat16, then its gradient.": (
            lambda *sizes: _tokens_to_hide(*sizes, moved=6)
        ),
        "gradients travel too, as float32.": lambda *sizes: _tokens_to_hide(*sizes, moved=4),
        "the backward pass computes twice as much as the forward pass: 6 FLOP in all.": (
            lambda *sizes: _tokens_to_hide(*sizes, flop=2)
        ),
        "all parameters travel, but a token computes with the active ones only.": (
            lambda parameters, active, rate, link: _tokens_to_hide(active, active, rate, link)
        ),
    },
)
