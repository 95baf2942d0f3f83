"""Batches of tasks: forms that are taken, structures of tensors, masks that travel along, lists of unequal tasks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imaml_ext import FOMAML, MAML, GradientDescent, TaskLoss
from imaml_ext.batch import EpisodeBatch, TaskData, as_data, as_episodes, count_tasks
from imaml_ext.models import MLP, from_module

F64 = torch.float64


def sides() -> tuple[TaskData, TaskData]:
    def side(size: int) -> TaskData:
        mask = torch.rand(5, size) < 0.6
        mask[:, 0] = True
        x = {"a": torch.randn(5, size, 2), "b": (torch.randn(5, size), torch.randint(9, (5, size, 3)))}
        return TaskData(x, torch.randint(2, (5, size)), mask, torch.tensor([2, 3, 2, 2, 3]))

    return side(4), side(6)


def test_an_episode_batch_carries_masks_ways_and_structures() -> None:
    support, query = sides()
    batch = EpisodeBatch(support.x, support.y, query.x, query.y, support.mask, query.mask, support.ways)
    assert batch.support.x is support.x
    assert batch.query.mask is query.mask
    assert batch.num_tasks == 5
    assert len(batch.tensors()) == 3 + 1 + 3 + 1 + 3
    double = batch.to(dtype=F64)
    assert [t.dtype for t in double.tensors()[:4]] == [F64, F64, torch.int64, torch.int64]
    assert double.support_mask.dtype == torch.bool
    parts = [batch.shard(rank, 2) for rank in range(2)]
    for whole, *halves in zip(batch.tensors(), *(part.tensors() for part in parts), strict=True):
        assert torch.equal(torch.cat(halves), whole)
    plain = EpisodeBatch(*(torch.zeros(2, 3) for _ in range(4)))
    assert len(plain.tensors()) == 4
    assert plain.support.mask is None
    assert plain.to(dtype=F64).ways is None


def test_what_does_not_fit_is_named() -> None:
    support, query = sides()
    with pytest.raises(ValueError, match=r"support_x, support_y and support_mask must agree .*\(5, 4, 2\).*\(5, 3\)"):
        EpisodeBatch(support.x, support.y, query.x, query.y, support.mask[:, 1:])
    with pytest.raises(
        ValueError, match="support and query and ways must hold the same number of tasks, got 5 and 5 and 2"
    ):
        EpisodeBatch(support.x, support.y, query.x, query.y, ways=support.ways[:2])
    for tasks, error, words in (
        ([], ValueError, "tasks must hold at least one task"),
        ([(torch.zeros(2, 3), torch.zeros(3))], ValueError, r"must have as many examples, got \[2, 3\]"),
        ([(torch.zeros(2, 3), [1])], TypeError, r"every task must be \(x, y\) of tensors"),
        ([(torch.zeros(2, n), torch.zeros(2)) for n in (1, 2)], ValueError, r"one shape, got \[\[1\], \[2\]\]"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            TaskData.padded(tasks)


def test_lists_of_tasks_of_different_sizes() -> None:
    sizes = (3, 1, 2)
    tasks = [({"a": torch.randn(n, 2), "b": torch.randint(9, (n,))}, torch.randint(2, (n,))) for n in sizes]
    data = TaskData.padded(tasks, ways=[2, 3, 2])
    assert data.mask.sum(1).tolist() == list(sizes)
    assert data.ways.tolist() == [2, 3, 2]
    for task, (x, y) in enumerate(tasks):
        for name in ("a", "b"):
            assert torch.equal(data.x[name][task, data.mask[task]], x[name])
        assert torch.equal(data.y[task, data.mask[task]], y)
    equal = TaskData.padded([(torch.zeros(2, 3), torch.zeros(2))] * 4)
    assert equal.mask is None
    assert equal.x.shape == (4, 2, 3)
    batch = EpisodeBatch.padded(
        [((torch.ones(n, 2), torch.ones(n)), (torch.zeros(5, 2), torch.zeros(5))) for n in sizes]
    )
    assert batch.support_mask.sum(1).tolist() == list(sizes)
    assert batch.query_mask is None


def test_forms_of_batches() -> None:
    x, y, mask = torch.zeros(2, 3, 1), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    own = SimpleNamespace(x=x, y=y)
    assert as_data(own) is own
    for given in ((x, y), [x, y], {"x": x, "y": y}):
        assert as_data(given) == (x, y, None, None)
    assert as_data((x, y, mask)).mask is mask
    assert as_data({"x": x, "y": y, "mask": mask}).mask is mask
    pair = SimpleNamespace(support=own, query=own)
    assert as_episodes(pair) is pair
    for given in ((own, (x, y)), {"support": own, "query": (x, y)}):
        assert as_episodes(given).support is own
        assert as_episodes(given).query == (x, y)
    named = {"support_x": x, "support_y": y, "query_x": x, "query_y": y, "query_mask": mask}
    assert as_episodes(named).query.mask is mask
    assert count_tasks(own) == count_tasks((x, y)) == count_tasks({"u": x, "v": [y]}) == 2
    assert count_tasks({"x": {"a": x}, "shared": torch.zeros(7)}) == 2
    assert count_tasks({"u": x, "v": torch.zeros(3)}) is None


@pytest.mark.parametrize("algorithm", [FOMAML(inner=GradientDescent(2, 0.1)), MAML(inner=GradientDescent(2, 0.1))])
def test_algorithms_take_every_form(algorithm: Any) -> None:
    model = MLP(1, (4,), 1, activation="tanh")
    x, y = torch.randn(2, 3, 1, dtype=F64), torch.randn(2, 3, dtype=F64)
    algorithm, theta = algorithm.bound(TaskLoss(model, "mse")), model.init(seed=0, dtype=F64)
    expected = algorithm.meta_gradient(theta, EpisodeBatch(x, y, x, y)).gradient
    for form in (((x, y), (x, y)), {"support": {"x": x, "y": y}, "query": [x, y]}):
        assert torch.equal(algorithm.meta_gradient(theta, form).gradient, expected)
    own = SimpleNamespace(support=SimpleNamespace(x=x, y=y), query=SimpleNamespace(x=x, y=y))
    chunks = replace(algorithm, tasks_per_chunk=1).meta_gradient(theta, own)
    torch.testing.assert_close(chunks.gradient, expected)
    assert chunks.counted == 2
    assert torch.equal(algorithm.adapt(theta, (x, y)), algorithm.adapt(theta, TaskData(x, y)))


class TwoInputs(nn.Module):
    """A module of two inputs, whose outputs have two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.scale = nn.Linear(3, 1, bias=False, dtype=F64), nn.Linear(2, 1, bias=False, dtype=F64)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"mean": self.mean(a).squeeze(-1), "scale": self.scale(b).squeeze(-1)}


