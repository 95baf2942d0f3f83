"""SciPy's `cg` and `minres` by the solvers of this package, and the inverse of an operator as a `LinearOperator`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from imaml_ext.checks import check_choice, check_int
from imaml_ext.integrations.outcome import Reaction, check_reactions, report
from imaml_ext.solvers import Solution
from imaml_ext.solvers import cg as _cg
from imaml_ext.solvers.minres import minres as _minres
from imaml_ext.solvers.operators import System

Method = Literal["cg", "minres"]
Array = np.ndarray[Any, Any]


def cg(
    A: Any,
    b: Any,
    x0: Any = None,
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Any = None,
    callback: Callable[[Array], object] | None = None,
) -> tuple[Array, Any]:
    """Solves A x = b for a symmetric positive definite A, with the signature of `scipy.sparse.linalg.cg`.

    Args:
        A: [N, N], real: an array, a sparse matrix, a `LinearOperator`, or what `aslinearoperator` takes.
        b: [N] or [N, 1]; or [N, K], K right-hand sides, solved together with one tolerance and one status each.
        x0: in the shape of b, where the solve begins.
        rtol, atol: a column ends when ‖b − A x‖ was measured to be at most max(rtol ‖b‖, atol).
        maxiter: the largest number of products with A per column; 10 N unless given.
        M: [N, N], an approximation of A⁻¹, in a form of A.
        callback: called after each step with the current x [N]; b must be one right-hand side.

    Returns:
        x, of the dtype of A and b together, float32 or float64; [N], or [N, K] where b is [N, K] with K > 1.
        info: 0 if CONVERGED; the number of steps (at least 1) if the products are spent or the residual stagnates;
        −status, negative, if A is not positive definite or a number is not finite. An array [K] for K > 1 columns.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape, or complex numbers.
    """
    solve = _Solve(A, b, x0, M)
    if callback is not None:
        if not callable(callback):
            raise TypeError(f"callback must be a function, got {type(callback).__name__}")
        if len(solve.b) > 1:
            raise ValueError(f"callback must be None where b has more than one column, got {len(solve.b)} columns")
        solve.product = _Followed(solve, callback)
    return _answer(solve.cg(rtol, atol, maxiter))


def minres(
    A: Any, b: Any, x0: Any = None, *, rtol: float = 1e-5, shift: float = 0.0, maxiter: int | None = None
) -> tuple[Array, Any]:
    """Solves (A − shift I) x = b for a symmetric A, as `scipy.sparse.linalg.minres` does; it may be indefinite.

    Arguments, results and errors are those of `cg`, but for `shift`; maxiter is 5 N unless given, as SciPy's is. A
    column ends when ‖b − (A − shift I) x‖ was measured to be at most rtol ‖b‖. SciPy estimates ‖r‖ / (‖A‖ ‖x‖).
    """
    return _answer(_Solve(A, b, x0, None).minres(rtol, shift, maxiter))


def inverse(
    A: Any,
    *,
    method: Method = "cg",
    rtol: float = 1e-8,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Any = None,
    on_failure: Reaction = "raise",
) -> Any:
    """Returns A⁻¹ as a `scipy.sparse.linalg.LinearOperator`, for a symmetric A; a product with it is a solve.

    A product with [N, K] solves for all columns together. It fits where SciPy wants an inverse, such as `OPinv` of
    `eigsh`, `M` of another solver, or the preconditioner of `lobpcg`.

    Args:
        A, rtol, atol, maxiter, M: as for `cg`. method: "cg" for a positive definite A; "minres", without M and atol.
        on_failure: what a product does where a column has not converged: "raise" a `SolveError`, "warn" by a
            `SolveWarning`, or "ignore"; the last two return the iterate that was reached.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """
    from scipy.sparse.linalg import LinearOperator

    check_choice("method", method, get_args(Method))
    check_reactions(on_failure=on_failure)
    if method == "minres" and (M is not None or atol != 0):
        raise ValueError("M must be None and atol must be 0 where method is 'minres'")
    size = _shape(A)[0]
    dtype = _real(getattr(A, "dtype", None), "A")

    def product(b: Array) -> Array:
        solve = _Solve(A, b, None, M)
        found = solve.cg(rtol, atol, maxiter) if method == "cg" else solve.minres(rtol, 0.0, maxiter)
        report(found, on_breakdown=on_failure, on_unfinished=on_failure, what="columns of an inverse product")
        return _array(found.x).reshape(b.shape)

    return LinearOperator((size, size), matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=dtype)


class _Solve:
    """A and K right-hand sides of NumPy, as K rows."""

    def __init__(self, A: Any, b: Any, x0: Any, M: Any) -> None:
        from scipy.sparse.linalg import aslinearoperator

        size = _shape(A)[0]
        b = np.asarray(b)
        if b.shape != (size,) and (b.ndim != 2 or b.shape[0] != size or b.shape[1] == 0):
            expected = f"[{size}] or [{size}, K]"
            raise ValueError(f"b must have shape {expected}, as A has {size} rows, got {list(b.shape)}")
        dtypes = [_real(getattr(A, "dtype", None), "A"), _real(b.dtype, "b")]
        if x0 is not None:
            x0 = np.asarray(x0)
            if x0.size != b.size or x0.shape[0] != size:
                raise ValueError(f"x0 must have the shape of b, {list(b.shape)}, got {list(x0.shape)}")
            dtypes.append(_real(x0.dtype, "x0"))
        self.dtype = np.result_type(*dtypes)
        A, M = (m if m is None or hasattr(m, "__matmul__") else aslinearoperator(m) for m in (A, M))
        system = System.read(A, self._columns(b))
        self.product, self.b, self.size = system.operator, system.b, size
        self.x0 = None if x0 is None else system.rows(self._columns(x0), "x0")
        self.M = system.product(M, "M")

    def _columns(self, given: Array) -> Tensor:
        """[N] or [N, K] -> [1, N, K]."""
        return torch.from_numpy(np.array(given.reshape(1, len(given), -1), dtype=self.dtype))

    def cg(self, rtol: float, atol: float, maxiter: int | None) -> Solution:
        most = 10 * self.size if maxiter is None else check_int("maxiter", maxiter, minimum=0)
        options: dict[str, Any] = {"rtol": rtol, "atol": atol, "max_iterations": most, "check_every": 1}
        return _cg(self.product, self.b, x0=self.x0, preconditioner=self.M, **options)

    def minres(self, rtol: float, shift: float, maxiter: int | None) -> Solution:
        most = 5 * self.size if maxiter is None else check_int("maxiter", maxiter, minimum=0)
        options: dict[str, Any] = {"rtol": rtol, "max_iterations": most, "check_every": 1}
        return _minres(self.product, self.b, x0=self.x0, shift=-shift, **options)


def _array(rows: Tensor) -> Array:
    """[K, N] -> [N, K], or [N] for one row."""
    return rows[0].numpy() if len(rows) == 1 else np.ascontiguousarray(rows.numpy().T)


def _answer(found: Solution) -> tuple[Array, Any]:
    """x and info."""
    info = torch.where(found.unfinished, found.iterations.clamp(min=1), -found.status).numpy()
    return _array(found.x), (int(info[0]) if len(info) == 1 else info)


class _Followed:
    """The product of one system, which follows the steps that conjugate gradients take with it.

    The vector of a product is a direction p, and then x ← x + α p with α = pᵀr / pᵀAp; or it is x itself, to measure
    b − A x. Directions are conjugate, so that none but a measured vector equals x; after a measurement a step follows.
    """

    def __init__(self, solve: _Solve, callback: Callable[[Array], object]) -> None:
        self.product, self.callback, self.b = solve.product, callback, solve.b
        self.x = torch.zeros_like(self.b) if solve.x0 is None else solve.x0.clone()
        self.r = self.b.clone()
        self.measured = solve.x0 is None  # with x0 the first product measures it

    def __call__(self, p: Tensor) -> Tensor:
        q = self.product(p)
        if not self.measured and torch.allclose(p, self.x, rtol=1e-6, atol=0):
            self.x, self.r, self.measured = p.clone(), self.b - q, True
            return q
        self.measured = False
        curvature = torch.linalg.vecdot(p, q)
        if curvature > 0:
            alpha = torch.linalg.vecdot(p, self.r) / curvature
            self.x, self.r = self.x + alpha * p, self.r - alpha * q
            self.callback(self.x[0].numpy())
        return q


def _shape(A: Any) -> tuple[int, int]:
    shape = tuple(getattr(A, "shape", ()))
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"A must be an operator of shape [N, N], got {type(A).__name__} of shape {list(shape)}")
    return shape


def _real(dtype: Any, name: str) -> Any:
    """The dtype in which numbers of another are worked on: float32 stays, others become float64."""
    if dtype is None:
        return np.dtype(np.float64)
    dtype = np.dtype(dtype)
    if dtype.kind not in "biuf":
        raise TypeError(f"{name} must have real numbers, got {dtype}")
    return np.dtype(np.float32 if dtype in (np.float32, np.float16) else np.float64)
