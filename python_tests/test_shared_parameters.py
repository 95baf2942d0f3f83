"""Parameters that tasks share, against finite differences of the exact bilevel objective."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property

import pytest
import torch
from meta_tasks import F64, Data, Episodes, relative
from torch import Tensor, nn

from imaml_ext import CG, FOMAML, IMAML, MAML, GradientDescent, NewtonCG, Reptile, from_module
from imaml_ext.batch import EpisodeBatch
from imaml_ext.losses import TaskLoss, as_loss
from imaml_ext.meta import MetaAlgorithm
from imaml_ext.models import ParameterLayout, TaskModel


class SharedBody(TaskModel):
    """tanh(tanh(x W) φ): the body W [3, 4] is shared, a head φ [4, 2] is a task's own."""

    def __init__(self) -> None:
        self._shared = torch.randn(12, dtype=F64)

    @cached_property
    def layout(self) -> ParameterLayout:
        return ParameterLayout.of({"head": torch.Size((4, 2))})

    @cached_property
    def shared_layout(self) -> ParameterLayout:
        return ParameterLayout.of({"body": torch.Size((3, 4))})

    def fitted(self, input_shape: tuple[int, ...], outputs: int) -> SharedBody:
        return self

    def initial_shared(self, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        return self._shared.to(device, dtype)

    def sharing(self, values: Tensor) -> SharedBody:
        model = copy.copy(self)
        model._shared = values
        return model

    def _initial(self, seed: int) -> dict[str, Tensor]:
        return {"head": torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(seed))}

    def _outputs(self, params: Tensor, inputs: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(inputs @ self._shared.view(3, 4)) @ params.view(-1, 4, 2))


def problem(tasks: int = 3) -> tuple[TaskLoss, Tensor, Episodes]:
    loss = TaskLoss(SharedBody(), "mse")
    sides = [Data(torch.randn(tasks, count, 3, dtype=F64), torch.randn(tasks, count, 2, dtype=F64)) for count in (6, 9)]
    return loss, loss.model.init(seed=1, dtype=F64), Episodes(*sides)


