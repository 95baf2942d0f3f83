"""Implicit meta-gradients against closed forms, finite differences and dense matrices."""

import math
from typing import Any

import pytest
import torch
from meta_tasks import F64, Data, Episodes, HostWatch
from systems import solve_directly
from torch import Tensor

from imaml_ext import CG, GradientDescent, NewtonCG, SolveError
from imaml_ext.losses import TaskLoss, as_loss
from imaml_ext.meta import (
    IMAML,
    implicit_solve,
    prox_solve,
)
from imaml_ext.models import MLP, Conv4


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def regression(tasks: int, *, hidden: tuple[int, ...] = (5,), scale: float = 1.0) -> tuple[TaskLoss, Tensor, Episodes]:
    model = MLP(3, hidden, 2, activation="tanh")
    sides = [
        Data(_random(tasks, count, 3, seed=seed), scale * _random(tasks, count, 2, seed=seed + 1))
        for count, seed in ((6, 10), (9, 20))
    ]
    return TaskLoss(model, "mse"), model.init(seed=2, dtype=F64), Episodes(*sides)


def classification(tasks: int, *, dtype: torch.dtype = F64) -> tuple[TaskLoss, Tensor, Episodes]:
    model = Conv4(3, image_size=12, filters=4)
    sides = [
        Data(
            torch.rand(tasks, 3 * count, 1, 12, 12, generator=torch.Generator().manual_seed(count), dtype=F64).to(
                dtype
            ),
            torch.arange(3).repeat_interleave(count).repeat(tasks, 1),
        )
        for count in (1, 2)
    ]
    return TaskLoss(model, "cross_entropy"), model.init(seed=2, dtype=dtype), Episodes(*sides)


def torch_func_product(loss: TaskLoss, row: Tensor, data: Data, task: int, p: Tensor) -> Tensor:
    """∇² of one task's loss times p, by torch.func: [N]."""
    one = Data(data.x[task : task + 1], data.y[task : task + 1])
    _, pullback = torch.func.vjp(torch.func.grad(lambda row: loss(row.unsqueeze(0), one)[0]), row)
    return pullback(p)[0]


# --- curvature --------------------------------------------------------------------------------------------------------


def test_hessian_products_equal_torch_func() -> None:
    loss, theta, episodes = regression(3)
    phi = theta + 0.3 * _random(3, theta.numel(), seed=5)
    p = _random(3, theta.numel(), seed=6)
    operator = loss.linearize(phi, episodes.support)
    for _ in range(2):  # a second product from the same graph
        product = operator(p)
        for task in range(3):
            expected = torch_func_product(loss, phi[task], episodes.support, task, p[task])
            torch.testing.assert_close(product[task], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(operator.losses, loss(phi, episodes.support))
    leaf = phi.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, episodes.support).sum(), leaf)
    torch.testing.assert_close(operator.gradient, gradient)


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_gauss_newton_equals_its_matrix_built_explicitly(kind: str) -> None:
    if kind == "regression":
        loss, theta, episodes = regression(2)
    else:
        model = MLP(4, (5,), 3)
        loss, theta = TaskLoss(model, "cross_entropy"), model.init(seed=0, dtype=F64)
        support = Data(_random(2, 6, 4, seed=1), torch.arange(3).repeat(2, 2))
        episodes = Episodes(support, support)
    phi = theta + 0.3 * _random(2, theta.numel(), seed=5)
    p = _random(2, theta.numel(), seed=6)
    operator = loss.linearize(phi, episodes.support, "gauss_newton")
    product = operator(p)
    x, y = episodes.support
    for task in range(2):
        row = phi[task : task + 1]

        def outputs(flat: Tensor, task: int = task) -> Tensor:
            return loss.outputs(flat.unsqueeze(0), x[task : task + 1]).flatten()

        out = outputs(row[0])
        shape = loss.outputs(row, x[task : task + 1]).shape

        def criterion(flat: Tensor, task: int = task, shape: torch.Size = shape) -> Tensor:
            return loss.criterion(flat.view(shape), y[task : task + 1])[0]

        jacobian = torch.autograd.functional.jacobian(outputs, row[0])  # [S·K, N]
        curvature = torch.autograd.functional.hessian(criterion, out)  # [S·K, S·K]
        matrix = jacobian.T @ curvature @ jacobian
        torch.testing.assert_close(product[task], matrix @ p[task], rtol=1e-10, atol=1e-12)
        assert torch.linalg.eigvalsh(matrix).min() > -1e-12
    plain = loss.linearize(phi, episodes.support)
    torch.testing.assert_close(operator.losses, plain.losses)
    torch.testing.assert_close(operator.gradient, plain.gradient)


