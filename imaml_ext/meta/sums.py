"""What an algorithm finds of a batch of tasks, some of them at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from imaml_ext.batch import Sides, TaskData
from imaml_ext.losses.ragged import RaggedData
from imaml_ext.ops import as_coefficient
from imaml_ext.ops.recording import map_tensors
from imaml_ext.settings import Settings

Rows = slice | Tensor  # which tasks of a batch: a slice, or their numbers [k]
S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, eq=False)
class Sums:
    """What an algorithm has found of B tasks.

    Attributes:
        by: derivatives by name, summed over the tasks that count: "theta" [N], the coefficients that are learnt [N],
            "shared" [N_s] where tasks share parameters. And what the algorithm carries on, summed alike.
        counted: [B] bool, the tasks that count.
        metrics: {name: [B]}, numbers or truth values.
    """

    by: dict[str, Tensor]
    counted: Tensor
    metrics: dict[str, Tensor]


def counted_sum(rows: Tensor, counted: Tensor) -> Tensor:
    """Returns the sum over the tasks that count, [B, N] → [N]."""
    return torch.where(counted.unsqueeze(1), rows, 0.0).sum(0)  # a NaN times 0 is a NaN


def means(metrics: Mapping[str, Tensor], counted: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns 0-d: the mean over the tasks that count (of none, 0 / 0), or of truth values the part of all tasks.

    Args:
        dtype: of the means.
    """
    numbers = {name: value.to(dtype) for name, value in metrics.items() if value.dtype != torch.bool}
    flags = {name: value for name, value in metrics.items() if name not in numbers}
    found = torch.where(counted, torch.stack(list(numbers.values())), 0.0).sum(1) / counted.sum()
    parts = torch.stack(list(flags.values())).to(dtype).mean(1)
    by_name = dict(zip((*numbers, *flags), (*found, *parts), strict=True))
    return {name: by_name[name] for name in metrics}


def tasks_of(data: Any, rows: Rows, tasks: int) -> Any:
    """Returns some of the tasks of `data`: of every tensor whose first dimension is `tasks`, these rows."""
    if isinstance(data, Sides):
        return Sides(*(tasks_of(side, rows, tasks) for side in data))
    if isinstance(data, RaggedData):
        data = TaskData(data.x, data.y, data.mask, data.ways)
    return map_tensors(lambda leaf: leaf[rows] if leaf.dim() and len(leaf) == tasks else leaf, data)


def coefficients(settings: Settings) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the settings, with the path of its field."""
    for each in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, each.name)
        if isinstance(value, Tensor):
            yield each.name, value
        elif isinstance(value, Settings):
            yield from ((f"{each.name}.{path}", tensor) for path, tensor in coefficients(value))


def settings_of(settings: S, rows: Rows, like: Tensor) -> S:
    """Returns the settings for some of the tasks of `like` [B, N]: these rows of coefficients given one per task."""
    changed: dict[str, Any] = {}
    for each in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, each.name)
        if isinstance(value, Tensor):
            coefficient = as_coefficient(value, each.name, like)  # [1 or B, 1 or N]
            changed[each.name] = coefficient[rows] if len(coefficient) > 1 else coefficient
        elif isinstance(value, Settings) and (own := settings_of(value, rows, like)) is not value:
            changed[each.name] = own
    return dataclasses.replace(settings, **changed) if changed else settings  # type: ignore[type-var]
