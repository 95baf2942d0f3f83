"""Functions of torch for which there is a faster way, with parameters of their own for every task or without.

`HANDLERS` maps a function to what is called in its place, with the same arguments, inside and outside
`torch.func.vmap`. torch's vmap makes a grouped convolution of a weight per task, whose derivatives, the second above
all, are slow. torch's second derivative of a batch norm takes many passes over memory. A handler returns what torch
returns, to rounding, and leaves to torch the arguments and devices that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from imaml_ext import _native
from imaml_ext.models.task_apply import apply
from imaml_ext.models.task_convolution import Convolve, Geometry, Pair, TurnWeight
from imaml_ext.models.task_norm import BatchNorm


def _ours(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these: real tensors on the CPU, of one dtype, outside forward-mode differentiation."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        _native.error is None
        and not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and all(isinstance(t, Tensor) and t.device.type == "cpu" and t.dtype == given[0].dtype for t in given)
        and given[0].dtype in (torch.float32, torch.float64)
    )


def _pair(value: int | tuple[int, ...]) -> Pair:
    if isinstance(value, int):
        return value, value
    return (int(value[0]), int(value[-1]))


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d`."""
    known = _ours(input, weight, bias) and input.dim() == weight.dim() == 4 and 0 not in input.shape
    geometry = _geometry(input, weight, stride, padding, dilation, groups) if known else None
    if geometry is None:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    x = input.permute(0, 2, 3, 1).contiguous().unsqueeze(0)
    w = apply(TurnWeight, weight.flatten(2).unsqueeze(0), False).unflatten(1, geometry.kernel)
    y = apply(Convolve, x, w, geometry).squeeze(0)
    return (y if bias is None else y + bias).permute(0, 3, 1, 2)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv1d`: images of one row."""
    if not (_ours(input, weight, bias) and input.dim() == weight.dim() == 3 and 0 not in input.shape):
        return F.conv1d(input, weight, bias, stride, padding, dilation, groups)
    moves, spread = (1, _pair(stride)[0]), (1, _pair(dilation)[0])
    sides = padding if isinstance(padding, str) else (0, _pair(padding)[0])
    return conv2d(input.unsqueeze(2), weight.unsqueeze(2), bias, moves, sides, spread, groups).squeeze(2)


def _geometry(x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Geometry | None:
    """None for what torch is to look at: sizes that do not fit, and padding of which one side has more."""
    kernel, moves, spread = (w.shape[2], w.shape[3]), _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        total = [0 if padding == "valid" else spread[i] * (kernel[i] - 1) for i in range(2)]
        if padding not in ("valid", "same") or any(t % 2 for t in total) or (padding == "same" and moves != (1, 1)):
            return None
        padding = (total[0] // 2, total[1] // 2)
    geometry = Geometry((x.shape[2], x.shape[3]), kernel, moves, _pair(padding), spread, groups)
    positive = min(*kernel, *moves, *spread, groups) > 0 and min(geometry.padding) >= 0
    fits = positive and x.shape[1] == groups * w.shape[1] and w.shape[0] % groups == 0
    return geometry if fits and min(geometry.output(0), geometry.output(1)) > 0 else None


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, where it normalises by the batch."""
    of_batch = training and running_mean is None and running_var is None
    if not (of_batch and _ours(input, weight, bias) and input.dim() >= 2 and input.numel() > input.shape[1]):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    last = input.movedim(1, -1)
    gamma = input.new_ones(input.shape[1]) if weight is None else weight
    beta = input.new_zeros(input.shape[1]) if bias is None else bias
    rows = last.flatten(0, -2).contiguous().unsqueeze(0)
    z, _, _ = apply(BatchNorm, rows, gamma.contiguous().unsqueeze(0), beta.contiguous().unsqueeze(0), eps)
    return z.squeeze(0).view(last.shape).movedim(-1, 1)


HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.conv1d: conv1d,
    F.conv2d: conv2d,
    F.batch_norm: batch_norm,
}
