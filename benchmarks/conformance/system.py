"""A batch of linear systems, the products with its matrices, and the judgement of what a solver returned for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, IntEnum

import torch
from torch import Tensor


class Must(Enum):
    """What a row of a batch demands of a solver."""

    SOLVE = "a right x, not reported as a failure"
    NOT_LIE = "a right x, or a failure that is reported"
    REPORT = "no x solves the system, or the products are not numbers: a failure that is reported"


class Verdict(IntEnum):
    """How a solver did in a case; of several parts or rows the largest counts."""

    PASS = 0
    RIGHT_BUT = 1  # every answer is right, but the case asks for more
    REPORTED = 2  # a row that has a solution was not solved, and the outputs say so
    RAISES = 3
    SILENT = 4  # a wrong answer that nothing in the outputs tells from a right one
    NOT_OFFERED = 5


@dataclass(frozen=True)
class System:
    """A_b x_b = b_b for every row b, as it is given to a solver.

    Attributes:
        A: [B, N, N] float64, symmetric; products are computed in float64 and rounded to the type of b.
        b: [B, N] or [B, N, K] in the type of the solve.
        must: one per row.
        rtol: the tolerance that a solver is given; a number, or one per row [B] float64.
        slack: a row is right where ‖b − A x‖ ≤ slack rtol ‖b‖. 10, so that a solver which misses its tolerance by a
            little does not fail cases about something else; 1 in those about the tolerance.
        x0: [B, N], a warm start.
        preconditioner: [B, N, N] float64, M ≈ A⁻¹.
        most_products: the largest number of products with A per row that the case allows.
        expected_x: [B, N], the x that must come back with the same bits.
        twin: a second batch; rows `shared` are the same in both, and must come back with the same bits.
        zero_dim: every row is given as a tensor without dimensions; N is 1.
        optional: a part that counts only where the interface allows it.
    """

    A: Tensor
    b: Tensor
    must: tuple[Must, ...]
    rtol: float | Tensor = 1e-8
    slack: float = 10
    max_iterations: int = 500
    x0: Tensor | None = None
    preconditioner: Tensor | None = None
    most_products: int | None = None
    expected_x: Tensor | None = None
    twin: System | None = None
    shared: tuple[int, ...] = ()
    zero_dim: bool = False
    optional: bool = False

    @property
    def needs(self) -> set[str]:
        """The options that a solver must have for this system."""
        asked = {
            "x0": self.x0 is not None,
            "preconditioner": self.preconditioner is not None,
            "a scalar without dimensions": self.zero_dim,
        }
        return {name for name, needed in asked.items() if needed}

    def tolerances(self) -> list[float]:
        return torch.as_tensor(self.rtol, dtype=torch.float64).expand(len(self.b)).tolist()


class Products:
    """The operator that every solver is given. A call for k rows counts as one product for each of them."""

    def __init__(self, system: System) -> None:
        self.A = system.A
        self.count = torch.zeros(len(system.A), dtype=torch.int64)

    def __call__(self, p: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """A p for p [R, N] or [R, N, K], of the rows that are named."""
        if p.shape[0] != len(self.count[rows]):
            raise ValueError(f"p must have {len(self.count[rows])} rows, got {list(p.shape)}")
        self.count.index_add_(0, *self._ones(rows))
        columns = p.double() if p.dim() == 3 else p.double().unsqueeze(2)
        product = (self.A[rows].unsqueeze(3) * columns.unsqueeze(1)).sum(2).to(p.dtype)  # row by row, in one order
        return product.reshape(p.shape)

    def _ones(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        which = torch.arange(len(self.count))[rows].unique()
        return which, torch.ones_like(which)


@dataclass
class Outcome:
    """What a solver returned.

    Attributes:
        x: as b.
        failed: [B] or [B, K] bool, what the outputs report; without dimensions where they speak of the whole call;
            None where the interface reports nothing.
        raised: by row, the exception that the call of this row ended with.
    """

    x: Tensor
    failed: Tensor | None = None
    raised: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A solver in a case. residual: the largest ‖b − A x‖ / ‖b‖ among rows that can be solved, in float64."""

    verdict: Verdict
    products: int | None = None
    residual: float | None = None
    message: str = ""


