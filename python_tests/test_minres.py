"""MINRES against direct solves: indefinite matrices, statuses, independence of the rows."""

import math

import pytest
import torch
from meta_tasks import F64, regression, relative
from systems import known_matrices, multiply, residual_in_long_double, singular_matrices
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from imaml_ext import CG, IMAML, GradientDescent, SolveError, SolveStatus
from imaml_ext.settings import from_json, to_json
from imaml_ext.solvers import MINRES, LinearSolver

B, N = 5, 23


def symmetric(eigenvalues: Tensor) -> Tensor:
    """Random symmetric matrices [B, N, N] with the eigenvalues [B, N]."""
    q = torch.linalg.qr(torch.randn(*eigenvalues.shape, eigenvalues.shape[-1], dtype=F64)).Q
    return (q * eigenvalues.unsqueeze(1)) @ q.mT


def solve_symmetric(A: Tensor, b: Tensor) -> Tensor:
    """A⁻¹ b of symmetric matrices [B, N, N] of any definiteness."""
    values, vectors = torch.linalg.eigh(A)
    return (vectors @ ((vectors.mT @ b.unsqueeze(2)) / values.unsqueeze(2))).squeeze(2)


def indefinite(rows: int = B, size: int = N) -> Tensor:
    """Eigenvalues of either sign, between 0.3 and 2 in size."""
    values = 0.3 + 1.7 * torch.rand(rows, size, dtype=F64)
    return symmetric(values * torch.where(torch.arange(size) % 2 == 0, 1.0, -1.0))


@pytest.mark.parametrize("form", ["number", "[B]", "[N]", "[B, N]"])
def test_indefinite_systems_against_direct_solves(form: str) -> None:
    A, b = indefinite(), torch.randn(B, N, dtype=F64)
    shape = {"number": (), "[B]": (B,), "[N]": (N,), "[B, N]": (B, N)}[form]
    shift = 0.2 * torch.rand(shape, dtype=F64)
    rows = shift.unsqueeze(1) if form == "[B]" else shift
    expected = solve_symmetric(A + rows.expand(B, N).diag_embed(), b)
    solution = MINRES(max_iterations=20 * N, rtol=1e-11).solve(multiply(A), b, shift)
    solution.raise_if_failed()
    residual = (b - multiply(A)(solution.x) - rows * solution.x).norm(dim=1)
    torch.testing.assert_close(solution.residual_norm, residual, rtol=1e-2, atol=1e-14)
    assert (residual <= 1.01e-11 * b.norm(dim=1)).all()
    assert relative(solution.x, expected) < 1e-6


