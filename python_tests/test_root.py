"""root: derivatives of roots and fixed points, in every form; what it says of a Jacobian that is not symmetric."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from imaml_ext import CG, SolveError, lsqr, root

F64 = torch.float64


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm().detach() / expected.norm().detach())


def newton(condition: Any, init: Tensor) -> Tensor:
    """Newton's method with the dense Jacobian, of one problem or of each row."""
    x = init
    for _ in range(30):
        if x.dim() == 1:
            J, F = torch.func.jacrev(condition)(x), condition(x)
        else:
            J = torch.autograd.functional.jacobian(lambda x: condition(x).sum(0), x).movedim(1, 0)
            F = condition(x)
        x = (x - torch.linalg.solve(J, F.unsqueeze(-1)).squeeze(-1)).detach()
    return x


def symmetric(*lead: int) -> Tensor:
    Q = randn(*lead, 4, 4)
    return Q + Q.mT + torch.diag_embed(3.0 * torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=F64))


@pytest.mark.parametrize("lead", [(), (1,), (33,)], ids=str)
def test_an_indefinite_linear_system(lead: tuple[int, ...]) -> None:
    """A x = b, A symmetric and indefinite: in closed form, twice."""
    A, b = symmetric(*lead).requires_grad_(), randn(*lead, 4).requires_grad_()

    def condition(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return ((A + A.mT) @ x.unsqueeze(-1)).squeeze(-1) / 2 - b

    x = root(condition, torch.zeros_like(b), (A, b), inner=newton)
    exact = torch.linalg.solve((A + A.mT) / 2, b)
    assert relative(x, exact) < 1e-8
    v = randn(*lead, 4)
    found, expected = (torch.autograd.grad((v * y**2).sum(), (A, b), create_graph=True) for y in (x, exact))
    for value, reference in zip(found, expected, strict=True):
        assert relative(value, reference) < 1e-6
    found, expected = (torch.autograd.grad(grads[0].square().sum(), (A, b)) for grads in (found, expected))
    for value, reference in zip(found, expected, strict=True):
        assert relative(value, reference) < 1e-5


def test_a_fixed_point_in_a_structure() -> None:
    """x = tanh(W x + c) / 2 with a symmetric W, whose Jacobian is symmetric in other variables only: lsqr solves it."""
    W, c = randn(5, 5) / 5, randn(5)
    W, c = (W + W.mT).requires_grad_(), c.requires_grad_()

    def condition(x: dict[str, Tensor], W: Tensor, c: Tensor) -> dict[str, Tensor]:
        y = torch.cat([x["a"].flatten(), x["b"]])
        out = torch.tanh(W @ y + c) / 2 - y
        return {"a": out[:4].reshape(2, 2), "b": out[4:]}

    def iterate(condition: Any, x: dict[str, Tensor]) -> dict[str, Tensor]:
        for _ in range(200):
            x = {name: (x[name] + value).detach() for name, value in condition(x).items()}
        return x

    def transposed(product: Any, v: Tensor) -> Tensor:
        return lsqr(product, v, n=v.shape[1], rtol=1e-13).x

    init = {"a": torch.zeros(2, 2, dtype=F64), "b": torch.zeros(1, dtype=F64)}
    x = root(condition, init, (W, c), inner=iterate, linear_solver=transposed)
    flat = torch.cat([x["a"].flatten(), x["b"]])
    exact = flat.detach()
    for _ in range(300):  # the derivative through the iteration
        exact = torch.tanh(W @ exact + c) / 2
    v = randn(5)
    for value, reference in zip(
        torch.autograd.grad((v * flat).sum(), (W, c)), torch.autograd.grad((v * exact).sum(), (W, c)), strict=True
    ):
        assert relative(value, reference) < 1e-8
    x = root(condition, init, (W, c), inner=iterate)
    with pytest.raises(ValueError, match=r"condition must have a symmetric Jacobian .*: give linear_solver a function"):
        x["a"].sum().backward()


def test_errors_name_the_argument() -> None:
    b = torch.ones(3, dtype=F64, requires_grad=True)
    init = torch.zeros(3, dtype=F64)

    def call(condition: Any = lambda x, b: x - b, init: Any = init, args: Any = (b,), **options: Any) -> Any:
        return root(condition, init, args, **{"inner": newton, **options})

    for error, words, wrong in (
        (TypeError, "condition must be a function, got int", {"condition": 1}),
        (TypeError, "inner must be a function, got NoneType", {"inner": None}),
        (TypeError, "args must be a tuple of what condition takes after x, got list", {"args": [b]}),
        (TypeError, "linear_solver must be a LinearSolver or a function, got str", {"linear_solver": "cg"}),
        (ValueError, "what condition returns must have the shape of init", {"condition": lambda x, b: x[:2]}),
        (ValueError, "what inner returns must have the shape of init", {"inner": lambda condition, x: x[:2]}),
        (ValueError, "condition must not reach tensors", {"condition": lambda x, c: x - b, "args": (init,)}),
    ):
        with pytest.raises(error, match=words):
            call(**{"inner": lambda condition, x: x, **wrong})
    A = torch.diag(torch.logspace(0, 6, 3, dtype=F64))
    x = call(lambda x, b: A @ x - b, linear_solver=CG(max_iterations=1))
    with pytest.raises(SolveError, match="MAX_ITERATIONS in 1 of 1 systems"):
        (x * randn(3)).sum().backward()
    with pytest.raises(RuntimeError, match="must have a LinearSolver as its linear_solver to be differentiated twice"):
        torch.autograd.grad(call(linear_solver=lambda product, v: v).sum(), b, create_graph=True)
    with pytest.raises(ValueError, match="linear_solver must return u"):
        call(linear_solver=lambda product, v: v[0]).sum().backward()
