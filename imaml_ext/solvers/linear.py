"""What every solver of (H_b + diag(shift)) x_b = b_b offers, and what it returns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from imaml_ext.errors import SolveError
from imaml_ext.ops import Coefficient
from imaml_ext.ops.calls import callback, check_untransformed
from imaml_ext.settings import Choice
from imaml_ext.solvers.operators import System

Operator = Callable[[Tensor], Tensor]  # p [B, N] -> H p [B, N], row b from row b alone
Self = TypeVar("Self", bound="LinearSolver")


class SolveStatus(IntEnum):
    """How a row ended. RowStatus in csrc/common/row.h has the same numbers."""

    CONVERGED = 0
    MAX_ITERATIONS = 1
    NEGATIVE_CURVATURE = 2
    NON_FINITE = 3
    DIVERGED = 6
    SINGULAR = 7
    STAGNATED = 8

    @property
    def advice(self) -> str:
        """What the status means, and what to do about it."""
        return _ADVICE[self]


_ADVICE = {
    SolveStatus.CONVERGED: "the residual is within the tolerance",
    SolveStatus.MAX_ITERATIONS: (
        "the iterations were spent before a measured residual met the tolerance: raise max_iterations or rtol, "
        "precondition, or add to shift (or A is not symmetric: check_symmetry=True looks at that)"
    ),
    SolveStatus.NEGATIVE_CURVATURE: (
        "pᵀAp < 0, so A = H + diag(shift) (or the preconditioner) is not positive definite to working precision, which "
        "a definite A can be too if its condition number is beyond about 1e15 in float64, 1e6 in float32, 250 in "
        "float16 and 60 in bfloat16: raise shift, use a positive semi-definite matrix such as Gauss-Newton in place of "
        "H, or solve by MINRES"
    ),
    SolveStatus.NON_FINITE: (
        "b, x0 or what the callback returned has NaN or infinite entries, or the solution overflows its dtype: look at "
        "the row's inputs, lower the inner learning rate, or use a wider dtype"
    ),
    SolveStatus.DIVERGED: (
        "the residual has grown, so the iteration does not converge for this matrix: raise lam or damping, lower the "
        "solver's lr, or solve by CG or MINRES; in lsqr, rmatvec is not the adjoint of M"
    ),
    SolveStatus.SINGULAR: (
        "A = H + diag(shift) is singular to working precision, and b is not in its range: x has about the least "
        "residual that was found; raise shift, or use a wider dtype if A is only ill-conditioned"
    ),
    SolveStatus.STAGNATED: (
        "b − A x was measured repeatedly and falls no further, though it is above the tolerance: residual_norm is what "
        "this dtype and these products can reach; raise rtol, use a wider dtype, or compute the products in more "
        "precision"
    ),
}
_UNFINISHED = (SolveStatus.MAX_ITERATIONS, SolveStatus.STAGNATED)
_BROKE_DOWN = (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.DIVERGED, SolveStatus.SINGULAR)


@dataclass(frozen=True, eq=False)
class Lanczos:
    """The tridiagonal matrices T = VᵀAV of a solve, A with its shift, V orthonormal and begun at b / ‖b‖.

    With a preconditioner M they are those of M^½ A M^½ begun at M^½ b.

    Attributes:
        diagonal: [B, m] float64. off_diagonal: [B, m − 1] float64. steps: [B] int32, the rows of T that are known: in
            `cg` the steps until the row's first measurement, restart or end. Entries at and beyond them are 0.

    Source: Golub and Meurant, Matrices, moments and quadrature with applications (2010), section 4.1.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    steps: Tensor


@dataclass(frozen=True, eq=False)
class SetUp:
    """What a solver did to make its preconditioner.

    Attributes:
        products: products with H per row that it spent, or their price; 0 where it has kept one.
        fallback: [B] bool, rows of which nothing could be learnt: they were divided by the shift.
    """

    products: int
    fallback: Tensor


