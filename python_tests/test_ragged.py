"""Tasks of different sizes in one batch: all equals the unpadded tasks one by one, whatever the padding holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_tools import small_config

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
)
from imaml_ext.batch import EpisodeBatch, TaskData
from imaml_ext.data import Glyphs
from imaml_ext.models import MLP, Conv4, TaskModel
from imaml_ext.solvers import KFAC
from imaml_ext.train import EvaluationSettings, Tasks, build, evaluate
from imaml_ext.train.experiment import Experiment

F64 = torch.float64
SHOTS, QUERIES, WAYS = (2, 5, 3, 5, 2), (4, 4, 6, 1, 3), (2, 4, 3, 4, 2)
CLASSES, TASKS = 4, len(SHOTS)


def network() -> nn.Sequential:
    body = nn.Sequential(nn.Conv2d(1, 3, 4, stride=4), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(75, CLASSES)).to(F64)


MODELS: dict[str, Callable[[], TaskModel]] = {
    "conv4": lambda: Conv4(CLASSES, image_size=20, filters=3),
    "mlp": lambda: MLP(400, (3,), CLASSES, activation="tanh"),
    "module": lambda: from_module(network(), batch_norm="task"),
}
ENGINES = [("conv4", "native"), ("conv4", "torch"), ("mlp", "native"), ("mlp", "torch"), ("module", "torch")]
CASES = [(*case, WAYS) for case in ENGINES] + [("conv4", "native", None), ("module", "torch", None)]


def padded(tasks: list[tuple[Tensor, Tensor]], ways: tuple[int, ...] | None, *, holes: bool = True) -> TaskData:
    """The tasks in one batch, NaN and impossible labels where no example is; with holes, examples lie anywhere."""
    room = max(len(x) for x, _ in tasks) + holes
    x = torch.full((len(tasks), room, *tasks[0][0].shape[1:]), torch.nan, dtype=tasks[0][0].dtype)
    y = torch.full((len(tasks), room, *tasks[0][1].shape[1:]), 99, dtype=tasks[0][1].dtype)
    mask = torch.zeros(len(tasks), room, dtype=torch.bool)
    for task, (of_x, of_y) in enumerate(tasks):
        at = torch.randperm(room)[: len(of_x)].sort().values if holes else torch.arange(len(of_x))
        x[task, at], y[task, at], mask[task, at] = of_x, of_y, True
    return TaskData(x, y, mask, None if ways is None else torch.tensor(ways))


def drawn(sizes: tuple[int, ...], dtype: torch.dtype = F64) -> list[tuple[Tensor, Tensor]]:
    images = [torch.rand(size, 1, 20, 20, dtype=dtype) for size in sizes]
    return [(x, torch.randint(ways, (len(x),))) for x, ways in zip(images, WAYS, strict=True)]


class Alone:
    """The tasks one by one, each by a loss of its own ways: the last layer's other outputs are cut off."""

    def __init__(self, model: TaskModel, ways: tuple[int, ...] | None = WAYS) -> None:
        self.model, self.ways = model, ways or (CLASSES,) * TASKS

    def loss(self, task: int) -> Callable[[Tensor, TaskData], Tensor]:
        def of_task(params: Tensor, data: TaskData) -> Tensor:
            logits = self.model(params, data.x)[..., : self.ways[task]]
            return nn.functional.cross_entropy(logits[0], data.y[0]).unsqueeze(0)

        return of_task


def one(task: tuple[Tensor, Tensor]) -> TaskData:
    return TaskData(task[0].unsqueeze(0), task[1].unsqueeze(0))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """‖found − expected‖ ≤ tolerance ‖expected‖."""
    assert found.shape == expected.shape
    assert float((found - expected).detach().norm()) <= tolerance * float(expected.detach().norm())


