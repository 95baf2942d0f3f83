"""How unknowns and right-hand sides are written, and the rows that solvers work on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Form:
    """How b is written: `pack` makes rows [R, N] of what is written so, and `unpack` the opposite.

    Attributes:
        lead: the shape of what there is one of per system: (), (B,) or (B, K). shapes: those of the leaves of b.
        spec: the structure of b; None for a tensor. name: of the argument b, for messages.
    """

    lead: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    spec: pytree.TreeSpec | None
    dtype: torch.dtype
    device: torch.device
    name: str = "b"

    @classmethod
    def of(cls, b: Any, name: str = "b") -> Form:
        """Raises TypeError or ValueError for what is no right-hand side."""
        if isinstance(b, Tensor):
            _check_leaf(b, name, b)
            lead: tuple[int, ...] = tuple(b.shape[:1]) if b.dim() > 1 else ()
            if b.dim() == 3:
                lead = (b.shape[0], b.shape[2])
                if b.shape[2] == 0:
                    raise ValueError(f"{name} must have at least one right-hand side, got {list(b.shape)} (K = 0)")
            return cls(lead, (b.shape,), None, b.dtype, b.device, name)
        leaves, spec = pytree.tree_flatten(b)
        if not leaves or spec.is_leaf():
            raise TypeError(f"{name} must be a tensor or a nested structure of tensors, got {type_name(b)}")
        for leaf in leaves:
            _check_leaf(leaf, f"every tensor of {name}", leaves[0])
            if leaf.dim() == 0 or leaf.shape[0] != leaves[0].shape[0]:
                raise ValueError(
                    f"every tensor of {name} must have the same number of rows [B, …], got "
                    f"{[list(x.shape) for x in leaves]}"
                )
        shapes = tuple(leaf.shape for leaf in leaves)
        return cls((shapes[0][0],), shapes, spec, leaves[0].dtype, leaves[0].device, name)

    @classmethod
    def of_unknowns(cls, value: Any, name: str, problems: int | None) -> Form:
        """The form of one problem's unknowns, tensors of any shapes; or of so many problems', tensors [B, …].

        Raises:
            TypeError, ValueError: not a tensor or a structure of tensors of one dtype and device, or not [B, …].
        """
        leaves, spec = pytree.tree_flatten(value)
        if not leaves or (spec.is_leaf() and not isinstance(value, Tensor)):
            raise TypeError(f"{name} must be a tensor or a nested structure of tensors, got {type_name(value)}")
        for leaf in leaves:
            _check_leaf(leaf, name if spec.is_leaf() else f"every tensor of {name}", leaves[0])
            if problems is not None and leaf.shape[:1] != (problems,):
                raise ValueError(
                    f"{name} must have one row per problem, [{problems}, …], got {[list(x.shape) for x in leaves]}"
                )
        lead = () if problems is None else (problems,)
        shapes = tuple(leaf.shape for leaf in leaves)
        return cls(lead, shapes, None if spec.is_leaf() else spec, leaves[0].dtype, leaves[0].device, name)

    @property
    def rows(self) -> int:
        return math.prod(self.lead)

    @property
    def size(self) -> int:
        """N, the unknowns of one system."""
        return sum(math.prod(self._row_shape(shape)) for shape in self.shapes)

    @property
    def columns(self) -> int:
        """K."""
        return self.lead[1] if len(self.lead) == 2 else 1

    def _row_shape(self, shape: torch.Size) -> torch.Size:
        if len(self.lead) == 2:
            return shape[1:2]
        return shape[len(self.lead) :]

    def pack(self, value: Any, name: str) -> Tensor:
        """Rows [R, N] of what is written as b is."""
        leaves = [value]
        if self.spec is not None:
            leaves, spec = pytree.tree_flatten(value)
            if spec != self.spec:
                raise ValueError(
                    f"{name} must have the structure of {self.name}, {in_words(self.spec)}, got {in_words(spec)}"
                )
        for leaf, shape in zip(leaves, self.shapes, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{name} must be a tensor where {self.name} is, got {type_name(leaf)}")
            if leaf.shape != shape:
                raise ValueError(f"{name} must have the shape of {self.name}, {list(shape)}, got {list(leaf.shape)}")
            if leaf.device != self.device:
                raise ValueError(f"{name} must have the device of {self.name}, {self.device}, got {leaf.device}")
            self.check_dtype(leaf, name)
        if len(self.lead) == 2:
            return leaves[0].mT.flatten(0, 1)
        if len(leaves) == 1:
            return leaves[0].reshape(self.rows, self.size)
        return torch.cat([leaf.reshape(self.rows, math.prod(self._row_shape(leaf.shape))) for leaf in leaves], 1)

    def check_dtype(self, value: Tensor, name: str) -> None:
        """Raises TypeError unless it is that of b. Under autocast, that dtype will do for a product."""
        if value.dtype == self.dtype:
            return
        device = self.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if not (autocast and value.dtype == torch.get_autocast_dtype(device)):
            raise TypeError(f"{name} must have the dtype of {self.name}, {self.dtype}, got {value.dtype}")

    def unpack(self, rows: Tensor) -> Any:
        """Rows [R, N], written as b is; views where that is possible."""
        if len(self.lead) == 2:
            return rows.reshape(*self.lead, rows.shape[1]).mT
        if self.spec is None:
            return rows.reshape(self.shapes[0])
        sizes = [math.prod(self._row_shape(shape)) for shape in self.shapes]
        leaves = [part.reshape(shape) for part, shape in zip(rows.split(sizes, 1), self.shapes, strict=True)]
        return pytree.tree_unflatten(leaves, self.spec)


def _check_leaf(leaf: Any, name: str, first: Tensor) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type_name(leaf)}")
    if leaf.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {leaf.dtype}")
    if leaf.dtype != first.dtype or leaf.device != first.device:
        raise ValueError(
            f"{name} must have one dtype and device, got {first.dtype} on {first.device} and {leaf.dtype} on "
            f"{leaf.device}"
        )


def type_name(value: Any) -> str:
    return type(value).__name__


def in_words(spec: pytree.TreeSpec | None) -> str:
    """A structure with a dot for each tensor: {'w': ·, 'b': ·}."""
    assert spec is not None
    return str(pytree.tree_unflatten(["·"] * spec.num_leaves, spec)).replace("'·'", "·")