@dataclass(frozen=True, eq=False)
class Solution:
    """What a linear solver returns; every field stays on the device of `b`, and nothing has been read back.

    Two solutions are equal only if they are the same object. `torch.load` with weights_only=True reads a solution back
    where imaml_ext.solvers has been imported.

    What there is one of per system, [B] here, is [] for one system and [B, K] for K right-hand sides.

    Attributes:
        x: the solution, or the last good iterate of a row that failed; in the form of b.
        status: [B] int32, a `SolveStatus`.
        iterations: [B] int32, steps taken.
        residual_norm: [B] float64, ‖b − A x‖ for the x returned, measured where a row is CONVERGED or STAGNATED. In CG
            and MINRES it is otherwise that of the recurrence, an estimate that can be far too small once rounding
            matters. In Neumann and FixedPoint it is that of the iterate before x where a row has spent its iterations.
            NaN where nothing has measured it.
        lanczos: the coefficients of the solve, where they were asked for.
        set_up: what was spent on a preconditioner that the solver made; `iterations` does not count it.
    """

    x: Any
    status: Tensor
    iterations: Tensor
    residual_norm: Tensor
    lanczos: Lanczos | None = None
    set_up: SetUp | None = None

    @property
    def non_finite(self) -> Tensor:
        """[B] bool: NaN or infinity in b or in a product."""
        return self.status == SolveStatus.NON_FINITE

    @property
    def broke_down(self) -> Tensor:
        """[B] bool: the matrix is not what the solver needs (NEGATIVE_CURVATURE, DIVERGED or SINGULAR)."""
        return torch.stack([self.status == status for status in _BROKE_DOWN]).any(0)

    @property
    def unfinished(self) -> Tensor:
        """[B] bool: the solver has stopped short of the tolerance, and the matrix is not to blame (MAX_ITERATIONS)."""
        return torch.stack([self.status == status for status in _UNFINISHED]).any(0)

    def raise_if_failed(self, *, unfinished: bool = True, what: str = "rows") -> None:
        """Waits for the device, and raises `SolveError` if a row is not CONVERGED.

        Args:
            unfinished: rows that have spent their iterations or STAGNATED have failed too. what: the rows are, for the
                message.

        Raises:
            SolveError: says which rows have failed, how, and what to do.
        """
        if not bool(self.status.any()):
            return
        statuses = self.status.flatten().tolist()
        sentences = []
        for status in list(SolveStatus)[1:]:
            rows = [row for row, value in enumerate(statuses) if value == status]
            if rows and (unfinished or status not in _UNFINISHED):
                shown = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
                sentences.append(f"{status.name} in {len(rows)} of {len(statuses)} {what} ({shown}): {status.advice}")
        if sentences:
            raise SolveError("; ".join(sentences))


torch.serialization.add_safe_globals([Solution, Lanczos, SetUp])


def checked(operator: Operator, b: Tensor, name: str, *, shift: Coefficient) -> tuple[Operator, Tensor]:
    """Operator and b without a graph, for a solver `name` in torch operations: what it demands is what `cg` does.

    Raises:
        TypeError, ValueError: in a call of the operator, for a product unlike b.
        RuntimeError: under a transform of torch.func.
    """
    check_untransformed(name, b=b, shift=shift)
    operator = callback(operator, name, "A", b)

    def product(p: Tensor) -> Tensor:
        result = operator(p)
        if not isinstance(result, Tensor):
            raise TypeError(f"{name}: A must return a tensor, got {type(result).__name__}")
        for what in ("device", "dtype", "shape"):
            found, expected = getattr(result, what), getattr(b, what)
            if found != expected:
                error = TypeError if what == "dtype" else ValueError
                raise error(
                    f"{name}: what A returns must have the {what} of b, {_words(expected)}, got {_words(found)}"
                )
        return result.detach()

    return product, b.detach()


def _words(value: object) -> str:
    return str(list(value)) if isinstance(value, torch.Size) else str(value).removeprefix("torch.")


def row_norm(a: Tensor) -> Tensor:
    """‖a‖ of every row, [B] float64, for entries of any magnitude: squares are taken next to 1."""
    if a.dtype != torch.float64 or a.shape[1] == 0:
        return torch.linalg.vector_norm(a, dim=1, dtype=torch.float64)
    largest = a.abs().amax(1)
    scale = torch.where(largest.isfinite() & (largest > 0), largest, 1.0)
    return torch.linalg.vector_norm(a / scale.unsqueeze(1), dim=1) * scale


class LinearSolver(Choice):
    """Settings of a linear solver, and the solver. A new one is a file, and an entry of `kinds`.

    Attributes:
        breakdown: how a row ends whose matrix is not what the solver needs.
    """

    kinds: ClassVar[dict[str, str]] = {
        "cg": "imaml_ext.solvers.cg.CG",
        "neumann": "imaml_ext.solvers.stationary.Neumann",
        "fixed_point": "imaml_ext.solvers.stationary.FixedPoint",
        "minres": "imaml_ext.solvers.minres.MINRES",
    }

    breakdown: ClassVar[SolveStatus] = SolveStatus.NEGATIVE_CURVATURE

    def solve(self, A: Any, b: Any, shift: Any = 0.0, x0: Any = None) -> Solution:
        """Solves (A_b + diag(shift)) x_b = b_b for every row b; nothing waits for the device.

        Args:
            A, b, shift, x0: as for `imaml_ext.cg`: an operator, right-hand sides, λ + δ, and a warm start. A
                `CurvatureOperator` says how many rows at a time it does best with.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        """
        system = System.read(A, b)
        shift, x0 = system.coefficient(shift, "shift"), system.rows(x0, "x0")
        return system.solution(self.solve_rows(system.operator, system.b, shift=shift, x0=x0))

    @abstractmethod
    def solve_rows(self, operator: Operator, b: Tensor, *, shift: Coefficient, x0: Tensor | None) -> Solution:
        """What a solver implements: `solve` for operator p [R, N] -> A p [R, N], row r from row r alone, and b [R, N].

        Args:
            shift: a number, [R], [N] or [R, N]. x0: [R, N] to begin from, or None for 0.
        """

    def with_rate(self: Self, lr: Coefficient | None) -> Self:
        """Returns the solver for an inner solver of step size `lr`, None where that has none: itself, for most."""
        return self
