"""Batches of tasks: what the data sets make, and what models, losses and algorithms take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from imaml_ext.checks import check_int


class Data(Protocol):
    """One side (support or query) of a batch of tasks: x [B, S, *] and y [B, S, *]."""

    @property
    def x(self) -> Tensor: ...

    @property
    def y(self) -> Tensor: ...


class TaskData(NamedTuple):
    """`Data` from two tensors. x: [B, S, …] inputs; y: [B, S] int64 labels, or [B, S, …] float targets."""

    x: Tensor
    y: Tensor


class Episodes(Protocol):
    """A batch of tasks, each with a support and a query set."""

    @property
    def support(self) -> Data: ...

    @property
    def query(self) -> Data: ...


@dataclass(frozen=True)
class EpisodeBatch:
    """`Episodes` of B tasks from four tensors.

    support_x [B, S, …], support_y [B, S] int64 (or [B, S, …] float); query_x [B, Q, …], query_y [B, Q] likewise.

    Raises:
        ValueError: the tensors disagree in the number of tasks or of examples.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def __post_init__(self) -> None:
        for side in ("support", "query"):
            x, y = getattr(self, f"{side}_x"), getattr(self, f"{side}_y")
            if x.dim() < 2 or y.dim() < 2 or x.shape[:2] != y.shape[:2]:
                raise ValueError(
                    f"{side}_x and {side}_y must agree in their first two dimensions [tasks, examples], "
                    f"got {tuple(x.shape)} and {tuple(y.shape)}"
                )
        if self.support_x.shape[0] != self.query_x.shape[0]:
            raise ValueError(
                "support and query must hold the same number of tasks, "
                f"got {self.support_x.shape[0]} and {self.query_x.shape[0]}"
            )

    @property
    def support(self) -> TaskData:
        return TaskData(self.support_x, self.support_y)

    @property
    def query(self) -> TaskData:
        return TaskData(self.query_x, self.query_y)

    @property
    def num_tasks(self) -> int:
        return self.support_x.shape[0]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.support_x, self.support_y, self.query_x, self.query_y

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> EpisodeBatch:
        """The same episodes on `device`; `dtype` applies to the floating-point tensors, labels stay int64."""
        return EpisodeBatch(*(t.to(device, dtype if t.is_floating_point() else None) for t in self.tensors()))

    def shard(self, rank: int, world_size: int) -> EpisodeBatch:
        """The tasks of process `rank` of `world_size`: a contiguous slice (views, no copies)."""
        rows = shard_slice(self.num_tasks, (rank, world_size))
        return EpisodeBatch(*(tensor[rows] for tensor in self.tensors()))


def shard_slice(num_tasks: int, shard: tuple[int, int] | None) -> slice:
    """The tasks that process `rank` of `world_size` takes of a batch; sizes differ by one at most.

    Raises:
        ValueError: the rank is outside 0 … world_size − 1, or there are more processes than tasks.
    """
    if shard is None:
        return slice(0, num_tasks)
    rank, world_size = shard
    world_size = check_int("world_size", world_size, minimum=1)
    rank = check_int("rank", rank, minimum=0)
    if rank >= world_size:
        raise ValueError(f"rank must be below world_size = {world_size}, got {rank}")
    if world_size > num_tasks:
        raise ValueError(f"world_size must not exceed the {num_tasks} tasks of a meta-batch, got {world_size}")
    return slice(rank * num_tasks // world_size, (rank + 1) * num_tasks // world_size)
