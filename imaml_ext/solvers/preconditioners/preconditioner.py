"""What every preconditioner offers: settings that make it for a matrix, and the made one that is applied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from imaml_ext.ops import Coefficient, as_coefficient, compute_dtype
from imaml_ext.ops.calls import callback
from imaml_ext.settings import Choice
from imaml_ext.solvers.form import Form
from imaml_ext.solvers.operators import product_of

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class MadePreconditioner(ABC):
    """M ≈ (H + diag(shift))⁻¹ of B rows, symmetric positive definite; `cg` takes it as `preconditioner=`.

    Attributes:
        products: products with H per row that were spent to make it, in the price of one; 0 where others paid.
        fallback: [B] bool, rows that gave nothing to make it from: M is 1 / shift there, or 1 where that is not
            positive.
        diagonal: [B, N] where M is one, which `cg` fuses into its iteration; else None.
    """

    multi_rhs: ClassVar[bool] = True

    products: int
    fallback: Tensor

    @property
    def diagonal(self) -> Tensor | None:
        return None

    def check_rows(self, b: Tensor) -> None:
        """Raises ValueError unless it was made for rows like those of b [B, N]; one without `like` tells B alone."""
        made_for = getattr(self, "like", self.fallback).shape
        if made_for != b.shape[: len(made_for)]:
            raise ValueError(
                f"preconditioner must be made for rows like those of b, {list(b.shape)}, got one made for "
                f"{list(made_for)}"
            )

    @abstractmethod
    def __call__(self, r: Tensor, rows: slice = ALL) -> Tensor:
        """Returns M r for r [k, N], or K vectors per row [k, N, K], of these rows; in the dtype of r."""

    @abstractmethod
    def for_shift(self, shift: Coefficient) -> MadePreconditioner:
        """Returns the preconditioner of the same H with another shift, for no product."""


class Preconditioner(Choice):
    """Settings of a preconditioner, which make it. A new one is a file, and an entry of `kinds`.

    What is made is a function of the settings, `seed` included, and of H alone; no global random state is touched. A
    row's M depends on no other row.
    """

    kinds: ClassVar[dict[str, str]] = {
        "jacobi": "imaml_ext.solvers.preconditioners.jacobi.Jacobi",
        "nystrom": "imaml_ext.solvers.preconditioners.nystrom.Nystrom",
        "kfac": "imaml_ext.solvers.preconditioners.kfac.KFAC",
        "refreshed": "imaml_ext.solvers.preconditioners.refreshed.Refreshed",
    }

    @abstractmethod
    def make(self, operator: Any, like: Tensor, shift: Coefficient = 0.0) -> MadePreconditioner:
        """Returns the preconditioner of H + diag(shift).

        Args:
            operator: H as `cg` takes it for b [B, N]: p [B, N] -> H p, row b from row b alone, or a matrix. One marked
                by `multi_rhs` is given all of its probes [B, N, K] in one call.
            like: [B, N], a vector of the dtype and device of those that will be preconditioned.
            shift: λ + δ, a number, one per task [B], one per parameter [N], or [B, N].

        Raises:
            TypeError, ValueError: an argument, or a product, of the wrong type, dtype, shape or device.
        """


def products(operator: Any, probes: Tensor, like: Tensor, name: str) -> Tensor:
    """Returns H z [B, N, K], in the compute type, for the K columns of probes [N, K], the same for all rows.

    All K go into one call where the operator can take them.
    """
    columns = probes.to(like.dtype).expand(like.shape[0], -1, -1)  # [B, N, K]
    form = Form.of(columns)
    product = callback(product_of(operator, form, f"{name}: operator"), name, "operator", like)
    result = product(form.pack(columns, "probes"))
    if result.dtype != like.dtype:
        raise TypeError(f"{name}: operator must return {like.dtype}, got {result.dtype}")
    return form.unpack(result.detach().to(probes.dtype))


def drawn(seed: int, like: Tensor, count: int) -> Tensor:
    """Returns random signs [N, count] of the compute type: the same for a seed on every device.

    A column is contiguous, as the vectors of products are.
    """
    generator = torch.Generator().manual_seed(seed)
    size = like.shape[1]
    eights = torch.randint(0, 256, (count, -(-size // 8), 1), generator=generator, dtype=torch.uint8)
    bits = eights.bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).flatten(1)[:, :size]
    return bits.to(like.device, compute_dtype(like.dtype)).mul_(2).sub_(1).mT


def shift_rows(shift: Coefficient, like: Tensor) -> Tensor:
    """Returns a shift as [1 or B, 1 or N] in the compute type, without a graph."""
    return as_coefficient(shift, "shift", like).detach()


def shape_of(like: Tensor) -> Tensor:
    """Returns a tensor of the shape, dtype and device of `like` that holds no memory of its own."""
    return like.new_zeros(()).expand(like.shape)
