"""Tasks of different sizes in one batch: groups of equal ones, each of which is computed without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext.batch import Data, Structure
from imaml_ext.losses.curvature import ALL, CurvatureOperator
from imaml_ext.ops.calls import is_traced, is_transformed
from imaml_ext.solvers.preconditioners.kfac import KroneckerBlock, KroneckerFactors


class OneSize(NamedTuple):
    """`Data` of tasks of one size, whose labels have been looked at."""

    x: Structure
    y: Structure


class Group(NamedTuple):
    """Tasks of one size.

    Attributes:
        data: [k, n, …] of k tasks with n examples. ways: of each of them; None: all outputs.
        examples: [k, n] int64, where those examples are among the S of the batch; None: n is S.
    """

    data: OneSize
    ways: int | None
    examples: Tensor | None


@dataclass(frozen=True, eq=False)
class RaggedData:
    """`Data` whose tasks have been put into groups.

    Attributes:
        order: [B] int64, the tasks group by group; None where they are so already. inverse: where each task is among
            them. shape: (B, S).
    """

    x: Structure
    y: Structure
    mask: Tensor | None
    ways: Tensor | None
    groups: tuple[Group, ...]
    order: Tensor | None
    inverse: Tensor | None
    shape: tuple[int, int]

    @classmethod
    def of(cls, data: Data) -> RaggedData:
        """Groups tasks by their numbers of examples and ways, which waits for the device once.

        Raises:
            TypeError, ValueError: mask or ways do not fit the data, a task has no example, or a label is beyond its
                task's ways; names the task.
        """
        mask, ways = getattr(data, "mask", None), getattr(data, "ways", None)
        shape, device = _shape(data.x, data.y)
        _check("mask", mask, torch.bool, shape, "[B, S]", device)
        _check("ways", ways, torch.int64, shape[:1], "[B]", device)
        keys = _sizes(data.y, mask, ways, shape, device)
        members: dict[tuple[int, int], list[int]] = {}
        for task, key in enumerate(keys):
            members.setdefault(key, []).append(task)
        tasks = [task for group in members.values() for task in group]
        order = None if tasks == list(range(shape[0])) else torch.tensor(tasks, device=device)
        # The real examples of each task in their order, then the others.
        first = None if mask is None else mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        groups = []
        for (size, width), group in members.items():
            rows = torch.tensor(group, device=device)
            examples = None if first is None or size == shape[1] else first[rows, :size]  # [k, n]
            at: Any = rows if examples is None else (rows.unsqueeze(1), examples)
            whole = examples is None and len(members) == 1
            x, y = (data.x, data.y) if whole else pytree.tree_map(lambda leaf, at=at: leaf[at], (data.x, data.y))
            groups.append(Group(OneSize(x, y), width or None, examples))
        inverse = None if order is None else order.argsort()
        return cls(data.x, data.y, mask, ways, tuple(groups), order, inverse, shape)

    def split(self, value: Tensor) -> Sequence[Tensor]:
        """Returns the rows of [B, …] of each group; [1, …] as it is for all of them."""
        if len(value) == 1:
            return [value] * len(self.groups)
        return self._ordered(value, self.order).split([len(pytree.tree_leaves(g.data.x)[0]) for g in self.groups])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Returns [B, …], task by task, of a [k, …] per group."""
        joined = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return self._ordered(joined, self.inverse)

    def join_outputs(self, parts: Sequence[Structure]) -> Structure:
        """Returns outputs [B, S, …] of a [k, n, …] per group: 0 where no example is, −∞ for classes beyond the ways."""

        def joined(*leaves: Tensor) -> Tensor:
            filled = []
            for group, leaf in zip(self.groups, leaves, strict=True):
                if group.ways is not None:
                    classes, absent = leaf[..., : group.ways], leaf[..., group.ways :]
                    leaf = torch.cat([classes, torch.full_like(absent, -torch.inf)], -1)
                if group.examples is not None:
                    index = group.examples.view(*group.examples.shape, *(1,) * (leaf.dim() - 2)).expand_as(leaf)
                    room = leaf.new_zeros(len(leaf), self.shape[1], *leaf.shape[2:])
                    leaf = room.scatter(1, index, leaf)
                filled.append(leaf)
            return self.join(filled)

        return pytree.tree_map(joined, *parts)

    @staticmethod
    def _ordered(value: Tensor, order: Tensor | None) -> Tensor:
        return value if order is None else value.index_select(0, order)


