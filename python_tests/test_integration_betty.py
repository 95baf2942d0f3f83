"""The solver for Betty: hypergradients against dense algebra, and Betty's own example."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from libraries import library
from torch import Tensor

from imaml_ext.errors import SolveError, SolveWarning
from imaml_ext.integrations.betty import install
from imaml_ext.solvers import CG, MINRES

pytestmark = pytest.mark.long
hypergradient = library("betty.hypergradient")
configs = library("betty.configs")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))


class Problem:
    """What Betty's methods ask of a problem."""

    def __init__(self, parameters: list[Tensor], config: Any = None, loss: Any = None) -> None:
        self.name, self.paths, self.cur_batch = "problem", [], None
        self.config, self.parameters_, self.loss = config, parameters, loss

    def trainable_parameters(self) -> list[Tensor]:
        return self.parameters_

    def parameters(self) -> list[Tensor]:
        return self.parameters_

    def training_step_exec(self, batch: Any) -> Any:
        return self.loss()


def quadratic(values: Tensor, config: Any) -> SimpleNamespace:
    """A lower problem with unknowns w [2, 3] and [], ½ wᵀHw + wᵀBθ, and one above it; H has these eigenvalues [7]."""
    Q, _ = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))
    H, B = Q * values @ Q.mT, torch.randn(7, 4, dtype=torch.float64)
    w = [torch.randn(2, 3, dtype=torch.float64), torch.randn((), dtype=torch.float64)]
    theta, unused = torch.randn(4, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    for parameter in (*w, theta, unused):
        parameter.requires_grad_()

    def loss() -> dict[str, Tensor]:
        flat = torch.cat([part.reshape(-1) for part in w])
        return {"loss": 0.5 * flat @ H @ flat + flat @ B @ theta}

    v = torch.randn(7, dtype=torch.float64)
    lower, upper = Problem(w, config, loss), Problem([theta, unused])
    return SimpleNamespace(
        lower=lower,
        upper=upper,
        vector=[v[:6].view(2, 3), v[6]],
        exact=lambda shift: -B.mT @ torch.linalg.solve(H + shift * torch.eye(7), v),
    )


def test_hypergradient_is_that_of_dense_algebra_whatever_cg_alpha() -> None:
    for alpha in (1.0, 0.1):
        config = configs.Config(type=install(shift=0.5), cg_iterations=20, cg_alpha=alpha)
        problem = quadratic(torch.linspace(1, 5, 7), config)
        method = hypergradient.jvp_fn_mapping[config.type]
        found, nothing = method(problem.vector, problem.lower, problem.upper)
        torch.testing.assert_close(found, problem.exact(0.5), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(nothing, torch.zeros(2, dtype=torch.float64))
        # as later releases of Betty ask for it
        assert method(problem.vector, problem.lower, problem.upper, True) is None
        torch.testing.assert_close(problem.upper.parameters_[0].grad, found)


def test_any_solver_and_its_failures() -> None:
    indefinite = torch.tensor([-2.0, -1, 1, 2, 3, 4, 5])
    config = configs.Config(type=install("imaml_minres", solver=MINRES(max_iterations=40, rtol=1e-9)), cg_iterations=20)
    problem = quadratic(indefinite, config)
    method = hypergradient.jvp_fn_mapping["imaml_minres"]
    found, _ = method(problem.vector, problem.lower, problem.upper)
    torch.testing.assert_close(found, problem.exact(0), rtol=1e-6, atol=1e-6)

    with pytest.raises(SolveError, match="NEGATIVE_CURVATURE in 1 of 1 hypergradients of Betty"):
        hypergradient.jvp_fn_mapping[install()](problem.vector, problem.lower, problem.upper)
    config.cg_iterations = 2
    definite = quadratic(torch.linspace(1, 100, 7), config)
    with pytest.warns(SolveWarning, match="MAX_ITERATIONS"):
        hypergradient.jvp_fn_mapping[install()](definite.vector, definite.lower, definite.upper)
    method = hypergradient.jvp_fn_mapping[install(on_unfinished="raise")]
    with pytest.raises(SolveError, match="MAX_ITERATIONS"):
        method(definite.vector, definite.lower, definite.upper)


def test_one_product_is_bettys_cg_of_one_iteration() -> None:
    config = configs.Config(type=install(on_unfinished="ignore"), cg_iterations=1)
    problem = quadratic(torch.linspace(1, 5, 7), config)
    problem.upper.parameters_.pop()  # Betty's own refuses a parameter that the loss does not use
    (found,) = hypergradient.jvp_fn_mapping[config.type](problem.vector, problem.lower, problem.upper)
    problem.lower.loss = lambda loss=problem.lower.loss: loss()["loss"]
    (theirs,) = hypergradient.jvp_fn_mapping["cg"](problem.vector, problem.lower, problem.upper)
    torch.testing.assert_close(found, theirs)


def test_bad_input_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match="name must not be that of one of Betty's own methods, got 'cg'"):
        install("cg")
    with pytest.raises(TypeError, match=r"solver must be a LinearSolver such as CG\(\), got str"):
        install(solver="cg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shift must be at least 0, got -1"):
        install(shift=-1)
    problem = quadratic(torch.ones(7), configs.Config(type=install(solver=CG())))
    problem.lower.paths = [[problem.lower, problem.lower]]
    with pytest.raises(ValueError, match="problem 'problem' must have no lower problem"):
        hypergradient.jvp_fn_mapping[install()](problem.vector, problem.lower, problem.upper)


def test_bettys_example_gives_the_same_hypergradients() -> None:
    from integration_examples import betty as example
    from integrations import difference

    runs = [example.example(ours, ways=3, shots=4, hidden=5, meta_steps=2) for ours in (False, True)]
    assert difference(*runs) <= 1e-5
    assert runs[1].products < runs[0].products / 2
