"""Batch norm by the statistics of every task's own batch, whose derivatives are written out.

x [B, P, C] is normalised over its P rows: x̂ = s (x − mean x), s = 1 / √(var x + ε), z = γ x̂ + β. What is kept is x, its
means and scales; x̂ is made again where it is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imaml_ext.models.task_apply import apply


class BatchNorm(torch.autograd.Function):
    """z, mean and s of x [B, P, C], with gamma and beta [B, C]; mean and s carry no derivative."""

    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.imaml_ext.task_batch_norm(x, gamma, beta, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, gamma, _, ctx.eps = inputs
        _, mean, scale = output
        ctx.save_for_backward(x, mean, scale, gamma)
        ctx.mark_non_differentiable(mean, scale)

    @staticmethod
    def backward(ctx: Any, z_bar: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *apply(BatchNormBack, *ctx.saved_tensors, z_bar, ctx.eps), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _over_tasks(BatchNorm, info.batch_size, in_dims, inputs)


class BatchNormBack(torch.autograd.Function):
    """x̄, γ̄ and β̄ of z̄; differentiable in x, γ and z̄, where mean and s are functions of x."""

    @staticmethod
    def forward(
        x: Tensor, mean: Tensor, scale: Tensor, gamma: Tensor, z_bar: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.imaml_ext.task_batch_norm_backward(x, mean, scale, gamma, z_bar.contiguous())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:-1])
        ctx.eps = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *dots: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, gamma, z_bar = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants the third derivative
            by_x, by_gamma, by_z_bar = _second(x, gamma, z_bar, ctx.eps, *dots)
        else:
            given = (mean, scale, gamma, z_bar.contiguous(), *(dot.contiguous() for dot in dots))
            by_x, by_gamma, by_z_bar = torch.ops.imaml_ext.task_batch_norm_second(x, *given)
        return by_x, None, None, by_gamma, by_z_bar, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _over_tasks(BatchNormBack, info.batch_size, in_dims, inputs)


def _second(
    x: Tensor, gamma: Tensor, z_bar: Tensor, eps: float, x_dot: Tensor, gamma_dot: Tensor, beta_dot: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """∂F/∂x, ∂F/∂γ and ∂F/∂z̄ of F = ⟨ẋ, x̄⟩ + ⟨γ̇, γ̄⟩ + ⟨β̇, β̄⟩; norm_second in csrc/layers has the equations."""

    def mean(t: Tensor) -> Tensor:
        return t.mean(1, keepdim=True)

    gamma, gamma_dot, beta_dot = (vector.unsqueeze(1) for vector in (gamma, gamma_dot, beta_dot))
    centred = x - mean(x)
    s = torch.rsqrt(mean(centred.square()) + eps)
    hat = centred * s
    along_z, along_dot = mean(z_bar * hat), mean(x_dot * hat)
    K = mean(x_dot * z_bar) - mean(x_dot) * mean(z_bar) - along_dot * along_z
    by_z_bar = gamma * s * (x_dot - mean(x_dot) - hat * along_dot) + gamma_dot * hat + beta_dot
    h = gamma_dot * z_bar - gamma * s * (x_dot * along_z + z_bar * along_dot)
    by_x = s * (h - mean(h) - hat * (mean(h * hat) + gamma * s * K))
    return by_x, (x.shape[1] * s * K).squeeze(1), by_z_bar


def _over_tasks(
    function: Any, size: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Tasks [B, …] under a dimension of `size` more are size · B tasks; the last input is a number."""
    tensors = []
    for tensor, dim in zip(inputs[:-1], in_dims, strict=False):
        each = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        tensors.append(each.flatten(0, 1).contiguous())
    outputs = apply(function, *tensors, inputs[-1])
    return tuple(output.unflatten(0, (size, -1)) for output in outputs), (0,) * len(outputs)
