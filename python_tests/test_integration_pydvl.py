"""`imaml_ext.integrations.pydvl` against pyDVL itself and dense float64."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import library
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from imaml_ext import SolveError, SolveStatus, SolveWarning

influence = library("pydvl.influence.torch")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from integration_examples import pydvl as published  # noqa: E402

from imaml_ext.integrations.pydvl import CgInfluence, CgOperator  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.cpu_kernels]


class Problem:
    """Two Gaussian classes and a logistic regression, which is not trained."""

    def __init__(self, features: int) -> None:
        torch.manual_seed(24)
        self.y = torch.randint(0, 2, (60, 1)).double()
        self.x = self.y + 0.2 * torch.randn(60, features, dtype=torch.float64)
        self.model = nn.Sequential(nn.Linear(features, 1), nn.Sigmoid()).double()
        self.data = DataLoader(TensorDataset(self.x, self.y), batch_size=30)

    def fit(self, kind: type, **options: Any) -> Any:
        return kind(self.model, nn.functional.binary_cross_entropy, **options).fit(self.data)

    def factors(self, kind: type, rows: int, **options: Any) -> Tensor:
        """[rows, N]: the inverse Hessian times the gradients of some points."""
        return self.fit(kind, **options).influence_factors(self.x[:rows], self.y[:rows])


def solver(model: Any) -> Any:
    (block,) = model.block_mapper.composable_block_dict.values()
    return block.op


def test_the_published_example_with_one_line_changed() -> None:
    theirs, ours = (published.example(ours) for ours in (False, True))
    assert ours.result.shape == (20, 100)
    torch.testing.assert_close(ours.result, theirs.result, rtol=0, atol=1e-5 * float(theirs.result.abs().max()))
    assert ours.products < theirs.products


@pytest.mark.parametrize("mode", ["HESSIAN", "GAUSS_NEWTON"])
def test_the_block_solver(mode: str) -> None:
    """Only here are the Gauss-Newton matrices the same: pyDVL divides theirs by the number of right-hand sides."""
    problem = Problem(features=20)
    options = {"regularization": 0.01, "rtol": 1e-7, "second_order_mode": influence.SecondOrderMode[mode]}
    theirs = problem.factors(influence.CgInfluence, 15, solve_simultaneously=True, **options)
    ours = problem.factors(CgInfluence, 15, **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_more_points_than_parameters() -> None:
    problem = Problem(features=2)  # three parameters
    options = {"regularization": 0.01, "rtol": 1e-9, "atol": 1e-12}
    wanted = problem.factors(influence.DirectInfluence, 40, regularization=0.01)
    ours = problem.factors(CgInfluence, 40, **options)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-7 * float(wanted.abs().max()))
    theirs = problem.factors(influence.CgInfluence, 40, **options)
    assert (theirs[3:] == 0).all()  # what pyDVL gives for all points but the first N


def test_a_preconditioner_is_used() -> None:
    problem = Problem(features=20)
    options = {"regularization": 1e-3, "rtol": 1e-6}
    wanted = problem.factors(influence.DirectInfluence, 10, regularization=1e-3)
    plain = problem.fit(CgInfluence, **options)
    plain.influence_factors(problem.x[:10], problem.y[:10])
    preconditioner = influence.preconditioner.NystroemPreconditioner(rank=15)
    faster = problem.fit(CgInfluence, preconditioner=preconditioner, **options)
    found = faster.influence_factors(problem.x[:10], problem.y[:10])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert solver(faster).solution.iterations.max() < solver(plain).solution.iterations.min()
    assert not preconditioner.is_fitted  # the caller's stays as it is


def test_rows_end_at_their_own_tolerance() -> None:
    problem = Problem(features=20)
    model = problem.fit(CgInfluence, regularization=0.01, rtol=1e-5, atol=0.0)
    operator = solver(model)
    assert isinstance(operator, CgOperator)
    b = torch.randn(6, 21, dtype=torch.float64) * torch.logspace(-3, 3, 6, dtype=torch.float64).unsqueeze(1)
    x = operator.apply(b)
    residual = (b - operator.operator.apply(x) - 0.01 * x).norm(dim=1)
    assert (residual <= 1.001e-5 * b.norm(dim=1)).all()
    assert operator.solution.status.tolist() == [SolveStatus.CONVERGED] * 6
    torch.testing.assert_close(operator.apply(b[2]), x[2])  # [N] for [N]
    model.with_regularization(0.5)
    y = operator.apply(b)
    assert (b - operator.operator.apply(y) - 0.5 * y).norm() < 1e-4 * b.norm()


def test_failures_are_told(caplog: pytest.LogCaptureFixture) -> None:
    problem = Problem(features=20)
    with pytest.warns(SolveWarning, match="MAX_ITERATIONS in 4 of 4 right-hand sides"):
        problem.factors(CgInfluence, 4, regularization=0.01, maxiter=2)
    with warnings.catch_warnings(), caplog.at_level("DEBUG", "imaml_ext"):
        warnings.simplefilter("error", SolveWarning)
        problem.factors(CgInfluence, 4, regularization=0.01, maxiter=2, warn_on_max_iteration=False)
    assert "[1, 1, 1, 1]" in caplog.text
    inverse = solver(problem.fit(CgInfluence, regularization=0.01))
    b = torch.ones(3, 21, dtype=torch.float64)
    b[1, 4] = torch.inf
    with pytest.raises(SolveError, match=r"NON_FINITE in 1 of 3 right-hand sides \(1\)"):
        inverse.apply(b)
    inverse.operator = influence.operator.MatrixOperator(-torch.eye(21, dtype=torch.float64))
    with pytest.raises(SolveError, match="NEGATIVE_CURVATURE in 2 of 2 right-hand sides"):
        inverse.apply(torch.ones(2, 21, dtype=torch.float64))
    inverse.on_breakdown = "warn"
    with pytest.warns(SolveWarning, match="NEGATIVE_CURVATURE"):
        inverse.apply(torch.ones(2, 21, dtype=torch.float64))
