"""What the processes of a job do together. Nothing here imports torch.

What every rank must decide alike goes through one of these methods, and every rank calls each of them equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from imaml_ext.meta import MetaGradient

Result = TypeVar("Result")


class Ranks:
    """Stands for a job of one process; each method does what its description says of all ranks.

    `imaml_ext.train.process_group.ProcessGroup` is the job of several; `imaml_ext.train.job.joined` gives either.

    Attributes:
        rank, size: this process, 0 … size − 1, and how many there are. Rank 0 owns the run directory and the terminal.
    """

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def shard(self) -> tuple[int, int]:
        """This process's share of a batch of tasks, as samplers understand it."""
        return self.rank, self.size

    def use_device(self, name: str) -> None:
        """Makes `run.device` mean a device of this rank's own; RunError, ConfigError where there is none for it."""

    def first_of_machine(self, action: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Runs `action(…)` on one rank of each machine, ahead of the others; in a job of one there are no others."""

    def check_equal(self, facts: Mapping[str, object]) -> None:
        """Checks that these are the same on every rank; a RunError names the first one that differs."""

    def on_all(self, action: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Runs `action(…)` on every rank; returns the rank's own result or, where it fails on one, raises on all."""
        return action(*args, **kwargs)

    def on_first(self, action: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Runs `action(…)` on rank 0; returns its result, or raises its error, on every rank."""
        return action(*args, **kwargs)

    def reported_once(self, error: Exception) -> Exception:
        """Returns what a rank raises for an error that every rank has come to: one of them tells the user."""
        return error

    def maximum(self, number: int) -> int:
        """Returns the greatest of the ranks' numbers; the device is not waited for."""
        return number

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of the ranks' tensors, which are of one shape."""
        return values

    def mean_over_tasks(self, meta: MetaGradient, *, tasks: int) -> MetaGradient:
        """Returns the meta-gradient and metrics of all ranks' tasks, from those of each rank's own `tasks`."""
        return meta
