"""Where each named parameter lies in the flat vector that the algorithms work on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class ParameterLayout:
    """Holds the names and shapes of parameters that lie one after another in a flat vector of `numel` entries.

    Attributes:
        names: in the order of the flat vector; distinct. shapes: one per name.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "shapes", tuple(torch.Size(shape) for shape in self.shapes))
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names must be distinct, got {list(self.names)}")

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> ParameterLayout:
        """Makes the layout of {name: shape}, in the order of the mapping."""
        return cls(tuple(shapes), tuple(torch.Size(shape) for shape in shapes.values()))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def numel(self) -> int:
        """N, the entries of all parameters together."""
        return sum(self.sizes)

    @cached_property
    def positions(self) -> dict[str, Tensor]:
        """Where each entry of each parameter lies in the flat vector, {name: int64 [*shape]}."""
        return self.views(torch.arange(self.numel))

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Returns every parameter of a flat [..., N] tensor by name, [..., *shape]; copies nothing.

        Raises:
            TypeError, ValueError: `flat` is not a tensor whose last dimension has N entries.
        """
        if not isinstance(flat, Tensor):
            raise TypeError(f"flat must be a tensor, got {type(flat).__name__}")
        if flat.dim() < 1 or flat.shape[-1] != self.numel:
            raise ValueError(f"flat must have shape [..., {self.numel}], got {list(flat.shape)}")
        pieces = flat.split(self.sizes, dim=-1)  # in one: its derivative is one concatenation, that of slices a sum
        named = zip(self.names, self.shapes, pieces, strict=True)
        return {name: piece.view((*flat.shape[:-1], *shape)) for name, shape, piece in named}

    def shared_last_layer(self, flat: Tensor, outputs: int) -> dict[str, Tensor]:
        """Returns the weight [in, outputs] and bias [outputs] of a last layer, every output the mean of flat's [N]."""
        views = self.views(flat)
        means = {name: views[name].mean(-1, keepdim=True) for name in self.names[-2:]}
        return {name: mean.expand(*mean.shape[:-1], outputs) for name, mean in means.items()}

    def share_last_layer_(self, flat: Tensor) -> Tensor:
        """Gives every output of the last layer of `flat` [N] the mean over the outputs, in place."""
        views = self.views(flat)
        for name, shared in self.shared_last_layer(flat, self.shapes[-1][-1]).items():
            views[name].copy_(shared)
        return flat

    def flatten(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Inverts `views`: {name: [..., *shape]} to one flat [..., N] tensor (a copy).

        Raises:
            ValueError: names are missing or unknown, or shapes do not fit.
        """
        missing = [name for name in self.names if name not in parameters]
        unknown = [name for name in parameters if name not in self.names]
        if missing or unknown:
            raise ValueError(f"parameters must be named {list(self.names)}; missing {missing}, unknown {unknown}")
        lead: tuple[int, ...] | None = None
        for name, shape in zip(self.names, self.shapes, strict=True):
            found = tuple(parameters[name].shape)
            before = found[: max(0, len(found) - len(shape))] if lead is None else lead
            if found != (*before, *shape):
                expected = ", ".join(map(str, ["...", *shape] if lead is None else [*lead, *shape]))
                raise ValueError(f"parameter {name!r} must have shape [{expected}], got {list(found)}")
            lead = before
        return torch.cat([parameters[name].reshape((*(lead or ()), -1)) for name in self.names], dim=-1)