def _norm(v: Tensor) -> float:
    """‖v‖ of any magnitude."""
    largest = float(v.abs().max())
    return largest * float((v / largest).norm()) if 0 < largest < math.inf else largest


def true_residual(A: Tensor, x: Tensor, b: Tensor) -> tuple[float, float]:
    """‖b − A x‖ / ‖b‖ of one row in float64, and how far rounding alone may take it above what was asked.

    The allowance is 4 u for the subtraction in the type of b, and 4 √N u₆₄ ‖A‖ ‖x‖ / ‖b‖ for a product in float64.
    """
    scale = _norm(b.double())
    if scale == 0:
        return (0.0 if not x.any() else math.inf), 0.0
    x, size = x.double() / scale, math.sqrt(len(x))
    residual = _norm(b.double() / scale - A @ x)
    in_products = 4 * size * torch.finfo(torch.float64).eps * float(torch.linalg.matrix_norm(A, 2)) * _norm(x)
    return residual, 4 * torch.finfo(b.dtype).eps + in_products


def judge(system: System, outcome: Outcome, products: Products) -> Cell:
    """The verdict on what came back for a system, by residuals computed here in float64."""
    b = system.b if system.b.dim() == 3 else system.b.unsqueeze(2)
    x = outcome.x.reshape(b.shape)
    failed = outcome.failed
    whole_call = failed is not None and failed.dim() == 0
    if failed is not None:
        failed = (failed if failed.dim() == 2 else failed.reshape(-1, 1)).expand(b.shape[0], b.shape[2])
    found: list[tuple[Verdict, str]] = []
    worst = 0.0
    false_alarms = []
    for row, (must, rtol) in enumerate(zip(system.must, system.tolerances(), strict=True)):
        for column in range(b.shape[2]):
            where = f"row {row}" + (f", column {column}" if b.shape[2] > 1 else "")
            said = failed is not None and bool(failed[row, column])
            finite = bool(x[row, :, column].isfinite().all())
            residual, allowance = math.nan, 0.0
            if finite and must is not Must.REPORT:
                residual, allowance = true_residual(system.A[row], x[row, :, column], b[row, :, column])
                worst = max(worst, residual)
            right = residual <= (rtol if said else system.slack * rtol) + allowance  # a report is right above rtol
            size = f"residual {residual:.1e}, asked {rtol:.0e}" if finite else "x is not finite"
            if must is Must.REPORT and finite and not said:
                found.append((Verdict.SILENT, f"{where} has no solution, and a finite x came without a report"))
            elif must is Must.SOLVE and row in outcome.raised:
                found.append((Verdict.RAISES, f"{where}: {outcome.raised[row]}"))
            elif must is not Must.REPORT and not right and finite and not said:
                found.append((Verdict.SILENT, f"{where}: {size}, nothing reported"))
            elif must is Must.SOLVE and not right:
                found.append((Verdict.REPORTED, f"{where}: {size}{', reported' if said else ''}"))
            elif must is Must.SOLVE and said:
                false_alarms.append((Verdict.RIGHT_BUT, f"{where}: {size}, but reported as a failure"))
    some_row_failed = any(must is not Must.SOLVE for must in system.must) or bool(found)
    if not (whole_call and some_row_failed):
        found += false_alarms
    found += _more_than_residuals(system, outcome, products)
    verdict, message = max(found, key=lambda item: item[0], default=(Verdict.PASS, ""))
    return Cell(verdict, int(products.count.max()), worst, message)


def _more_than_residuals(system: System, outcome: Outcome, products: Products) -> list[tuple[Verdict, str]]:
    most, count = system.most_products, int(products.count.max())
    found = []
    if most is not None and count > most:
        found.append((Verdict.RIGHT_BUT, f"{count} products, and {most} are allowed"))
    if system.expected_x is not None and not torch.equal(outcome.x.reshape(system.b.shape), system.expected_x):
        found.append((Verdict.RIGHT_BUT, "x changed although it solves the system exactly"))
    return found
