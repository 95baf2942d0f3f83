"""Criteria of torch and of one's own: per task, against a loop over the tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaml_ext import FOMAML, IMAML, GradientDescent, TaskLoss
from imaml_ext.batch import TaskData
from imaml_ext.models import MLP

F64 = torch.float64
TASKS, EXAMPLES, OUTPUTS = 3, 6, 4


def labels() -> Tensor:
    return torch.randint(OUTPUTS, (TASKS, EXAMPLES))


def values() -> Tensor:
    return torch.randn(TASKS, EXAMPLES, OUTPUTS, dtype=F64)


def bits() -> Tensor:
    return torch.randint(2, (TASKS, EXAMPLES, OUTPUTS)).to(F64)


def some_ignored() -> Tensor:
    return labels().index_fill(1, torch.tensor([1]), -100)


WEIGHT = torch.rand(OUTPUTS, dtype=F64)
CRITERIA: dict[str, tuple[Any, Callable[..., Tensor], Callable[[], Tensor]]] = {
    "cross_entropy by name": ("cross_entropy", F.cross_entropy, labels),
    "mse by name": ("mse", F.mse_loss, values),
    "function": (F.cross_entropy, F.cross_entropy, labels),
    "ignored labels": (F.cross_entropy, F.cross_entropy, some_ignored),
    "probabilities": (F.cross_entropy, F.cross_entropy, lambda: values().softmax(-1)),
    "module": (nn.CrossEntropyLoss(), F.cross_entropy, labels),
    "weight and smoothing": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
        partial(F.cross_entropy, weight=WEIGHT, label_smoothing=0.1),
        labels,
    ),
    "sum, another ignored": (
        nn.CrossEntropyLoss(reduction="sum", ignore_index=2),
        partial(F.cross_entropy, reduction="sum", ignore_index=2),
        labels,
    ),
    "partial": (partial(F.cross_entropy, label_smoothing=0.2), partial(F.cross_entropy, label_smoothing=0.2), labels),
    "mse_loss": (F.mse_loss, F.mse_loss, values),
    "sum of squares": (nn.MSELoss(reduction="sum"), partial(F.mse_loss, reduction="sum"), values),
    "huber_loss by name": ("huber_loss", F.huber_loss, values),
    "smooth_l1_loss": (nn.SmoothL1Loss(), F.smooth_l1_loss, values),
    "binary": (F.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, bits),
    "binary, weighted": (
        nn.BCEWithLogitsLoss(pos_weight=WEIGHT),
        partial(F.binary_cross_entropy_with_logits, pos_weight=WEIGHT),
        bits,
    ),
    "poisson_nll_loss": (nn.PoissonNLLLoss(), F.poisson_nll_loss, lambda: values().abs()),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_of_torch_against_a_loop_over_tasks(name: str) -> None:
    criterion, function, targets = CRITERIA[name]
    model = MLP(3, (5,), OUTPUTS, activation="tanh")
    params = 0.5 * torch.randn(TASKS, model.num_parameters, dtype=F64)
    data = TaskData(torch.randn(TASKS, EXAMPLES, 3, dtype=F64), targets())
    loss, p = TaskLoss(model, criterion), torch.randn_like(params)
    losses, outputs, gradient = loss.gradient(params, data)
    operators = {kind: loss.linearize(params, data, kind) for kind in ("hessian", "gauss_newton")}
    for task in range(TASKS):
        leaf = params[task : task + 1].clone().requires_grad_()
        logits = model(leaf, data.x[task : task + 1])[0]
        value = function(logits, data.y[task])
        (by_leaf,) = torch.autograd.grad(value, leaf, create_graph=True)
        (product,) = torch.autograd.grad(by_leaf, leaf, p[task : task + 1])
        torch.testing.assert_close(losses[task], value.detach(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(gradient[task], by_leaf[0].detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(operators["hessian"](p)[task], product[0], rtol=1e-11, atol=1e-12)
        hessian = torch.autograd.functional.hessian(lambda z, y=data.y[task]: function(z, y), logits.detach())
        jacobian = torch.autograd.functional.jacobian(
            lambda row, x=data.x[task : task + 1]: model(row.unsqueeze(0), x)[0], leaf[0].detach()
        ).flatten(0, 1)  # [S K, N]
        expected = jacobian.T @ (hessian.reshape(len(jacobian), -1) @ (jacobian @ p[task]))
        torch.testing.assert_close(operators["gauss_newton"](p)[task], expected, rtol=1e-11, atol=1e-12)
    accuracies = loss.accuracy(outputs, data.y)
    if getattr(function, "func", function) is not F.cross_entropy:
        assert accuracies is None
        return
    ignored = getattr(criterion, "ignore_index", -100)
    for task in range(TASKS):
        y = data.y[task].argmax(-1) if data.y.is_floating_point() else data.y[task]
        kept = y != ignored
        right = (outputs[task].argmax(-1)[kept] == y[kept]).to(F64).mean()
        torch.testing.assert_close(accuracies[task], right, equal_nan=True)


def test_targets_are_not_broadcast() -> None:
    """torch broadcasts [S] against [S, 1] with a warning, which is another loss."""
    model = MLP(3, (5,), 1)
    params, x = torch.randn(TASKS, model.num_parameters, dtype=F64), torch.randn(TASKS, EXAMPLES, 3, dtype=F64)
    y = torch.randn(TASKS, EXAMPLES, dtype=F64)
    expected = TaskLoss(model, "mse")(params, TaskData(x, y))
    torch.testing.assert_close(TaskLoss(model, F.mse_loss)(params, TaskData(x, y)), expected)
    with pytest.raises(ValueError, match=r"targets must have the shape of the outputs, \[3, 6, 1\], got \[3, 6, 2\]"):
        TaskLoss(model, F.mse_loss)(params, TaskData(x, torch.randn(TASKS, EXAMPLES, 2, dtype=F64)))
    with pytest.raises(TypeError, match=r"targets must have the dtype of the outputs, torch.float64, got torch.int64"):
        TaskLoss(model, nn.L1Loss())(params, TaskData(x, labels()))
    with pytest.raises(ValueError, match=r"criterion must return one loss per task, shape \[3\], got \[3, 6, 1\]"):
        TaskLoss(model, nn.MSELoss(reduction="none"))(params, TaskData(x, y))
    with pytest.raises(ValueError, match="engine must be 'auto' or 'torch' for a MLP with <function mse_loss"):
        TaskLoss(model, F.mse_loss, engine="native")


def test_accuracy_of_a_criterion_of_ones_own_also_of_ragged_tasks() -> None:
    def signs(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs[..., 0] > 0) == (targets > 0)).to(outputs.dtype).mean(1)

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.softplus(-targets * outputs[..., 0]).sum(1)

    model = MLP(3, (), 1)
    loss = TaskLoss(model, criterion, accuracy=signs)
    params = torch.randn(2, model.num_parameters, dtype=F64)
    sizes = (4, 2)
    tasks = [(torch.randn(s, 3, dtype=F64), torch.randint(2, (s,)).to(F64) * 2 - 1) for s in sizes]
    data = TaskData.padded(tasks)
    losses, accuracies = loss.measure(params, data)
    for task, (x, y) in enumerate(tasks):
        expected = loss.measure(params[task : task + 1], TaskData(x.unsqueeze(0), y.unsqueeze(0)))
        torch.testing.assert_close(losses[task], expected[0][0])
        torch.testing.assert_close(accuracies[task], expected[1][0])
    meta = FOMAML(loss, inner=GradientDescent(0)).meta_gradient(params[0], (data, data))
    torch.testing.assert_close(meta.metrics["query_accuracy"], loss.measure(params[:1].expand(2, -1), data)[1].mean())
    with pytest.raises(ValueError, match=r"accuracy must return one accuracy per task, shape \[2\], got \[\]"):
        TaskLoss(model, criterion, accuracy=lambda outputs, targets: outputs.mean()).measure(
            params, data._replace(mask=None)
        )


def test_a_function_loss_on_any_data() -> None:
    """IMAML on a dict of tensors [B, …] without x: the number of tasks is what they share."""
    data = {"design": torch.randn(4, 7, 3, dtype=F64), "target": torch.randn(4, 7, dtype=F64)}

    def loss(w: Tensor, data: Any) -> Tensor:
        return (torch.einsum("bsn,bn->bs", data["design"], w) - data["target"]).square().mean(1)

    theta = torch.zeros(3, dtype=F64)
    meta = IMAML(loss, lam=1.0, inner=GradientDescent(5)).meta_gradient(theta, {"support": data, "query": data})
    assert meta.gradient.shape == (3,)
    assert meta.counted == 4
    with pytest.raises(
        ValueError, match=r"num_tasks must be given where neither data.x nor theta has one row per task"
    ):
        IMAML(loss).adapt(theta, {**data, "shared": torch.zeros(3)})
