"""What a function takes beside the unknowns: structures, of whose tensors some take part in a derivative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class Arguments:
    """A nested structure of tensors and of anything else.

    Attributes:
        places: which of the leaves are tensors that require a gradient.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    places: tuple[int, ...]

    @classmethod
    def of(cls, value: Any) -> Arguments:
        leaves, spec = pytree.tree_flatten(value)
        wanted = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        return cls(tuple(leaves), spec, tuple(wanted))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that require a gradient."""
        return tuple(self.leaves[i] for i in self.places)

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """The structure with these in place of `tensors`."""
        leaves = list(self.leaves)
        for i, tensor in zip(self.places, tensors, strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, self.spec)

    def detached(self) -> Any:
        """The structure without a graph."""
        return self.filled([tensor.detach() for tensor in self.tensors])


def pulled_back(
    outputs: Tensor, tensors: Sequence[Tensor], cotangent: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """cotangentᵀ ∂outputs/∂w for every w of `tensors` that is needed, zero where there is no dependence.

    With a graph where autograd records, for the derivative after this one.
    """
    wanted = [w for w, need in zip(tensors, needs, strict=True) if need]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if wanted and outputs.requires_grad:
        found = torch.autograd.grad(outputs, wanted, cotangent, create_graph=torch.is_grad_enabled(), allow_unused=True)
    each = iter(zip(wanted, found, strict=True))
    zero_where_none = (torch.zeros_like(w) if value is None else value for w, value in each)
    return tuple(next(zero_where_none) if need else None for need in needs)
