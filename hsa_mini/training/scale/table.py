"""What `plan --gpus` prints and writes: how a model would be trained on a number of GPUs."""

from dataclasses import asdict

from hsa_mini.config import HSAConfig
from hsa_mini.model.cost_estimate import scaled
from hsa_mini.paths import data_dir
from hsa_mini.provenance import command, commit, versions
from hsa_mini.training.scale.plan import GPU_MEMORY_BYTES, plans
from hsa_mini.training.scale.seconds import MEASURED, Links, Measured

SHOWN = 3  # meshes
LABEL = "a prediction: on more than one GPU nothing of this was measured"


def prediction(config: HSAConfig, name: str, contexts: list[int], gpus: int) -> dict:
    """For every context the best mesh and the two that follow, with what they were computed from.

    Raises ValueError for a model or context that no mesh of this many GPUs can train.
    """
    measured = Measured.read(data_dir() / "results")
    found = {tokens: plans(config, tokens, gpus, measured)[:SHOWN] for tokens in contexts}
    return {
        "label": LABEL,
        "preset": name,
        "gpus": gpus,
        "gpu_memory_bytes": GPU_MEMORY_BYTES,
        "links": asdict(Links()),
        "measured": measured.sources,
        "versions": versions(),
        "commit": commit(),
        "command": command(),
        "contexts": {
            str(tokens): [plan.to_json() for plan in best] for tokens, best in found.items()
        },
    }


def scale_table(found: dict) -> str:
    """The prediction for people."""
    lines = [f"{found['preset']} on {found['gpus']:,} GPUs, {found['label']}"]
    for tokens, best in found["contexts"].items():
        lines += ["", f"training context of {int(tokens):,} tokens", _heads()]
        lines += [line for plan in best for line in _lines(plan)]
    links = found["links"]
    nvlink, network = (scaled(links[name], "B/s") for name in ("nvlink", "network"))
    memory = scaled(found["gpu_memory_bytes"], "B")
    lines += [
        "",
        f"GPUs of {memory}, {links['gpus_per_host']} in a host; each receives {nvlink} by NVLink,"
        f" and {network} from other hosts",
        "of full: what halo and memory are of the keys and values that full attention would move",
        "tokens/s, MFU: from no overlap to weights and gradients that travel while others compute",
        f"Computing takes, for each FLOP, what one GPU took for {MEASURED}:",
        *(f"  data/results/{file}: {what}" for file, what in found["measured"].items()),
    ]
    return "\n".join(lines)


def _heads() -> str:
    names = ("memory", "received", "of full", "tokens a step", "tokens/s", "MFU")
    return f"  {'mesh':<18}" + "".join(
        f"{name:>{width}}" for name, width in zip(names, (12, 12, 10, 15, 24, 16))
    )


def _lines(plan: dict) -> list[str]:
    """Two lines of the table for one mesh."""
    received = sum(plan["received_bytes"].values())
    parts = plan["received_bytes"]
    ring = plan["full_attention_ring_bytes"]
    share = f"{(parts['halo'] + parts['memory']) / ring:.1%}" if ring else ""
    slow = plan["tokens_per_second_without_overlap"]
    fast = plan["tokens_per_second"]
    mfu = plan["mfu"]
    kinds = ", ".join(f"{kind} {scaled(size, 'B')}" for kind, size in parts.items() if size)
    memory = ", ".join(f"{what} {scaled(size, 'B')}" for what, size in plan["memory_bytes"].items())
    return [
        f"  {plan['mesh']:<18}{scaled(plan['peak_bytes'], 'B'):>12}{scaled(received, 'B'):>12}"
        f"{share:>10}{plan['step_tokens']:>15,}{f'{slow:,.0f} to {fast:,.0f}':>24}"
        f"{f'{mfu * slow / fast:.3f} to {mfu:.3f}':>16}"
        + ("" if plan["fits"] else "  does not fit"),
        f"    memory: {memory}",
        *([f"    received in a step: {kinds}"] if received else []),
    ]