def test_gauss_newton_is_the_hessian_of_a_linear_model_and_of_no_curvature_zero() -> None:
    loss, theta, episodes = regression(2, hidden=())
    phi, p = theta.expand(2, -1), _random(2, theta.numel(), seed=6)
    torch.testing.assert_close(
        loss.linearize(phi, episodes.support, "gauss_newton")(p), loss.linearize(phi, episodes.support)(p)
    )
    linear = TaskLoss(loss.model, lambda outputs, targets: outputs.sum((1, 2)))
    for kind in ("hessian", "gauss_newton"):
        assert torch.equal(linear.linearize(phi, episodes.support, kind)(p), torch.zeros_like(p))


def test_conv4_products_are_symmetric_and_equal_differences_of_gradients() -> None:
    loss, theta, episodes = classification(2)
    phi = theta + 0.05 * _random(2, theta.numel(), seed=3)
    p, q = _random(2, theta.numel(), seed=4), _random(2, theta.numel(), seed=5)
    operator = loss.linearize(phi, episodes.support)
    torch.testing.assert_close((q * operator(p)).sum(1), (p * operator(q)).sum(1), rtol=1e-9, atol=1e-9)
    h = 1e-6
    ahead, behind = (loss.linearize(phi + sign * h * p, episodes.support).gradient for sign in (1, -1))
    torch.testing.assert_close(operator(p), (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-6)


# --- the implicit gradient is exact -----------------------------------------------------------------------------------


def _linear_problem() -> tuple[TaskLoss, Tensor, Episodes, int]:
    """Linear regression with a bias: N = 4 parameters, more than the 3 support points determine."""
    model = MLP(3, (), 1)
    support = Data(_random(4, 3, 3, seed=1), _random(4, 3, 1, seed=2))
    query = Data(_random(4, 7, 3, seed=3), _random(4, 7, 1, seed=4))
    return TaskLoss(model, "mse"), _random(4, seed=5), Episodes(support, query), 4


def _closed_form(theta: Tensor, lam: Tensor, episodes: Episodes) -> Tensor:
    """F(θ, λ) with the inner problem solved exactly, by a dense solve that autograd differentiates.

    MSE over S points is ‖Zφ − y‖²/S with Z = [x, 1], so φ* = (2 ZᵀZ/S + Λ)⁻¹ (2 Zᵀy/S + Λθ).
    """
    total = theta.new_zeros(())
    for task in range(4):
        x, y = episodes.support.x[task], episodes.support.y[task, :, 0]
        z = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)
        own = lam[task] if lam.dim() == 2 or (lam.dim() == 1 and len(lam) == 4 and lam.shape == (4,)) else lam
        shift = torch.diag(own.expand(4)) if own.dim() else own * torch.eye(4, dtype=F64)
        phi = solve_directly(2 * z.T @ z / len(x) + shift, 2 * z.T @ y / len(x) + shift @ theta)
        qx, qy = episodes.query.x[task], episodes.query.y[task, :, 0]
        total = total + ((qx @ phi[:3] + phi[3] - qy) ** 2).mean()
    return total / 4


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_meta_gradient_equals_the_closed_form_on_linear_regression() -> None:
    loss, theta, episodes, _ = _linear_problem()
    lam = torch.tensor(0.7, dtype=F64)
    leaf = theta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(_closed_form(leaf, lam, episodes), leaf)
    for curvature in ("hessian", "gauss_newton"):
        algorithm = IMAML(
            loss,
            lam=0.7,
            inner=GradientDescent(steps=600, lr=0.15),
            linear_solver=CG(max_iterations=12, rtol=1e-14),
            curvature=curvature,
        )
        assert _relative(algorithm.meta_gradient(theta, episodes).gradient, expected) < 1e-10


