"""A whole model with random weights: prefill of a long text, then decoding, with K and V on the
device or in host memory.

Random weights cost as much as trained ones, except that neighbouring tokens share fewer chunks.
"""

import time
from collections.abc import Callable

import torch
from ceilings import bytes_per_second
from timing import peak_bytes
from tqdm import tqdm

from hsa_mini import PRESETS, ChunkMemory, HSAModel
from hsa_mini.inference.decode_step import DecodeStep
from hsa_mini.inference.prefill import prefill
from hsa_mini.model.core import Output
from hsa_mini.model.cost_estimate import estimate_cost

# Tokens: "64k", "1m" and "16m" in the keys of the results.
NEAR = 1 << 16
LONG = 1 << 20
LONGEST = 1 << 24
# Tokens decoded before the clock starts, and while it runs.
WARM = 16
DECODED = 256


def waited(device: torch.device) -> float:
    """The time after the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def least_bytes(preset: str, tokens: int, dtype: torch.dtype) -> float:
    """Bytes that must be read to decode one token after `tokens` others.

    They are active weights, windows, landmarks and chosen chunks.
    """
    counted = estimate_cost(preset, tokens)
    config = PRESETS[preset]
    # 2 bytes per number, as in the cost estimate
    weights = 2 * (counted.params_active_with_head - counted.params_by_part["chunk encoder"])
    chosen = counted.kv_bytes * min(config.top_k / (tokens // config.chunk_size), 1)
    needed = (
        weights + counted.window_cache_bytes + config.groups * (counted.landmark_bytes + chosen)
    )
    return needed * dtype.itemsize / 2


@torch.no_grad()
def read(
    model: HSAModel, tokens: int, advance: Callable[[int], object], *, offload: bool = False
) -> tuple[Output, float]:
    """Prefill of a random text: its output, and its seconds. Resets the peak of memory."""
    device = model.norm.weight.device
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator, device=device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = waited(device)
    output = prefill(model, ids, ChunkMemory(model.config, offload=offload), progress=advance)
    return output, waited(device) - start


def seconds_per_token(model: HSAModel, output: Output) -> float:
    """Greedy decoding of one sequence after a prefill, with the chunks that become complete."""
    device = model.norm.weight.device
    output.memory.ensure_capacity(output.memory.position + WARM + DECODED)
    steps = DecodeStep(model, output.memory, graph=device.type == "cuda")
    token = output.logits[:, -1].argmax(-1, keepdim=True)
    for i in range(WARM + DECODED):
        if i == WARM:
            start = waited(device)
        token = steps(token).argmax(-1, keepdim=True)
    return (waited(device) - start) / DECODED


def measure_model(preset: str, device: torch.device) -> dict:
    """Every figure of one model, by key.

    `peak_bytes` include the weights, and are None without a GPU.
    """
    torch.manual_seed(0)
    model = HSAModel(
        PRESETS[preset], device=device, dtype=torch.bfloat16 if device.type == "cuda" else None
    ).eval()
    speed = bytes_per_second(device)
    with tqdm(
        total=2 * NEAR + LONG + 2 * LONGEST,
        unit=" tokens",
        unit_scale=True,
        desc=f"{preset}: prefill",
    ) as bar:
        seconds_per_token(model, read(model, NEAR, bar.update)[0])  # a first run, which compiles
        near = seconds_per_token(model, read(model, NEAR, bar.update)[0])
        long = read(model, LONG, bar.update)[1]
        result = {"prefill_1m_seconds": long, "prefill_1m_peak_bytes": peak_bytes(device)}
        output, longest = read(model, LONGEST, bar.update)
        result |= {"prefill_16m_seconds": longest, "prefill_16m_peak_bytes": peak_bytes(device)}
        far = seconds_per_token(model, output)
        del output
        offloaded = seconds_per_token(model, read(model, LONGEST, bar.update, offload=True)[0])
    return result | {
        "prefill_16m_over_1m_per_token": longest / LONGEST / (long / LONG),
        "decode_64k_tokens_per_second": 1 / near,
        "decode_64k_roofline_share": least_bytes(preset, NEAR, model.norm.weight.dtype)
        / speed
        / near,
        "decode_16m_over_64k": far / near,
        "offload_16m_device_bytes": peak_bytes(device),
        "offload_slowdown": offloaded / far,
        "copy_bytes_per_second": speed,
        "tokens": {"64k": NEAR, "1m": LONG, "16m": LONGEST},
    }
