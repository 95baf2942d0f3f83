"""The Neumann series and the fixed point in place of conjugate gradients: closed forms, divergence."""

from typing import Any

import pytest
import torch
from meta_tasks import F64, regression, relative
from systems import multiply, solve_directly
from torch import Tensor

from imaml_ext import CG, IMAML, GradientDescent, NewtonCG, SolveError
from imaml_ext.meta import implicit_solve
from imaml_ext.solvers import FixedPoint, LinearSolver, Neumann

B, N = 4, 12


def of_name(name: str, *, lr: float | None = None, **settings: Any) -> LinearSolver:
    """A solver by its name; `lr` is of the fixed point, which takes the inner one unless given."""
    return LinearSolver.kind(name)(**settings, **({"lr": lr} if name == "fixed_point" else {}))


def symmetric(eigenvalues: Tensor) -> Tensor:
    """Random symmetric matrices [B, N, N] with the eigenvalues [B, N]."""
    q = torch.linalg.qr(torch.randn(*eigenvalues.shape, eigenvalues.shape[-1], dtype=F64)).Q
    return (q * eigenvalues.unsqueeze(1)) @ q.mT


def shifted(matrices: Tensor, shift: Tensor | float) -> Tensor:
    return matrices + torch.as_tensor(shift, dtype=F64).expand(B, N).diag_embed()


@pytest.mark.parametrize("form", ["number", "[N]"])
@pytest.mark.parametrize("name", ["neumann", "fixed_point"])
def test_they_equal_the_closed_form_where_they_converge(name: str, form: str) -> None:
    H = symmetric(2 * torch.rand(B, N, dtype=F64) - 1)  # ‖H‖ < 1
    lam = 1.5 if form == "number" else 1.5 + torch.rand(N, dtype=F64)
    v = torch.randn(B, N, dtype=F64)
    solver = of_name(name, lr=0.5, max_iterations=300, rtol=1e-13)  # ‖H + Λ + δ‖ < 3.8
    solution = implicit_solve(multiply(H), v, lam=lam, damping=0.3, linear_solver=solver)
    assert not solution.solution.broke_down.any()
    assert solution.counted_tasks.all()
    A = shifted(H, lam + 0.3)
    assert relative(solution.u, solve_directly(A, v)) < 1e-11
    measured = (v - multiply(A)(solution.u)).norm(dim=1)
    assert (measured <= 1e-13 * v.norm(dim=1) * 1.01).all()  # stopped there
    assert (solution.solution.iterations < 300).all()
    torch.testing.assert_close(solution.solution.residual_norm, measured, rtol=1e-2, atol=1e-15)


def test_a_truncated_series_is_the_sum_of_its_terms() -> None:
    H = symmetric(0.8 * torch.rand(B, N, dtype=F64))
    v = torch.randn(B, N, dtype=F64)
    solution = implicit_solve(multiply(H), v, lam=2.0, linear_solver=Neumann(max_iterations=3, rtol=0.0))
    terms = [v]
    for _ in range(3):
        terms.append(-multiply(H)(terms[-1]) / 2)
    torch.testing.assert_close(solution.u, sum(terms) / 2)
    assert solution.solution.iterations.tolist() == [4] * B
    before = sum(terms[:-1]) / 2
    torch.testing.assert_close(solution.solution.residual_norm, (v - multiply(shifted(H, 2.0))(before)).norm(dim=1))


def test_the_fixed_point_is_as_many_steps_of_back_propagation() -> None:
    """On a quadratic, K terms at the step size η are the derivative of K inner steps in θ, to the last term."""
    H = symmetric(torch.rand(B, N, dtype=F64))
    v, eta, lam, steps = torch.randn(B, N, dtype=F64), 0.3, 0.7, 6
    solution = implicit_solve(
        multiply(H), v, lam=lam, linear_solver=FixedPoint(lr=eta, max_iterations=steps - 1, rtol=0.0)
    )
    contraction = torch.eye(N, dtype=F64) - eta * shifted(H, lam)
    expected, power = torch.zeros_like(v), v
    for _ in range(steps):
        expected, power = expected + eta * power, multiply(contraction)(power)
    torch.testing.assert_close(solution.u, expected)


