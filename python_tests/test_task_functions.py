"""Handlers of torch functions against torch itself in float64: values, and derivatives to the third."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.overrides import TorchFunctionMode

from imaml_ext.models import task_convolution
from imaml_ext.models.task_functions import HANDLERS, batch_norm, conv1d, conv2d

TASKS = 3
EVERY_WAY = pytest.mark.parametrize("batched", ["all", "inputs", "parameters", "none"])
CONVOLUTIONS = {  # input [S, C, H, W], weight, arguments
    "winograd": ((2, 17, 11, 9), (18, 17, 3, 3), {"padding": 1}),
    "winograd, unpadded": ((1, 16, 10, 13), (16, 16, 3, 3), {}),
    "winograd, padded by 2": ((1, 16, 8, 9), (17, 16, 3, 3), {"padding": (2, 2)}),
    "strided": ((2, 3, 7, 10), (5, 3, 3, 3), {"stride": 2, "padding": 1}),
    "odd": ((2, 2, 9, 8), (3, 2, 2, 4), {"stride": (3, 1), "padding": (0, 2), "dilation": (2, 1)}),
    "same": ((2, 2, 5, 6), (4, 2, 3, 5), {"padding": "same", "dilation": (1, 2)}),
    "same of an even kernel": ((2, 2, 5, 6), (4, 2, 2, 2), {"padding": "same"}),
    "valid": ((2, 2, 5, 6), (1, 2, 5, 6), {"padding": "valid"}),
    "1x1": ((2, 4, 3, 3), (6, 4, 1, 1), {"stride": 2}),
    "groups": ((2, 4, 5, 5), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((1, 3, 5, 4), (3, 1, 3, 3), {"groups": 3}),
}


def derivatives(outputs: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The value, gradient, product with the Hessian and a derivative of that, of a random function of the outputs."""
    generator = torch.Generator().manual_seed(7)

    def like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)

    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = outputs(*leaves)
    found, scalar = [y], (torch.tanh(y) * like(y)).sum()
    for _ in range(3):
        gradients = torch.autograd.grad(scalar, leaves, create_graph=True)
        found += gradients
        scalar = sum((g * like(g)).sum() for g in gradients)
    return found


def check(ours: Callable[..., Tensor], torchs: Callable[..., Tensor], tensors: list[Tensor], batched: str) -> None:
    """Tensors of one task, the first of which are inputs; of `TASKS` where they are batched."""
    dims: list[int | None] = [
        0 if batched == "all" or batched == ("inputs" if i == 0 else "parameters") else None
        for i in range(len(tensors))
    ]
    many = [
        tensor if dim is None else torch.randn(TASKS, *tensor.shape, dtype=tensor.dtype)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]

    def by_loop(*tensors: Tensor) -> Tensor:
        of_tasks = [[t if d is None else t[b] for t, d in zip(tensors, dims, strict=True)] for b in range(TASKS)]
        return torch.stack([torchs(*of_task) for of_task in of_tasks])

    pair = (ours, torchs) if batched == "none" else (vmap(ours, tuple(dims)), by_loop)
    found, expected = (derivatives(function, many) for function in pair)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * max(1.0, float(b.detach().abs().max())))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@EVERY_WAY
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, batched: str) -> None:
    x, weight, options = CONVOLUTIONS[name]
    tensors = [random(*x), random(*weight)]
    if name in ("strided", "winograd", "groups"):
        tensors.append(random(weight[0]))
    check(lambda *t: conv2d(*t, **options), lambda *t: F.conv2d(*t, **options), tensors, batched)


@pytest.mark.parametrize("options", [{"stride": 2, "padding": 1}, {"padding": "same", "dilation": (2,)}])
def test_convolution_along_a_line(options: dict[str, Any]) -> None:
    tensors = [random(2, 3, 9), random(4, 3, 3), random(4)]
    check(lambda *t: conv1d(*t, **options), lambda *t: F.conv1d(*t, **options), tensors, "all")


@EVERY_WAY
@pytest.mark.parametrize("way", ["_Torch", "_Pixels", "_Patches", "_Winograd(2)", "_Winograd(4)"])
def test_every_way_to_convolve(way: str, batched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_convolution, "_method", lambda *_: eval(way, vars(task_convolution)))
    options = {"padding": 1}
    tensors = [random(2, 16, 5, 7), random(32, 16, 3, 3)]
    check(lambda *t: conv2d(*t, **options), lambda *t: F.conv2d(*t, **options), tensors, batched)


def test_convolution_refuses_as_torch_does() -> None:
    with pytest.raises(RuntimeError, match="expected input"):
        conv2d(random(2, 3, 5, 5), random(4, 2, 3, 3))
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        conv2d(random(2, 3, 2, 2), random(4, 3, 3, 3))


@EVERY_WAY
@pytest.mark.parametrize("shape", [(3, 5, 4, 2), (70, 18), (2, 16, 3)])
def test_batch_norm(shape: tuple[int, ...], batched: str) -> None:
    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm(x, None, None, weight, bias, True, 0.1, 1e-3)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # torch's own has no third derivative
        last = x.movedim(1, -1)
        rows = last.flatten(0, -2)
        hat = (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-3).sqrt()
        return (hat * weight + bias).view(last.shape).movedim(-1, 1)

    tensors = [random(*shape), random(shape[1]), random(shape[1])]
    x, *parameters = tensors
    torch.testing.assert_close(ours(*tensors), F.batch_norm(x, None, None, *parameters, True, 0.1, 1e-3))
    check(ours, plain, tensors, batched)


def test_batch_norm_without_parameters_and_of_constants() -> None:
    x = random(4, 3, 2, 2)
    torch.testing.assert_close(batch_norm(x, None, None, training=True), F.batch_norm(x, None, None, training=True))
    mean, var = random(3), random(3).square() + 0.1
    torch.testing.assert_close(batch_norm(x, mean, var), F.batch_norm(x, mean, var))
    constant = torch.full((5, 2), 3.0, dtype=torch.float64, requires_grad=True)
    batch_norm(constant, None, None, training=True).sum().backward()
    assert constant.grad is not None
    assert bool(constant.grad.isfinite().all())
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        batch_norm(random(1, 3), None, None, training=True)


class Handlers(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return HANDLERS.get(func, func)(*args, **(kwargs or {}))


def test_a_module_under_other_transforms() -> None:
    """grad inside vmap, and forward over reverse; the table is what a module's layers reach."""
    module = nn.Sequential(
        nn.Conv2d(2, 16, 3, 2, 1), nn.BatchNorm2d(16, track_running_stats=False), nn.Tanh(), nn.Conv2d(16, 16, 2),
        nn.Flatten(), nn.Linear(64, 3),
    ).double()  # fmt: skip
    values = {name: random(TASKS, *p.shape) for name, p in module.named_parameters()}
    directions = {name: torch.randn_like(value) for name, value in values.items()}
    x = random(TASKS, 4, 2, 6, 6)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x,)).square().sum()

    def product(parameters: dict[str, Tensor], directions: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return jvp(lambda p: grad(loss)(p, x), (parameters,), (directions,))[1]

    calls: list[Callable[[], dict[str, Tensor]]] = [
        lambda: vmap(grad(loss))(values, x),
        lambda: vmap(product)(values, directions, x),
    ]
    for call in calls:
        expected = call()
        with Handlers():
            found = call()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)
