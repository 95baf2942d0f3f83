"""Batches of tasks: what the data sets make, and what models, losses and algorithms take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as pytree

from imaml_ext.checks import check_int

# A tensor [B, S, …], or a nested structure (tuple, list, dict) of such for several inputs or targets.
Structure = Any


class Data(Protocol):
    """One side (support or query) of a batch of tasks: x and y [B, S, *], and where tasks differ `mask` and `ways`.

    `TaskData` says what they are. An object without the attributes `mask` and `ways` has tasks of one size.
    """

    @property
    def x(self) -> Structure: ...

    @property
    def y(self) -> Structure: ...


class TaskData(NamedTuple):
    """`Data` of B tasks with room for S examples each.

    Attributes:
        x: [B, S, …] inputs, or a nested structure of such. y: [B, S] int64 labels, or [B, S, …] float targets, or a
            structure.
        mask: [B, S] bool, True where an example is real; None: all are. What is elsewhere is never looked at, and may
            be NaN.
        ways: [B] int64, how many of the model's outputs are classes of the task, the first ones; None: all.
    """

    x: Structure
    y: Structure
    mask: Tensor | None = None
    ways: Tensor | None = None

    @classmethod
    def padded(cls, tasks: Iterable[tuple[Structure, Structure]], ways: Sequence[int] | None = None) -> TaskData:
        """Makes a batch of tasks (x [S_b, …], y [S_b, …]) of different sizes: zeros behind the examples, and a mask.

        Tasks of one size get no mask. `ways` has one number per task.

        Raises:
            TypeError, ValueError: there are no tasks, or x and y of a task do not have the same number of examples.
        """
        tasks = [(x, y) for x, y in tasks]
        if not tasks:
            raise ValueError("tasks must hold at least one task (x, y), got none")
        sizes: list[int] = []
        for task in tasks:
            leaves = pytree.tree_leaves(task)
            if not leaves or not all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves):
                raise TypeError("every task must be (x, y) of tensors [S, …] or nested structures of such")
            found = {len(leaf) for leaf in leaves}
            if len(found) > 1:
                raise ValueError(f"x and y of a task must have as many examples, got {sorted(found)}")
            sizes += found
        x, y = pytree.tree_map(_padded, *tasks)
        device, mask = pytree.tree_leaves(y)[0].device, None
        if len(set(sizes)) > 1:
            mask = (torch.arange(max(sizes)) < torch.tensor(sizes).unsqueeze(1)).to(device)
        return cls(x, y, mask, None if ways is None else torch.as_tensor(ways, device=device))


def _padded(*leaves: Tensor) -> Tensor:
    """[S_b, …] of every task -> [B, max S_b, …], zeros behind the examples."""
    shapes = {leaf.shape[1:] for leaf in leaves}
    if len(shapes) > 1:
        raise ValueError(f"the examples of all tasks must have one shape, got {sorted(map(list, shapes))}")
    return pad_sequence(list(leaves), batch_first=True)


class Episodes(Protocol):
    """A batch of tasks, each with a support and a query set."""

    @property
    def support(self) -> Any: ...

    @property
    def query(self) -> Any: ...


class Sides(NamedTuple):
    """`Episodes` of two sides as they are."""

    support: Any
    query: Any


@dataclass(frozen=True)
class EpisodeBatch:
    """`Episodes` of B tasks.

    support_x [B, S, …], support_y [B, S] int64 (or [B, S, …] float); query_x [B, Q, …], query_y [B, Q] likewise, or
    nested structures of such. support_mask [B, S], query_mask [B, Q] and ways [B]: as in `TaskData`.

    Raises:
        ValueError: the tensors disagree in the number of tasks or of examples.
    """

    support_x: Structure
    support_y: Structure
    query_x: Structure
    query_y: Structure
    support_mask: Tensor | None = None
    query_mask: Tensor | None = None
    ways: Tensor | None = None

    def __post_init__(self) -> None:
        for side, data in (("support", self.support), ("query", self.query)):
            shapes = [leaf.shape for leaf in pytree.tree_leaves(data[:3]) if leaf is not None]
            if any(len(shape) < 2 or shape[:2] != shapes[0][:2] for shape in shapes):
                names = f"{side}_x and {side}_y" if data.mask is None else f"{side}_x, {side}_y and {side}_mask"
                raise ValueError(
                    f"{names} must agree in their first two dimensions [tasks, examples], "
                    f"got {' and '.join(str(tuple(shape)) for shape in shapes)}"
                )
        tasks = {"support": self.num_tasks, "query": len(pytree.tree_leaves(self.query_x)[0])}
        if self.ways is not None:
            tasks["ways"] = len(self.ways)
        if len(set(tasks.values())) > 1:
            names, found = " and ".join(tasks), " and ".join(map(str, tasks.values()))
            raise ValueError(f"{names} must hold the same number of tasks, got {found}")

    @classmethod
    def padded(
        cls,
        tasks: Iterable[tuple[tuple[Structure, Structure], tuple[Structure, Structure]]],
        ways: Sequence[int] | None = None,
    ) -> EpisodeBatch:
        """Makes a batch of tasks ((x, y) of the support, (x, y) of the query) of different sizes, as `TaskData.padded`.

        Raises:
            TypeError, ValueError: as of `TaskData.padded`.
        """
        tasks = list(tasks)
        support, query = (TaskData.padded((task[side] for task in tasks), ways) for side in (0, 1))
        return cls(support.x, support.y, query.x, query.y, support.mask, query.mask, support.ways)

    @property
    def support(self) -> TaskData:
        return TaskData(self.support_x, self.support_y, self.support_mask, self.ways)

    @property
    def query(self) -> TaskData:
        return TaskData(self.query_x, self.query_y, self.query_mask, self.ways)

    @property
    def num_tasks(self) -> int:
        return len(pytree.tree_leaves(self.support_x)[0])

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors: those of support_x, support_y, query_x and query_y, then masks and ways where there are any."""
        return tuple(leaf for leaf in pytree.tree_leaves(list(vars(self).values())) if leaf is not None)

    def map(self, function: Callable[[Tensor], Tensor]) -> EpisodeBatch:
        """The episodes with `function` of every tensor in its place."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return EpisodeBatch(**pytree.tree_map(lambda leaf: None if leaf is None else function(leaf), values))

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> EpisodeBatch:
        """The same episodes on `device`; `dtype` applies to the floating-point tensors, labels stay int64."""
        return self.map(lambda leaf: leaf.to(device, dtype if leaf.is_floating_point() else None))

    def shard(self, rank: int, world_size: int) -> EpisodeBatch:
        """The tasks of process `rank` of `world_size`: a contiguous slice (views, no copies)."""
        rows = shard_slice(self.num_tasks, (rank, world_size))
        return self.map(lambda leaf: leaf[rows])


def as_data(data: Any) -> Any:
    """Returns one side of a batch as an object with x and y: as it is, or `TaskData` of a tuple or a mapping.

    Args:
        data: an object with attributes x and y; (x, y), (x, y, mask) or (x, y, mask, ways); or a mapping with the keys
            "x" and "y", and "mask" and "ways" where it has them.

    Raises:
        TypeError: it is nothing of this.
    """
    if hasattr(data, "x") and hasattr(data, "y"):
        return data
    if isinstance(data, Mapping) and {"x", "y"} <= data.keys() <= set(TaskData._fields):
        return TaskData(**data)
    if isinstance(data, tuple | list) and 2 <= len(data) <= 4:
        return TaskData(*data)
    found = f"a mapping of {sorted(map(str, data))}" if isinstance(data, Mapping) else type(data).__name__
    raise TypeError(
        "data must have x and y: as attributes, as (x, y[, mask[, ways]]), or as a mapping with these keys, "
        f"got {found}"
    )


def as_episodes(episodes: Any) -> Any:
    """Returns a batch of tasks as an object with `support` and `query`, each as it is.

    Args:
        episodes: such an object; (support, query); or a mapping with these keys, or with those of `EpisodeBatch`.

    Raises:
        TypeError: it is nothing of this.
    """
    if hasattr(episodes, "support") and hasattr(episodes, "query"):
        return episodes
    if isinstance(episodes, Mapping):
        if episodes.keys() == {"support", "query"}:
            return Sides(**episodes)
        if "support_x" in episodes and episodes.keys() <= {each.name for each in fields(EpisodeBatch)}:
            return EpisodeBatch(**episodes)
    if isinstance(episodes, tuple | list) and len(episodes) == 2:
        return Sides(*episodes)
    raise TypeError(
        "episodes must have support and query: as attributes, as (support, query), or as a mapping with these keys, "
        f"got {type(episodes).__name__}"
    )


def ragged(data: Any) -> dict[str, Tensor]:
    """Returns the mask and the ways of the data by name, where it has them."""
    given = {name: getattr(data, name, None) for name in ("mask", "ways")}
    return {name: value for name, value in given.items() if value is not None}


def inputs_of(data: Any) -> Any:
    """Returns data.x, or data["x"]; None where there is no such thing."""
    return data.get("x") if isinstance(data, Mapping) else getattr(data, "x", None)


def count_tasks(data: Any) -> int | None:
    """Returns B: the rows of the first tensor of data.x or, without it, those that all tensors of the data share."""
    x = inputs_of(data)
    leaves = [leaf for leaf in pytree.tree_leaves(data if x is None else x) if isinstance(leaf, Tensor) and leaf.dim()]
    rows = {len(leaf) for leaf in (leaves if x is None else leaves[:1])}
    return rows.pop() if len(rows) == 1 else None


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
