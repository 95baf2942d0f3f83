"""Batched least squares: the x_b of the least ‖M_b x_b − y_b‖² + shift ‖x_b‖², M only through M p and Mᵀq."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from imaml_ext._native import native
from imaml_ext.checks import check_int
from imaml_ext.ops import Coefficient, as_coefficient
from imaml_ext.ops.calls import callback, check_untransformed, eager
from imaml_ext.solvers.cg import stopping_arguments
from imaml_ext.solvers.form import Form
from imaml_ext.solvers.linear import Solution
from imaml_ext.solvers.operators import Product, System, is_matrix, product_of


@dataclass(frozen=True, eq=False)
class LeastSquaresSolution(Solution):
    """What `lsqr` returns: a `Solution` whose residual_norm is ‖y − M x‖, without the damping.

    Both norms are measured where a row is CONVERGED or STAGNATED, else those of the recurrence.

    Attributes:
        gradient_norm: [B] float64, ‖Mᵀ(y − M x) − shift x‖, which is 0 at the minimum.
    """

    gradient_norm: Tensor = field(kw_only=True)


torch.serialization.add_safe_globals([LeastSquaresSolution])


@eager
def lsqr(
    M: Any,
    y: Any,
    *,
    rmatvec: Any = None,
    n: int | None = None,
    shift: Coefficient = 0.0,
    x0: Any = None,
    max_iterations: int = 100,
    rtol: float | Tensor = 1e-5,
    atol: float | Tensor = 0.0,
    check_every: int = 0,
    check_adjoint: bool = False,
) -> LeastSquaresSolution:
    """Minimises ‖M_b x_b − y_b‖² + shift_b ‖x_b‖² for every row b, M_b of shape [m, n].

    M may be of any shape and rank. From x0 = None, x is the minimiser of least norm. Rows are independent, as in
    `imaml_ext.cg`. The loop is C++; after each product there is one fused op and no host synchronisation.

    A row is CONVERGED when one of these has been measured, by a pair of products with M and Mᵀ:

        ‖Mᵀ(y − M x) − shift x‖ ≤ max(rtol ‖Mᵀy‖, atol)          the gradient
        (‖y − M x‖² + shift ‖x‖²)^½ ≤ rtol ‖y‖                     the residual, of a consistent system

    It measures when the recurrence meets either, and goes on from what it has measured. It is STAGNATED once four
    measured gradients were not a tenth smaller, and returns the x of the least. Where Mᵀy is 0 to working precision,
    y is orthogonal to the range of M, and the gradient has to be at most 16 u ‖M‖ ‖y‖, u the unit roundoff. A row is
    DIVERGED when what is minimised has grown, as it does only where rmatvec is not the adjoint of M.

    The method is CGLS, conjugate gradients on the normal equations (CGNR) in the form that never multiplies by MᵀM.
    Its iterates are those of LSQR, and as accurate; it starts and restarts anywhere with damping, which LSQR cannot.

    Args:
        M: p [B, n] -> M p [B, m], row b from row b of p alone; or a matrix [m, n] or [B, m, n], dense or sparse; or an
            operator with a `shape` and @, such as those of SciPy.
        y: [B, m]; [m], one problem; [B, m, K], K right-hand sides for each of B operators; or a nested structure of
            tensors [B, …]. float32, float64, bfloat16 or float16.
        rmatvec: q [B, m] -> Mᵀq [B, n]; or what stands for Mᵀ in another form of M. None: the transpose of a matrix;
            for a function M the reverse-mode derivative of one product, whose graph is kept until the end.
        n: the number of unknowns of a row, where M is a function and there is no x0.
        shift: a number, one per row [B], one per unknown [n], or [B, n]; at least 0.
        x0: a warm start, [B, n] (or [n], [B, n, K], or a structure, in whose form x is returned then), at the price of
            one more pair of products.
        max_iterations: the largest number of pairs of products, those that measure included. Before them is one Mᵀy.
        rtol, atol: numbers, or one per row [B].
        check_every: k > 0 asks the device every k iterations whether all rows are done; 0 never does.
        check_adjoint: first compare qᵀ(M p) with (Mᵀq)ᵀp for random p and q, by three pairs, and wait for the result.

    Returns:
        A `LeastSquaresSolution`. No autograd graph is recorded.

    Raises:
        TypeError, ValueError: an argument, or what a function returned, of the wrong type, dtype, structure, shape or
            device; or, with check_adjoint, an rmatvec that is not the adjoint of M.
        NativeUnavailableError: the compiled part does not load, or has no code for the device of y.

    Source: Hestenes and Stiefel (1952); Paige and Saunders, LSQR (1982); its accuracy: Björck, Elfving and Strakoš
    (1998).
    """
    of_y = Form.of(y, "y")
    of_x = _form_of_unknowns(M, of_y, n, x0)
    matvec, adjoint = _pair(M, rmatvec, of_x, of_y)
    if check_adjoint:
        _check_adjoint(matvec, adjoint, of_x, of_y)
    like = torch.empty((), dtype=of_x.dtype, device=of_x.device).expand(of_x.rows, of_x.size)
    unknowns = System(matvec, like, of_x)
    b, options = of_y.pack(y, "y").contiguous(), unknowns.options(shift, x0, rtol, atol)
    damping, start = options.pop("shift"), options.pop("x0")
    check_untransformed("lsqr", y=b, shift=damping, x0=start)
    if isinstance(damping, Tensor) or damping != 0:
        damping = as_coefficient(damping, "shift", like, at_least=0).detach()
    x, status, iterations, residual_norm, gradient_norm = native(b.device).lsqr(
        callback(matvec, "lsqr", "matvec", b),
        callback(adjoint, "lsqr", "rmatvec", b),
        b,
        of_x.size,
        shift=damping if isinstance(damping, Tensor) else None,
        x0=start,
        **stopping_arguments("lsqr", b, max_iterations=max_iterations, check_every=check_every, **options),
    )
    return unknowns.solution(  # type: ignore[return-value]
        LeastSquaresSolution(x, status, iterations, residual_norm, gradient_norm=gradient_norm)
    )


def _pair(M: Any, rmatvec: Any, of_x: Form, of_y: Form) -> tuple[Product, Product]:
    """p -> M p and q -> Mᵀq, of rows."""
    M, rmatvec = (value.detach() if isinstance(value, Tensor) else value for value in (M, rmatvec))
    matvec = product_of(M, of_x, "M", of_y)
    if rmatvec is not None:
        return matvec, product_of(rmatvec, of_y, "rmatvec", of_x)
    if is_matrix(M):
        return matvec, product_of(_transposed(M), of_y, "the transpose of M", of_x)
    return matvec, _derived(matvec, of_x)


def _form_of_unknowns(M: Any, of_y: Form, n: int | None, x0: Any) -> Form:
    """The form of x."""
    if n is not None:
        n = check_int("n", n, minimum=0)
    if x0 is not None:
        form = Form.of(x0, "x0")
        for what in ("lead", "dtype", "device"):
            found, expected = getattr(form, what), getattr(of_y, what)
            if found != expected:
                error = TypeError if what == "dtype" else ValueError
                what = "number of rows and right-hand sides" if what == "lead" else what
                raise error(f"x0 must have the {what} of y, {expected}, got {found}")
        if n not in (None, form.size):
            raise ValueError(f"n must be the number of unknowns of x0, {form.size}, got {n}")
        return replace(form, name="x")
    if is_matrix(M) and len(M.shape) >= 2:
        n = M.shape[-1] if n is None else n
    if n is None:
        raise ValueError("n, the number of unknowns of a row, must be given where M is a function and there is no x0")
    shape = torch.Size((*of_y.lead[:1], n, *of_y.lead[1:]))
    return replace(of_y, shapes=(shape,), spec=None, name="x")


def _transposed(M: Any) -> Any:
    """Mᵀ of a matrix or an operator with a shape and @."""
    if isinstance(M, Tensor) and M.layout != torch.strided:
        return M.to_sparse_coo().transpose(-2, -1)
    for name in ("mT", "T") if len(M.shape) == 2 else ("mT",):
        if hasattr(M, name):
            return getattr(M, name)
    if hasattr(M, "adjoint"):
        return M.adjoint()
    raise TypeError(f"rmatvec must be given where M has no transpose, got {type(M).__name__} without mT, T and adjoint")


def _derived(matvec: Product, of_x: Form) -> Product:
    """q -> Mᵀq by reverse mode through one product M p, at p = 0 as M is linear."""
    with torch.enable_grad():
        p = torch.zeros(of_x.rows, of_x.size, dtype=of_x.dtype, device=of_x.device, requires_grad=True)
        Mp = matvec(p)
    sentence = (
        "rmatvec must be given where M cannot be differentiated, got an M whose product has no graph that leads to p"
    )
    if not Mp.requires_grad:
        raise TypeError(sentence)

    def rmatvec(q: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(Mp, p, q, retain_graph=True, allow_unused=True)
        if found is None:
            raise TypeError(sentence)
        return found

    return rmatvec


def _check_adjoint(matvec: Product, rmatvec: Product, of_x: Form, of_y: Form, *, probes: int = 3) -> None:
    """Raises ValueError unless qᵀ(M p) = (Mᵀq)ᵀp within rounding, for random p and q."""
    generator = torch.Generator().manual_seed(0)
    normal: Callable[[Form], Tensor] = lambda form: torch.randn(  # noqa: E731
        form.rows, form.size, generator=generator, dtype=torch.float64
    ).to(device=form.device, dtype=form.dtype)
    worst = torch.zeros(of_x.rows, dtype=torch.float64, device=of_x.device)
    for _ in range(probes):
        p, q = normal(of_x), normal(of_y)
        Mp, Mtq = matvec(p).detach().double(), rmatvec(q).detach().double()
        difference = ((q.double() * Mp).sum(1) - (p.double() * Mtq).sum(1)).abs()
        worst = torch.maximum(worst, difference / (Mp.norm(dim=1) + Mtq.norm(dim=1)).clamp(min=1e-300))
    wrong = worst > min(1000 * torch.finfo(of_x.dtype).eps, 0.1)
    if bool(wrong.any()):
        rows = wrong.nonzero().flatten().tolist()
        raise ValueError(
            f"rmatvec must be the adjoint of M, got qᵀ(M p) ≠ (rmatvec q)ᵀp for random p and q in rows {rows[:8]}: "
            f"they differ by {float(worst.max()):.2g} of ‖M p‖ + ‖rmatvec q‖"
        )