def test_as_many_products_as_distinct_eigenvalues_and_one_that_measures() -> None:
    values = torch.tensor([-2.0, -0.5, 1.0, 3.0], dtype=F64)[torch.arange(N) % 4].expand(B, N)
    A, b = symmetric(values), torch.randn(B, N, dtype=F64)
    calls = 0

    def counted(p: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return multiply(A)(p)

    solution = MINRES(max_iterations=5, rtol=1e-10).solve(counted, b)
    assert calls == 5
    assert (solution.status == SolveStatus.CONVERGED).all()
    assert solution.iterations.tolist() == [4] * B
    unmeasured = MINRES(max_iterations=4, rtol=1e-10).solve(multiply(A), b)
    assert (unmeasured.status == SolveStatus.MAX_ITERATIONS).all()  # nothing has measured it yet
    torch.testing.assert_close(unmeasured.x, solution.x)


def test_the_residual_never_grows_and_is_the_least_of_the_krylov_space() -> None:
    A, b = indefinite(), torch.randn(B, N, dtype=F64)
    norms = [b.norm(dim=1)]
    for k in range(1, 9):
        solution = MINRES(max_iterations=k, rtol=0.0).solve(multiply(A), b)
        residual = (b - multiply(A)(solution.x)).norm(dim=1)
        torch.testing.assert_close(solution.residual_norm, residual, rtol=1e-8, atol=1e-12)
        assert (residual <= norms[-1] * (1 + 1e-12)).all()
        norms.append(residual)
        power, columns = b, []
        for _ in range(k):
            columns.append(power)
            power = multiply(A)(power)
        images = multiply(A)
        space = torch.stack([images(column) for column in columns], 2)  # [B, N, k]
        least = b - (space @ torch.linalg.lstsq(space, b.unsqueeze(2)).solution).squeeze(2)
        torch.testing.assert_close(residual, least.norm(dim=1), rtol=1e-6, atol=1e-10)


def test_positive_definite_systems_as_conjugate_gradients() -> None:
    A, b = symmetric(0.5 + torch.rand(B, N, dtype=F64)), torch.randn(B, N, dtype=F64)
    found, expected = (solver(max_iterations=60, rtol=1e-12).solve(multiply(A), b) for solver in (MINRES, CG))
    torch.testing.assert_close(found.x, expected.x, rtol=1e-9, atol=1e-11)


def test_statuses_of_rows_side_by_side() -> None:
    """Converges; b = 0; NaN in b; infinity in a product; singular with b outside the range; too few iterations."""
    values = torch.rand(6, N, dtype=F64) + 0.5
    values[4] = torch.arange(N) % 2  # two eigenvalues, of which one is 0
    values[5] = torch.logspace(-7, 0, N, dtype=F64)
    A, b = symmetric(values), torch.randn(6, N, dtype=F64)
    clean = MINRES(max_iterations=40, rtol=1e-9).solve(multiply(A), b)
    b[1] = 0
    b[2, 3] = math.nan
    A[3, 0, 0] = math.inf
    solution = MINRES(max_iterations=40, rtol=1e-9).solve(multiply(A), b)
    names = [SolveStatus(status).name for status in solution.status.tolist()]
    assert names == ["CONVERGED", "CONVERGED", "NON_FINITE", "NON_FINITE", "SINGULAR", "MAX_ITERATIONS"]
    assert torch.equal(solution.x[[0, 5]], clean.x[[0, 5]])  # whatever their neighbours do
    assert solution.iterations[1] == 0
    assert not solution.x[:4][1:].any()
    assert solution.x.isfinite().all()
    # Of all x, the singular row's has the least residual: the part of b that A cannot reach.
    q = torch.linalg.eigh(A[4])
    outside = q.eigenvectors[:, q.eigenvalues.abs() < 1e-8]
    torch.testing.assert_close(solution.residual_norm[4], (outside.T @ b[4]).norm())
    assert solution.broke_down.tolist() == [False] * 4 + [True, False]
    with pytest.raises(SolveError, match=r"SINGULAR in 1 of 6 rows \(4\): .* raise shift"):
        solution.raise_if_failed(unfinished=False)


def test_converged_is_measured_where_rounding_drives_the_recurrence_away() -> None:
    """κ = 10² in float32: what is called CONVERGED has that residual in float64 too, but for the product's rounding."""
    values = torch.logspace(-2, 0, 60, dtype=F64) * torch.where(torch.arange(60) % 3 == 0, -1.0, 1.0)
    A = symmetric(values.expand(24, 60)).float()
    b = torch.randn(24, 60)
    solution = MINRES(max_iterations=600, rtol=1e-3).solve(multiply(A), b)
    converged = solution.status == SolveStatus.CONVERGED
    assert converged.any()
    residual = (b.double() - multiply(A.double())(solution.x.double())).norm(dim=1) / b.double().norm(dim=1)
    floor = 60 * torch.finfo(torch.float32).eps * solution.x.double().norm(dim=1) / b.double().norm(dim=1)
    assert (residual <= 1e-3 + floor)[converged].all()


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_what_it_says_of_known_matrices_was_measured(dtype: torch.dtype) -> None:
    """Shifted to be indefinite too. A row that is done has the residual that it reports."""
    said = set()
    small = [matrix for matrix in {**known_matrices(), **singular_matrices()}.values() if len(matrix) <= 24]
    for matrix in small:
        for shift in (0.0, -float(matrix.diagonal().mean())):
            A = (matrix + shift * torch.eye(len(matrix), dtype=F64)).to(dtype)
            b, rtol = torch.randn(1, len(A), dtype=dtype), 1e-8 if dtype == F64 else 1e-5
            solution = MINRES(max_iterations=100, rtol=rtol).solve(lambda p: p @ A, b)  # noqa: B023
            said.add(int(solution.status))
            assert solution.x.isfinite().all()
            if solution.status == SolveStatus.MAX_ITERATIONS:
                continue
            true, norm = residual_in_long_double(A, solution.x[0], b[0]), float(b.double().norm())
            rounding = len(A) * torch.finfo(dtype).eps * float((A.abs() @ solution.x[0].abs()).norm())
            assert float(solution.residual_norm) == pytest.approx(true, rel=1.0, abs=rounding)
            assert true <= (3 * rtol if solution.status == SolveStatus.CONVERGED else 2) * norm
    assert said >= {SolveStatus.CONVERGED, SolveStatus.SINGULAR}


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_what_the_type_cannot_reach_stagnates(dtype: torch.dtype) -> None:
    d, b = 1 + torch.rand(3, 400, dtype=dtype), torch.randn(3, 400, dtype=dtype)
    solution = MINRES(max_iterations=200, rtol=1e-30).solve(lambda p: d * p, b)
    assert solution.status.tolist() == [SolveStatus.STAGNATED] * 3
    torch.testing.assert_close(solution.x, b / d)


class _Watch(TorchDispatchMode):
    """Counts ops that hand a number of the device to the host."""

    looks = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: object = None) -> object:
        self.looks += func._overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    A, b = indefinite(), torch.randn(B, N, dtype=F64)
    with _Watch() as watch:
        MINRES(max_iterations=7).solve(multiply(A), b, torch.rand(B, dtype=F64))
    assert watch.looks == 0


