"""Batched conjugate gradients: (H_b + diag(shift)) x_b = b_b for every row b, H only through H p."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Annotated, Any

import torch
from torch import Tensor

from imaml_ext._native import native
from imaml_ext.checks import check_int
from imaml_ext.ops import Coefficient, as_coefficient
from imaml_ext.ops.calls import callback, check_untransformed, eager, is_traced
from imaml_ext.settings import COUNT, NOT_NEGATIVE
from imaml_ext.solvers import operators
from imaml_ext.solvers.compiled import cg_loop
from imaml_ext.solvers.linear import Lanczos, LinearSolver, Operator, SetUp, Solution
from imaml_ext.solvers.operators import System
from imaml_ext.solvers.preconditioners.preconditioner import ALL, MadePreconditioner, Preconditioner

BlockOperator = Callable[[Tensor, slice], Tensor]  # [k, N] and which rows of the batch they are -> [k, N], row by row


@dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients, for symmetric positive definite matrices; what it does, `imaml_ext.cg` says."""

    max_iterations: Annotated[int, COUNT] = 5  # Largest number of products with the matrix.
    rtol: Annotated[float, NOT_NEGATIVE] = 1e-5  # Relative residual at which a task's solve stops.
    atol: Annotated[float, NOT_NEGATIVE] = 0.0  # Absolute residual at which a task's solve stops.
    # Iterations between two looks at whether all tasks are done; 0: never look, and never wait for the device.
    check_every: Annotated[int, NOT_NEGATIVE] = 0
    # What is made of the matrix before every solve, to spend fewer products in it; unset: nothing.
    preconditioner: Preconditioner | None = None

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"preconditioner": None, **values}

    def solve(self, A: Any, b: Any, shift: Any = 0.0, x0: Any = None) -> Solution:
        """As every solver's; a preconditioner is made once for all right-hand sides of an operator."""
        blocks = getattr(A, "rows_per_block", None) if isinstance(b, Tensor) and b.dim() == 2 else None
        return cg(A, b, shift=shift, x0=x0, rows_per_block=blocks, **vars(self))

    def solve_rows(self, operator: Operator, b: Tensor, *, shift: Coefficient, x0: Tensor | None) -> Solution:
        preconditioner, set_up = _prepared(self.preconditioner, operator, System(operator, b, None), shift)
        options = {**vars(self), "preconditioner": preconditioner}
        blocks = getattr(operator, "rows_per_block", None)
        solution = _cg_rows(operator, b, shift=shift, x0=x0, rows_per_block=blocks, **options)
        return solution if set_up is None else replace(solution, set_up=set_up)