EXACT = {
    "imaml": IMAML(
        lam=0.5,
        inner=NewtonCG(steps=25, linear_solver=CG(max_iterations=40, rtol=1e-13)),
        linear_solver=CG(max_iterations=40, rtol=1e-13),
    ),
    "imaml, gradient descent": IMAML(
        lam=2.0, inner=GradientDescent(steps=100, lr=0.3), linear_solver=CG(max_iterations=40, rtol=1e-13)
    ),
    "maml": MAML(inner=GradientDescent(steps=3, lr=0.3)),
    "maml, checkpoint": MAML(inner=GradientDescent(steps=3, lr=0.3), checkpoint=True),
    "maml, checkpoint, adam": MAML(
        lam=0.5,
        learn={"lr": "global", "lam": "parameter"},
        inner=GradientDescent(steps=3, lr=0.05, optimizer="adam", eps=0.1, proximal="after"),
        checkpoint=True,
        tasks_per_chunk=2,
    ),
    "maml, momentum": MAML(inner=GradientDescent(steps=3, lr=0.1, optimizer="momentum", batch_size=2)),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_gradient_equals_finite_differences(name: str) -> None:
    loss, theta, episodes = problem()
    algorithm = EXACT[name].bound(loss)
    params = algorithm.initial(theta)
    assert params["shared"].shape == (12,)
    assert params["shared"].dtype == F64
    meta = algorithm.meta_gradient(params, episodes)
    assert meta.gradients.keys() == params.keys()
    h = 1e-5
    for key, value in params.items():
        d = torch.randn_like(value)
        ahead, behind = (
            loss.sharing(moved["shared"])(algorithm.adapt(moved, episodes.support), episodes.query).mean()
            for moved in (params | {key: value + sign * h * d} for sign in (1, -1))
        )
        gradient = meta.gradients[key]
        difference = float((ahead - behind) / (2 * h))
        assert abs(float(gradient @ d) - difference) < 1e-6 * float(gradient.norm() * d.norm()) + 1e-10


def test_first_order_takes_phi_for_a_constant() -> None:
    loss, theta, episodes = problem()
    algorithm = FOMAML(loss, inner=GradientDescent(steps=3, lr=0.3))
    params = algorithm.initial(theta)
    phi, shared = algorithm.adapt(params, episodes.support), params["shared"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss.sharing(shared)(phi, episodes.query).mean(), shared)
    assert relative(algorithm.meta_gradient(params, episodes).gradients["shared"], expected) < 1e-12


@pytest.mark.parametrize("name", ["imaml", "maml", "maml, checkpoint", "fomaml"])
def test_a_task_that_does_not_count_is_in_no_sum(name: str) -> None:
    loss, theta, episodes = problem(4)
    algorithm = (EXACT | {"fomaml": FOMAML()})[name].bound(loss)
    params = algorithm.initial(theta)
    episodes.query.x[1, 0] = float("nan")
    episodes.support.x[2, 0] = float("nan")
    others = Episodes(*(Data(side.x[[0, 3]], side.y[[0, 3]]) for side in episodes))
    found, expected = algorithm.meta_gradient(params, episodes), algorithm.meta_gradient(params, others)
    assert found.per_task["skipped"].tolist() == [False, True, True, False]
    for key in params:
        assert relative(found.gradients[key], expected.gradients[key]) < 1e-12
    episodes.query.x[:] = float("nan")
    nothing = algorithm.meta_gradient(params, episodes)
    assert all(gradient.isnan().all() for gradient in nothing.gradients.values())


def test_what_cannot_share_says_so() -> None:
    loss, theta, episodes = problem()
    with pytest.raises(ValueError, match=r"Reptile cannot learn parameters that tasks share: .*MAML"):
        Reptile(loss)
    with pytest.raises(ValueError, match=r"params must hold all that `initial.theta.` gives, shared is missing"):
        IMAML(loss).adapt(theta, episodes.support)
    with pytest.raises(
        TypeError, match="loss must be a TaskLoss to have parameters that tasks share, got FunctionLoss"
    ):
        as_loss(lambda params, data: params.sum(1)).sharing(theta)


@pytest.mark.parametrize("kind", [IMAML, MAML, FOMAML])
def test_the_outer_loop_in_inference_mode(kind: type[MetaAlgorithm]) -> None:
    loss, theta, episodes = problem()
    algorithm = kind(loss, inner=GradientDescent(steps=2))
    params = algorithm.initial(theta)
    expected = algorithm.meta_gradient(params, episodes).gradients["shared"]
    with torch.inference_mode():
        copies = {key: value.clone() for key, value in params.items()}
        torch.testing.assert_close(algorithm.meta_gradient(copies, episodes).gradients["shared"], expected)


def test_a_module_of_which_the_head_is_adapted() -> None:
    """By `from_module`, ragged tasks included, a few at a time: as the algorithm alone, task by task."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    loss = TaskLoss(from_module(module, adapt=["2.*"]), "mse")
    tasks = [(torch.randn(size, 3, dtype=F64), torch.randn(size, 2, dtype=F64)) for size in (5, 3, 5, 4, 6, 6)]
    episodes = EpisodeBatch.padded([(tasks[0], tasks[4]), (tasks[1], tasks[5]), (tasks[2], tasks[3])])
    for algorithm in (IMAML(loss, lam=1.0), MAML(loss, checkpoint=True), FOMAML(loss)):
        params = algorithm.initial(loss.model.init(seed=0, dtype=F64))
        assert params["shared"].shape == (16,)
        found = replace(algorithm, tasks_per_chunk=2).meta_gradient(params, episodes)
        alone = [
            algorithm.meta_gradient(params, EpisodeBatch.padded([each]))
            for each in ((tasks[0], tasks[4]), (tasks[1], tasks[5]), (tasks[2], tasks[3]))
        ]
        for key, gradient in found.gradients.items():
            assert relative(gradient, torch.stack([each.gradients[key] for each in alone]).mean(0)) < 1e-10
        for key, values in found.per_task.items():
            torch.testing.assert_close(values, torch.cat([each.per_task[key] for each in alone]))