def test_the_implicit_gradient_where_the_hessian_is_indefinite() -> None:
    """Conjugate gradients meet negative curvature; MINRES solves the system, as a dense solve does."""
    loss, theta, episodes = regression(3)
    theta = theta + torch.randn_like(theta)
    lam, inner = 0.05, GradientDescent(steps=1, lr=0.01)
    algorithm = IMAML(loss, lam=lam, inner=inner, linear_solver=MINRES(max_iterations=600, rtol=1e-12))
    phi = algorithm.adapt(theta, episodes.support)
    n = theta.numel()
    product = loss.linearize(phi, episodes.support)
    H = torch.stack([product(torch.eye(n, dtype=F64)[i].expand(3, n).contiguous()) for i in range(n)], 2)
    assert (torch.linalg.eigvalsh(H).min(1).values < -lam).any()
    v = loss.gradient(phi, episodes.query).gradient
    expected = (lam * solve_symmetric(H + lam * torch.eye(n, dtype=F64), v)).mean(0)
    meta = algorithm.meta_gradient(theta, episodes)
    assert relative(meta.gradient, expected) < 1e-6
    assert float(meta.metrics["singular"]) == 0
    by_cg = IMAML(loss, lam=lam, inner=inner, linear_solver=CG(max_iterations=600, rtol=1e-12))
    assert float(by_cg.meta_gradient(theta, episodes).metrics["negative_curvature"]) > 0


def test_it_is_chosen_by_name_and_read_back() -> None:
    solver = LinearSolver.kind("minres")(max_iterations=9, rtol=1e-3)
    assert from_json(LinearSolver, to_json(solver)) == solver == MINRES(max_iterations=9, rtol=1e-3)
    with pytest.raises(ValueError, match=r"MINRES\.max_iterations must be at least 1, got 0"):
        MINRES(max_iterations=0)