@pytest.mark.parametrize("solver", ["neumann", "fixed_point"])
def test_divergence_is_reported_and_treated_as_asked(solver: str) -> None:
    """Task 1 has ‖H‖ > λ, task 2 a direction of negative curvature; tasks 0 and 3 converge, task 3 has v = 0."""
    values = torch.rand(B, N, dtype=F64)
    values[1, 0] = 40.0
    values[2, 0] = -9.0
    H, v = symmetric(values), torch.randn(B, N, dtype=F64)
    v[3] = 0
    options = {"lam": 2.0, "linear_solver": of_name(solver, lr=0.3, max_iterations=60)}
    keep, gradient, skip = (
        implicit_solve(multiply(H), v, on_breakdown=reaction, **options) for reaction in ("keep", "gradient", "skip")
    )
    A = shifted(H, 2.0)
    for solution in (keep, gradient, skip):
        assert solution.solution.broke_down.tolist() == [False, True, True, False]
        assert solution.u.isfinite().all()
        assert relative(solution.u[0], solve_directly(A[0], v[0])) < 1e-4
        assert not solution.u[3].any()
    # What is kept has the smallest residual in the norm that a converging iteration never raises.
    measured = (v - multiply(A)(keep.u)).norm(dim=1)
    assert (measured[1:3] <= v[1:3].norm(dim=1)).all()
    torch.testing.assert_close(keep.solution.residual_norm[1:3], measured[1:3])
    torch.testing.assert_close(gradient.u[1:3], v[1:3] / 2)
    assert skip.counted_tasks.tolist() == [True, False, False, True]
    with pytest.raises(
        SolveError, match=r"DIVERGED in 2 of 4 tasks' implicit systems \(1, 2\): .*raise lam or damping"
    ):
        implicit_solve(multiply(H), v, on_breakdown="raise", **options)


def test_rounding_is_not_taken_for_divergence() -> None:
    """Iterated far beyond what float32 can resolve, the residual wanders and no row is blamed for it."""
    H = symmetric(torch.rand(B, N, dtype=F64)).float()
    v = torch.randn(B, N)
    solution = implicit_solve(multiply(H), v, lam=2.0, linear_solver=Neumann(max_iterations=200, rtol=0.0))
    assert not solution.solution.broke_down.any()
    assert relative(solution.u.double(), solve_directly(shifted(H.double(), 2.0), v.double())) < 1e-5


def test_a_row_of_nan_leaves_the_others_alone() -> None:
    H, v = symmetric(torch.rand(B, N, dtype=F64)), torch.randn(B, N, dtype=F64)
    options = {"lam": 2.0, "linear_solver": Neumann(max_iterations=20)}
    clean = implicit_solve(multiply(H), v, **options)
    broken_v, broken_H = v.clone(), H.clone()
    broken_v[1, 3] = float("nan")
    broken_H[2, 0, 0] = float("inf")
    dirty = implicit_solve(multiply(broken_H), broken_v, **options)
    assert dirty.solution.non_finite.tolist() == [False, True, True, False]
    assert dirty.counted_tasks.tolist() == [True, False, False, True]
    assert torch.equal(dirty.u[[0, 3]], clean.u[[0, 3]])
    assert not dirty.u[[1, 2]].any()


@pytest.mark.parametrize("solver", ["neumann", "fixed_point"])
def test_imaml_with_them_equals_imaml_with_conjugate_gradients(solver: str) -> None:
    loss, theta, episodes = regression(3)
    common = {"lam": 60.0, "inner": GradientDescent(steps=30, lr=0.01)}
    solvers = [of_name(name, max_iterations=400, rtol=1e-12) for name in (solver, "cg")]
    found, expected = (IMAML(loss, linear_solver=each, **common).meta_gradient(theta, episodes) for each in solvers)
    assert relative(found.gradient, expected.gradient) < 1e-10
    assert float(found.metrics["diverged"]) == 0
    assert float(found.metrics["solve_residual"]) <= 1e-12