@pytest.mark.parametrize("form", ["0-d", "[B, 1]", "[1, N]", "[B, N]"])
def test_prox_solve_equals_the_closed_form_for_theta_and_lam(form: str) -> None:
    loss, theta, episodes, _ = _linear_problem()
    shape = {"0-d": (), "[B, 1]": (4, 1), "[1, N]": (1, 4), "[B, N]": (4, 4)}[form]
    lam = 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    theta.requires_grad_()
    lam.requires_grad_()
    full = lam.expand(4, 4)
    expected = torch.autograd.grad(_closed_form(theta, full, episodes), (theta, lam))
    phi = prox_solve(
        loss,
        theta,
        lam,
        episodes.support,
        inner=GradientDescent(steps=800, lr=0.15),
        linear_solver=CG(max_iterations=12, rtol=1e-14),
    )
    found = torch.autograd.grad(loss(phi, episodes.query).mean(), (theta, lam))
    for value, reference in zip(found, expected, strict=True):
        assert value.shape == reference.shape
        assert _relative(value, reference) < 1e-10


def _solved(loss: TaskLoss, theta: Tensor, lam: Any, support: Data) -> Tensor:
    """φ of an MLP, solved to rounding, with the implicit gradient behind it."""
    return prox_solve(
        loss,
        theta,
        lam,
        support,
        inner=GradientDescent(steps=180, lr=0.4, optimizer="momentum", momentum=0.6),
        linear_solver=CG(max_iterations=80, rtol=1e-13),
    )


@pytest.mark.parametrize("form", ["0-d", "[B]", "[N]", "[B, N]"])
def test_gradients_equal_finite_differences_of_a_fully_solved_mlp(form: str) -> None:
    tasks = 3
    loss, theta, episodes = regression(tasks)
    n = theta.numel()
    shape = {"0-d": (), "[B]": (tasks,), "[N]": (n,), "[B, N]": (tasks, n)}[form]
    lam = 0.6 + torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=F64)

    def objective(theta: Tensor, lam: Tensor) -> Tensor:
        return loss(_solved(loss, theta, lam, episodes.support), episodes.query).mean()

    theta.requires_grad_()
    lam.requires_grad_()
    by_theta, by_lam = torch.autograd.grad(objective(theta, lam), (theta, lam))
    assert by_lam.shape == lam.shape
    h = 1e-5
    with torch.no_grad():
        for seed in range(2):
            for gradient, value, at in (
                (by_theta, theta, lambda moved: objective(moved, lam)),
                (by_lam, lam, lambda moved: objective(theta, moved)),
            ):
                direction = _random(*value.shape, seed=seed)
                difference = (at(value + h * direction) - at(value - h * direction)) / (2 * h)
                slope = (gradient * direction).sum()
                scale = float(gradient.norm() * direction.norm())
                assert abs(float(slope - difference)) < 1e-5 * min(scale, abs(float(difference)) + 1e-3 * scale)


