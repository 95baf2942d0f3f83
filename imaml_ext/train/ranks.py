"""The processes of a job: this one alone, or the ranks that torchrun has started. Nothing here imports torch.

What every rank must decide alike goes through one of these methods, and every rank calls each of them equally often.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from imaml_ext.meta import MetaGradient

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Ranks:
    """A job of one process, for which each method is what it says of all ranks, without any doing.

    `imaml_ext.training.process_group.ProcessGroup` is the job of several.

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
        """Make `run.device` mean a device of this rank's own.

        Raises:
            ConfigError, RunError: there is none for it.
        """

    def first_of_machine(
        self, action: Callable[Arguments, object], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> None:
        """`action(…)` on one rank of each machine, ahead of the others; in a job of one there are no others."""

    def agree(self, facts: Mapping[str, object]) -> None:
        """Check that these are the same on every rank.

        Raises:
            RunError: they are not; the message names the first one that differs.
        """

    def together(
        self, action: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """`action(…)` on every rank: the rank's own result or, where it fails on one, an error on all."""
        return action(*args, **kwargs)

    def on_first(
        self, action: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """`action(…)` on rank 0: its result, or its error, on every rank."""
        return action(*args, **kwargs)

    def once(self, error: Exception) -> Exception:
        """What a rank raises for an error that every rank has come to: one of them tells the user."""
        return error

    def greatest(self, number: int) -> int:
        """The greatest of the ranks' numbers; the device is not waited for."""
        return number

    def sum(self, values: Tensor) -> Tensor:
        """The sum of the ranks' tensors, which are of one shape."""
        return values

    def mean_over_tasks(self, meta: MetaGradient, *, tasks: int) -> MetaGradient:
        """The meta-gradient and metrics of all ranks' tasks, from those of each rank's `tasks`, at least one."""
        return meta


_current: Ranks | None = None


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this job, for as long as the context is open; within it, `joined()` gives the same again.

    Raises:
        RunError: torchrun's other processes cannot be reached, or one of them has ended.
        ReportedElsewhere: the same, and another rank says why.
    """
    global _current
    if _current is not None:
        yield _current
    elif not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        yield Ranks()
    else:
        from imaml_ext.training.process_group import ProcessGroup

        with ProcessGroup.joined() as _current:
            try:
                yield _current
            finally:
                _current = None
