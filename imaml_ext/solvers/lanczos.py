"""What Lanczos tridiagonals tell of a matrix: traces of functions, log-determinants, extreme eigenvalues."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imaml_ext.checks import check_int
from imaml_ext.ops import as_coefficient
from imaml_ext.ops.calls import check_untransformed, eager
from imaml_ext.solvers.cg import _cg_rows
from imaml_ext.solvers.linear import Lanczos, Operator, Solution, SolveStatus, checked, row_norm
from imaml_ext.solvers.multi_shift import on_columns, read_single
from imaml_ext.solvers.operators import System


@dataclass(frozen=True, eq=False)
class TraceEstimate:
    """Estimates of tr f(A), one per row.

    Attributes:
        value: [B] float64, the mean over the probes; NaN where the solve of a probe has failed.
        standard_error: [B] float64, of that mean; NaN where there is one probe. It says nothing of the error of
            quadrature, which more steps make smaller.
        status: [B] int32, CONVERGED, or the `SolveStatus` of a probe that failed: A is not positive definite, or a
            product is not finite.
    """

    value: Tensor
    standard_error: Tensor
    status: Tensor

    def raise_if_failed(self) -> None:
        """Waits for the device, and raises `SolveError` if a row has no value, as `Solution.raise_if_failed` does."""
        Solution(self.value, self.status, self.status, self.standard_error).raise_if_failed()


def trace_of(
    A: Any,
    function: Callable[[Tensor], Tensor],
    like: Any,
    *,
    generator: torch.Generator,
    shift: Any = 0.0,
    probes: int = 16,
    steps: int = 50,
    definite: bool = True,
) -> TraceEstimate:
    """Estimates tr f(A_b + diag(shift)) for every row b by stochastic Lanczos quadrature.

    All probes of all rows are one batched solve of `steps` products each.

    Args:
        A, shift: as in `cg`.
        function: f on eigenvalues, elementwise on a float64 tensor, such as `torch.log`.
        like: written as b is in `cg`, [N], [B, N] or a structure of [B, …]; its values are not looked at.
        generator: of the probes, with entries ±1; on the device of `like`.
        probes: the error of the mean falls as 1 / √probes.
        steps: the largest number of nodes of a quadrature.
        definite: the matrices are positive definite, and the solve is `cg`. False: they need not be. Then Lanczos with
            full reorthogonalisation in torch operations keeps `steps` vectors of every probe.

    Raises:
        TypeError, ValueError, NativeUnavailableError: as `cg`.

    Source: Ubaru, Chen, Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature (2017); Golub and Meurant
    (2010), chapter 6.
    """
    options = {"generator": generator, "shift": shift, "probes": probes, "steps": steps}
    return _trace(A, function, like, None, definite=definite, **options)


def logdet(
    A: Any,
    like: Any,
    *,
    generator: torch.Generator,
    shift: Any = 0.0,
    probes: int = 16,
    steps: int = 50,
    preconditioner: Any = None,
) -> TraceEstimate:
    """Estimates log det(A_b + diag(shift)), positive definite, for every row b: the trace of the logarithm.

    Args:
        preconditioner: the diagonal of M ≈ A⁻¹, positive, as in `cg`. Then log det(A) is log det(M^½ A M^½), by
            quadrature, less log det(M), exactly: fewer steps and a smaller variance.
        A, like, generator, shift, probes, steps: as in `trace_of`.

    Source: as `trace_of`; for kernels of Gaussian processes Gardner, Pleiss, Bindel, Weinberger, Wilson, GPyTorch
    (2018).
    """
    options = {"generator": generator, "shift": shift, "probes": probes, "steps": steps}
    return _trace(A, torch.log, like, preconditioner, definite=True, **options)


@eager
def _trace(
    A: Any,
    function: Callable[[Tensor], Tensor],
    like: Any,
    preconditioner: Any,
    *,
    generator: torch.Generator,
    shift: Any,
    probes: int,
    steps: int,
    definite: bool,
) -> TraceEstimate:
    check_untransformed("trace_of", like=like, shift=shift, preconditioner=preconditioner)
    probes, steps = check_int("probes", probes, minimum=1), check_int("steps", steps, minimum=1)
    system = _read(A, like, "trace_of")
    b = system.b
    rows, cols = b.shape
    signs = torch.randint(0, 2, (rows, probes, cols), generator=generator, device=b.device).to(b.dtype) * 2 - 1
    exact = torch.zeros(rows, dtype=torch.float64, device=b.device)
    diagonal = None
    if preconditioner is not None:  # uᵀ log(M^½ A M^½) u, with M^½ b = u
        diagonal = _coefficient(system, preconditioner, "preconditioner", above=0)
        signs = (signs * diagonal.rsqrt().unsqueeze(1)).to(b.dtype)
        exact = diagonal.double().log().expand(rows, cols).sum(1)
        diagonal = diagonal.expand(rows, cols).repeat_interleave(probes, 0)
    product = on_columns(A, like, system, probes)
    shift = _coefficient(system, shift, "shift").expand(rows, -1).repeat_interleave(probes, 0)
    if definite:
        lanczos, status = _by_cg(product, signs.flatten(0, 1), shift, diagonal, steps)
    else:
        lanczos, _, status = _reorthogonalised(product, signs.flatten(0, 1), shift, steps)
    samples = cols * quadrature(lanczos, function).view(rows, probes) - exact.unsqueeze(1)
    status = status.view(rows, probes).amax(1)
    value = samples.mean(1).masked_fill(status != 0, torch.nan)
    error = samples.std(1) / probes**0.5 if probes > 1 else torch.full_like(value, torch.nan)
    error = error.masked_fill(status != 0, torch.nan)
    return TraceEstimate(*(_as_rows(v, system) for v in (value, error, status)))


def _read(A: Any, like: Any, name: str) -> System:
    system = read_single(A, like, f"{name}: like")
    if system.b.shape[1] == 0:
        raise ValueError(f"{name}: like must have at least one unknown per row, got rows {list(system.b.shape)}")
    return system


def _as_rows(value: Tensor, system: System) -> Tensor:
    return value.reshape(system.form.lead if system.form else (-1,))


def _by_cg(product: Operator, b: Tensor, shift: Tensor, diagonal: Tensor | None, steps: int) -> tuple[Lanczos, Tensor]:
    """T of the rows b; and [R] CONVERGED, or how a row failed."""
    solution = _cg_rows(
        product,
        b,
        x0=None,
        shift=shift,
        max_iterations=steps,
        rtol=torch.finfo(b.dtype).eps,  # where a Krylov space is exhausted, and T complete
        atol=0.0,
        preconditioner=diagonal,
        lanczos=True,
    )
    assert solution.lanczos is not None
    complete = solution.iterations > solution.lanczos.steps  # the row has measured, and gone on
    failed = (solution.broke_down | solution.non_finite) & ~complete
    return solution.lanczos, torch.where(failed, solution.status, int(SolveStatus.CONVERGED))


def _coefficient(system: System, value: Any, name: str, *, above: float | None = None) -> Tensor:
    value = system.coefficient(value, name)
    return as_coefficient(value.detach() if isinstance(value, Tensor) else value, name, system.b, above=above)


def quadrature(lanczos: Lanczos, function: Callable[[Tensor], Tensor]) -> Tensor:
    """e₁ᵀ f(T) e₁ of every row [R]: the Gauss quadrature of vᵀ f(A) v for the unit vector v that T began with.

    Source: Golub and Meurant (2010), section 6.2.
    """
    eigenvalues, vectors = torch.linalg.eigh(_matrix(lanczos))
    return (vectors[:, 0].square() * function(eigenvalues)).sum(1)


def _matrix(lanczos: Lanczos) -> Tensor:
    """T [R, m, m]. Beyond its order stands its first entry, so that no eigenvalue is outside the spectrum of T."""
    beyond = torch.arange(lanczos.diagonal.shape[1], device=lanczos.steps.device) >= lanczos.steps.unsqueeze(1)
    off = torch.diag_embed(lanczos.off_diagonal, 1)
    return torch.diag_embed(torch.where(beyond, lanczos.diagonal[:, :1], lanczos.diagonal)) + off + off.mT


@dataclass(frozen=True, eq=False)
class ExtremeEigenvalues:
    """The ends of the spectrum of every row's matrix, as Ritz values: smallest from above, largest from below.

    Attributes:
        smallest, largest: [B] float64; NaN where a product is not finite.
        smallest_error, largest_error: [B] float64: an eigenvalue is as near as that, up to the rounding of products.
            Only a start vector without a part along the extreme eigenvector makes that another eigenvalue.
    """

    smallest: Tensor
    largest: Tensor
    smallest_error: Tensor
    largest_error: Tensor


def extreme_eigenvalues(
    A: Any, like: Any, *, generator: torch.Generator, shift: Any = 0.0, steps: int = 50
) -> ExtremeEigenvalues:
    """Finds the smallest and the largest eigenvalue of A_b + diag(shift), which may be indefinite, for every row b.

    Lanczos with full reorthogonalisation, in torch operations, from a Gaussian vector. It keeps all `steps` vectors of
    a row: unlike the coefficients of conjugate gradients it needs no definite A, and each Ritz pair has its bound.

    Args:
        A, shift, like, generator: as in `trace_of`.
        steps: products per row; the ends of the spectrum are found first, the sooner the further they stand apart.

    Raises:
        TypeError, ValueError: as `cg`.

    Source: Golub and Van Loan, Matrix computations, section 10.1; Parlett, The symmetric eigenvalue problem (1998),
    section 13.2 for the bounds.
    """
    system = _read(A, like, "extreme_eigenvalues")
    operator, b = checked(system.operator, system.b, "extreme_eigenvalues", shift=shift)
    start = torch.randn(b.shape, generator=generator, dtype=b.dtype, device=b.device)
    steps = min(check_int("steps", steps, minimum=1), b.shape[1])
    lanczos, last, status = _reorthogonalised(operator, start, _coefficient(system, shift, "shift"), steps)
    eigenvalues, vectors = torch.linalg.eigh(_matrix(lanczos))
    bounds = last.unsqueeze(1) * vectors[:, -1].abs()  # ‖A y − θ y‖ = β_m |s_m|
    return ExtremeEigenvalues(
        *(
            _as_rows(value.masked_fill(status != 0, torch.nan), system)
            for value in (eigenvalues[:, 0], eigenvalues[:, -1], bounds[:, 0], bounds[:, -1])
        )
    )


def _reorthogonalised(operator: Operator, start: Tensor, shift: Tensor, steps: int) -> tuple[Lanczos, Tensor, Tensor]:
    """T; the norm [R] of what the last product has outside the Krylov space; and [R] CONVERGED or NON_FINITE."""
    rows, cols = start.shape
    basis = start.new_zeros(rows, steps, cols)
    diagonal = torch.zeros(rows, steps, dtype=torch.float64, device=start.device)
    norms = torch.zeros_like(diagonal)
    v = start / row_norm(start).unsqueeze(1).to(start.dtype)
    going = torch.ones(rows, dtype=torch.bool, device=start.device)
    taken = torch.zeros(rows, dtype=torch.int32, device=start.device)
    for k in range(steps):
        basis[:, k] = v
        w = operator(v) + shift.to(v.dtype) * v
        diagonal[:, k] = (v.double() * w.double()).sum(1)
        taken += going.to(torch.int32)
        known = basis[:, : k + 1]
        for _ in range(2):  # "twice is enough"
            w = w - torch.einsum("rk,rkn->rn", torch.einsum("rkn,rn->rk", known, w), known)
        norms[:, k] = row_norm(w)
        scale = diagonal.abs().amax(1) + norms.amax(1)
        going = going & ~(norms[:, k] <= 4 * cols**0.5 * torch.finfo(w.dtype).eps * scale)
        norms[:, k] = norms[:, k].masked_fill(~going, 0.0)
        v = torch.where(going.unsqueeze(1), w / norms[:, k].masked_fill(~going, 1.0).unsqueeze(1).to(w.dtype), 0.0)
    finite = diagonal.isfinite().all(1) & norms.isfinite().all(1)
    status = torch.where(finite, 0, int(SolveStatus.NON_FINITE)).to(torch.int32)
    diagonal, norms = (torch.where(finite.unsqueeze(1), v, 0.0) for v in (diagonal, norms))
    return Lanczos(diagonal, norms[:, :-1].contiguous(), taken), norms[:, -1], status
