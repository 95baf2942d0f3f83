"""Running means of the metrics between two lines of the log, kept on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_COUNT = "steps"


class Window:
    """Sums over the steps since the last line; the host reads them once a line, not once a step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=device)  # 0: none so far

    def add(self, metrics: Mapping[str, Tensor], *, step: int, finite: Tensor) -> None:
        """Add a step's metrics (0-d tensors); remember the first step at which `finite` was false."""
        for name, value in metrics.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        first = (self._nonfinite == 0) & ~finite
        self._nonfinite.masked_fill_(first, step)
        self._steps += 1

    def means(self) -> dict[str, float]:
        """Waits for the device."""
        if not self._sums:
            return {}
        means = (torch.stack(list(self._sums.values())) / self._steps).tolist()
        return dict(zip(self._sums, means, strict=True))

    def first_nonfinite_step(self) -> int | None:
        """Waits for the device."""
        return int(self._nonfinite.item()) or None

    def clear(self) -> None:
        self._sums.clear()
        self._steps = 0

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint between two lines of the log."""
        return {_COUNT: torch.tensor(self._steps), **{f"sum {name}": value for name, value in self._sums.items()}}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._steps = int(state[_COUNT])
        self._sums = {
            name.removeprefix("sum "): value.to(self._device) for name, value in state.items() if name != _COUNT
        }
