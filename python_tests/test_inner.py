"""Proximal gradient descent against torch's optimisers on every task alone, and against closed forms."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from imaml_ext.inner import GradientDescent, gradient_descent
from imaml_ext.losses import TaskLoss
from imaml_ext.models import MLP

TASKS = 3


class Data(NamedTuple):
    x: Tensor
    y: Tensor


def regression(tasks: int = TASKS, dtype: torch.dtype = torch.float64) -> tuple[TaskLoss, Tensor, Data]:
    generator = torch.Generator().manual_seed(0)
    model = MLP(3, (6,), 2, activation="tanh")
    x = torch.randn(tasks, 8, 3, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(tasks, 8, 2, generator=generator, dtype=torch.float64).to(dtype)
    return TaskLoss(model, "mse"), model.init(seed=1, dtype=dtype), Data(x, y)


def quadratic(params: Tensor, data: Data) -> Tensor:
    """½ Σ x (φ − y)², every row with its own curvature x > 0 and minimiser y, [B, N]."""
    return 0.5 * (data.x * (params - data.y) ** 2).sum(1)


def coefficients(form: str, tasks: int, size: int) -> Tensor | float:
    generator = torch.Generator().manual_seed(3)
    shape = {"number": (), "0-d": (), "[B]": (tasks,), "[N]": (size,), "[B, N]": (tasks, size)}[form]
    value = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    return float(value) if form == "number" else value


@pytest.mark.parametrize("form", ["number", "0-d", "[B]", "[N]", "[B, N]"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov", "adam"])
@pytest.mark.parametrize("own_theta", [False, True])
def test_equals_torch_optim_on_every_task_alone(optimizer: str, form: str, own_theta: bool) -> None:
    loss, theta, data = regression()
    if own_theta:
        theta = theta + 0.1 * torch.randn(TASKS, theta.numel(), dtype=torch.float64)
    before = theta.clone()
    lam = coefficients(form, TASKS, theta.shape[-1])
    kind = "momentum" if optimizer == "nesterov" else optimizer
    result = gradient_descent(
        loss, theta, data, lam=lam, steps=7, lr=0.05, optimizer=kind, momentum=0.8, nesterov=optimizer == "nesterov"
    )
    assert torch.equal(theta, before)
    assert result.losses.shape == (7, TASKS)
    assert result.steps.tolist() == [7] * TASKS

    for task in range(TASKS):
        center = theta[task] if own_theta else theta
        phi = center.clone().requires_grad_()
        one = Data(data.x[task : task + 1], data.y[task : task + 1])
        own_lam = lam if isinstance(lam, float) or form in ("0-d", "[N]") else lam[task]
        if optimizer == "adam":
            steps: torch.optim.Optimizer = torch.optim.Adam([phi], lr=0.05)
        elif optimizer == "sgd":
            steps = torch.optim.SGD([phi], lr=0.05)
        else:
            steps = torch.optim.SGD([phi], lr=0.05, momentum=0.8, nesterov=optimizer == "nesterov")
        for step in range(7):
            steps.zero_grad()
            support = loss(phi.unsqueeze(0), one)
            torch.testing.assert_close(result.losses[step, task], support[0].detach(), rtol=1e-10, atol=1e-12)
            (support.sum() + 0.5 * (own_lam * (phi - center) ** 2).sum()).backward()
            steps.step()
        torch.testing.assert_close(result.phi[task], phi.detach(), rtol=1e-9, atol=1e-11)


def test_a_step_size_for_every_task() -> None:
    loss, theta, data = regression()
    lr = torch.tensor([0.1, 0.0, 0.02], dtype=torch.float64)
    together = gradient_descent(loss, theta, data, lam=1.0, steps=4, lr=lr).phi
    for task in range(TASKS):
        one = Data(data.x[task : task + 1], data.y[task : task + 1])
        alone = gradient_descent(loss, theta, one, lam=1.0, steps=4, lr=float(lr[task])).phi
        torch.testing.assert_close(together[task : task + 1], alone, rtol=1e-12, atol=1e-12)
    assert torch.equal(together[1], theta)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_reaches_the_closed_form_of_a_quadratic(optimizer: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a = 0.5 + torch.rand(TASKS, 11, generator=generator, dtype=torch.float64)
    m = torch.randn(TASKS, 11, generator=generator, dtype=torch.float64)
    theta, lam = torch.randn(11, generator=generator, dtype=torch.float64), coefficients("[B, N]", TASKS, 11)
    result = gradient_descent(
        quadratic, theta, Data(a, m), lam=lam, steps=400, lr=0.3, optimizer=optimizer, momentum=0.5, measure=True
    )
    exact = (a * m + lam * theta) / (a + lam)
    torch.testing.assert_close(result.phi, exact, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(result.final_loss, quadratic(exact, Data(a, m)), rtol=1e-12, atol=1e-12)
    assert result.final_gradient_norm.max() < 1e-12


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_a_task_within_tolerance_stays_and_the_others_go_on(optimizer: str) -> None:
    a = torch.ones(3, 4, dtype=torch.float64)
    m = torch.tensor([[0.0], [1.0], [100.0]], dtype=torch.float64).expand(3, 4)
    theta = torch.zeros(4, dtype=torch.float64)
    common = {"lam": 1.0, "steps": 60, "lr": 0.3, "optimizer": optimizer, "momentum": 0.2, "measure": True}
    result = gradient_descent(quadratic, theta, Data(a, m), tolerance=1e-3, **common)
    free = gradient_descent(quadratic, theta, Data(a, m), **common)
    assert result.steps[0] == 0
    assert torch.equal(result.phi[0], theta)
    if optimizer == "adam":
        return
    assert 0 < result.steps[1] < result.steps[2] < 60
    assert (result.final_gradient_norm <= 1e-3).all()
    assert (free.final_gradient_norm < result.final_gradient_norm / 10)[1:].all()
    for task in (1, 2):  # stopped exactly where that many steps lead
        stopped = gradient_descent(
            quadratic, theta, Data(a, m), **{**common, "steps": int(result.steps[task]), "measure": False}
        )
        assert torch.equal(stopped.phi[task], result.phi[task])


@pytest.mark.parametrize(("size", "parts"), [(1, 8), (3, 3), (4, 2), (7, 2), (8, 1), (50, 1)])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_minibatches_in_turn(optimizer: str, size: int, parts: int) -> None:
    """By hand: step after step on other examples, each part as large as the others to one example."""
    loss, theta, data = regression()
    common = {"lam": 0.7, "lr": 0.05, "optimizer": optimizer, "betas": (0.0, 0.9)}
    result = gradient_descent(loss, theta, data, steps=10, batch_size=size, measure=True, **common)
    for task in range(TASKS):
        phi = theta.clone().requires_grad_()
        rule = torch.optim.Adam([phi], 0.05, (0.0, 0.9)) if optimizer == "adam" else torch.optim.SGD([phi], 0.05)
        for step in range(10):
            mine = [i for i in range(8) if i % parts == step % parts]
            assert len(mine) <= size
            support = loss(phi.unsqueeze(0), Data(data.x[task : task + 1, mine], data.y[task : task + 1, mine]))
            torch.testing.assert_close(result.losses[step, task], support[0].detach(), rtol=1e-10, atol=1e-12)
            rule.zero_grad()
            (support.sum() + 0.35 * ((phi - theta) ** 2).sum()).backward()
            rule.step()
        torch.testing.assert_close(result.phi[task], phi.detach(), rtol=1e-9, atol=1e-11)
    whole = loss(result.phi, data)
    torch.testing.assert_close(result.final_loss, whole.detach(), rtol=1e-12, atol=1e-12)


def test_every_minibatch_of_a_support_set_has_all_classes() -> None:
    labels = torch.arange(5).repeat_interleave(10).repeat(TASKS, 1)  # as episodes have them
    for part in GradientDescent(batch_size=10).batches(Data(torch.rand(TASKS, 50, 1, 3, 3), labels)):
        assert (part.y.sort(1).values == torch.arange(5).repeat_interleave(2)).all()


def test_no_step_is_theta() -> None:
    loss, theta, data = regression()
    result = gradient_descent(loss, theta, data, lam=1.0, steps=0, lr=0.1)
    assert torch.equal(result.phi, theta.expand(TASKS, -1))
    assert result.phi.is_contiguous()
    assert result.losses.shape == (0, TASKS)


def test_a_task_of_nan_leaves_the_others_bit_identical() -> None:
    loss, theta, data = regression()
    broken = Data(data.x.clone(), data.y)
    broken.x[1] = float("nan")
    common = {"lam": 1.0, "steps": 5, "lr": 0.1, "optimizer": "adam", "tolerance": 1e-9, "measure": True}
    clean, dirty = (gradient_descent(loss, theta, side, **common) for side in (data, broken))
    assert dirty.phi[1].isnan().all()
    assert torch.equal(clean.phi[[0, 2]], dirty.phi[[0, 2]])
    assert torch.equal(clean.steps, dirty.steps)  # a NaN is not an arrival


def test_works_inside_no_grad_and_leaves_no_graph() -> None:
    loss, theta, data = regression()
    theta.requires_grad_()
    with torch.no_grad():
        inside = gradient_descent(loss, theta, data, lam=1.0, steps=3, lr=0.1)
    outside = gradient_descent(loss, theta, data, lam=1.0, steps=3, lr=0.1)
    assert torch.equal(inside.phi, outside.phi)
    assert not outside.phi.requires_grad
    assert not outside.losses.requires_grad


def test_number_of_tasks_from_data_theta_or_argument() -> None:
    def loss(params: Tensor, data: object) -> Tensor:
        return params.square().sum(1)

    theta = torch.ones(5)
    common = {"lam": 1.0, "steps": 1, "lr": 0.1}
    assert gradient_descent(loss, theta, None, num_tasks=4, **common).phi.shape == (4, 5)
    assert gradient_descent(loss, theta.expand(2, -1), None, **common).phi.shape == (2, 5)
    with pytest.raises(
        ValueError, match=r"num_tasks must be given where neither data.x nor theta has one row per task"
    ):
        gradient_descent(loss, theta, None, **common)
    with pytest.raises(ValueError, match=r"theta must have shape \[N\] or \[3, N\]"):
        gradient_descent(loss, theta.expand(2, -1), None, num_tasks=3, **common)


def test_errors_name_the_argument() -> None:
    loss, theta, data = regression()
    good = {"lam": 1.0, "steps": 1, "lr": 0.1}
    n = theta.numel()
    for error, words, changes in (
        (TypeError, "theta must be a tensor, got list", {"theta": [0.0]}),
        (ValueError, r"theta must have shape \[N\], or \[B, N\]", {"theta": theta[None, None]}),
        (TypeError, "theta must be float32 or float64, got torch.int64", {"theta": theta.long()}),
        (ValueError, rf"params must have shape \[B, {n}\]", {"theta": theta[1:]}),
        (TypeError, "inputs must have the dtype of params", {"theta": theta.float()}),
        (ValueError, "data.x must be on the device of theta, meta", {"theta": theta.to("meta")}),
        (ValueError, "lam must be at least 0, got -1.0", {"lam": -1.0}),
        (
            ValueError,
            "lam must be at least 0, got a tensor with an entry of -2",
            {"lam": torch.tensor([0.0, -2.0, 1.0])},
        ),
        (ValueError, "lam must be finite, got nan", {"lam": float("nan")}),
        (TypeError, "lam must be a number or a tensor, got str", {"lam": "2"}),
        (ValueError, "lam must be a number, .*got .7.", {"lam": torch.ones(7)}),
        (ValueError, "lr must be at least 0", {"lr": -0.1}),
        (ValueError, "lr must be a number, .*got .4.", {"lr": torch.ones(4)}),
        (ValueError, "steps must be at least 0, got -1", {"steps": -1}),
        (TypeError, "steps must be an integer, got 1.0", {"steps": 1.0}),
        (ValueError, "optimizer must be one of 'sgd', 'momentum', 'adam', got 'rmsprop'", {"optimizer": "rmsprop"}),
        (ValueError, "momentum must be at least 0 and below 1, got 1.0", {"momentum": 1.0}),
        (ValueError, "tolerance must be at least 0", {"tolerance": -1.0}),
        (ValueError, "batch_size must be at least 1, got 0", {"batch_size": 0}),
        (TypeError, "batch_size must be an integer, got 2.0", {"batch_size": 2.0}),
        (ValueError, "tolerance must be None with .* batch_size", {"batch_size": 2, "tolerance": 0.1}),
        (TypeError, "loss must return a tensor, got float", {"loss": lambda params, data: 0.0}),
        (ValueError, r"loss must return one loss per task, shape \[3\]", {"loss": lambda params, data: params.sum()}),
        (ValueError, "loss must depend on params", {"loss": lambda params, data: params.detach().sum(1)}),
    ):
        arguments = {"loss": loss, "theta": theta, **good, **changes}
        with pytest.raises(error, match=words):
            gradient_descent(arguments.pop("loss"), arguments.pop("theta"), data, **arguments)


def test_what_cannot_be_cut_into_minibatches() -> None:
    loss, theta, data = regression()
    common = {"lam": 1.0, "steps": 1, "lr": 0.1, "batch_size": 4}
    with pytest.raises(TypeError, match=r"data must have x and y: as attributes, .*, got Tensor"):
        gradient_descent(loss, theta, data.x, num_tasks=TASKS, **common)
    with pytest.raises(ValueError, match=r"data must have tensors x and y \[B, S, …\]"):
        gradient_descent(lambda params, x: params.sum(1), theta, data.x, num_tasks=TASKS, **common)
    with pytest.raises(ValueError, match=r"data.x and data.y must agree in \[B, S\] .*got \[3, 8\] and \[3, 7\]"):
        gradient_descent(loss, theta, Data(data.x, data.y[:, 1:]), **common)