@pytest.mark.parametrize(("name", "engine", "ways"), CASES)
def test_values_and_derivatives_are_those_of_each_task_alone(name: str, engine: str, ways: Any) -> None:
    model, tasks = MODELS[name](), drawn(SHOTS)
    loss, alone, data = TaskLoss(model, "cross_entropy", engine=engine), Alone(model, ways), padded(tasks, ways)
    params = (model.init(seed=1, dtype=F64) + 0.3 * torch.randn(TASKS, model.num_parameters, dtype=F64)).contiguous()
    p = torch.randn_like(params)
    losses, outputs, gradient = loss.gradient(params, data)
    measured, accuracies = loss.measure(params, data)
    leaf = params.clone().requires_grad_()
    again = loss(leaf, data)
    (weighted,) = torch.autograd.grad(again @ torch.arange(1.0, TASKS + 1, dtype=F64), leaf)
    curvatures = {kind: loss.linearize(params, data, kind) for kind in ("hessian", "gauss_newton")}
    assert accuracies is not None
    assert outputs is not None
    seen = loss.outputs(params, data.x, data.mask, data.ways)
    torch.testing.assert_close(outputs, seen, rtol=1e-12, atol=1e-12)
    close(loss.accuracy(outputs, data.y, data.mask, data.ways), accuracies)
    close(loss.criterion(outputs, data.y, data.mask, data.ways), losses)
    for task, own in enumerate(tasks):
        row, single, function = params[task : task + 1].clone().requires_grad_(), one(own), alone.loss(task)
        value = function(row, single)
        (by_row,) = torch.autograd.grad(value, row, create_graph=True)
        (product,) = torch.autograd.grad(by_row, row, p[task : task + 1])
        for found in (losses, measured, again.detach(), *(c.losses for c in curvatures.values())):
            close(found[task : task + 1], value.detach())
        for found in (gradient, weighted / (task + 1), *(c.gradient for c in curvatures.values())):
            close(found[task : task + 1], by_row.detach())
        close(curvatures["hessian"](p)[task : task + 1], product)
        with torch.no_grad():
            logits = model(row, single.x)[0, :, : alone.ways[task]]
        close(accuracies[task], (logits.argmax(-1) == own[1]).to(F64).mean())
        assert data.mask is not None
        close(seen[task, data.mask[task]][:, : alone.ways[task]], logits)

        def of_parameters(row: Tensor, x: Tensor = single.x, width: int = alone.ways[task]) -> Tensor:
            return model._outputs(row.unsqueeze(0), x)[0, :, :width]

        if name != "module":
            jacobian = torch.autograd.functional.jacobian(of_parameters, row[0].detach())  # [S, K, N]
            q = logits.softmax(-1)
            outer = (torch.diag_embed(q) - q.unsqueeze(2) * q.unsqueeze(1)) / len(q)
            expected = torch.einsum("skn,skj,sjm,m->n", jacobian, outer, jacobian, p[task])
            close(curvatures["gauss_newton"](p)[task], expected, 1e-11)
            close(curvatures["gauss_newton"].curvature(p)[task], expected @ p[task], 1e-11)


@pytest.mark.parametrize(("name", "engine"), [("conv4", "native"), ("module", "torch")])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_classes_beyond_the_ways_have_derivatives_of_exactly_zero(name: str, engine: str, dtype: torch.dtype) -> None:
    model, tasks = MODELS[name](), drawn(SHOTS, dtype)
    loss, data = TaskLoss(model, "cross_entropy", engine=engine), padded(tasks, WAYS)
    params = model.init(seed=1, dtype=dtype) + 0.3 * torch.randn(TASKS, model.num_parameters, dtype=dtype)
    results = [loss.gradient(params, data).gradient]
    for kind in ("hessian", "gauss_newton"):
        operator = loss.linearize(params, data, kind)
        p = 10 * torch.randn_like(params)
        results += [operator(p)]
        wide = operator.of_columns(2)
        if wide is not None:
            close(wide(p.repeat_interleave(2, 0)), operator(p).repeat_interleave(2, 0), 1e-12 if dtype == F64 else 1e-4)
    for result in results:
        views = model.layout.views(result)
        for task, ways in enumerate(WAYS):
            for last in model.layout.names[-2:]:
                of_classes = views[last][task]
                if name == "module":
                    of_classes = of_classes.movedim(0, -1)
                assert (of_classes[..., ways:] == 0).all()
                assert (of_classes[..., :ways] != 0).any()