def _tolerance(value: float | Tensor, name: str, b: Tensor) -> Tensor:
    """A tolerance as a float64 tensor [1 or B]."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a number or a floating-point tensor, got {value.dtype}")
        if value.device != b.device:
            raise ValueError(f"{name} must be on {b.device}, got {value.device}")
        if value.dim() != 0 and value.shape != b.shape[:1]:
            raise ValueError(f"{name} must be a number or have shape [{b.shape[0]}], got {list(value.shape)}")
        return value.detach().to(torch.float64).reshape(-1).contiguous()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return torch.full((1,), float(value), dtype=torch.float64, device=b.device)


def check_arguments(
    hvp: Operator | BlockOperator,
    b: Tensor,
    x0: Tensor | None,
    preconditioner: Tensor | Operator | BlockOperator | None,
) -> None:
    """What `cg` and its oracle demand of their arguments beyond what the ops check."""
    if x0 is not None and not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor, got {type(x0).__name__}")
    if preconditioner is not None and not isinstance(preconditioner, Tensor) and not callable(preconditioner):
        raise TypeError(f"preconditioner must be a tensor or callable, got {type(preconditioner).__name__}")


def check_blocks(rows_per_block: int | None, system: System) -> None:
    """Raises ValueError unless the rows of a batch can be solved some at a time."""
    if rows_per_block is not None and system.form is not None:
        raise ValueError("rows_per_block must be None where b is not [B, N] and A a function of p and its rows")


def all_rows(A: Any, b: Any, rows_per_block: int | None) -> Any:
    """A as it multiplies all rows at once: where rows are solved some at a time, a function is told which it has."""
    if rows_per_block is None or hasattr(A, "rows_per_block"):
        return A
    return lambda p: A(p, slice(0, b.shape[0]))


def _look_every(check_every: int, name: str) -> int:
    """The argument of that name, checked."""
    check_every = check_int("check_every", check_every, minimum=0)
    if check_every > 0 and is_traced():
        raise ValueError(
            f"check_every must be 0 where {name} is traced, as a trace can look at no value, got {check_every}"
        )
    return check_every


def loop_arguments(
    name: str,
    hvp: Operator | BlockOperator,
    b: Tensor,
    *,
    shift: Coefficient,
    x0: Tensor | None,
    rows_per_block: int | None = None,
    preconditioner: Tensor | Operator | BlockOperator | None = None,
    **stopping: Any,
) -> dict[str, Any]:
    """The arguments of every native loop, checked, for the solver `name`: those below without the preconditioner."""
    check_untransformed(name, b=b, shift=shift, x0=x0, preconditioner=preconditioner)
    check_arguments(hvp, b, x0, preconditioner)
    return {
        "shift": as_coefficient(shift.detach() if isinstance(shift, Tensor) else shift, "shift", b),
        "x0": x0,
        "rows_per_block": 0 if rows_per_block is None else check_int("rows_per_block", rows_per_block, minimum=1),
        **stopping_arguments(name, b, **stopping),
    }


def stopping_arguments(
    name: str, b: Tensor, max_iterations: int, rtol: float | Tensor, atol: float | Tensor, check_every: int = 0
) -> dict[str, Any]:
    """When the native loop of the solver `name` stops: the arguments of these names, checked."""
    return {
        "max_iterations": check_int("max_iterations", max_iterations, minimum=0),
        "rtol": _tolerance(rtol, "rtol", b),
        "atol": _tolerance(atol, "atol", b),
        "check_every": _look_every(check_every, name),
    }


def cg(
    A: Any,
    b: Any,
    *,
    shift: Any = 0.0,
    x0: Any = None,
    max_iterations: int = 5,
    rtol: float | Tensor = 1e-5,
    atol: float | Tensor = 0.0,
    preconditioner: Any = None,
    check_every: int = 0,
    rows_per_block: int | None = None,
    check_symmetry: bool = False,
    lanczos: bool = False,
) -> Solution:
    """Solves (A_b + diag(shift)) x_b = b_b for every row b by preconditioned conjugate gradients.

    Rows are independent: each has its own step lengths, tolerance, iteration count and status, and one that converges,
    breaks down or turns non-finite leaves the others' bits alone. The loop is C++; between two calls of A there is one
    fused op and no host synchronisation.

    A row is CONVERGED when b − A x has been measured, by one product, to be at most max(rtol ‖b‖, atol). It measures
    when the residual carried by recurrence is: the next p of that row is x itself. Where rounding has driven the two
    apart, the row goes on from the measured one. It is STAGNATED once four measurements were not a tenth smaller.

    A row is SINGULAR or has NEGATIVE_CURVATURE when pᵀAp > 0 does not stand out of rounding. On the first step from
    x = 0 it returns b / shift where the shift is positive (else 0). Later, a row of NEGATIVE_CURVATURE returns the
    iterate it had, and a SINGULAR one an iterate from before it ran off.

    A zero b gives x = 0 after no iterations.

    Args:
        A: symmetric, row b of its product from row b of p alone. A function p -> A p of the form of b: it is called
            with p (contiguous rows, not to be kept or written to: without x0 and preconditioner the first p is b
            itself), and what it raises comes out unchanged. Or a matrix [N, N] or [B, N, N], dense or sparse. Or an
            operator with a `shape` and @, of SciPy, curvlinops or linear_operator.
        b: float32, float64, bfloat16 or float16. [B, N], a system per row; [N], one system; [B, N, K], K right-hand
            sides for each of B operators; or a nested structure of tensors [B, …]. A function is given one [B, N] of K
            at a time, or all in one call if it is marked by `imaml_ext.solvers.multi_rhs`.
        shift: λ + δ, a number, one per task [B], one per parameter [N], or [B, N]; or a structure like b.
        x0: in the form of b, a warm start, at the price of one more product.
        max_iterations: the largest number of products otherwise, that which measures included: a row that meets its
            tolerance with the last of them is MAX_ITERATIONS. To measure any x: `cg(…, x0=x, max_iterations=0)`.
        rtol, atol: numbers, or one per system [B] or [B, K].
        preconditioner: M ≈ A⁻¹, symmetric positive definite: its diagonal ([N] or [B, N], or a structure like b), or a
            function r -> M r of the form of b. Or a `Preconditioner`, which is made here, as `Solution.set_up` tells;
            or one that has been made.
        check_every: k > 0 asks the device every k iterations whether all rows are done, to stop early; 0 never does,
            and multiplies exactly max_iterations times. Either can be captured in a CUDA graph: with k > 0 the loop is
            a while node of it, which a replay leaves when its rows are done.
        rows_per_block: k ≥ 1 solves k rows at a time, each block to its end before the next begins, so that their
            vectors stay in the cache where those of B rows would not; every row has the same bits. b must be [B, N]. A
            and a preconditioner are functions of two arguments, p [k, N] (fewer rows in the last block) and the `slice`
            of the batch that these rows are; counts of products are a block's. None: all rows together, or for K
            right-hand sides what the operator does best with.
        check_symmetry: first compare qᵀAp with pᵀAq for random p and q, by six products, and wait for the result.
        lanczos: keep the coefficients of every row's Lanczos tridiagonal, `Lanczos` with m = max_iterations. Without
            rtol and atol no measurement cuts it short. Not under torch.compile, nor with check_every in a CUDA graph.

    Returns:
        A `Solution`. No autograd graph is recorded; `imaml_ext.solve` is the differentiable solve.

    Raises:
        TypeError, ValueError: an argument, or what a function returned, of the wrong type, dtype, structure, shape or
            device; or, with check_symmetry, an A that is not symmetric.
        NativeUnavailableError: the compiled part does not load, or has no code for the device of b.
        NotImplementedError: check_every > 0 inside a captured CUDA graph, without what a while node needs: torch 2.14,
            CUDA 12.4 and a driver for it.

    Source: Hestenes and Stiefel (1952); used so in Algorithm 2 of Rajeswaran et al., arXiv 1909.04630. Restarts from a
    measured residual: van der Vorst and Ye (2000).
    """
    system = System.read(A, b)
    check_blocks(rows_per_block, system)
    whole = all_rows(A, b, rows_per_block)
    if check_symmetry:
        operators.check_symmetry(whole, b)
    undivided = system if system.form is not None else replace(system, operator=whole)
    preconditioner, set_up = _prepared(preconditioner, whole, undivided, shift)
    if rows_per_block is None and system.form is not None:
        rows_per_block = _rows_of_columns(system.operator, preconditioner)
    solution = _cg_rows(
        system.operator,
        system.b,
        **system.options(shift, x0, rtol, atol),
        max_iterations=max_iterations,
        preconditioner=preconditioner,
        check_every=check_every,
        rows_per_block=rows_per_block,
        lanczos=lanczos,
    )
    solution = system.solution(solution)
    return solution if set_up is None else replace(solution, set_up=set_up)


def _prepared(preconditioner: Any, A: Any, system: System, shift: Any) -> tuple[Any, SetUp | None]:
    """A preconditioner in any form as a diagonal or a function on rows, and what was spent to make it here."""
    form, set_up = system.form, None
    if isinstance(preconditioner, Preconditioner):
        if system.b.numel() == 0:
            return None, None
        preconditioner = make_preconditioner(preconditioner, A, system, shift)
        lead = system.b.shape[:1] if form is None else form.lead[:1]
        set_up = SetUp(preconditioner.products, preconditioner.fallback.reshape(lead))
    if isinstance(preconditioner, MadePreconditioner):
        if preconditioner.diagonal is not None:
            preconditioner = preconditioner.diagonal
        else:
            columns = 1 if form is None else form.columns
            preconditioner.check_rows(system.b[::columns])
            return preconditioner if columns == 1 else _OfColumns(preconditioner, columns), set_up
    if isinstance(preconditioner, (Tensor, dict, list, tuple)):
        return system.coefficient(preconditioner, "preconditioner"), set_up
    return system.product(preconditioner, "preconditioner"), set_up


def _rows_of_columns(A: Any, preconditioner: Any) -> int | None:
    """How many of K right-hand sides per operator to solve for at a time; None: all."""
    rows = getattr(A, "rows_per_block", None)
    if rows is None or isinstance(preconditioner, _OfColumns):  # which reads vectors of its own for each block
        return rows if rows is None else -(-16 // rows) * rows
    return rows if preconditioner is None or isinstance(preconditioner, Tensor) else None


@dataclass(frozen=True)
class _OfColumns:
    """r [B K, N] -> M r for K right-hand sides of every row; or r [k, N] and which of those rows they are."""

    made: MadePreconditioner
    columns: int

    def __call__(self, r: Tensor, rows: slice = ALL) -> Tensor:
        count = max(len(r) // self.columns, 1)
        first = (rows.start or 0) // self.columns
        columns = r.view(count, -1, r.shape[1]).mT  # [count, N, k]
        return self.made(columns, slice(first, first + count)).mT.reshape(r.shape)


@eager
def make_preconditioner(preconditioner: Preconditioner, A: Any, system: System, shift: Any) -> MadePreconditioner:
    """The preconditioner of the B operators, one for all right-hand sides of each."""
    check_untransformed("cg", b=system.b, shift=shift)
    form = system.form
    if form is not None and form.columns > 1:
        return preconditioner.make(A, system.b[:: form.columns], shift)
    return preconditioner.make(system.operator, system.b, system.coefficient(shift, "shift"))


def _cg_rows(hvp: Any, b: Tensor, **options: Any) -> Solution:
    """`cg` on rows."""
    return (_compiled_rows if torch.compiler.is_dynamo_compiling() else _eager_rows)(hvp, b, **options)


def _compiled_rows(
    hvp: Operator,
    b: Tensor,
    *,
    preconditioner: Any,
    rows_per_block: int | None = None,
    lanczos: bool = False,
    **options: Any,
) -> Solution:
    if rows_per_block is not None:
        raise ValueError(f"rows_per_block must be None in a compiled function, got {rows_per_block}")
    if lanczos:
        raise ValueError("lanczos must be False where cg is compiled, got True")
    arguments = loop_arguments("cg", hvp, b, preconditioner=preconditioner, **options)
    del arguments["check_every"], arguments["rows_per_block"]
    diagonal, preconditioner = _diagonal_or_function(preconditioner, b)
    return Solution(*cg_loop(hvp, b, inverse_diagonal=diagonal, preconditioner=preconditioner, **arguments))


@eager
def _eager_rows(
    hvp: Operator | BlockOperator,
    b: Tensor,
    *,
    preconditioner: Any,
    lanczos: bool = False,
    **options: Any,
) -> Solution:
    arguments = loop_arguments("cg", hvp, b, preconditioner=preconditioner, **options)
    diagonal, preconditioner = _diagonal_or_function(preconditioner, b)
    if preconditioner is not None:
        preconditioner = callback(preconditioner, "cg", "preconditioner", b)
    hvp = callback(hvp, "cg", "A", b)
    x, status, iterations, residual_norm, tables, _ = native(b.device).cg(
        hvp,
        b,
        inverse_diagonal=diagonal,
        preconditioner=preconditioner,
        lanczos=bool(lanczos),
        shifts=None,
        **arguments,
    )
    return Solution(x, status, iterations, residual_norm, Lanczos(*tables) if lanczos else None)


def _diagonal_or_function(preconditioner: Any, b: Tensor) -> tuple[Tensor | None, Any]:
    if isinstance(preconditioner, Tensor):
        return as_coefficient(preconditioner.detach(), "preconditioner", b), None
    return None, preconditioner