def test_prox_solve_passes_gradcheck() -> None:
    model = MLP(2, (3,), 1, activation="tanh")
    loss = TaskLoss(model, "mse")
    n = model.num_parameters
    data = Data(_random(2, 5, 2, seed=0), _random(2, 5, 1, seed=1))
    theta = (model.init(seed=0, dtype=F64) + 0.1 * _random(n, seed=2)).requires_grad_()
    for lam in (torch.tensor(0.8, dtype=F64), 0.6 + torch.rand(2, n, dtype=F64)):
        lam.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda *at: _solved(loss, *at, data), (theta, lam), fast_mode=True, atol=1e-6, rtol=1e-5
        )
    own = (theta.detach() + 0.1 * _random(2, n, seed=3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: _solved(loss, t, 0.8, data), (own,), fast_mode=True, atol=1e-6, rtol=1e-5)


def test_imaml_equals_prox_solve_under_the_query_loss() -> None:
    loss, theta, episodes = classification(3)
    common = {"linear_solver": CG(max_iterations=7, rtol=1e-8), "damping": 0.3, "curvature": "gauss_newton"}
    algorithm = IMAML(loss, lam=2.0, inner=GradientDescent(steps=5, lr=0.1), **common)
    meta = algorithm.meta_gradient(theta, episodes)
    theta.requires_grad_()
    phi = prox_solve(loss, theta, 2.0, episodes.support, inner=GradientDescent(steps=5, lr=0.1), **common)
    assert torch.equal(phi.detach(), algorithm.adapt(theta, episodes.support))
    (expected,) = torch.autograd.grad(loss(phi, episodes.query).mean(), theta)
    torch.testing.assert_close(meta.gradient, expected, rtol=1e-10, atol=1e-14)


def test_metrics_say_what_was_done() -> None:
    loss, theta, episodes = classification(3)
    algorithm = IMAML(
        loss, lam=2.0, inner=GradientDescent(steps=5, lr=0.1), linear_solver=CG(max_iterations=4), damping=20.0
    )
    metrics = algorithm.meta_gradient(theta, episodes).metrics
    phi = algorithm.adapt(theta, episodes.support)
    outputs = loss.outputs(phi, episodes.query.x)
    leaf = phi.clone().requires_grad_()
    (v,) = torch.autograd.grad(loss(leaf, episodes.query).sum(), leaf)
    operator = loss.linearize(phi, episodes.support)
    solution = implicit_solve(operator, v, lam=2.0, damping=20.0, linear_solver=CG(max_iterations=4))
    x = solution.solution.x
    expected = {
        "query_loss": loss(phi, episodes.query).mean(),
        "query_accuracy": (outputs.argmax(-1) == episodes.query.y).double().mean(),
        "support_loss": loss(phi, episodes.support).mean(),
        "support_loss_before": loss(theta.expand(3, -1), episodes.support).mean(),
        "inner_gradient_norm": (operator.gradient + 2.0 * (phi - theta)).norm(dim=1).mean(),
        "solve_residual": ((v - operator(x) - 22.0 * x).norm(dim=1) / v.norm(dim=1)).mean(),
        "solve_iterations": solution.solution.iterations.double().mean(),
        "negative_curvature": solution.solution.broke_down.double().mean(),
        "non_finite": torch.tensor(0.0, dtype=F64),
        "skipped": torch.tensor(0.0, dtype=F64),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].dim() == 0
        torch.testing.assert_close(metrics[name], value, rtol=1e-6, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


# --- what breaks down -------------------------------------------------------------------------------------------------


def _quadratic(params: Tensor, data: Data) -> Tensor:
    """½ Σ x (φ − y)²: H = diag(x), of any sign."""
    return 0.5 * (data.x * (params - data.y) ** 2).sum(1)


def _broken_episodes() -> tuple[Tensor, Episodes, Tensor]:
    """Four tasks, λ = 1: fine; negative on CG's first step; negative only later; NaN."""
    n = 6
    curvature = torch.full((4, n), 0.5, dtype=F64)
    curvature[1] = -3.0
    curvature[2, 0] = -1.5  # λ + H = −0.5 in one direction of six
    curvature[3, 2] = float("nan")
    support = Data(curvature, torch.zeros(4, n, dtype=F64))
    query = Data(torch.ones(4, n, dtype=F64), _random(4, n, seed=9))
    return _random(n, seed=8), Episodes(support, query), curvature


def test_reactions_to_negative_curvature() -> None:
    theta, episodes, curvature = _broken_episodes()

    def solved(reaction: str, tasks: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        data = Data(episodes.support.x[tasks], episodes.support.y[tasks])
        phi = theta.expand(len(tasks), -1)
        v = phi - episodes.query.y[tasks]
        operator = as_loss(_quadratic).linearize(phi, data)
        solution = implicit_solve(
            operator, v, lam=1.0, damping=0.0, linear_solver=CG(max_iterations=6), on_breakdown=reaction
        )
        assert solution.solution.broke_down.tolist() == [False, True, True][: len(tasks)]
        return solution.u, solution.counted_tasks, v

    for reaction in ("keep", "gradient", "skip"):
        u, counts, v = solved(reaction, [0, 1, 2])
        torch.testing.assert_close(u[0], v[0] / 1.5)
        if reaction == "skip":
            assert counts.tolist() == [True, False, False]
            assert not u[1:].any()
            continue
        assert counts.all()
        torch.testing.assert_close(u[1], v[1])  # v / λ
        if reaction == "gradient":
            torch.testing.assert_close(u[2], v[2])
        else:  # Steihaug: the iterate before the direction, after one step along v
            a = v[2] * (1 + curvature[2])
            torch.testing.assert_close(u[2], v[2] * (v[2] @ v[2]) / (v[2] @ a))
    with pytest.raises(
        SolveError, match=r"NEGATIVE_CURVATURE in 2 of 3 tasks' implicit systems \(1, 2\): .*raise shift"
    ):
        solved("raise", [0, 1, 2])
    u, _, v = solved("raise", [0])
    torch.testing.assert_close(u[0], v[0] / 1.5)
    with pytest.raises(SolveError, match=r"NON_FINITE in 1 of 2 tasks' implicit systems \(1\)"):
        solved("raise", [0, 3])


@pytest.mark.parametrize(("reaction", "left"), [("keep", 3), ("gradient", 3), ("skip", 1)])
def test_the_mean_is_over_the_tasks_that_count_and_the_others_are_reported(reaction: str, left: int) -> None:
    theta, episodes, _ = _broken_episodes()
    algorithm = IMAML(
        _quadratic, lam=1.0, inner=GradientDescent(steps=0), linear_solver=CG(max_iterations=6), on_breakdown=reaction
    )
    meta = algorithm.meta_gradient(theta, episodes)
    sides = [Data(side.x[:3], side.y[:3]) for side in episodes]
    without_nan = algorithm.meta_gradient(theta, Episodes(*sides))
    assert torch.equal(meta.gradient, without_nan.gradient)
    assert float(meta.metrics["non_finite"]) == 1 / 4
    assert float(meta.metrics["negative_curvature"]) == 2 / 4
    assert float(meta.metrics["skipped"]) == 1 - left / 4
    alone = [
        algorithm.meta_gradient(theta, Episodes(*(Data(s.x[t : t + 1], s.y[t : t + 1]) for s in episodes))).gradient
        for t in (range(3) if reaction != "skip" else [0])
    ]
    torch.testing.assert_close(meta.gradient, torch.stack(alone).mean(0), rtol=1e-12, atol=1e-14)


def test_no_task_left_is_nan_and_not_silence() -> None:
    theta, episodes, _ = _broken_episodes()
    sides = [Data(side.x[3:], side.y[3:]) for side in episodes]
    meta = IMAML(_quadratic, lam=1.0, inner=GradientDescent(steps=2)).meta_gradient(theta, Episodes(*sides))
    assert meta.gradient.isnan().all()
    assert float(meta.metrics["skipped"]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rows_are_independent(dtype: torch.dtype) -> None:
    """A solve of every task alone; and a NaN task among them changes no bit of the others."""
    loss, theta, episodes = classification(4, dtype=dtype)

    def everything(episodes: Episodes) -> list[Tensor]:
        tasks = len(episodes.support.x)
        lam = torch.tensor([2.0, 1.0, 3.0, 0.7], dtype=dtype)[4 - tasks :] if tasks > 1 else LAST
        algorithm = IMAML(loss, lam=lam, inner=GradientDescent(steps=3, lr=0.1))
        phi = algorithm.adapt(theta, episodes.support)
        leaf = phi.clone().requires_grad_()
        (v,) = torch.autograd.grad(loss(leaf, episodes.query).sum(), leaf)
        rows = [phi, v]
        for kind in ("hessian", "gauss_newton"):
            operator = loss.linearize(phi, episodes.support, kind)
            rows += [operator(v), implicit_solve(operator, v, lam=lam, damping=0.5).u]
        return rows

    LAST = torch.tensor([0.7], dtype=dtype)
    together = everything(episodes)
    alone = everything(Episodes(*(Data(side.x[3:], side.y[3:]) for side in episodes)))
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == F64 else {"rtol": 1e-3, "atol": 1e-3}
    for rows, row in zip(together, alone, strict=True):
        torch.testing.assert_close(rows[3:], row, **tolerance)

    broken = Data(episodes.support.x.clone(), episodes.support.y)
    broken.x[1, 2] = float("nan")
    for clean, dirty in zip(together, everything(Episodes(broken, episodes.query)), strict=True):
        assert torch.equal(clean[[0, 2, 3]], dirty[[0, 2, 3]])


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("reaction", ["keep", "gradient", "skip"])
def test_nothing_waits_for_the_device(curvature: str, reaction: str) -> None:
    loss, theta, episodes = classification(2)
    lam = torch.full((theta.numel(),), 2.0, dtype=F64)
    algorithm = IMAML(loss, lam=lam, inner=GradientDescent(steps=2), curvature=curvature, on_breakdown=reaction)
    with HostWatch() as watch:
        algorithm.meta_gradient(theta, episodes)
    assert watch.seen == []
    with HostWatch() as watch:  # the watch sees what it should
        IMAML(loss, inner=GradientDescent(steps=2), on_breakdown="raise", damping=100.0).meta_gradient(theta, episodes)
    assert watch.seen


def test_the_support_gradient_is_built_once_for_all_products() -> None:
    loss, theta, episodes = regression(2)
    calls = 0

    def counted(params: Tensor, data: Data) -> Tensor:
        nonlocal calls
        calls += 1
        return loss(params, data)

    IMAML(counted, lam=1.0, inner=GradientDescent(steps=3), linear_solver=CG(max_iterations=9, rtol=0.0)).meta_gradient(
        theta, episodes
    )
    assert calls == 3 + 1 + 1  # inner steps, query gradient, linearisation


# --- prox_solve as a function -----------------------------------------------------------------------------------------


def test_prox_solve_twice_differentiated() -> None:
    """Against the closed form, a gradient of a gradient; Gauss-Newton gives no derivative, and so an error."""
    loss, theta, episodes, _ = _linear_problem()
    theta.requires_grad_()
    lam = torch.tensor(0.7, dtype=F64, requires_grad=True)
    exact = {"linear_solver": CG(max_iterations=30, rtol=1e-14), "inner": NewtonCG(steps=3, linear_solver=CG(30))}

    def twice(value: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(value, (theta, lam), create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), (theta, lam))

    phi = prox_solve(loss, theta, lam, episodes.support, **exact)
    expected = twice(_closed_form(theta, lam, episodes))
    for value, reference in zip(twice(loss(phi, episodes.query).mean()), expected, strict=True):
        assert _relative(value, reference) < 1e-9
    phi = prox_solve(loss, theta, lam, episodes.support, curvature="gauss_newton")
    with pytest.raises(RuntimeError, match="must have curvature='hessian' to be differentiated twice"):
        torch.autograd.grad(phi.sum(), theta, create_graph=True)


def test_prox_solve_with_a_solver_of_ones_own() -> None:
    """The derivative of a solver that autograd cannot see through: a dense solve of linear regression."""
    loss, theta, episodes, _ = _linear_problem()

    def dense(loss: Any, theta: Tensor, data: Data, lam: Tensor) -> Tensor:
        z = torch.cat([data.x, torch.ones_like(data.x[..., :1])], 2)  # [B, S, 4]
        points = z.shape[1]
        matrix = 2 * z.mT @ z / points + lam * torch.eye(4, dtype=F64)
        return solve_directly(matrix, 2 * (z.mT @ data.y)[..., 0] / points + lam * theta)

    lam = torch.tensor(0.7, dtype=F64, requires_grad=True)
    theta.requires_grad_()
    phi = prox_solve(loss, theta, lam, episodes.support, inner=dense, linear_solver=CG(max_iterations=20, rtol=1e-14))
    found = torch.autograd.grad(loss(phi, episodes.query).mean(), (theta, lam))
    expected = torch.autograd.grad(_closed_form(theta, lam, episodes), (theta, lam))
    for value, reference in zip(found, expected, strict=True):
        assert _relative(value, reference) < 1e-10
    with pytest.raises(ValueError, match=r"inner must return phi \[4, 4\].*got \[4\]"):
        prox_solve(loss, theta, lam, episodes.support, inner=lambda loss, theta, data, lam: theta)
    with pytest.raises(TypeError, match="inner must return a tensor, got NoneType"):
        prox_solve(loss, theta, lam, episodes.support, inner=lambda loss, theta, data, lam: None)


def test_prox_solve_raises_in_backward_where_there_is_no_minimum() -> None:
    theta, episodes, _ = _broken_episodes()
    theta.requires_grad_()
    support = Data(episodes.support.x[:3], episodes.support.y[:3])
    phi = prox_solve(_quadratic, theta, 1.0, support, inner=GradientDescent(steps=1, lr=0.1))
    with pytest.raises(SolveError, match=r"NEGATIVE_CURVATURE in .*raise shift, use a positive semi-definite"):
        phi.sum().backward()
    phi = prox_solve(_quadratic, theta, 1.0, support, inner=GradientDescent(steps=1, lr=0.1), on_breakdown="keep")
    phi.sum().backward()
    assert theta.grad.isfinite().all()


def test_prox_solve_asks_for_no_more_than_is_needed() -> None:
    loss, theta, episodes = regression(2)
    assert not prox_solve(loss, theta, 9.0, episodes.support, inner=GradientDescent(steps=2, lr=0.1)).requires_grad
    theta.requires_grad_()
    phi = prox_solve(loss, theta, 9.0, episodes.support, inner=GradientDescent(steps=2, lr=0.1))
    with torch.no_grad():
        assert not prox_solve(loss, theta, 9.0, episodes.support, inner=GradientDescent(steps=2, lr=0.1)).requires_grad
    phi.sum().backward()
    assert theta.grad.shape == theta.shape


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors_name_the_argument() -> None:
    loss, theta, episodes = regression(3)
    n = theta.numel()
    phi, v = theta.expand(3, -1), torch.ones(3, n, dtype=F64)
    operator = loss.linearize(phi, episodes.support)

    def function(params: Tensor, data: Data) -> Tensor:
        return loss(params, data)

    def solve(theta: Any = theta, lam: Any = 1.0, **options: Any) -> Tensor:
        return prox_solve(loss, theta, lam, episodes.support, **{"inner": GradientDescent(steps=1), **options})

    def meta(theta: Any = theta, **options: Any) -> Any:
        return IMAML(loss, **options).meta_gradient(theta, episodes)

    for error, words, call in (
        (TypeError, "loss must be a TaskLoss or a function, got int", lambda: IMAML(1)),
        (ValueError, "lam must be above 0, got 0", lambda: meta(lam=0.0)),
        (ValueError, "lam must be finite, got inf", lambda: meta(lam=math.inf)),
        (ValueError, "steps must be at least 0", lambda: meta(inner=GradientDescent(steps=-1))),
        (TypeError, "inner must be of type InnerSolver, got int", lambda: meta(inner=16)),
        (ValueError, "max_iterations must be at least 1, got 0", lambda: meta(linear_solver=CG(max_iterations=0))),
        (ValueError, "damping must be at least 0", lambda: meta(damping=-1.0)),
        (
            ValueError,
            "curvature must be one of 'hessian', 'gauss_newton', got 'fisher'",
            lambda: meta(curvature="fisher"),
        ),
        (ValueError, "on_breakdown must be one of 'keep',", lambda: meta(on_breakdown="ignore")),
        (TypeError, "loss must be a TaskLoss with curvature=", lambda: IMAML(function, curvature="gauss_newton")),
        (ValueError, rf"theta must have shape \[N\], got \[3, {n}\]", lambda: meta(phi)),
        (TypeError, "theta must be a tensor, got NoneType", lambda: meta(None)),
        (ValueError, rf"params must have shape \[B, {n}\]", lambda: meta(theta[:-1])),
        (TypeError, "theta must be float32 or float64, got torch.float16", lambda: meta(theta.half())),
        (ValueError, r"lam must be a number, .*got \[5\]", lambda: meta(lam=torch.ones(5, dtype=F64))),
        (ValueError, "lam must be on cpu, got meta", lambda: meta(lam=torch.ones(n, device="meta"))),
        (TypeError, "loss must be a TaskLoss with", lambda: as_loss(function).linearize(phi, 0, "gauss_newton")),
        (ValueError, r"phi must have shape \[B, N\]", lambda: loss.linearize(theta, episodes.support)),
        (ValueError, rf"p must have the shape of phi, \[3, {n}\]", lambda: operator(v[:2])),
        (ValueError, "p must be torch.float64 on cpu as phi is, got torch.float32", lambda: operator(v.float())),
        (TypeError, "p must be a tensor, got float", lambda: operator(1.0)),
        (ValueError, r"v must have shape \[B, N\]", lambda: implicit_solve(operator, v[0], lam=1.0)),
        (TypeError, "v must be a tensor, got list", lambda: implicit_solve(operator, [1.0], lam=1.0)),
        (ValueError, "lam must be above 0, got -1", lambda: solve(lam=-1.0)),
        (ValueError, "lam must be above 0, got a tensor with an entry of -1", lambda: solve(lam=torch.tensor(-1.0))),
        (ValueError, "lam must be above 0, got a tensor with an entry of 0", lambda: meta(lam=torch.zeros(()))),
        (ValueError, "on_unfinished must be one of 'warn', 'raise', 'ignore', got 3", lambda: solve(on_unfinished=3)),
        (ValueError, "unfinished_residual must be at least 0", lambda: solve(unfinished_residual=-1.0)),
        (TypeError, "on_solve must be a function, got list", lambda: solve(on_solve=[])),
        (ValueError, r"lam must be a number, .*got \[2\]", lambda: solve(lam=torch.ones(2, dtype=F64))),
        (ValueError, r"theta must have shape \[N\] or \[3, N\]", lambda: solve(theta.expand(2, -1))),
        (TypeError, "theta must be a tensor, got list", lambda: solve([0.0])),
        (
            TypeError,
            "linear_solver must be a LinearSolver such as CG",
            lambda: implicit_solve(operator, v, lam=1.0, linear_solver=5),
        ),
        (ValueError, "curvature must be one of", lambda: solve(curvature="none")),
        (ValueError, "on_breakdown must be one of", lambda: solve(on_breakdown="ignore")),
        (ValueError, "optimizer must be one of", lambda: solve(inner=GradientDescent(optimizer="rmsprop"))),
    ):
        with pytest.raises(error, match=words):
            call()
