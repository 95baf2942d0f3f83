"""Meta-batches a few tasks at a time; what each task tells; derivatives under no_grad and inference mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from meta_tasks import F64, Data, Episodes, PeakWatch, classification, regression, relative
from torch import Tensor, nn

from imaml_ext import (
    CG,
    FOMAML,
    IMAML,
    MAML,
    GradientDescent,
    NewtonCG,
    Reptile,
    TaskLoss,
    argmin,
    from_module,
    prox_solve,
    root,
)
from imaml_ext.batch import EpisodeBatch, Sides, TaskData
from imaml_ext.meta import MetaAlgorithm
from imaml_ext.solvers import FixedPoint

INNER = GradientDescent(steps=3, lr=0.1)
SOLVED = IMAML(lam=0.4, curvature="gauss_newton", linear_solver=CG(max_iterations=100, rtol=1e-13))
ALGORITHMS: dict[str, Callable[[TaskLoss, int], MetaAlgorithm]] = {
    "imaml": lambda loss, tasks: IMAML(loss, lam=1.0 + torch.rand(tasks, dtype=F64), inner=INNER, damping=0.5),
    "imaml, newton, lam learnt": lambda loss, tasks: IMAML(
        loss, inner=NewtonCG(steps=2), learn={"lam": "tensor"}, curvature="gauss_newton"
    ),
    "imaml, rates of tasks": lambda loss, tasks: IMAML(
        loss, inner=replace(INNER, lr=0.05 + 0.1 * torch.rand(tasks, dtype=F64)), linear_solver=FixedPoint()
    ),
    "maml": lambda loss, tasks: MAML(loss, inner=INNER, lam=torch.rand(tasks, 1, dtype=F64)),
    "maml, all learnt": lambda loss, tasks: MAML(
        loss, lam=0.3, inner=INNER, checkpoint=True, learn={"lr": "parameter", "lam": "global"}
    ),
    "fomaml": lambda loss, tasks: FOMAML(loss, inner=INNER, learn={"lr": "tensor"}),
    "reptile": lambda loss, tasks: Reptile(loss, inner=INNER),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_few_tasks_at_a_time_give_the_same(name: str) -> None:
    tasks = 5
    loss, theta, episodes = regression(tasks)
    episodes.support.x[3, 1] = float("nan")
    whole = ALGORITHMS[name](loss, tasks)
    params = whole.initial(theta)
    phi, expected = whole.adapt(params, episodes.support), whole.meta_gradient(params, episodes)
    assert expected.gradients.keys() == params.keys()
    forms = {
        2: EpisodeBatch(*episodes.support, *episodes.query),
        4: SimpleNamespace(support=episodes.support, query=episodes.query),
        5: episodes,
    }
    for size, form in forms.items():
        algorithm = replace(whole, tasks_per_chunk=size)
        torch.testing.assert_close(algorithm.adapt(params, form.support), phi, equal_nan=True)
        found = algorithm.meta_gradient(params, form)
        assert int(found.counted) == int(expected.counted) == 4
        for key, gradient in expected.gradients.items():
            assert relative(found.gradients[key], gradient) < 1e-12
        assert found.metrics.keys() == found.per_task.keys() == expected.per_task.keys()
        for key, value in expected.per_task.items():
            assert value.shape == (tasks,)
            torch.testing.assert_close(found.per_task[key], value, equal_nan=True)
            torch.testing.assert_close(found.metrics[key], expected.metrics[key])


@pytest.mark.parametrize("kind", [IMAML, MAML, FOMAML, Reptile])
def test_memory_does_not_grow_with_the_number_of_tasks(kind: type[MetaAlgorithm]) -> None:
    def peak(tasks: int, size: int | None) -> int:
        loss, theta, episodes = regression(tasks, hidden=(256,))
        algorithm = kind(TaskLoss(loss.model, "mse", engine="torch"), inner=INNER, lam=1.0, tasks_per_chunk=size)
        with PeakWatch(theta, *episodes.support, *episodes.query) as watch:
            algorithm.meta_gradient(theta, episodes)
        return watch.peak

    few, many = (peak(tasks, 2) for tasks in (4, 40))
    assert many < 1.1 * few
    assert peak(40, None) > 4 * few  # the watch sees what it should


def test_metrics_are_of_the_tasks_that_count() -> None:
    loss, theta, episodes = classification(3)
    episodes.support.x[1, 0] = float("nan")
    others = Episodes(*(Data(side.x[[0, 2]], side.y[[0, 2]]) for side in episodes))
    for kind in (IMAML, MAML, FOMAML, Reptile):
        algorithm = kind(loss, inner=INNER, lam=2.0)
        found, expected = algorithm.meta_gradient(theta, episodes), algorithm.meta_gradient(theta, others)
        assert found.per_task["skipped"].tolist() == [False, True, False]
        for name, value in expected.metrics.items():
            torch.testing.assert_close(found.per_task[name][[0, 2]], expected.per_task[name])
            if found.per_task[name].dtype == torch.bool:  # a part of all tasks
                value = found.per_task[name].double().mean()
            torch.testing.assert_close(found.metrics[name], value, rtol=1e-10, atol=1e-12)
        assert float(found.metrics["non_finite"]) == pytest.approx(1 / 3)


# --- coefficients that require a gradient ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [IMAML, MAML, FOMAML, Reptile])
def test_a_setting_that_requires_a_gradient_is_refused(kind: type[MetaAlgorithm]) -> None:
    loss, theta, episodes = regression(2)
    coefficient = torch.tensor(0.1, dtype=F64, requires_grad=True)
    for settings, words in (
        ({"inner": GradientDescent(lr=coefficient)}, r"inner.lr must not .*learn=\{'lr': 'global'\}"),
        ({"lam": coefficient}, r"\.lam must not require a gradient.*learn=\{'lam': 'global'\}"),
    ):
        algorithm = kind(loss, **settings)
        for call in (
            lambda algorithm=algorithm: algorithm.adapt(theta, episodes.support),
            lambda algorithm=algorithm: algorithm.meta_gradient(theta, episodes),
        ):
            with pytest.raises(ValueError, match=words):
                call()


# --- what the caller has switched off --------------------------------------------------------------------------------


def _steep(params: Tensor, data: Data) -> Tensor:
    """A loss with a derivative in it, as of a physics-informed network: ‖∂f/∂x‖² and a fit."""
    x = data.x.detach().requires_grad_()
    f = torch.tanh(x * params[:, None, :3] + params[:, None, 3:6]).sum(2)
    (slope,) = torch.autograd.grad(f.sum(), x, create_graph=True)
    return slope.square().mean((1, 2)) + (f - data.y[..., 0]).square().mean(1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["function", "module", "mlp"])
def test_derivatives_are_taken_whatever_the_caller_has_switched_off(mode: Any, kind: str) -> None:
    made, theta, episodes = regression(2)
    if kind == "module":
        module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        model = from_module(module)
        loss, theta = TaskLoss(model, "mse"), model.init(seed=0, dtype=F64)
    else:
        loss, theta = (made, theta) if kind == "mlp" else (_steep, theta[:6].clone())
    algorithms = [
        IMAML(loss, inner=NewtonCG(steps=2)),
        IMAML(loss, inner=INNER, linear_solver=CG(max_iterations=3)),
        MAML(loss, inner=INNER),
        MAML(loss, inner=INNER, checkpoint=True, tasks_per_chunk=1),
        FOMAML(loss, inner=INNER),
        Reptile(loss, inner=replace(INNER, optimizer="adam")),
    ]
    expected = [(each.adapt(theta, episodes.support), each.meta_gradient(theta, episodes)) for each in algorithms]
    with mode():  # tensors that are made here are of inference mode
        at, tasks = theta.clone(), Episodes(*(Data(side.x.clone(), side.y.clone()) for side in episodes))
        for algorithm, (phi, meta) in zip(algorithms, expected, strict=True):
            torch.testing.assert_close(algorithm.adapt(at, tasks.support), phi)
            torch.testing.assert_close(algorithm.meta_gradient(at, tasks).gradient, meta.gradient)
            inner = algorithm.inner.solve(algorithm.loss, at, tasks.support, lam=algorithm.lam, measure=True)
            torch.testing.assert_close(inner.phi, phi)
        direct = algorithms[0].loss
        rows = at.expand(2, -1).clone()
        product = direct.linearize(rows, tasks.support)(rows)
        losses, _, gradient = direct.gradient(rows, tasks.support)
        measured, _ = direct.measure(rows, tasks.support)
    rows = theta.expand(2, -1)
    torch.testing.assert_close(product, direct.linearize(rows, episodes.support)(rows))
    torch.testing.assert_close(gradient, direct.gradient(rows, episodes.support).gradient)
    torch.testing.assert_close(losses, measured)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_solver_of_ones_own_can_differentiate(mode: Any) -> None:
    made, theta, episodes = regression(2)

    def descent(loss: Any, theta: Tensor, data: Data, lam: Tensor) -> Tensor:
        phi = theta.expand(2, -1).clone().requires_grad_()
        optimizer = torch.optim.SGD([phi], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (loss(phi, data) + (0.5 * lam * (phi - theta).square()).sum(1)).sum().backward()
            optimizer.step()
        return phi

    for loss in (made, TaskLoss(made.model, "mse", engine="torch")):
        expected = INNER.solve(loss, theta, episodes.support, lam=1.0).phi
        with mode():
            support = Data(episodes.support.x.clone(), episodes.support.y.clone())
            torch.testing.assert_close(prox_solve(loss, theta.clone(), 1.0, support, inner=descent), expected)

    def ridge(phi: Tensor, x: Tensor) -> Tensor:
        return (phi - x).square().sum(1)

    def by_newton(objective: Any, phi: Tensor) -> Tensor:
        phi = phi.requires_grad_()
        return phi - torch.autograd.grad(objective(phi).sum(), phi)[0] / 2

    with mode():
        x = torch.randn(3, 4, dtype=F64).clone()
        for inner in (by_newton, NewtonCG(steps=1), None):
            torch.testing.assert_close(argmin(ridge, torch.zeros(3, 4, dtype=F64), (x,), inner=inner), x)
        step = root(lambda phi, x: 3 * (x - phi), torch.zeros_like(x), (x,), inner=lambda f, phi: phi + f(phi) / 3)
        torch.testing.assert_close(step, x)


@pytest.mark.parametrize(
    "algorithm", [SOLVED, MAML(inner=GradientDescent(steps=2)), FOMAML(), Reptile()], ids=lambda a: type(a).__name__
)
def test_query_sets_are_judged_apart(algorithm: MetaAlgorithm) -> None:
    """As the mean over episodes that have one of the sets each, drawing k of a class being in set k."""
    loss, theta, episodes = classification(3)
    bound = replace(algorithm, inner=replace(algorithm.inner, steps=2)).bound(loss)
    whole = replace(bound, query_sets=2).meta_gradient(theta, episodes)
    sets = [Data(episodes.query.x[:, k::2], episodes.query.y[:, k::2]) for k in (0, 1)]
    apart = [bound.meta_gradient(theta, Episodes(episodes.support, each)) for each in sets]
    mean = (apart[0].gradient + apart[1].gradient) / 2
    assert relative(whole.gradient, mean) < 1e-10
    for name in ("query_loss", "query_accuracy"):
        expected = (apart[0].per_task[name] + apart[1].per_task[name]) / 2
        torch.testing.assert_close(whole.per_task[name], expected)
    together = bound.meta_gradient(theta, episodes)
    assert relative(together.per_task["query_loss"], whole.per_task["query_loss"]) > 1e-6  # batch norm notices
    with pytest.raises(ValueError, match=r"query_sets must be a divisor of the query examples .* \[3, 6, .* got 4"):
        replace(bound, query_sets=4).meta_gradient(theta, episodes)
    masked = TaskData(*episodes.query, torch.ones(3, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="query_sets must be 1 for tasks with a mask or ways, got 2"):
        replace(bound, query_sets=2).meta_gradient(theta, Sides(episodes.support, masked))
