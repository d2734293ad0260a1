"""What the processes of a training run compute together. One process alone has nothing to add."""

from collections.abc import Iterable

import torch


class OneProcess:
    """A run of one process. data_ranks: in how many shares the rows of a batch are read.
    data_rank: the share of this process.
    """

    data_ranks = 1
    data_rank = 0

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the tensor over all processes, which may replace it in place."""
        return tensor

    def clip_gradients(self, parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
        """`torch.nn.utils.clip_grad_norm_`, for the gradients of all processes together."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


ONE_PROCESS = OneProcess()