@pytest.mark.parametrize(
    ("inner", "engine"),
    [
        (GradientDescent(3, 0.2), "native"),
        (GradientDescent(3, 0.2), "torch"),
        (GradientDescent(3, 0.05, optimizer="adam", eps=1e-3), "native"),
        (NewtonCG(2, damping=5.0), "native"),
    ],
)
def test_inner_solvers(inner: Any, engine: str) -> None:
    model, tasks = MODELS["conv4"](), drawn(SHOTS)
    loss, alone, theta = TaskLoss(model, "cross_entropy", engine=engine), Alone(model), MODELS["conv4"]().init(seed=0)
    theta = theta.to(F64) + 0.1 * torch.randn(model.num_parameters, dtype=F64)
    result = inner.solve(loss, theta, padded(tasks, WAYS), lam=0.7, measure=True)
    for task, own in enumerate(tasks):
        expected = inner.solve(alone.loss(task), theta, one(own), lam=0.7, measure=True)
        for found, other in (
            (result.phi, expected.phi),
            (result.losses.T, expected.losses.T),
            (result.final_gradient_norm, expected.final_gradient_norm),
        ):
            close(found[task : task + 1], other, 1e-10)


def test_steps_in_one_call_from_anywhere() -> None:
    """φ ≠ θ, coefficients of every kind: parameters that no loss depends on go to θ as the others do."""
    model, data = MODELS["mlp"](), padded(drawn(SHOTS), WAYS)
    loss, n = TaskLoss(model, "cross_entropy"), model.num_parameters
    start, theta = torch.randn(TASKS, n, dtype=F64), torch.randn(1, n, dtype=F64)
    for lam in (torch.rand(TASKS, n, dtype=F64), torch.rand(1, n, dtype=F64), torch.rand(TASKS, 1, dtype=F64)):
        lr, phi, expected = torch.full((1, 1), 0.1, dtype=F64), start.clone(), start.clone()
        losses = loss.descend_(phi, theta, data, lam=lam, lr=lr, steps=3)
        assert losses is not None
        for step in range(3):
            here = loss.gradient(expected, data)
            close(losses[step], here.losses)
            expected = expected - lr * (here.gradient + lam * (expected - theta))
        close(phi, expected)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "algorithm",
    [
        IMAML(lam=1.5, inner=GradientDescent(3, 0.2), linear_solver=CG(max_iterations=60, rtol=1e-13), damping=2.0),
        IMAML(lam=1.5, inner=NewtonCG(2), linear_solver=CG(max_iterations=2), curvature="gauss_newton"),
        MAML(inner=GradientDescent(2, 0.2), tasks_per_chunk=2),
        MAML(inner=GradientDescent(2, 0.2, batch_size=2), checkpoint=True),
        FOMAML(inner=GradientDescent(4, 0.2, batch_size=2)),
        Reptile(inner=GradientDescent(3, 0.2), tasks_per_chunk=3),
    ],
    ids=["imaml", "imaml-gauss-newton", "maml", "maml-minibatches", "fomaml-minibatches", "reptile"],
)
def test_meta_gradients_are_the_means_of_those_of_each_task(algorithm: Any, dtype: torch.dtype) -> None:
    model = MODELS["conv4"]()
    support, query = drawn(SHOTS, dtype), drawn(QUERIES, dtype)
    sides = padded(support, WAYS), padded(query, WAYS)
    episodes = EpisodeBatch(
        sides[0].x, sides[0].y, sides[1].x, sides[1].y, sides[0].mask, sides[1].mask, torch.tensor(WAYS)
    )
    algorithm = algorithm.bound(TaskLoss(model, "cross_entropy"))
    theta = model.init(seed=3, dtype=dtype)
    found = algorithm.meta_gradient(theta, episodes)
    total, losses, accuracies = torch.zeros_like(theta), [], []
    for ways, of_support, of_query in zip(WAYS, support, query, strict=True):
        # A network of so many outputs, with the first columns of the last layer.
        smaller = Conv4(ways, image_size=20, filters=3)
        kept = model.layout.flatten({**model.layout.views(torch.zeros_like(theta))}).bool()
        views = model.layout.views(kept)
        for last in model.layout.names[-2:]:
            views[last][..., ways:] = True
        kept = ~kept
        alone = algorithm.bound(TaskLoss(smaller, "cross_entropy"))
        meta = alone.meta_gradient(theta[kept], (one(of_support), one(of_query)))
        total[kept] += meta.gradient / TASKS
        losses.append(meta.metrics["query_loss"])
        accuracies.append(meta.metrics["query_accuracy"])
    tolerance = 1e-11 if dtype == F64 else 2e-3
    assert float((found.gradient - total).norm() / total.norm()) < tolerance
    close(found.metrics["query_loss"], torch.stack(losses).mean(), tolerance)
    close(found.metrics["query_accuracy"], torch.stack(accuracies).mean(), tolerance)


