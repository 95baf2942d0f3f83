"""What prox_solve and curvature say of themselves: unfinished systems, losses differentiable once, tracers."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from meta_tasks import F64, Data, Episodes, HostWatch, regression, relative
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from imaml_ext import CG, FOMAML, IMAML, MAML, GradientDescent, NewtonCG, SolveError, SolveWarning, prox_solve
from imaml_ext.losses import GaussNewtonOperator, HessianOperator
from imaml_ext.meta import ImplicitSolution


def _scales(params: Tensor, data: Data) -> Tensor:
    """½ Σ x_j (φ_j − y_j)², x [B, N] of condition number 1e4."""
    return 0.5 * (data.x * (params - data.y).square()).sum(1)


def _unfinished(iterations: int, **options: object) -> tuple[Tensor, Tensor, list[ImplicitSolution]]:
    """The gradient of a prox_solve whose linear solver takes so many iterations, the exact one, and what it reports."""
    x = torch.logspace(-4, 0, 60, dtype=F64).expand(3, -1)
    data, theta, lam = Data(x, torch.randn(3, 60, dtype=F64)), torch.randn(60, dtype=F64).requires_grad_(), 1e-4
    v, reports = torch.randn(3, 60, dtype=F64), []
    phi = prox_solve(
        _scales,
        theta,
        lam,
        data,
        inner=lambda loss, theta, data, lam: (data.x * data.y + lam * theta) / (data.x + lam),
        linear_solver=CG(max_iterations=iterations, rtol=1e-6),
        on_solve=reports.append,
        **options,
    )
    (gradient,) = torch.autograd.grad(phi, theta, v)
    exact = (lam / (x + lam) * v).sum(0)
    residual = (v - (x + lam) * reports[-1].u).norm(dim=1) / v.norm(dim=1)
    torch.testing.assert_close(reports[-1].relative_residual, residual, rtol=1e-3, atol=1e-9)
    return gradient, exact, reports


def test_prox_solve_says_that_its_linear_systems_are_unfinished() -> None:
    words = "unfinished, with a relative residual above 0.01, so that its gradient is inexact: raise"
    with pytest.warns(SolveWarning, match=words) as caught:
        gradient, exact, reports = _unfinished(20)
    assert relative(gradient, exact) > 0.1
    assert [warning.filename for warning in caught] == [__file__]  # where prox_solve was called
    assert len(reports) == 1
    assert reports[0].solution.unfinished.all()
    assert reports[0].solution.iterations.tolist() == [20] * 3
    with pytest.raises(SolveError, match=words + r".* \(tasks 0, 1, 2: up to \d"):
        _unfinished(20, on_unfinished="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _unfinished(20, on_unfinished="ignore")
        _unfinished(20, unfinished_residual=1e3)
        gradient, exact, reports = _unfinished(120)
        assert relative(gradient, exact) < 1e-2


def test_prox_solve_warns_once_for_every_line_that_calls_it() -> None:
    script = """
import torch
from imaml_ext import CG, prox_solve

def loss(params, data):
    return 0.5 * (torch.logspace(-4, 0, 60) * params.square()).sum(1)

def solve():
    return prox_solve(loss, theta, 1e-4, None, num_tasks=2, linear_solver=CG(max_iterations=3))

theta = torch.ones(60, requires_grad=True)
for _ in range(3):
    solve().sum().backward()
prox_solve(loss, theta, 1e-4, None, num_tasks=2, linear_solver=CG(max_iterations=3)).sum().backward()
"""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        exec(compile(script, "<script>", "exec"), {"__name__": "script"})
    assert [(each.category, each.filename, each.lineno) for each in caught] == [
        (SolveWarning, "<script>", 9),
        (SolveWarning, "<script>", 14),
    ]


def test_prox_solve_waits_for_no_device_where_it_is_not_to_look() -> None:
    theta = torch.ones(5, dtype=F64, requires_grad=True)
    data = Data(torch.rand(2, 5, dtype=F64), torch.randn(2, 5, dtype=F64))
    for on_unfinished, looks in (("ignore", False), ("warn", True)):
        phi = prox_solve(_scales, theta, 0.5, data, on_breakdown="keep", on_unfinished=on_unfinished)
        with HostWatch() as watch:
            phi.sum().backward()
        assert bool(watch.seen) == looks


def test_every_result_loads_as_weights_and_is_compared_as_an_object() -> None:
    loss, theta, episodes = regression(2)
    reports: list[ImplicitSolution] = []
    leaf = theta.clone().requires_grad_()
    options = {"on_solve": reports.append, "on_breakdown": "keep", "on_unfinished": "ignore"}
    prox_solve(loss, leaf, 1.0, episodes.support, **options).sum().backward()
    inner = NewtonCG().solve(loss, theta, episodes.support, lam=1.0)
    descent = GradientDescent().solve(loss, theta, episodes.support, lam=1.0)
    for result in (reports[0], inner, descent, IMAML(loss).meta_gradient(theta, episodes)):
        file = io.BytesIO()
        torch.save(result, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert type(loaded) is type(result)
        assert loaded == loaded
        assert loaded != result
        for tensor, value in zip(tensors(loaded), tensors(result), strict=True):
            assert torch.equal(tensor, value)


def tensors(value: object) -> list[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for part in parts for tensor in tensors(part)]


class _Quartic(torch.autograd.Function):
    """Σ_j x_j⁴ of every row, whose gradient is computed in differentiable operations, detached, or marked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.pow(4).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 4 * ctx.saved_tensors[0] ** 3 * grad.unsqueeze(1)