def test_structures_of_inputs_targets_and_outputs_also_of_ragged_tasks() -> None:
    def criterion(outputs: Any, targets: Any) -> Tensor:
        residual = outputs["mean"] - targets[0]
        return (residual.square() * (-outputs["scale"]).exp() + outputs["scale"] * targets[1]).mean(1)

    loss, sizes = TaskLoss(from_module(TwoInputs()), criterion), (4, 2, 4)
    tasks = [
        ({"a": torch.randn(n, 3, dtype=F64), "b": torch.randn(n, 2, dtype=F64)}, tuple(torch.randn(2, n, dtype=F64)))
        for n in sizes
    ]
    data, params = TaskData.padded(tasks), torch.randn(3, 5, dtype=F64)
    found, p = loss.gradient(params, data), torch.randn_like(params)
    product = loss.linearize(params, data)(p)
    assert found.outputs["mean"].shape == (3, 4)
    for task, (x, y) in enumerate(tasks):
        single = TaskData({name: value.unsqueeze(0) for name, value in x.items()}, tuple(t.unsqueeze(0) for t in y))
        row = params[task : task + 1]
        expected = loss.gradient(row, single)
        torch.testing.assert_close(found.losses[task], expected.losses[0])
        torch.testing.assert_close(found.gradient[task], expected.gradient[0])
        torch.testing.assert_close(found.outputs["mean"][task, : sizes[task]], expected.outputs["mean"][0])
        torch.testing.assert_close(product[task], loss.linearize(row, single)(p[task : task + 1])[0])
