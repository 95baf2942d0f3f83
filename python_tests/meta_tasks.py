"""Small tasks for the tests of the meta-gradients, and a watch for what waits for the device."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imaml_ext.losses import TaskLoss
from imaml_ext.models import MLP, Conv4

F64 = torch.float64


class Data(NamedTuple):
    x: Tensor
    y: Tensor


class Episodes(NamedTuple):
    support: Data
    query: Data


def regression(tasks: int, *, hidden: tuple[int, ...] = (5,)) -> tuple[TaskLoss, Tensor, Episodes]:
    """Random points and targets, of 3 inputs and 2 outputs: loss, theta [N] and the tasks, in float64."""
    model = MLP(3, hidden, 2, activation="tanh")
    theta = model.init(seed=0, dtype=F64) + 0.2 * torch.randn(model.num_parameters, dtype=F64)
    sides = [Data(torch.randn(tasks, count, 3, dtype=F64), torch.randn(tasks, count, 2, dtype=F64)) for count in (6, 9)]
    return TaskLoss(model, "mse"), theta, Episodes(*sides)


def classification(tasks: int, *, dtype: torch.dtype = F64) -> tuple[TaskLoss, Tensor, Episodes]:
    """Random images of 12 × 12 pixels in 3 classes, for a Conv4 of 4 filters."""
    model = Conv4(3, image_size=12, filters=4)
    sides = [
        Data(
            torch.rand(tasks, 3 * count, 1, 12, 12, dtype=dtype),
            torch.arange(3).repeat_interleave(count).repeat(tasks, 1),
        )
        for count in (1, 2)
    ]
    return TaskLoss(model, "cross_entropy"), model.init(seed=2, dtype=dtype), Episodes(*sides)


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())


class HostWatch(TorchDispatchMode):
    """Records ops that hand a number of the device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class PeakWatch(TorchDispatchMode):
    """Adds up the bytes of the storages that live at once, those of `known` tensors left out."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.live: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := (storage := leaf.untyped_storage())._cdata) not in self.live:
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key)
        self.peak = max(self.peak, sum(self.live.values()))
        return result