class _MarkedQuartic(_Quartic):
    backward = staticmethod(torch.autograd.function.once_differentiable(_Quartic.backward))


class _DetachedQuartic(_Quartic):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Quartic.backward(ctx, grad).detach()


@pytest.mark.parametrize("kind", ["marked", "detached", "a marked part"])
def test_a_loss_that_is_differentiable_once_has_no_curvature(kind: str) -> None:
    """Autograd would give zero: the gradient looks like that of a linear loss."""
    function = {"detached": _DetachedQuartic}.get(kind, _MarkedQuartic).apply
    theta = torch.rand(4, dtype=F64, requires_grad=True)

    def loss(params: Tensor, data: Data) -> Tensor:
        return function(params) + (params.square().sum(1) if kind == "a marked part" else 0)

    episodes = Episodes(Data(torch.rand(2, 1), torch.rand(2, 1)), Data(torch.rand(2, 1), torch.rand(2, 1)))
    words = "loss must be twice differentiable in params, .*not once_differentiable"
    phi = prox_solve(loss, theta, 1.0, episodes.support)  # needs the gradient alone
    for call in (
        lambda: phi.sum().backward(),
        lambda: IMAML(loss).meta_gradient(theta, episodes),
        lambda: MAML(loss).meta_gradient(theta, episodes),
        lambda: NewtonCG().solve(loss, theta, episodes.support, lam=1.0),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    FOMAML(loss).meta_gradient(theta, episodes)


def test_a_model_that_is_differentiable_once_has_no_gauss_newton_matrix() -> None:
    phi, w = torch.rand(2, 4, dtype=F64), torch.rand(2, 4, dtype=F64)
    for function in (_MarkedQuartic.apply, _DetachedQuartic.apply):
        with pytest.raises(ValueError, match="model must be twice differentiable in params"):
            GaussNewtonOperator(lambda phi, f=function: f(phi), lambda outputs: outputs.square(), phi)
        with pytest.raises(ValueError, match="loss must be twice differentiable in params"):
            GaussNewtonOperator(lambda phi: phi * w, function, phi)


def test_the_curvature_of_a_loss_without_curvature_is_zero() -> None:
    phi, c, other = torch.rand(2, 4, dtype=F64), torch.rand(4, dtype=F64), torch.ones(2, dtype=F64, requires_grad=True)
    for function in (
        lambda params, data: params @ c,
        lambda params, data: (params * c).sum(1) + other,
        lambda params, data: other.square(),  # of other parameters alone
    ):
        operator = HessianOperator(function, phi, None)
        assert torch.equal(operator(torch.rand(2, 4, dtype=F64)), torch.zeros(2, 4, dtype=F64))
    operator = HessianOperator(lambda params, data: _Quartic.apply(params), phi, None)
    p = torch.rand(2, 4, dtype=F64)
    torch.testing.assert_close(operator(p), 12 * phi.square() * p)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_prox_solve_says_what_transforms_and_tracers_cannot_have() -> None:
    theta = torch.ones(5, dtype=F64, requires_grad=True)
    data = Data(torch.rand(2, 5, dtype=F64), torch.randn(2, 5, dtype=F64))

    def solve(theta: Tensor, lam: object = 0.5, **options: object) -> Tensor:
        return prox_solve(_scales, theta, lam, data, **options)

    def backward(theta: Tensor, **options: object) -> Tensor:
        return torch.autograd.grad(solve(theta, **options).sum(), theta)[0]

    grads = torch.randn(3, 2, 5, dtype=F64)
    for words, call in (
        ("outside the transforms of torch.func", lambda: torch.func.grad(lambda t: solve(t).sum())(theta.detach())),
        ("outside the transforms of torch.func", lambda: torch.func.vmap(solve)(torch.ones(2, 5, dtype=F64))),
        ("outside the transforms of torch.func", lambda: torch.func.jvp(solve, (theta.detach(),), (torch.ones(5),))),
        (
            "one outer gradient at a time: call torch.autograd.grad for each, in place of is_grads_batched",
            lambda: torch.autograd.grad(solve(theta), theta, grads, is_grads_batched=True),
        ),
        ("one outer gradient", lambda: torch.autograd.functional.jacobian(solve, theta, vectorize=True)),
        ("outside torch.jit.trace", lambda: torch.jit.trace(solve, (theta,))),
        (
            "prox_solve must have on_breakdown other than 'raise' and on_unfinished='ignore'",
            lambda: make_fx(backward)(theta),
        ),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()
    traced = make_fx(lambda theta: backward(theta, on_breakdown="keep", on_unfinished="ignore"))(theta)
    other = torch.randn(5, dtype=F64, requires_grad=True)
    torch.testing.assert_close(traced(other), backward(other))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"prox_solve runs a loop outside torch.compile"):
        torch.compile(solve, backend="eager", fullgraph=True)(theta)
    torch._dynamo.reset()
    compiled = torch.compile(lambda theta: solve(2 * theta).sum(), backend="eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(other), other), torch.autograd.grad(solve(2 * other).sum(), other)
    )
    torch._dynamo.reset()
