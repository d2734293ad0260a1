"""A training step of a whole model on one long sequence, and the same with full attention in every
block.

Weights, gradients and the optimizer's state are bfloat16 on a GPU. Blocks and the head are
recomputed in the backward pass, so that only the input of each block is kept.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from ceilings import PRODUCT, flops_per_second
from timing import measure, peak_bytes

from hsa_mini import PRESETS, HSAModel
from hsa_mini.lab.variants import NO_HSA, WithoutHSA
from hsa_mini.model.cost_estimate import training_flops
from hsa_mini.model.moe import MoE
from hsa_mini.training.loss import mixture_loss_in_pieces
from hsa_mini.training.mixture import TEXT
from hsa_mini.training.trainer import checkpoint_blocks

TOKENS = 1 << 14  # "16k" in the keys of the results
PREDICTED = 2048  # tokens whose logits are held at once


def loss_of(model: HSAModel, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss of ids [B, T+1], with the logits of `PREDICTED` tokens at a time."""
    hidden = model(ids[:, :-1], with_logits=False).logits
    parts = torch.full_like(ids[:, 1:], TEXT)
    return mixture_loss_in_pieces(model.logits, hidden, ids[:, 1:], parts, tokens=PREDICTED)[0]


def make_step(model: HSAModel, tokens: int) -> Callable[[], torch.Tensor]:
    """A function that trains `model` on one random sequence and returns the loss."""
    device = model.norm.weight.device
    ids = torch.randint(
        model.config.vocab_size, (1, tokens + 1), generator=torch.Generator().manual_seed(0)
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    checkpoint_blocks(model)
    mixtures = [layer for layer in model.modules() if isinstance(layer, MoE)]
    for layer in mixtures:
        layer.count_tokens()

    def step() -> torch.Tensor:
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for layer in mixtures:
            layer.update_bias(1e-3)
        return loss.detach()

    return step


def timed(
    make: Callable[..., HSAModel], device: torch.device, dtype: torch.dtype
) -> tuple[float, int | None]:
    """Seconds of a step, and its peak of bytes, including the model and the optimizer."""
    torch.manual_seed(0)
    step = make_step(make(device=device, dtype=dtype).train(), TOKENS)
    milliseconds, _ = measure(step, device)
    return milliseconds / 1e3, peak_bytes(device)


def measure_training(preset: str, device: torch.device) -> dict:
    """Every figure of training, by key.

    MFU is the useful FLOP as a share of the measured rate of a matrix product.
    """
    config = PRESETS[preset]
    dtype = PRODUCT[device.type][1]  # the dtype of the product that MFU is relative to
    rate = flops_per_second(device)
    seconds, peak = timed(partial(HSAModel, config), device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    # For comparison: in place of the window and of HSA, every block attends to all tokens.
    full = replace(config, window=TOKENS, **NO_HSA)
    full_seconds, full_peak = timed(partial(WithoutHSA, full), device, dtype)
    return {
        "train_16k_tokens_per_second": TOKENS / seconds,
        "train_16k_mfu": training_flops(HSAModel(config, device="meta"), TOKENS) / seconds / rate,
        "train_16k_peak_bytes": peak,
        "train_16k_full_attention_tokens_per_second": TOKENS / full_seconds,
        "train_16k_full_attention_peak_bytes": full_peak,
        "train_dtype_of_weights_gradients_and_optimizer": str(dtype).removeprefix("torch."),
        "product_flops_per_second": rate,
        "train_tokens": TOKENS,
    }
