"""Running means of the metrics between two lines of the log, kept on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_COUNT = "steps"


class MetricAccumulator:
    """Holds sums over the steps since the last line of the log; the host reads them once per line, not per step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=device)  # 0: none so far

    def add(self, metrics: Mapping[str, Tensor], *, step: int | Tensor, finite: Tensor) -> None:
        """Adds a step's metrics (0-d tensors), and remembers the first step at which `finite` was false.

        On the device alone and in place, so that a CUDA graph can replay it; `count` then counts the step.
        """
        for name, value in metrics.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros((), dtype=torch.float64, device=self._device)
            self._sums[name].add_(value.detach())
        first = (self._nonfinite == 0) & ~finite
        self._nonfinite.copy_(torch.where(first, step, self._nonfinite))

    def count(self) -> None:
        self._steps += 1

    def buffers(self) -> list[Tensor]:
        """Returns what `add` changes in place."""
        return [*self._sums.values(), self._nonfinite]

    def means(self) -> dict[str, float]:
        """Returns the means over the steps that were counted; waits for the device."""
        if not self._steps:
            return {}
        means = (torch.stack(list(self._sums.values())) / self._steps).tolist()
        return dict(zip(self._sums, means, strict=True))

    def first_nonfinite_step(self) -> int | None:
        """Returns the first step that was not finite, if any; waits for the device."""
        return int(self._nonfinite.item()) or None

    def clear(self) -> None:
        for value in self._sums.values():
            value.zero_()
        self._steps = 0

    def state(self) -> dict[str, Tensor]:
        """Returns the sums, for a checkpoint between two lines of the log."""
        sums = self._sums if self._steps else {}
        return {_COUNT: torch.tensor(self._steps), **{f"sum {name}": value for name, value in sums.items()}}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._steps = int(state[_COUNT])
        self._sums = {
            name.removeprefix("sum "): value.to(self._device) for name, value in state.items() if name != _COUNT
        }
