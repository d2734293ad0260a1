"""The picture of training on many GPUs: memory, bytes and efficiency against the number of GPUs."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hsa_mini.training.scale.plan import FREE, ScalePlan
from hsa_mini.viz.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY, hide_frame

GB = 1e9
MOVED = {
    "weights, gradients": ("weights", "gradients"),
    "experts' tokens": ("experts",),
    "halo, chunk memory": ("halo", "memory"),
}


def scale_panels(figure: Figure, plans: Sequence[ScalePlan], gpus: int, capacity: float) -> None:
    """Three panels over the number of GPUs, one plan for each number, with a mark at `gpus`.

    Memory of a GPU, with a line at `capacity` bytes; the bytes that a GPU receives in a step,
    beside those of full attention; efficiency, from a step without overlap to one with overlap.
    """
    axes = figure.subplots(1, 3)
    for ax, draw in zip(axes, (_memory, _received, _efficiency)):
        draw(ax, plans, [plan.gpus for plan in plans])
        ax.axvline(gpus, color=INK, linewidth=1.2)
        ax.set_xscale("log", base=2)
        ticks = [plan.gpus for plan in plans][:: max(len(plans) // 4, 1)]
        ax.set_xticks(ticks, [f"{n:,}" for n in ticks], fontsize=10)
        ax.minorticks_off()
        ax.set_xlabel("GPUs")
        hide_frame(ax)
    axes[0].axhline((1 - FREE) * capacity / GB, color=RED, linestyle="--", linewidth=1.5)
    axes[0].set_ylim(0, 2 * capacity / GB)


def _memory(ax: Axes, plans: Sequence[ScalePlan], gpus: list[int]) -> None:
    parts = [[plan.memory_bytes[name] / GB for plan in plans] for name in plans[0].memory_bytes]
    colors = (BLUE, SKY, GREY, ORANGE, GREEN, PURPLE)
    ax.stackplot(gpus, parts, labels=list(plans[0].memory_bytes), colors=colors, linewidth=0)
    ax.set_title("memory of a GPU, GB", fontsize=11)
    ax.legend(frameon=False, fontsize=9, reverse=True)


def _received(ax: Axes, plans: Sequence[ScalePlan], gpus: list[int]) -> None:
    curves = {
        name: [sum(plan.received_bytes[kind] for kind in kinds) for plan in plans]
        for name, kinds in MOVED.items()
    }
    curves["full attention's K, V"] = [plan.full_attention_ring_bytes for plan in plans]
    looks = ((BLUE, "-", "o"), (ORANGE, ":", "D"), (GREEN, "-.", "^"), (RED, "--", "s"))
    for (name, sizes), (color, line, mark) in zip(curves.items(), looks):
        moved = [(n, size / GB) for n, size in zip(gpus, sizes) if size]
        if moved:
            look = dict(color=color, linestyle=line, marker=mark, markersize=4)
            ax.plot(*zip(*moved), label=name, **look)
    ax.set_yscale("log")
    ax.set_ylim(1e-3, 3e3)
    ax.set_title("received by a GPU in a step, GB", fontsize=11)
    if ax.lines:
        ax.legend(frameon=False, fontsize=9, loc="lower right")


def _efficiency(ax: Axes, plans: Sequence[ScalePlan], gpus: list[int]) -> None:
    best = [plan.efficiency for plan in plans]
    worst = [plan.efficiency_without_overlap for plan in plans]
    ax.fill_between(gpus, worst, best, color=SKY, alpha=0.5, linewidth=0)
    ax.plot(gpus, best, color=BLUE, marker="o", markersize=4, label="all gathers overlap")
    ax.plot(gpus, worst, color=BLUE, linestyle=":", marker="v", markersize=4, label="none overlaps")
    ax.set_ylim(0, 1.05)
    ax.set_title("efficiency against one GPU", fontsize=11)
    ax.legend(frameon=False, fontsize=9, loc="lower left")