class RaggedCurvature(CurvatureOperator):
    """The curvature of ragged tasks, each group by its own operator."""

    def __init__(self, parts: Sequence[CurvatureOperator], data: RaggedData, phi: Tensor) -> None:
        super().__init__(phi)
        self._parts, self._data, self.kind = parts, data, parts[0].kind
        self.losses = data.join([part.losses for part in parts])
        self.gradient = data.join([part.gradient for part in parts])
        if all(part.kronecker_factors is not None for part in parts):
            self.kronecker_factors = self._factors

    def _product(self, p: Tensor, rows: slice = ALL) -> Tensor:
        return self._over(p, [part.__call__ for part in self._parts])

    def curvature(self, p: Tensor) -> Tensor:
        self._check(p, self._phi)
        return self._over(p, [part.curvature for part in self._parts])

    def of_columns(self, columns: int) -> Callable[..., Tensor] | None:
        products = [part.of_columns(columns) for part in self._parts]
        if any(product is None for product in products):
            return None

        def wide(p: Tensor) -> Tensor:
            rows = p.view(-1, columns, p.shape[1])  # [B, K, N]
            each = [lambda q, f=f: f(q.flatten(0, 1)).view_as(q) for f in products]  # type: ignore[misc]
            return self._over(rows, each).flatten(0, 1)

        return wide

    def _over(self, p: Tensor, functions: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        return self._data.join([f(q) for f, q in zip(functions, self._data.split(p), strict=True)])

    def _factors(self, *, samples: int, seed: int) -> KroneckerFactors:
        parts = [part.kronecker_factors(samples=samples, seed=seed) for part in self._parts]  # type: ignore[misc]
        blocks = [
            KroneckerBlock(
                same[0].columns,
                self._data.join([block.inputs for block in same]),
                self._data.join([block.outputs for block in same]),
            )
            for same in zip(*(part.blocks for part in parts), strict=True)
        ]
        diagonal = self._data.join([part.diagonal for part in parts])
        return KroneckerFactors(tuple(blocks), diagonal, max(part.products for part in parts))


def may_look(labels: Any, anyway: bool) -> bool:
    """Whether these are labels and their values can be looked at; on a device, which waits, only `anyway`."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or not labels.numel():
        return False
    return (labels.is_cpu or anyway) and not is_traced() and not is_transformed()


def _shape(x: Structure, y: Structure) -> tuple[tuple[int, int], torch.device]:
    """(B, S) and the device that the tensors of x and y share."""
    leaves = pytree.tree_leaves((x, y))
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError("x and y must be tensors, or nested structures of tensors, where there is a mask or ways")
    shapes = [list(leaf.shape) for leaf in leaves]
    if any(len(shape) < 2 or shape[:2] != shapes[0][:2] for shape in shapes):
        raise ValueError(f"x and y must agree in [B, S] where there is a mask or ways, got shapes {shapes}")
    return (shapes[0][0], shapes[0][1]), leaves[0].device


def _check(
    name: str, value: object, dtype: torch.dtype, shape: tuple[int, ...], letters: str, device: torch.device
) -> None:
    """Raises TypeError or ValueError unless the value is None or a tensor of this dtype, shape and device."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype != dtype:
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of {dtype}, got {found}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {letters} = {list(shape)}, got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on the device of x, {device}, got {value.device}")


def _sizes(
    y: Structure, mask: Tensor | None, ways: Tensor | None, shape: tuple[int, int], device: torch.device
) -> list[tuple[int, int]]:
    """How many examples and ways every task has, checked; 0 ways where they are not given."""
    tasks, size = shape
    sizes = torch.full((tasks,), size, device=device) if mask is None else mask.sum(1)
    widths = torch.zeros_like(sizes) if ways is None else ways
    largest = torch.full_like(sizes, -1)
    if ways is not None and isinstance(y, Tensor) and y.dim() == 2 and not y.is_floating_point():
        largest = (y if mask is None else y.masked_fill(~mask, -1)).amax(1) if size else largest
    found = torch.stack([sizes, widths, largest.to(sizes.dtype)], 1).tolist()  # in one go
    for task, (count, width, label) in enumerate(found):
        if not count:
            raise ValueError(f"every task must have at least one real example, got none in task {task}")
        if ways is not None and width < 1:
            raise ValueError(f"ways must be at least 1, got {width} for task {task}")
        if ways is not None and label >= width:
            raise ValueError(f"y must be below a task's ways, got label {label} in task {task} of {width} ways")
    return [(count, width) for count, width, _ in found]
