"""Pictures of the notebooks that stand side by side in one figure.

Dimensions: T tokens, S chunk size, N chunks.
"""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hsa_mini.evaluation.results import PUBLISHED
from hsa_mini.lab.claims import Measure, Spread
from hsa_mini.model.cost_estimate import scaled
from hsa_mini.viz import laboratory
from hsa_mini.viz.kernels import design_bars
from hsa_mini.viz.models import log_bars
from hsa_mini.viz.plots import chunk_grid, reach_map, weight_bars
from hsa_mini.viz.results import TITLES, heat_map, length_curves
from hsa_mini.viz.style import BLUE, GREY, ORANGE, RED
from hsa_mini.viz.widgets import make_figure


def reach_maps(moved: Mapping[str, object], *, tokens: Sequence[str], token: int) -> Figure:
    """A `reach_map` of every entry: title -> bool [T, T]."""
    figure = make_figure(3.7 * len(moved), 4.4)
    for ax, (title, map_) in zip(figure.subplots(1, len(moved)), moved.items()):
        reach_map(ax, map_, tokens=tokens, token=token, title=title)
    return figure


def reach_and_chunks(
    figure: Figure,
    moved,
    weights,
    tokens: Sequence[str],
    chunk_size: int,
    *,
    token: int,
    title: str,
) -> None:
    """Left, which token sees which (bool [T, T]); right, the weights [N] that a token gives."""
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    reach_map(left, moved, tokens=tokens, token=token, title=title)
    chunk_grid(right, tokens, chunk_size, token=token, weights=weights)
    right.set_title(f"what retrieval gives to token {token}", fontsize=11)


def angle_bars(ax: Axes, angles: Sequence[float], names: Sequence[str]) -> None:
    """A bar per summary: by how many degrees it turns when a chunk is reordered."""
    weight_bars(ax, angles, names, limit=60, digits=0)
    ax.set_xlabel("angle between the summaries before and after, in degrees")


def bars(
    panels: Mapping[str, object], names: Sequence[str], *, limit: float, xlabel: str
) -> Figure:
    """A panel of horizontal bars per entry: title -> one number per name."""
    figure = make_figure(4.5 * len(panels), 3.2)
    for ax, (title, values) in zip(figure.subplots(1, len(panels)), panels.items()):
        weight_bars(ax, values, names, limit=limit)
        ax.set(title=title, xlabel=xlabel)
    return figure


def designs(figure: Figure, rows: Mapping[str, Sequence[float]]) -> None:
    """Four panels of bars: what designs keep, read and compute, with a line at 80 GB.

    rows: name -> bytes on the GPU, on the host, read for a token, (fetched); FLOP of attention.
    """
    titles = ("kept on the GPU", "kept on the host", "read per token", "attention per token")
    columns = zip(titles, (0, 1, 2, 4), (BLUE, ORANGE, BLUE, GREY))
    for ax, (title, column, color) in zip(figure.subplots(1, 4, sharey=True), columns):
        unit, limits = ("FLOP", (1e7, 1e16)) if column == 4 else ("B", (1e5, 3e15))
        values = {name: row[column] for name, row in rows.items()}
        labels = [scaled(value, unit) if value else "" for value in values.values()]
        mark = 80e9 if column == 0 else None
        design_bars(ax, values, labels, color=color, limits=limits, title=title, mark=mark)


def bills(figure: Figure, kept: Mapping[str, float], work: Mapping[str, float]) -> None:
    """Bars of bytes kept (weights, three of HSA, full attention) and of FLOP per token (two and
    two), on logarithmic axes.
    """
    left, right = figure.subplots(1, 2)
    in_bytes = [scaled(value, "B") for value in kept.values()]
    in_flop = [scaled(value, "FLOP") for value in work.values()]
    log_bars(left, kept, in_bytes, [GREY, BLUE, BLUE, BLUE, RED], (1e4, 3e14))
    log_bars(right, work, in_flop, [BLUE, BLUE, RED, RED], (3e8, 2e14))
    left.set_xlabel("bytes kept")
    right.set_xlabel("FLOP per token")


def heat_maps(panels: Mapping[str, Sequence]) -> Figure:
    """A brief `heat_map` of every entry: title -> rows."""
    figure = make_figure(0.7 + 3.0 * len(panels), 2.9)
    for ax, (title, rows) in zip(_row(figure, panels), panels.items()):
        heat_map(ax, rows, low=0.5, brief=True)
        ax.set_title(title, fontsize=12)
        ax.label_outer()
    return figure


def curves_by_task(panels: Mapping[str, Mapping[str, Sequence]]) -> Figure:
    """Shares right against length beside the paper's: task -> model -> rows."""
    figure = make_figure(11, 3.6)
    for ax, (task, curves) in zip(_row(figure, panels), panels.items()):
        length_curves(ax, curves, published=PUBLISHED[task])
        ax.set_title(TITLES[task] + ("" if curves else " (ours not measured)"), fontsize=12)
        ax.label_outer()
    return figure


def ratios(panels: Mapping[str, Mapping]) -> Figure:
    """A panel of ratios per entry: title -> arm -> `Spread` or None."""
    figure = make_figure(10.5, 2.4)
    for ax, (title, rows) in zip(figure.subplots(1, len(panels)), panels.items()):
        laboratory.ratio_rows(ax, rows)
        ax.set_title(f"{title}\n", fontsize=11)
    return figure


def deciding(finding) -> tuple[Figure, str]:
    """The measures that decide about a claim, and what the picture shows in words."""
    measures = laboratory.measures_of(finding, brief=True)
    figure = make_figure(2 + 3.5 * len(measures), 0.9 + 0.32 * len(finding.claim.arms))
    words = laboratory.claim(figure, finding, brief=True)
    return figure, f"A mark for every seed, by measure and arm: {words}"


def rule(figure: Figure, better: Spread, worse: Spread, by: Measure) -> None:
    """The seeds of two arms, the first of which should be better."""
    ax = figure.subplots()
    rows = {"A (should be better)": better, "B (should be worse)": worse}
    laboratory.seed_rows(ax, rows, lambda x: f"{x:.0%}", (laboratory.BETTER, laboratory.WORSE))
    laboratory.measure_axis(ax, by)


def _row(figure: Figure, panels: Mapping) -> Sequence[Axes]:
    return figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