def test_imaml_says_that_a_series_diverged() -> None:
    loss, theta, episodes = regression(3)
    meta = IMAML(loss, lam=0.01, linear_solver=Neumann(max_iterations=50)).meta_gradient(theta, episodes)
    assert float(meta.metrics["diverged"]) == 1
    assert meta.gradient.isfinite().all()


def test_errors_name_the_argument() -> None:
    loss, _, _ = regression(2)
    v = torch.ones(B, N, dtype=F64)

    for words, call in (
        ("linear solver must be one of 'cg', 'neumann', 'fixed_point'", lambda: LinearSolver.kind("lu")),
        ("FixedPoint.lr must be above 0, got 0.0", lambda: FixedPoint(lr=0.0)),
        ("FixedPoint.lr must be given where", lambda: IMAML(loss, linear_solver=FixedPoint(), inner=NewtonCG())),
        ("FixedPoint.lr must be given", lambda: implicit_solve(lambda p: p, v, lam=1.0, linear_solver=FixedPoint())),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("form", ["number", "[N]"])
def test_a_kept_step_is_no_longer_than_the_first_order_one(form: str) -> None:
    """Of matrices with eigenvalues next to 0 and below, CG's iterate before it meets the direction is of any length."""
    curvature = torch.full((B, N), -0.99, dtype=F64) + 0.02 * torch.rand(B, N, dtype=F64)  # λ + H about 0.01
    curvature[:, 0] = -2.0
    curvature[3] = 0.5  # nothing is wrong with this task
    H = symmetric(curvature)
    lam = 1.0 if form == "number" else 1.0 + 0.01 * torch.rand(N, dtype=F64)
    v, downwards = torch.randn(B, N, dtype=F64), torch.linalg.eigh(H).eigenvectors[:, :, 0]
    v -= 0.999 * (v * downwards).sum(1, keepdim=True) * downwards
    solver = CG(max_iterations=N)
    kept = implicit_solve(multiply(H), v, lam=lam, linear_solver=solver)
    assert kept.solution.broke_down.tolist() == [True, True, True, False]
    first_order = implicit_solve(multiply(H), v, lam=lam, linear_solver=solver, on_breakdown="gradient").u
    lengths = [(lam * u).norm(dim=1) for u in (kept.solution.x, kept.u, first_order)]
    assert (lengths[0][:3] > 10 * lengths[2][:3]).all()
    assert (lengths[1] <= lengths[2] * (1 + 1e-12))[:3].all()
    for task in range(B):  # shortened, not turned
        assert float(torch.cosine_similarity(kept.u[task], kept.solution.x[task], 0)) > 1 - 1e-12
    assert torch.equal(kept.u[3], kept.solution.x[3])


def test_lam_per_parameter_is_the_preconditioner_of_cg() -> None:
    """A curvature of rank 3 beside a λ spread over four magnitudes: 1 + 3 iterations end it."""
    factor = torch.randn(B, N, 3, dtype=F64)
    H, lam = factor @ factor.mT, 10 ** (4 * torch.rand(N, dtype=F64) - 2)
    v = torch.randn(B, N, dtype=F64)
    expected = solve_directly(shifted(H, lam), v)
    solved = implicit_solve(multiply(H), v, lam=lam, linear_solver=CG(max_iterations=4, rtol=0.0))
    assert relative(solved.u, expected) < 1e-8
    assert solved.solution.set_up is None
    plain = CG(max_iterations=4, rtol=0.0).solve(multiply(H), v, lam)
    assert relative(plain.x, expected) > 0.1  # which CG itself leaves alone
    lam[0] = 0.0  # of `argmin`, which allows it
    zero = implicit_solve(multiply(H + torch.eye(N, dtype=F64)), v, lam=lam, linear_solver=CG(max_iterations=3 * N))
    assert relative(zero.u, solve_directly(shifted(H, lam + 1), v)) < 1e-4