def test_prox_solve_and_argmin_differentiate_data_too() -> None:
    """∂/∂θ, ∂/∂λ and ∂/∂x of ragged tasks, and 0 for the inputs of no example, though they are NaN."""
    model, tasks = MLP(400, (), CLASSES), drawn(SHOTS)
    loss, alone, data = TaskLoss(model, "cross_entropy"), Alone(model), padded(tasks, WAYS)
    theta = (0.05 * torch.randn(model.num_parameters, dtype=F64)).requires_grad_()
    lam, x = torch.tensor(2.0, dtype=F64, requires_grad=True), data.x.clone().requires_grad_()
    weights = torch.randn(TASKS, model.num_parameters, dtype=F64)
    how = {"inner": NewtonCG(8), "linear_solver": CG(max_iterations=200, rtol=1e-13)}
    phi = prox_solve(loss, theta, lam, data._replace(x=x), **how)
    again = argmin(loss, theta.detach(), (data,), center=theta.expand(TASKS, -1), lam=lam, inner=NewtonCG(8))
    close(again, phi, 1e-11)
    by_theta, by_lam, by_x = torch.autograd.grad((weights * phi).sum(), (theta, lam, x))
    assert (by_x[~data.mask] == 0).all()
    by_theta_alone, by_lam_alone = torch.zeros_like(theta), torch.zeros_like(lam)
    for task, own in enumerate(tasks):
        x_alone = own[0].unsqueeze(0).requires_grad_()
        expected = prox_solve(alone.loss(task), theta, lam, TaskData(x_alone, own[1].unsqueeze(0)), **how)
        close(phi[task : task + 1], expected, 1e-11)
        of_theta, of_lam, of_x = torch.autograd.grad((weights[task] * expected).sum(), (theta, lam, x_alone))
        by_theta_alone, by_lam_alone = by_theta_alone + of_theta, by_lam_alone + of_lam
        close(by_x[task, data.mask[task]], of_x[0], 1e-9)
    close(by_theta, by_theta_alone, 1e-9)
    close(by_lam, by_lam_alone, 1e-9)


def test_kfac_preconditions_each_task_as_alone() -> None:
    model, tasks = MODELS["conv4"](), drawn(SHOTS)
    loss = TaskLoss(model, "cross_entropy")
    params = model.init(seed=1, dtype=F64) + 0.3 * torch.randn(TASKS, model.num_parameters, dtype=F64)
    b = torch.randn_like(params)
    solver = CG(max_iterations=4, rtol=0.0, preconditioner=KFAC())
    found = solver.solve(loss.linearize(params, padded(tasks, WAYS), "gauss_newton"), b, 0.5).x
    for task, own in enumerate(tasks):
        single = one(own)._replace(ways=torch.tensor(WAYS[task : task + 1]))
        operator = loss.linearize(params[task : task + 1], single, "gauss_newton")
        close(found[task : task + 1], solver.solve(operator, b[task : task + 1], 0.5).x, 1e-9)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_labels_of_no_example(engine: str) -> None:
    """-100 is such a label, on the CPU without a mask; other labels outside the classes are errors."""
    model, data = MODELS["conv4"](), padded(drawn(SHOTS), None)
    loss, params = TaskLoss(model, "cross_entropy", engine=engine), model.init(seed=1, dtype=F64).expand(TASKS, -1)
    unmasked = TaskData(data.x, data.y.masked_fill(~data.mask, -100))
    expected, found = loss.gradient(params, data), loss.gradient(params, unmasked)
    assert torch.equal(expected.losses, found.losses)
    assert torch.equal(expected.gradient, found.gradient)
    assert torch.equal(loss.measure(params, unmasked)[1], loss.measure(params, data)[1])
    algorithm = IMAML(loss, inner=GradientDescent(2, 0.1))
    theta = model.init(seed=1, dtype=F64)
    meta = [algorithm.meta_gradient(theta, (side, side)) for side in (data, unmasked)]
    assert torch.equal(meta[0].gradient, meta[1].gradient)
    assert torch.equal(meta[0].metrics["query_accuracy"], meta[1].metrics["query_accuracy"])
    with pytest.raises((IndexError, RuntimeError), match="-7"):
        loss(params, TaskData(data.x, torch.full_like(data.y, -7)))


