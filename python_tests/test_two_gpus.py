"""Ops on a GPU that is not the current one, and on two GPUs in one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imaml_ext import IMAML, GradientDescent, TaskLoss, cg, ops
from imaml_ext.batch import EpisodeBatch
from imaml_ext.models import Conv4

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]
DEVICES = ("cuda:0", "cuda:1")


def random(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def on(device: str) -> list[Tensor]:
    """Results of every family of ops, called while the first GPU is the current one."""
    diagonal, b = 1 + random(3, 40_001).square().to(device), random(3, 40_001).to(device)
    solved = cg(lambda p: diagonal * p, b, max_iterations=4, shift=0.5)
    penalty = ops.prox_penalty(b, diagonal, 0.5)
    model = Conv4(3, image_size=17, filters=20)
    x, y = random(2, 3, 1, 17, 17), torch.arange(3).expand(2, 3)
    episodes = EpisodeBatch(*(tensor.to(device) for tensor in (x, y, x, y)))
    algorithm = IMAML(TaskLoss(model, "cross_entropy"), inner=GradientDescent(steps=2))
    step = algorithm.meta_gradient(model.init(seed=0, device=device), episodes)
    assert torch.cuda.current_device() == 0
    return [solved.x, solved.residual_norm, penalty, step.gradient]


def test_the_device_of_the_tensors_is_where_an_op_runs() -> None:
    first, second = (on(device) for device in DEVICES)
    for result, other in zip(first, second, strict=True):
        assert result.device == torch.device(DEVICES[0])
        assert other.device == torch.device(DEVICES[1])
        # Equal bits are promised for one generation of GPUs; the machine may hold two.
        torch.testing.assert_close(result.cpu(), other.cpu(), rtol=1e-4, atol=1e-5)


def test_both_at_once() -> None:
    with torch.cuda.device(1):
        inputs = [1 + random(2, 5_000).square().to(device) for device in DEVICES]
    results = [cg(lambda p, d=d: d * p, d, max_iterations=60) for d in inputs for _ in range(3)]
    for k, result in enumerate(results):
        torch.testing.assert_close(result.x, torch.ones_like(result.x), rtol=1e-3, atol=1e-3)
        assert result.x.device == torch.device(DEVICES[k // 3])


def test_tensors_of_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="must be on cuda:0, got cuda:1"):
        ops.prox_penalty(random(2, 5).to("cuda:0"), random(5).to("cuda:0"), torch.ones(2, 1, device="cuda:1"))
