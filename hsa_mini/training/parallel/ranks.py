"""What the processes of a training run compute together. One process alone has nothing to add."""

from collections.abc import Iterable
from typing import Any

import torch


class OneProcess:
    """A run of one process. rank: which of the processes this is. data_ranks: in how many shares
    the rows of a batch are read. data_rank: the share of this process.
    """

    rank = 0
    data_ranks = 1
    data_rank = 0

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the tensor over all processes, which may replace it in place."""
        return tensor

    def largest(self, *numbers: float) -> tuple[float, ...]:
        """The largest of each number over all processes. This waits for all of them."""
        return numbers

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise ValueError, on every process, unless each value is the same on all."""

    def own_part(
        self, batch: tuple[torch.Tensor, ...], *, chunk_size: int, accumulate: int = 1
    ) -> tuple[torch.Tensor, ...]:
        """What this process reads of a batch, whose tensors are [B, T+1].

        accumulate: in how many parts, one after the other, a step reads the batch.
        """
        return batch

    def clip_gradients(self, parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
        """`torch.nn.utils.clip_grad_norm_`, for the gradients of all processes together."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


ONE_PROCESS = OneProcess()
