"""Derivatives inside the library, whatever the caller has switched off."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Lets autograd record, also under torch.no_grad and torch.inference_mode; tensors from there need `recordable`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def recordable(data: T) -> T:
    """Returns data that autograd can keep: as they are or, where `map_tensors` finds tensors of inference mode, copied.

    To be called while `recording`, for a copy that is made in inference mode is such a tensor too.
    """
    if isinstance(data, Tensor):
        return data.clone() if data.is_inference() else data  # type: ignore[return-value]
    found = False

    def usable(leaf: Tensor) -> Tensor:
        nonlocal found
        found |= leaf.is_inference()
        return leaf.clone() if leaf.is_inference() else leaf

    copied = map_tensors(usable, data)
    return copied if found else data


def map_tensors(function: Callable[[Tensor], Tensor], data: T) -> T:
    """Returns data with `function` of every tensor in its place.

    Tensors are found in nested tuples, lists and dictionaries, and in the attributes of objects that these hold.
    """

    def mapped(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not hasattr(leaf, "__dict__") or callable(leaf) or isinstance(leaf, type):
            return leaf
        values = {name: pytree.tree_map(of_attribute, value) for name, value in vars(leaf).items()}
        if all(value is vars(leaf)[name] for name, value in values.items()):
            return leaf
        copied = copy.copy(leaf)
        vars(copied).update(values)
        return copied

    def of_attribute(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(mapped, data)
