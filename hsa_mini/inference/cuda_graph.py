"""A function of tensors that is recorded once as a CUDA graph and then replayed.

A decode step or a small training step consists of thousands of small kernels. Launching them one by
one from the CPU takes several times longer than running them.
"""

from collections.abc import Callable

import torch

from hsa_mini.ops.choice import runs_kernels

WARM_UP = 3  # plain calls before the recording; the first compiles kernels


class CUDAGraphRunner:
    """`function(*inputs)` -> a tuple of tensors.

    After the recording, every call returns the same tensors, so read them before the next call.

    Inputs are tensors of fixed shapes on one device. The function may change other tensors in
    place. It must neither synchronise with the CPU nor depend on a Python value that changes. Every
    call does the work exactly once, recorded or not. On the CPU, and on GPUs without kernels (see
    `runs_kernels`), every call is a plain one.
    """

    def __init__(self, function: Callable[..., tuple[torch.Tensor, ...]]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not runs_kernels(inputs[0].device):
            return self.function(*inputs)
        if self.calls < WARM_UP:
            self.calls += 1
            if self.calls == 1:
                # One stream throughout: autograd binds each gradient to the stream that created it.
                self.stream = torch.cuda.Stream()
                self.inputs = tuple(x.clone() for x in inputs)
            return self._call_plainly(*inputs)
        for own, x in zip(self.inputs, inputs):
            own.copy_(x)
        if self.calls == WARM_UP:
            self.calls += 1
            self._record()
        self.graph.replay()
        return self.outputs

    def _call_plainly(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Call the function on the runner's stream without recording it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def _record(self) -> None:
        """Record the function for the runner's own inputs."""
        self.graph = torch.cuda.CUDAGraph()
        # Other threads pin memory for the next batches meanwhile, so only this thread's calls are
        # recorded.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.outputs = self.function(*self.inputs)
