"""The solver for TorchOpt: trees of tensors, operators of any sign, and TorchOpt's own example."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import library
from torch import Tensor

from imaml_ext import Solution, SolveStatus
from imaml_ext.errors import SolveError, SolveWarning
from imaml_ext.integrations.torchopt import solve_symmetric

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:We've integrated functorch:FutureWarning")]
torchopt = library("torchopt")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))


def symmetric(values: list[float] | Tensor) -> Tensor:
    """A dense matrix [N, N] with these eigenvalues."""
    values = torch.as_tensor(values, dtype=torch.float64)
    Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return Q * values @ Q.mT


def tree(x: Tensor) -> dict[str, Any]:
    """[11] as a nested structure with a number in it."""
    return {"w": x[:6].view(2, 3), "more": (x[6], [x[7:8], x[8:]])}


def flat(leaves: dict[str, Any]) -> Tensor:
    w, (number, (one, rest)) = leaves["w"], leaves["more"]
    return torch.cat([w.flatten(), number.reshape(1), one, rest])


def product(A: Tensor) -> Any:
    return lambda leaves: tree(A @ flat(leaves))


def close(x: Any, expected: Tensor) -> None:
    torch.testing.assert_close(flat(x), expected, rtol=0, atol=1e-7 * float(expected.abs().max()))


MIXED = [-3.0, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("values", "method", "last"),
    [
        (torch.linspace(1, 9, 11), "auto", "CG"),
        (torch.linspace(1, 9, 11), "cg", "CG"),
        (-torch.linspace(1, 9, 11), "auto", "CG of −A"),
        (-torch.linspace(1, 9, 11), "minres", "MINRES"),
        (MIXED, "auto", "MINRES"),
        (MIXED, "minres", "MINRES"),
    ],
)
def test_trees_and_operators_of_any_sign(values: Any, method: Any, last: str) -> None:
    A, b, init = symmetric(values), torch.randn(11, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    for ridge in (None, 0.25):
        expected = torch.linalg.solve(A + (ridge or 0) * torch.eye(11), b)
        for start in (None, tree(init)):
            solutions: list[Solution] = []
            options: dict[str, Any] = {"ridge": ridge, "init": start, "rtol": 1e-10, "on_solve": solutions.append}
            close(solve_symmetric(method=method, **options)(product(A), tree(b)), expected)
            assert [s.status.item() for s in solutions] == [SolveStatus.CONVERGED], last
            # where A is definite, TorchOpt's own solver gives the same
            if last == "CG":
                own = torchopt.linear_solve.solve_cg(ridge=ridge, init=start, rtol=1e-10)
                close(own(product(A), tree(b)), expected)


def test_products_are_those_of_one_method_where_a_is_definite() -> None:
    for sign in (1, -1):
        A, calls = symmetric(sign * torch.linspace(1, 9, 11)), 0

        def counted(leaves: Any, A: Tensor = A) -> Any:
            nonlocal calls
            calls += 1
            return product(A)(leaves)

        solve_symmetric(rtol=1e-10)(counted, tree(torch.randn(11, dtype=torch.float64)))
        assert calls <= 14  # 11 steps, one that measures, one for the sign, and one of rounding


def test_a_preconditioner_has_the_sign_of_a() -> None:
    scale = torch.logspace(0, 3, 11, dtype=torch.float64)
    for sign in (1, -1):
        A = sign * (torch.diag(scale) + 0.1 * symmetric(torch.ones(11)))
        b, solutions = torch.randn(11, dtype=torch.float64), []
        solve = solve_symmetric(M=product(torch.diag(sign / scale)), rtol=1e-10, on_solve=solutions.append)
        close(solve(product(A), tree(b)), torch.linalg.solve(A, b))
        assert solutions[0].iterations.item() <= 8


def test_no_failure_is_silent() -> None:
    b = tree(torch.ones(11, dtype=torch.float64))
    with pytest.raises(SolveError, match="NEGATIVE_CURVATURE in 1 of 1 systems of TorchOpt"):
        solve_symmetric(method="cg")(product(symmetric(-torch.linspace(1, 9, 11))), b)
    singular = product(torch.diag(torch.tensor([0.0, *MIXED[1:]], dtype=torch.float64)))
    with pytest.raises(SolveError, match="SINGULAR"):
        solve_symmetric(maxiter=60)(singular, b)
    with pytest.warns(SolveWarning, match="SINGULAR"):
        solve_symmetric(maxiter=60, on_breakdown="warn")(singular, b)
    with pytest.raises(SolveError, match="NON_FINITE"):
        solve_symmetric()(lambda leaves: tree(flat(leaves) * torch.nan), b)
    hard = product(symmetric(torch.logspace(0, 4, 11)))
    with pytest.warns(SolveWarning, match="MAX_ITERATIONS"):
        solve_symmetric(maxiter=3)(hard, b)
    with pytest.raises(SolveError, match="MAX_ITERATIONS"):
        solve_symmetric(maxiter=3, on_unfinished="raise")(hard, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = solve_symmetric(maxiter=3, on_unfinished="ignore")(hard, b)
    close(x, flat(torchopt.linear_solve.solve_cg(maxiter=3)(hard, b)))


def test_gradient_of_a_scalar_root() -> None:
    """x(a) with a x³ − x − 2 = 0, a number: dx/da = −x³ / (3 a x² − 1)."""

    def optimality(x: Tensor, a: Tensor) -> Tensor:
        return a * x**3 - x - 2

    @torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solve_symmetric(rtol=1e-10))
    def root(x: Tensor, a: Tensor) -> Tensor:
        for _ in range(50):  # Newton
            x = x - (a * x**3 - x - 2) / (3 * a * x**2 - 1)
        return x

    for dtype in (torch.float32, torch.float64):
        a = torch.tensor(2.0, dtype=dtype, requires_grad=True)
        x = root(torch.tensor(1.5, dtype=dtype), a)
        (found,) = torch.autograd.grad(x, a)
        expected = (-(x**3) / (3 * a * x**2 - 1)).detach()
        assert found.shape == ()
        torch.testing.assert_close(found, expected)


def test_second_derivatives_are_refused() -> None:
    A, b = symmetric(torch.linspace(1, 9, 11)), torch.ones(11, dtype=torch.float64)
    cases = {"b": (A, b.clone().requires_grad_()), "what matvec returns": (A.clone().requires_grad_(), b)}
    for name, (matrix, wanting) in cases.items():
        solve = solve_symmetric()
        with pytest.raises(RuntimeError, match=f"{name} must not require a gradient"):
            solve(product(matrix), tree(wanting))
        with torch.no_grad():
            solve(product(matrix), tree(wanting))


def test_bad_input_gets_a_sentence() -> None:
    b = tree(torch.ones(11, dtype=torch.float64))
    with pytest.raises(ValueError, match="what matvec returns must have the structure of b"):
        solve_symmetric()(lambda leaves: leaves["w"], b)
    with pytest.raises(ValueError, match="b must have at least one tensor"):
        solve_symmetric()(lambda leaves: leaves, ())
    with pytest.raises(ValueError, match="method must be one of 'auto', 'cg', 'minres', got 'lu'"):
        solve_symmetric(method="lu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="M must be None where method is 'minres'"):
        solve_symmetric(method="minres", M=lambda r: r)
    with pytest.raises(ValueError, match="on_breakdown must be one of"):
        solve_symmetric(on_breakdown="stop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="maxiter must be at least 0, got -1"):
        solve_symmetric(maxiter=-1)


def test_torchopts_example_gives_the_same_meta_gradient() -> None:
    from integration_examples import torchopt as example
    from integrations import difference

    runs = [example.example(ours, filters=3, tasks=2, ways=3, shots=3) for ours in (False, True)]
    assert difference(*runs) <= 1e-5
    assert runs[1].products < runs[0].products / 2
