"""Layers with parameters of their own for every task, whose derivatives can be differentiated again.

Activations are channels-last, [B, S, H, W, C] for B tasks of S images, so that the pixels of a task are the rows of a
matrix [B, S·H·W, C]: a convolution is one batched matrix product over patches, and no copy stands between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from imaml_ext.models.products import product


class _Patches(torch.autograd.Function):
    """Takes x [B, S, H, W, C] to the 3×3 neighbourhoods [B, S·H'·W', 9 C], zero-padded by 1, every `stride` pixels.

    It is linear, so its derivative is its adjoint and the derivative of that is itself, to any order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        ctx.shape, ctx.stride = x.shape, stride
        padded = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
        windows = padded.unfold(2, 3, stride).unfold(3, 3, stride)  # [B, S, H', W', C, 3, 3], a view
        return windows.permute(0, 1, 2, 3, 5, 6, 4).reshape(x.shape[0], -1, 9 * x.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ScatterPatches.apply(grad, ctx.shape, ctx.stride), None


class _ScatterPatches(torch.autograd.Function):
    """The adjoint of `_Patches`: every pixel of [B, S, H, W, C] sums what the patches hold of it."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor, shape: torch.Size, stride: int) -> Tensor:
        ctx.stride = stride
        batch, images, height, width, channels = shape
        rows, cols = (height - 1) // stride + 1, (width - 1) // stride + 1
        windows = patches.view(batch, images, rows, cols, 3, 3, channels)
        padded = patches.new_zeros(batch, images, height + 2, width + 2, channels)
        for i in range(3):
            for j in range(3):
                here = padded[:, :, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (cols - 1) + 1 : stride]
                here.add_(windows[:, :, :, :, i, j])
        return padded[:, :, 1:-1, 1:-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Patches.apply(grad, ctx.stride), None, None


class Taps:
    """Keeps what enters the layers of a model, and adds to what leaves them, as `TaskModel.tapped` says."""

    def __init__(self, added: Mapping[str, Tensor]) -> None:
        self.added, self.entered = added, dict[str, Tensor]()

    def __call__(self, name: str, entering: Tensor, leaving: Tensor) -> Tensor:
        self.entered[name] = entering
        return leaving + self.added[name] if name in self.added else leaving


Tap = Callable[[Tensor, Tensor], Tensor]  # what enters [B, P, I] and leaves [B, P, O] -> what is to leave


def conv3x3(x: Tensor, weight: Tensor, *, stride: int, precision: str = "float32", tap: Tap | None = None) -> Tensor:
    """Convolves x [B, S, H, W, C] with a weight per task [B, 3, 3, C, C'], zero padding 1, no bias.

    Returns [B, S, ⌈H/stride⌉, ⌈W/stride⌉, C'].
    """
    batch, images, height, width, _ = x.shape
    patches = _Patches.apply(x, stride)
    out = product(patches, weight.flatten(1, 3), precision)  # [B, S·H'·W', 9 C] · [B, 9 C, C']
    if tap is not None:
        out = tap(patches, out)
    return out.view(batch, images, (height - 1) // stride + 1, (width - 1) // stride + 1, -1)


class _Standardise(torch.autograd.Function):
    """Takes x [B, P, C] to (x − mean) / √(var + ε) over the P rows of a task, and 1 / √(var + ε) [B, 1, C].

    The second output makes the derivative an expression in outputs alone, which autograd differentiates again:
    x̄ = s · (ȳ − mean ȳ) − y · (s · mean(ȳ y) + s̄ s² / P).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y = x - x.mean(1, keepdim=True)
        scale = torch.rsqrt(y.square().mean(1, keepdim=True) + eps)  # [B, 1, C]; several times faster than var_mean
        y.mul_(scale)
        ctx.save_for_backward(y, scale)
        ctx.set_materialize_grads(False)
        return y, scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_scale: Tensor | None) -> tuple[Tensor | None, None]:
        y, scale = ctx.saved_tensors
        if grad is None and grad_scale is None:
            return None, None
        along_y = 0.0 if grad_scale is None else grad_scale * scale.square() / y.shape[1]
        if grad is None:
            return -y * along_y, None
        along_y = along_y + scale * (grad * y).mean(1, keepdim=True)  # [B, 1, C]
        return torch.addcmul(scale * (grad - grad.mean(1, keepdim=True)), y, along_y, value=-1), None


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Normalises x [B, S, H, W, C] by the statistics of the task's own batch, always; weight and bias are [B, C]."""
    y, _ = _Standardise.apply(x.flatten(1, 3), eps)
    return torch.addcmul(bias.unsqueeze(1), y, weight.unsqueeze(1)).view_as(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, precision: str = "float32", tap: Tap | None = None) -> Tensor:
    """Returns x W + b [B, S, C'] for x [B, S, C], with a weight [B, C, C'] and a bias [B, C'] per task."""
    if precision == "float32":  # in one pass
        out = torch.baddbmm(bias.unsqueeze(1), x, weight)
    else:
        out = product(x, weight, precision) + bias.unsqueeze(1)
    return out if tap is None else tap(x, out)


def max_pool2x2(x: Tensor) -> Tensor:
    """Returns the largest of every 2×2 pixels: [B, S, H, W, C] -> [B, S, ⌊H/2⌋, ⌊W/2⌋, C]; ties share the gradient."""
    rows, cols = x.shape[2] // 2, x.shape[3] // 2
    return x[:, :, : 2 * rows, : 2 * cols].unflatten(3, (cols, 2)).unflatten(2, (rows, 2)).amax(dim=(3, 5))
