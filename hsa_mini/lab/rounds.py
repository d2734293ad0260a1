"""Which arms a scale has."""

from hsa_mini.lab.arms import ARMS, Arm
from hsa_mini.lab.capacity.grid import GRID
from hsa_mini.lab.settled.arms import SETTLED_ARMS


def arms_of(scale: str) -> dict[str, Arm]:
    """The arms that run at the scale of this name, by their names.

    The scale "lab" has those of the first round only, so that its claims stay as they were judged.
    """
    if scale == "lab":
        return ARMS
    return GRID if scale == "capacity" else ARMS | SETTLED_ARMS
