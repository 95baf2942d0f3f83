"""`imaml_ext.integrations.linear_operator` against linear_operator and GPyTorch themselves and dense float64."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import library
from torch import Tensor

from imaml_ext import Solution, SolveError, SolveWarning
from imaml_ext.integrations.linear_operator import installed, linear_cg

linear_operator, gpytorch = library("linear_operator"), library("gpytorch")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from integration_examples import linear_operator as published  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.cpu_kernels]
theirs = linear_operator.utils.linear_cg
TIGHT = {"tolerance": 1e-10, "max_iter": 100, "max_tridiag_iter": 30}
CLOSE = {"rtol": 0, "atol": 1e-7}


def definite(*shape: int) -> Tensor:
    """Positive definite matrices [*shape, shape[-1]], of condition about 10."""
    S = torch.randn(*shape, shape[-1], dtype=torch.float64)
    return S @ S.mT / shape[-1] + 0.5 * torch.eye(shape[-1], dtype=torch.float64)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def quadrature(T: Tensor) -> Tensor:
    """e₁ᵀ log(T) e₁ of matrices [..., m, m]."""
    values, vectors = torch.linalg.eigh(T)
    return (vectors[..., 0, :] ** 2 * values.log()).sum(-1)


@pytest.mark.parametrize(
    ("matrix", "rhs"),
    [((17,), (17,)), ((17,), (17, 3)), ((4, 17), (4, 17, 3)), ((2, 3, 9), (2, 3, 9, 1)), ((4, 17), (17, 3))],
)
def test_every_shape(matrix: tuple[int, ...], rhs: tuple[int, ...]) -> None:
    A, b = definite(*matrix), normal(*rhs)
    x = linear_cg(A.matmul, b, **TIGHT)
    wanted = torch.linalg.solve(A, b if b.dim() > 1 else b.unsqueeze(-1))
    torch.testing.assert_close(x, wanted if b.dim() > 1 else wanted.squeeze(-1), **CLOSE)
    assert x.shape == theirs(A.matmul, b, **TIGHT).shape
    torch.testing.assert_close(linear_cg(A, b, **TIGHT), x)
    guess = x + 1e-3 * torch.randn_like(x)
    torch.testing.assert_close(linear_cg(A, b, initial_guess=guess, **TIGHT), x, **CLOSE)
    if b.dim() > 1:
        diagonal = A.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        torch.testing.assert_close(linear_cg(A, b, preconditioner=lambda r: r / diagonal, **TIGHT), x, **CLOSE)


def test_products_are_not_made_twice() -> None:
    A, b = definite(3, 12), normal(3, 12, 2)
    for options in ({}, {"initial_guess": normal(3, 12, 2)}):
        made: list[Tensor] = []
        solutions: list[Solution] = []

        def product(v: Tensor, made: list[Tensor] = made) -> Tensor:
            made.append(v)
            return A @ v

        linear_cg(product, b, on_solve=solutions.append, **TIGHT, **options)
        steps = solutions[0].iterations
        assert len(made) == int(steps.max()) + 1 + len(options)  # one measures, and one is of the guess
        assert solutions[0].x.shape == (3, 12, 2)
        assert steps.shape == solutions[0].status.shape == (3, 2)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_tridiagonal_matrices(batch: tuple[int, ...], preconditioned: bool) -> None:
    A, b = definite(*batch, 24), normal(*batch, 24, 5)
    D = A.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    options = {"preconditioner": lambda r: r / D} if preconditioned else {}
    _, T = linear_cg(A, b, n_tridiag=2, **TIGHT, **options)
    _, wanted = theirs(A.matmul, b, n_tridiag=2, eps=1e-300, **TIGHT, **options)
    assert T.shape[:-2] == (2, *batch)
    m = 8  # beyond it rounding turns the Lanczos vectors
    torch.testing.assert_close(T[..., :m, :m], wanted[..., :m, :m], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(T, T.mT)
    root = D.rsqrt() if preconditioned else torch.ones_like(D)  # T is that of M^½ A M^½ from M^½ b
    values, vectors = torch.linalg.eigh(root * A * root.mT)
    start = torch.nn.functional.normalize(root * b[..., :2], dim=-2)
    exact = ((vectors.mT @ start) ** 2 * values.log().unsqueeze(-1)).sum(-2)  # [*batch, 2]
    torch.testing.assert_close(quadrature(T), exact.movedim(-1, 0), rtol=1e-9, atol=1e-9)


def test_tridiagonal_matrices_of_columns_that_end_early() -> None:
    A = definite(20)
    values, vectors = torch.linalg.eigh(A)
    b = torch.stack([vectors[:, 3], torch.zeros(20, dtype=torch.float64), vectors[:, :4].sum(1), normal(20)], 1)
    _, T = linear_cg(A, b, n_tridiag=4, **TIGHT)
    found = quadrature(T)
    torch.testing.assert_close(found[0], values[3].log())
    assert float(found[1]) == 0  # the identity
    torch.testing.assert_close(found[2], values[:4].log().mean())
    _, T = linear_cg(A, b, n_tridiag=1, **{**TIGHT, "max_tridiag_iter": 5})
    assert T.shape == (1, 1, 1)  # of the leading column alone
    _, T = linear_cg(A, b.flip(1), n_tridiag=1, **{**TIGHT, "max_tridiag_iter": 5})
    assert T.shape == (1, 5, 5)


def test_the_quadrature_is_as_good_as_the_square_of_the_tolerance() -> None:
    x = torch.rand(200, 1, dtype=torch.float64)
    for distance in (5 * (x - x.T).abs(), 25 * (x - x.T) ** 2):  # an exponential kernel and a Gaussian one
        A = torch.exp(-distance) + 0.01 * torch.eye(200, dtype=torch.float64)
        b = torch.nn.functional.normalize(normal(200, 5), dim=0)
        values, vectors = torch.linalg.eigh(A)
        exact = ((vectors.T @ b) ** 2 * values.log().unsqueeze(1)).sum(0)
        for tolerance in (1e-2, 1e-3):
            _, T = linear_cg(A, b, n_tridiag=5, tolerance=tolerance, max_tridiag_iter=200)
            assert (quadrature(T) - exact).abs().max() < 3 * tolerance**2


def test_columns_stop_on_their_own_residual() -> None:
    A = definite(50)
    b = torch.cat([torch.linalg.eigh(A).eigenvectors[:, :40], normal(50, 1)], 1)
    tolerance = 1e-4
    solutions: list[Solution] = []
    residual = {}
    for name, solver, options in (("theirs", theirs, {}), ("ours", linear_cg, {"on_solve": solutions.append})):
        x = solver(A.matmul, b, tolerance=tolerance, max_tridiag_iter=1, **options)
        residual[name] = float(((b - A @ x).norm(dim=0) / b.norm(dim=0)).max())
    assert residual["ours"] <= 1.001 * tolerance
    assert residual["theirs"] > 2 * tolerance
    assert solutions[0].iterations[0, :40].max() == 1


def test_tolerances_below_the_eps_of_the_library_are_met() -> None:
    A, b = definite(40) * 1e-4, normal(40, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", linear_operator.utils.warnings.NumericalWarning)
        stalled = theirs(A.matmul, b, **TIGHT)
    assert (b - A @ stalled).norm() > 1e-5 * b.norm()  # its guard against division by 0 ends the steps
    assert (b - A @ linear_cg(A, b, **TIGHT)).norm() < 1.001e-10 * b.norm()


def test_what_the_settings_ask_for() -> None:
    A, b = definite(40), normal(40, 1)

    def residual(**options: Any) -> float:
        x = linear_cg(A, b, **options)
        return float((b - A @ x).norm() / b.norm())

    assert 1e-4 < residual() <= 0.01001  # the library's default of 1 would be met by x = 0
    with linear_operator.settings.cg_tolerance(1e-6):
        assert 1e-9 < residual() <= 1.001e-6
        assert residual(tolerance=1e-9) <= 1.001e-9
    solutions: list[Solution] = []
    NumericalWarning = linear_operator.utils.warnings.NumericalWarning
    with (
        linear_operator.settings.max_cg_iterations(3),
        pytest.warns(NumericalWarning, match="MAX_ITERATIONS in 1 of 1"),
    ):
        linear_cg(A, b, on_solve=solutions.append)
    assert solutions[0].iterations.tolist() == [[3]]
    with linear_operator.settings.terminate_cg_by_size(True), pytest.warns(NumericalWarning):
        linear_cg(A, b, tolerance=0, stop_updating_after=0, on_solve=solutions.append)
    assert solutions[1].iterations.tolist() == [[40]]
    with pytest.raises(RuntimeError, match="max_tridiag_iter must be at most max_iter, 5, got 20"):
        linear_cg(A, b, n_tridiag=1, max_iter=5)
    with pytest.raises(SolveError, match="NEGATIVE_CURVATURE in 1 of 1 columns"):
        linear_cg(-A, b)
    with pytest.warns(SolveWarning, match="NEGATIVE_CURVATURE in 1 of 1 columns"):
        linear_cg(-A, b, on_breakdown="warn")
    with pytest.raises(ValueError, match="on_breakdown must be"):
        linear_cg(A, b, on_breakdown="panic")
    with pytest.warns(NumericalWarning, match="STAGNATED in 1 of 1 columns"):
        x = linear_cg(A.float(), b.float(), tolerance=1e-12)
    assert x.dtype == torch.float32
    with pytest.raises(SolveError, match="NON_FINITE"):
        linear_cg(A, b * torch.nan)


def test_the_published_batch_gp_example_with_one_line_changed() -> None:
    theirs, ours = (published.example(ours, points=40, steps=4) for ours in (False, True))
    torch.testing.assert_close(ours.result, theirs.result, rtol=0, atol=1e-5 * float(theirs.result.abs().max()))
    assert ours.products < theirs.products
    exact = published.train(points=40, steps=4)  # by Cholesky decompositions; else log-determinants are estimates
    torch.testing.assert_close(ours.result[:4], exact[:4], rtol=0.05, atol=0)  # the losses


def test_installed_reaches_all_and_is_undone() -> None:
    import gpytorch.variational.ciq_variational_strategy as strategy
    from linear_operator.utils import contour_integral_quad as _  # noqa: F401

    holders = [linear_operator.utils, strategy]
    with installed(tolerance=1e-9):
        assert all(holder.linear_cg.func is linear_cg for holder in holders)
        A, b = definite(30), normal(30, 2)
        with linear_operator.settings.max_cholesky_size(0):
            x = linear_operator.to_linear_operator(A).solve(b)
        assert (b - A @ x).norm(dim=0).max() <= 1.001e-9 * b.norm()
    assert all(holder.linear_cg is theirs for holder in holders)
    with contextlib.suppress(KeyError), installed():
        raise KeyError
    assert all(holder.linear_cg is theirs for holder in holders)
