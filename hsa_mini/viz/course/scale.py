"""Training on many GPUs as a widget: memory, bytes and efficiency against the number of GPUs."""

from collections.abc import Callable, Sequence
from math import nan
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import traitlets
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hsa_mini.training.scale.plan import FREE, GPU_MEMORY_BYTES, ScalePlan
from hsa_mini.viz.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY, hide_frame
from hsa_mini.viz.widgets import CANVAS, Explorer, make_figure, to_png

GB = 1e9
MOVED = {
    "weights, gradients": ("weights", "gradients"),
    "experts' tokens": ("experts",),
    "halo, chunk memory": ("halo", "memory"),
}


HERE = Path(__file__).parent
ALT = (
    "Three panels over 1 to 1,024 GPUs: memory of a GPU, bytes received in a step, and efficiency. "
    "Arrow keys move the number of GPUs."
)


def explore_scale(
    find: Callable[..., Sequence[ScalePlan]], *, place: int = 0, **controls
) -> "ScaleExplorer":
    """`find(**values)` returns one plan for each number of GPUs, and mouse or arrow keys move the
    number. Each further keyword names an argument of `find`; its value is a `Control`, or what one
    offers. place: which of the plans is marked first.
    """
    return ScaleExplorer(find, place, controls)


class ScaleExplorer(Explorer):
    """What `explore_scale` returns; `plans` are those that the picture shows."""

    def __init__(
        self, find: Callable[..., Sequence[ScalePlan]], place: int, controls: dict
    ) -> None:
        self.find = find
        self.plans: Sequence[ScalePlan]
        canvas = ScaleMap(place=place, alt=ALT, layout=ipywidgets.Layout(width="100%"))
        super().__init__(controls, canvas, ALT)

    def paint(self, values: dict[str, Any]) -> None:
        self.plans = self.find(**values)
        self.picture.data = picture_of(self.plans)
        self.summary.value = ""  # the canvas shows its own summary

    def still(self) -> tuple[bytes, str]:
        plan = self.plans[self.picture.place]
        figure = make_figure(11, 3.4)
        scale_panels(figure, self.plans, plan.gpus, GPU_MEMORY_BYTES)
        return to_png(figure), words(plan)


class ScaleMap(anywidget.AnyWidget):
    """The canvas of `explore_scale`.

    data: what `picture_of` returns. place: which of the plans is marked.
    """

    _esm = CANVAS + (HERE / "scale.js").read_text(encoding="utf-8")
    data = traitlets.Dict().tag(sync=True)
    place = traitlets.Int(0).tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)


def picture_of(plans: Sequence[ScalePlan]) -> dict[str, Any]:
    """The data of the canvas: bytes by name, shares, and a line of words, for each plan."""
    return {
        "gpus": [plan.gpus for plan in plans],
        "words": [words(plan) for plan in plans],
        "capacity": GPU_MEMORY_BYTES,
        "usable": (1 - FREE) * GPU_MEMORY_BYTES,
        "memory": {name: [p.memory_bytes[name] for p in plans] for name in plans[0].memory_bytes},
        "received": received(plans),
        "efficiency": {
            "all gathers overlap": [plan.efficiency for plan in plans],
            "none overlaps": [plan.efficiency_without_overlap for plan in plans],
        },
    }


def received(plans: Sequence[ScalePlan]) -> dict[str, list[int]]:
    """Kind -> the bytes that a GPU receives in a step, for each plan."""
    curves = {
        name: [sum(plan.received_bytes[kind] for kind in kinds) for plan in plans]
        for name, kinds in MOVED.items()
    }
    return curves | {"full attention's K, V": [p.full_attention_ring_bytes for p in plans]}


def words(plan: ScalePlan) -> str:
    """One plan in a line."""
    held = f"{plan.peak_bytes / GB:.0f} GB" + ("" if plan.fits else ", which does not fit")
    each = plan.step_tokens // plan.gpus
    share = f"{plan.efficiency_without_overlap:.0%} to {plan.efficiency:.0%}"
    return (
        f"{plan.gpus:,} GPUs, {plan.mesh}: {held}; {each:,} tokens a GPU and step; "
        f"{plan.tokens_per_second:,.0f} tokens/s at best, efficiency {share}."
    )


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
    looks = ((BLUE, "-", "o"), (ORANGE, ":", "D"), (GREEN, "-.", "^"), (RED, "--", "s"))
    for (name, sizes), (color, line, mark) in zip(received(plans).items(), looks):
        if any(sizes):  # where nothing travels, the line has a gap
            moved = [size / GB if size else nan for size in sizes]
            look = dict(color=color, linestyle=line, marker=mark, markersize=4)
            ax.plot(gpus, moved, label=name, **look)
    ax.set_yscale("log")
    ax.set_ylim(1e-3, 1e4)
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
