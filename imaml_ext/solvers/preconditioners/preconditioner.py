"""What every preconditioner offers: settings that make it for a matrix, and the made one that is applied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imaml_ext.ops import Coefficient, as_coefficient, compute_dtype
from imaml_ext.ops.calls import callback
from imaml_ext.settings import Choice

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class MadePreconditioner(ABC):
    """M ≈ (H + diag(shift))⁻¹ of B rows, symmetric positive definite; `cg` takes it as `preconditioner=`.

    Attributes:
        products: products with H per row that were spent to make it, in the price of one; 0 where others paid.
        fallback: [B] bool, rows that gave nothing to make it from: M is 1 / shift there, or 1 where that is not
            positive.
        diagonal: [B, N] or [1, N] where M is one, which `cg` fuses into its iteration; else None.
    """

    products: int
    fallback: Tensor

    @property
    def diagonal(self) -> Tensor | None:
        return None

    @abstractmethod
    def __call__(self, r: Tensor, rows: slice = ALL) -> Tensor:
        """Returns M r [k, N] for r [k, N] of these rows, in the dtype of r."""

    @abstractmethod
    def for_shift(self, shift: Coefficient) -> MadePreconditioner:
        """Returns the preconditioner of the same H with another shift, for no product."""


class Preconditioner(Choice):
    """Settings of a preconditioner, which make it. A new one is a file, and an entry of `kinds`.

    What is made is a function of the settings, `seed` included, and of H alone; no global random state is touched. A
    row's M depends on no other row.
    """

    kinds: ClassVar[dict[str, str]] = {
        name: f"imaml_ext.solvers.preconditioners.{module}.{attribute}"
        for name, module, attribute in (
            ("jacobi", "jacobi", "Jacobi"),
            ("nystrom", "nystrom", "Nystrom"),
            ("kfac", "kfac", "KFAC"),
            ("refreshed", "refreshed", "Refreshed"),
        )
    }

    @abstractmethod
    def make(self, operator: Callable[[Tensor], Tensor], like: Tensor, shift: Coefficient = 0.0) -> MadePreconditioner:
        """Returns the preconditioner of H + diag(shift).

        Args:
            operator: p [B, N] -> H p [B, N], row b from row b alone.
            like: [B, N], a vector of the dtype and device of those that will be preconditioned.
            shift: λ + δ, a number, one per task [B], one per parameter [N], or [B, N].

        Raises:
            TypeError, ValueError: an argument, or a product, of the wrong type, dtype, shape or device.
        """


def products(operator: Callable[[Tensor], Tensor], probes: Tensor, like: Tensor, name: str) -> Tensor:
    """Returns H z [B, N, K], in the compute type, for the K columns of probes [N, K], the same for all rows."""
    operator = callback(operator, name, "operator", like)
    columns = []
    for k in range(probes.shape[1]):
        column = operator(probes[:, k].to(like.dtype).expand_as(like).contiguous())
        if not isinstance(column, Tensor):
            raise TypeError(f"{name}: operator must return a tensor, got {type(column).__name__}")
        if column.shape != like.shape or column.dtype != like.dtype or column.device != like.device:
            raise ValueError(
                f"{name}: operator must return {list(like.shape)}, {like.dtype} on {like.device}, "
                f"got {list(column.shape)}, {column.dtype} on {column.device}"
            )
        columns.append(column.detach().to(probes.dtype))
    return torch.stack(columns, 2)


def drawn(seed: int, like: Tensor, count: int, *, signs: bool) -> Tensor:
    """Returns random signs or Gaussians [N, count] of the compute type: the same bits for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    shape, dtype = (like.shape[1], count), compute_dtype(like.dtype)
    if signs:
        return torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1).to(like.device, dtype)
    return torch.randn(shape, generator=generator, dtype=dtype).to(like.device)


def shift_rows(shift: Coefficient, like: Tensor) -> Tensor:
    """Returns a shift as [1 or B, 1 or N] in the compute type, without a graph."""
    return as_coefficient(shift, "shift", like).detach()


def shape_of(like: Tensor) -> Tensor:
    """Returns a tensor of the shape, dtype and device of `like` that holds no memory of its own."""
    return like.new_zeros(()).expand(like.shape)