def test_one_size_takes_the_path_of_today() -> None:
    model, tasks = MODELS["conv4"](), drawn((3,) * TASKS)
    loss = TaskLoss(model, "cross_entropy")
    plain = TaskData(torch.stack([x for x, _ in tasks]), torch.stack([y for _, y in tasks]))
    ready = loss.prepared(plain)
    assert loss.prepared(ready) is ready
    assert ready.x is plain.x
    full = plain._replace(mask=torch.ones(TASKS, 3, dtype=torch.bool), ways=torch.full((TASKS,), CLASSES))
    params = model.init(seed=1, dtype=F64).expand(TASKS, -1).contiguous()
    for found, expected in zip(loss.gradient(params, full), loss.gradient(params, plain), strict=True):
        assert torch.equal(found, expected)
    ragged = loss.prepared(full)
    assert loss.prepared(ragged) is ragged
    assert len(ragged.groups) == 1
    assert ragged.groups[0].data.x is plain.x


def test_errors_name_what_is_wrong() -> None:
    model, data = MODELS["mlp"](), padded(drawn(SHOTS), WAYS)
    loss, params = TaskLoss(model, "cross_entropy"), torch.zeros(TASKS, model.num_parameters, dtype=F64)
    empty = data.mask.clone()
    empty[2] = False
    wrong = data.y.masked_fill(data.mask & (torch.arange(TASKS) == 1).unsqueeze(1), 3)
    for error, words, change in (
        (ValueError, "every task must have at least one real example, got none in task 2", {"mask": empty}),
        (ValueError, r"mask must have shape \[B, S\] = \[5, 6\], got \[5, 5\]", {"mask": data.mask[:, 1:]}),
        (TypeError, "mask must be a tensor of torch.bool, got torch.float64", {"mask": data.mask.double()}),
        (ValueError, "mask must be on the device of x, cpu, got meta", {"mask": data.mask.to("meta")}),
        (TypeError, "ways must be a tensor of torch.int64, got list", {"ways": [2] * TASKS}),
        (ValueError, r"ways must have shape \[B\] = \[5\], got \[1\]", {"ways": data.ways[:1]}),
        (ValueError, "ways must be at least 1, got 0 for task 0", {"ways": 0 * data.ways}),
        (ValueError, "ways must be at most the 4 outputs of the model, got 7", {"ways": 0 * data.ways + 7}),
        (ValueError, "y must be below a task's ways, got label 3 in task 1 of 3 ways",
         {"y": wrong, "ways": data.ways.clamp(max=3)}),
        (ValueError, r"x and y must agree in \[B, S\] .*, got shapes \[\[5, 6, 1, 20, 20\], \[5, 5\]\]",
         {"y": data.y[:, 1:]}),
    ):  # fmt: skip
        for engine in ("native", "torch"):
            with pytest.raises(error, match=words):
                TaskLoss(model, "cross_entropy", engine=engine).gradient(params, data._replace(**change))
    with pytest.raises(ValueError, match=r"params must have shape \[5, N\] \(one row per task\), got \[4, 1219\]"):
        loss(params[1:], data)
    with pytest.raises(ValueError, match="ways must be None with the criterion 'mse'"):
        TaskLoss(model, "mse")(params, data)
    with pytest.raises(TypeError, match=r"data must have x and y: .*, got a mapping of \['inputs', 'targets'\]"):
        loss(params, {"inputs": data.x, "targets": data.y})
    with pytest.raises(TypeError, match=r"episodes must have support and query: .*, got Tensor"):
        IMAML(loss).meta_gradient(params[0], data.x)
    with pytest.raises(TypeError, match="accuracy must be a function, got str"):
        TaskLoss(model, "mse", accuracy="r2")


