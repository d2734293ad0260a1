"""Which step made the loss or the gradient not finite, found without waiting for every step."""

import torch

from hsa_mini.training.step import StepFigures


class FiniteSteps:
    """Keeps one number of each of the last `size` steps on the device; see `first_bad`."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._sums = torch.zeros(size, device=device)

    def note(self, step: int, figures: StepFigures) -> None:
        """Keep the loss and the gradient norm of a step. One kernel, which nothing waits for."""
        place = self._sums[step % len(self._sums)]
        torch.add(figures.loss, figures.gradient_norm, out=place)

    def first_bad(self, step: int) -> int | None:
        """The first of the last `size` steps up to `step` whose loss or gradient is not finite.

        This waits for the device.
        """
        finite = self._sums.isfinite().tolist()
        steps = range(max(step - len(finite), 0) + 1, step + 1)
        return next((s for s in steps if not finite[s % len(finite)]), None)
