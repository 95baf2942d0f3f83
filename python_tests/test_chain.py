"""nn.Modules that the native engine computes, against torch's engine; and those that it must leave alone."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imaml_ext import GradientDescent, TaskLoss, from_module
from imaml_ext.batch import TaskData

F64 = torch.float64
B, S = 3, 4


def block(channels: int, filters: int, *rest: nn.Module, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(filters, track_running_stats=False), *rest]


class Functional(nn.Module):
    """The same kinds of layers by functions and methods, in an order of parameters that is not that of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(5)
        self.body = nn.Conv2d(2, 5, 3, padding=1, bias=False)
        self.middle, self.out = nn.Linear(5 * 12, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.norm(self.body(x))), 2)
        return self.out(torch.tanh(self.middle(x.flatten(1))))


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = (
            nn.Sequential(*block(2, 4, nn.ReLU(), stride=2), *block(4, 6, nn.ReLU(), stride=2)),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


CHAINS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 3)), (5,)),
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)),
        (5,),
    ),
    "pooled": (
        lambda: nn.Sequential(
            *block(1, 4, nn.ReLU(), nn.MaxPool2d(2)),
            *block(4, 3, nn.MaxPool2d(2), nn.Identity(), nn.ReLU()),
            nn.Flatten(),
            nn.Dropout(0.5).eval(),
            nn.Linear(12, 3),
        ),
        (1, 11, 9),
    ),
    "mean": (Mean, (2, 7, 9)),
    "adaptive": (
        lambda: nn.Sequential(*block(2, 4, nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        (2, 5, 6),
    ),
    "functional": (Functional, (2, 9, 7)),
}


def both(module: nn.Module) -> tuple[TaskLoss, TaskLoss]:
    model = from_module(module.double(), batch_norm="task")
    return TaskLoss(model, "cross_entropy"), TaskLoss(model, "cross_entropy", engine="torch")


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_equals_torch(name: str) -> None:
    make, example = CHAINS[name]
    ours, torchs = both(make())
    x, y = torch.randn(B, S, *example, dtype=F64), torch.randint(3, (B, S))
    assert ours.model.network_for(x) is not None
    theta = ours.model.init(seed=0, dtype=F64)
    params = theta + 0.1 * torch.randn(B, len(theta), dtype=F64)
    data = TaskData(x, y, ways=torch.tensor([3, 2, 3])) if name == "mean" else TaskData(x, y)
    if name == "mean":
        data.y[1] %= 2
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
    found, expected = ours.gradient(params, data), torchs.gradient(params, data)
    torch.testing.assert_close(found.losses, expected.losses, **close)
    torch.testing.assert_close(found.gradient, expected.gradient, **close)
    torch.testing.assert_close(ours.measure(params, data), torchs.measure(params, data), **close)
    p = torch.randn_like(params)
    for kind in ("hessian", "gauss_newton"):
        operators = [loss.linearize(params, data, kind) for loss in (ours, torchs)]
        torch.testing.assert_close(operators[0].gradient, operators[1].gradient, **close)
        torch.testing.assert_close(operators[0](p), operators[1](p), **close)
        torch.testing.assert_close(operators[0].curvature(p), operators[1].curvature(p), **close)
    leaf = params.clone().requires_grad_()
    twice = []
    for loss in (ours, torchs):
        (gradient,) = torch.autograd.grad(loss(leaf, data).sum(), leaf, create_graph=True)
        twice.append(torch.autograd.grad((gradient * p).sum(), leaf)[0])
    torch.testing.assert_close(*twice, **close)
    lam = torch.rand(len(theta), dtype=F64)
    phi = [GradientDescent(steps=3, lr=0.05).solve(loss, theta, data, lam=lam).phi for loss in (ours, torchs)]
    torch.testing.assert_close(*phi, **close)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x + torch.relu(self.a(x)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(torch.relu(self.a(x)))))


class Branches(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def _hooked() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    module[0].register_forward_hook(lambda layer, inputs, y: 2 * y)
    return module


def _frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    module[0].bias.requires_grad_(False)
    return module


class WithoutGradient(nn.Module):
    """A body that gets no gradient, by a mode that torch.fx does not record."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = torch.tanh(self.body(x))
        return self.head(x)


class Scales(nn.Module):
    """Looks at the type of its input, which is another one while torch.fx follows the module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(5, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.layer(x / 10 if isinstance(x, Tensor) else x)


def _exchanged() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    module[0].forward = types.MethodType(lambda self, x: 3 * F.linear(x, self.weight, self.bias), module[0])
    return module


OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (5,)),
    "a layer called twice": (Twice, (5,)),
    "a hook": (_hooked, (5,)),
    "a body without gradient": (WithoutGradient, (5,)),
    "a branch on a type": (Scales, (5,)),
    "a forward that was exchanged": (_exchanged, (5,)),
    "an activation of the engine at the end": (lambda: nn.Sequential(nn.Linear(5, 3), nn.Tanh()), (5,)),
    "no linear layer": (
        lambda: nn.Sequential(*block(2, 3, nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        (2, 6, 6),
    ),
    "a frozen bias": (_frozen, (5,)),
    "no bias": (lambda: nn.Sequential(nn.Linear(5, 3, bias=False)), (5,)),
    "another activation": (lambda: nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)), (5,)),
    "an activation at the end": (lambda: nn.Sequential(nn.Linear(5, 3), nn.Softplus()), (5,)),
    "a norm with another epsilon": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4, eps=1e-3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        (2, 6, 6),
    ),
    "a convolution with a bias": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
        ),
        (2, 6, 6),
    ),
    "statistics as constants": (
        lambda: nn.Sequential(
            *block(2, 4)[:1], nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
        ).eval(),
        (2, 6, 6),
    ),
    "no activation after the norm": (
        lambda: nn.Sequential(*block(2, 4), nn.Flatten(), nn.Linear(4 * 36, 3)),
        (2, 6, 6),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_chain_is_left_to_torch(name: str) -> None:
    make, example = OTHERS[name]
    ours, torchs = both(make())
    x, y = torch.randn(B, S, *example, dtype=F64), torch.randint(3, (B, S))
    assert ours.model.network_for(x) is None
    params = ours.model.init(seed=0, dtype=F64).expand(B, -1)
    for ways in (None, torch.tensor([3, 2, 3])):
        data = TaskData(x, y if ways is None else y.clamp(max=1), ways=ways)
        found, expected = (loss.gradient(params, data).gradient for loss in (ours, torchs))
        torch.testing.assert_close(found, expected)


def test_modules_with_a_branch_or_shared_parameters_are_left_to_torch() -> None:
    model = from_module(Branches(5, 3), tasks="loop")
    assert model.network_for(torch.randn(B, S, 5)) is None
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    assert from_module(module, adapt=["2.*"]).network_for(torch.randn(B, S, 5)) is None
    assert from_module(module, output=lambda y: y[0]).network_for(torch.randn(B, S, 5)) is None
    assert from_module(module).network_for((torch.randn(B, S, 5),)) is None