class Thinned:
    """The tasks of a sampler, some examples of which are not there."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def sample(self, step: int, *, shard: tuple[int, int] | None = None) -> EpisodeBatch:
        batch, masks = self.sampler.sample(step, shard=shard), []
        for y in (batch.support_y, batch.query_y):
            rank = torch.arange(y.shape[1]).expand_as(y)
            masks.append((rank + batch.num_tasks + torch.arange(len(y)).unsqueeze(1)) % 4 > 0)
        hidden = [
            x.masked_fill(~mask.view(*mask.shape, *(1,) * (x.dim() - 2)), torch.nan)
            for x, mask in zip((batch.support_x, batch.query_x), masks, strict=True)
        ]
        return EpisodeBatch(hidden[0], batch.support_y, hidden[1], batch.query_y, *masks)


@pytest.mark.parametrize("transductive", [True, False])
def test_evaluation(transductive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(small_config(steps=1), data=Glyphs(), tasks=Tasks(ways=3, shots=2, queries=2))
    config = replace(config, model=Conv4(filters=3), evaluation=EvaluationSettings(meta_batch=3))
    experiment = build(config)
    plain = experiment.sampler
    monkeypatch.setattr(Experiment, "sampler", lambda self, *a, **k: Thinned(plain(*a, **k)))
    theta = experiment.initial_params()["theta"]
    found = evaluate(experiment, theta, split="test", tasks=4, seed=5, transductive=transductive)
    sampler = experiment.sampler("test", tasks=4, seed=5)
    losses, accuracies = [], []
    for shard in ((0, 2), (1, 2)):
        batch = sampler.sample(0, shard=shard)
        for task in range(batch.num_tasks):
            (support, support_y), (query, query_y) = (
                (side.x[task, side.mask[task]], side.y[task, side.mask[task]]) for side in (batch.support, batch.query)
            )
            phi = experiment.test_algorithm.adapt(theta, one((support, support_y)))
            sets = [query] if transductive else [torch.cat([query[i : i + 1], support]) for i in range(len(query))]
            logits = [experiment.model(phi, x.unsqueeze(0))[0] for x in sets]
            of_queries = logits[0] if transductive else torch.stack([each[0] for each in logits])
            losses.append(nn.functional.cross_entropy(of_queries, query_y).item())
            accuracies.append((of_queries.argmax(-1) == query_y).double().mean().item())
    assert found.loss == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert found.accuracy == pytest.approx(sum(accuracies) / 4)


@pytest.mark.cuda
@pytest.mark.parametrize("engine", ["native", "torch"])
def test_on_cuda_as_on_the_cpu(engine: str) -> None:
    model, data = MODELS["conv4"](), padded(drawn(SHOTS), WAYS)
    loss, params = TaskLoss(model, "cross_entropy", engine=engine), model.init(seed=1, dtype=F64).expand(TASKS, -1)
    p = torch.randn_like(params)
    on_cuda = TaskData(*(value.cuda() for value in data))
    losses, outputs, gradient = loss.gradient(params.cuda(), on_cuda)
    expected = loss.gradient(params, data)
    close(losses.cpu(), expected.losses, 1e-10)
    close(gradient.cpu(), expected.gradient, 1e-9)
    torch.testing.assert_close(outputs.cpu(), expected.outputs, rtol=1e-9, atol=1e-9)
    product = loss.linearize(params.cuda(), on_cuda)(p.cuda())
    close(product.cpu(), loss.linearize(params, data)(p), 1e-8)
    ignored = TaskData(on_cuda.x, on_cuda.y.masked_fill(~on_cuda.mask, -100), ways=on_cuda.ways)
    assert torch.equal(loss.gradient(params.cuda(), ignored).losses, losses)
