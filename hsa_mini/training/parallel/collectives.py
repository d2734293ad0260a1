"""Two collectives with gradients.

`torch.distributed` has both under names that change from version to version, and none of them
gathers several tensors in one step of autograd. One step matters: autograd may run the backward
passes of independent collectives in another order on another process, which then wait for each
other forever.
"""

from typing import Any

import torch
import torch.distributed as dist


class Traffic:
    """sent_bytes: what this process has sent by the functions of this module."""

    sent_bytes = 0

    def count(self, tensor: torch.Tensor, copies: int = 1) -> None:
        self.sent_bytes += copies * tensor.nbytes


TRAFFIC = Traffic()  # a process is in one run


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], group: Any
    ) -> torch.Tensor:
        ctx.others = (received, sent, group)
        own = dist.get_rank(group)
        TRAFFIC.count(rows[: sum(sent) - sent[own]])
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        return _AllToAll.apply(gradients[0], *ctx.others), None, None, None


def all_to_all(
    rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """rows [sum(sent), ...], the first sent[0] for process 0 of the group, and so on -> what the
    processes sent to this one, in their order, [sum(received), ...].
    """
    return _AllToAll.apply(rows, sent, received, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sizes: list[int], group: Any, *parts: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.sizes = sizes
        ctx.group = group
        return tuple(_gathered(part, sizes, group) for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        own = (_summed(gradient, ctx.sizes, ctx.group) for gradient in gradients)
        return None, None, *own


def gather(
    parts: tuple[torch.Tensor, ...], sizes: list[int], group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    """Tensors [B, sizes[r], ...] of process r -> those of all processes, [B, sum(sizes), ...], in
    their order. Backward: every process gets the sum of the gradients of its part.
    """
    return _Gather.apply(sizes, group, *parts)


def _gathered(part: torch.Tensor, sizes: list[int], group: Any) -> torch.Tensor:
    B, n = part.shape[:2]
    padded = part.new_zeros(B, max(sizes), *part.shape[2:])
    padded[:, :n] = part
    every = [torch.empty_like(padded) for _ in sizes]
    TRAFFIC.count(padded, len(sizes) - 1)
    dist.all_gather(every, padded, group=group)
    return torch.cat([own[:, :size] for own, size in zip(every, sizes)], dim=1)


def _summed(gradient: torch.Tensor, sizes: list[int], group: Any) -> torch.Tensor:
    """The sum over all processes of the gradient [B, sum(sizes), ...], cut to this one's part.

    It is added in float32 at least: 16 bits would round at every process.
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    shape = (len(gradient), max(sizes), *gradient.shape[2:])
    padded = [gradient.new_zeros(shape, dtype=wide) for _ in sizes]
    for place, part, size in zip(padded, gradient.split(sizes, dim=1), sizes):
        place[:, :size] = part
    out = torch.empty_like(padded[0])
    TRAFFIC.count(out, len(sizes) - 1)
    dist.reduce_scatter(out, padded, group=group)
    return out[:, : sizes[dist.get_rank(group)]].to(gradient.dtype)
