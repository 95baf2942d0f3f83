"""`imaml_ext.integrations.dattri` against dattri itself and dense float64."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import library
from torch import Tensor

from imaml_ext import Solution, SolveError, SolveStatus, SolveWarning
from imaml_ext.integrations.dattri import ihvp_at_x_cg, ihvp_cg, installed

library("dattri")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from integration_examples import dattri as published  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.cpu_kernels]

SIZES = {"train": 100, "test": 20, "features": 12}


@pytest.mark.parametrize("options", [{"max_iter": 10}, {"max_iter": 40, "tol": 1e-4}])
def test_the_published_example_with_one_line_changed(options: dict[str, Any]) -> None:
    theirs, ours = (published.example(ours, **SIZES, **options) for ours in (False, True))
    assert ours.result.shape == (100, 20)
    torch.testing.assert_close(ours.result, theirs.result, rtol=0, atol=1e-5 * float(theirs.result.abs().max()))
    assert theirs.products == 20 * (1 + options["max_iter"])
    assert ours.products == theirs.products if "tol" not in options else ours.products < theirs.products


def test_rows_end_at_tol_where_dattri_turns_into_nan() -> None:
    theirs, ours = (published.example(ours, **SIZES, max_iter=200, tol=1e-4) for ours in (False, True))
    assert theirs.result.isnan().any()
    assert ours.result.isfinite().all()
    assert ours.products < 20 * 60


def test_installed_is_undone_and_tells_of_its_solves() -> None:
    from dattri.func import hessian

    own, solutions = hessian.ihvp_cg, list[Solution]()
    scale = torch.linspace(1, 9, 30, dtype=torch.float64)
    with installed(on_solve=solutions.append):
        solver = hessian.ihvp_cg(lambda w: (scale * w * w).sum() / 2, max_iter=60, tol=1e-8)
        x = solver((torch.zeros(30, dtype=torch.float64),), torch.eye(30, dtype=torch.float64)[:4])
    torch.testing.assert_close(x, torch.diag(1 / scale)[:4], rtol=0, atol=1e-8)
    assert solutions[0].status.tolist() == [SolveStatus.CONVERGED] * 4
    assert hessian.ihvp_cg is own


@pytest.mark.parametrize("mode", ["rev-rev", "rev-fwd"])
def test_ihvp_solves_for_the_argument_asked_for(mode: str) -> None:
    torch.manual_seed(0)
    S = torch.randn(9, 9, dtype=torch.float64)
    A = S @ S.T
    x, v = torch.randn(9, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)

    def function(scale: Tensor, w: Tensor) -> Tensor:
        return scale.sum() * (w @ A @ w) / 2

    scale = torch.tensor([0.5, 1.5], dtype=torch.float64)
    wanted = torch.linalg.solve(2 * A + 0.1 * torch.eye(9, dtype=torch.float64), v.T).T
    options = {"argnums": 1, "max_iter": 60, "tol": 1e-12, "mode": mode, "regularization": 0.1}
    found = ihvp_at_x_cg(function, scale, x, **options)(v)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))
    assert torch.equal(ihvp_cg(function, **options)((scale, x), v), found)
    single = ihvp_cg(function, **options)((scale, x), v[1])
    torch.testing.assert_close(single, found[1:2])  # [1, N], as dattri gives


def test_steps_are_dattris_steps() -> None:
    from dattri.func import hessian

    S = torch.randn(20, 20, dtype=torch.float64)
    A, v = S @ S.T / 20, torch.randn(4, 20, dtype=torch.float64)
    for steps in (1, 3, 7):
        ours, theirs = (
            of(lambda w: w @ A @ w / 2, torch.zeros(20, dtype=torch.float64), max_iter=steps, regularization=0.3)(v)
            for of in (ihvp_at_x_cg, hessian.ihvp_at_x_cg)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_an_indefinite_hessian_is_an_error() -> None:
    w, v = torch.zeros(5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    with pytest.raises(SolveError, match="NEGATIVE_CURVATURE in 2 of 2 rows of v"):
        ihvp_at_x_cg(lambda w: -(w @ w), w, regularization=0.5)(v)
    with pytest.warns(SolveWarning, match="NEGATIVE_CURVATURE"):
        ihvp_cg(lambda w: -(w @ w), regularization=0.5, on_breakdown="warn")((w,), v)
