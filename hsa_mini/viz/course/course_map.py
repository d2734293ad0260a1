"""The picture of the course: its parts, its notebooks, and what each of them needs."""

from matplotlib.axes import Axes

from hsa_mini.course import Header, part_of, short_name
from hsa_mini.viz.style import BLUE, INK, PALE


def course_map(ax: Axes, headers: list[Header]) -> str:
    """The notebooks in columns, one per part; lines lead from what a notebook needs to it.

    Returns what can be seen in one sentence.
    """
    parts = list(dict.fromkeys(part_of(h.number) for h in headers))
    inside = {part: [h for h in headers if part_of(h.number) == part] for part in parts}
    places = {
        h.name: (3 * column, -row)
        for column, part in enumerate(parts)
        for row, h in enumerate(inside[part])
    }
    box = {"boxstyle": "round", "facecolor": PALE, "edgecolor": INK, "linewidth": 0.8}
    middle = {"ha": "center", "va": "center"}
    drawn = {
        name: ax.text(x, y, short_name(name), fontsize=9, bbox=box, zorder=3, **middle)
        for name, (x, y) in places.items()
    }
    arrow = {"arrowstyle": "-|>", "color": BLUE, "shrinkA": 0, "shrinkB": 0}
    for h in headers:
        for needed in h.needs:
            ends = dict(
                patchA=drawn[needed].get_bbox_patch(), patchB=drawn[h.name].get_bbox_patch()
            )
            ends = arrow | ends
            ax.annotate("", places[h.name], places[needed], arrowprops=ends, zorder=2)
    for column, part in enumerate(parts):
        ax.text(3 * column, 0.8, part, ha="center", fontsize=11, weight="bold")
    rows = max(map(len, inside.values()))
    ax.set(xlim=(-1.5, 3 * len(parts) - 1.5), ylim=(-rows + 0.4, 1.2))
    ax.axis("off")
    minutes = sum(h.minutes for h in headers)
    return f"{len(headers)} notebooks in {len(parts)} parts, {minutes / 60:.0f} hours to read."
