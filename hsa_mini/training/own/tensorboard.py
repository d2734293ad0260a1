"""The rows of a run's log as curves of TensorBoard."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def tensorboard(folder: Path) -> Iterator[Callable[[dict[str, float]], None]]:
    """A function for `on_log` of `train` that writes every row to event files in `folder`.

    Raises ImportError if the package tensorboard is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "--tensorboard: needs the package tensorboard (`pip install 'hsa-mini[train]'`)"
        ) from None
    with SummaryWriter(folder) as writer:

        def write(row: dict[str, float]) -> None:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, int(row["step"]))

        yield write
