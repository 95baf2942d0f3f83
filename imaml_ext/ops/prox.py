"""Proximal terms and steps of all tasks at once: broadcasting rules and dtypes in, native ops underneath.

Everything is batched over tasks: `phi`, `grad` and the optimiser's moments are [B, N], one row per task. `theta` is [N]
(shared, never copied) or [B, N]. A coefficient (`lam`, `lr`) is a number, one per task [B], one per parameter [N], or
one per element [B, N]; [B, 1] and [1, N] say the same without ambiguity, which B == N needs.

Vectors may be float32, float64, bfloat16 or float16; arithmetic is done in float32 (float64 for float64), sums are
accumulated in float64 in a fixed order. Every function raises TypeError or ValueError for a dtype, shape or device that
does not fit, and names the argument.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imaml_ext._native import error as load_error
from imaml_ext._native import native
from imaml_ext.checks import check_number
from imaml_ext.ops.calls import is_traced
from imaml_ext.ops.registration import register_fake

Coefficient = float | Tensor  # a number, one per task [B], one per parameter [N], or one per element [B, N]


def cpu_capability() -> str:
    """Returns the instruction set of the CPU kernels: "default", "avx2" or "avx512"."""
    return str(native().cpu_capability())


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the type that arithmetic on vectors of `dtype` is done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_coefficient(
    value: Coefficient, name: str, like: Tensor, *, above: float | None = None, at_least: float | None = None
) -> Tensor:
    """Returns a coefficient as [1 or B, 1 or N] in the compute type of `like` [B, N]; copies nothing to broadcast.

    Args:
        above, at_least: bounds of a number, and of the entries of a tensor (see `check_entries`).

    Raises:
        TypeError: not a number or a floating-point tensor.
        ValueError: a shape that does not fit, a 1-D tensor where B == N, another device, or a value outside its bounds
            or outside the range of the compute type.
    """
    (rows, cols), dtype = like.shape, compute_dtype(like.dtype)
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    if not isinstance(value, Tensor):
        number = float(value)
        if above is not None or at_least is not None:
            check_number(name, value, above=above, at_least=at_least)
        largest = torch.finfo(dtype).max
        if largest < abs(number) < float("inf"):
            raise ValueError(f"{name} must be at most {largest:.3g}, the largest {dtype}, got {value}")
        return torch.full((1, 1), number, dtype=dtype, device=like.device)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}")
    if value.dim() == 1 and rows == cols != 1:
        raise ValueError(
            f"{name} of shape [{rows}] could be one per task or one per parameter, as both are {rows}: "
            f"give it as [{rows}, 1] or [1, {rows}]"
        )
    if value.dim() == 0 or value.shape == (rows,):
        value = value.reshape(-1, 1)
    elif value.shape == (cols,):
        value = value.reshape(1, cols)
    if not (value.dim() == 2 and value.shape[0] in (1, rows) and value.shape[1] in (1, cols)):
        raise ValueError(
            f"{name} must be a number, [{rows}] (one per task), [{cols}] (one per parameter) or [{rows}, {cols}], "
            f"got {list(value.shape)}"
        )
    check_entries(value, name, above=above, at_least=at_least)
    value = value.to(dtype)
    return value if value.shape[1] == 1 or value.stride(1) == 1 else value.contiguous()


def check_entries(value: Tensor, name: str, *, above: float | None = None, at_least: float | None = None) -> None:
    """Raises ValueError where an entry of a tensor on the CPU is outside its bounds; waits for no other device.

    A NaN passes: it is the affair of its task.
    """
    if (above is None and at_least is None) or not value.is_cpu or is_traced():
        return
    # Through NumPy, so that it is no operation of torch, as a look at a value of the device would be.
    lowest = float(np.fmin.reduce(value.detach().double().numpy(), axis=None, initial=np.inf))
    if above is not None and lowest <= above:
        raise ValueError(f"{name} must be above {above:g}, got a tensor with an entry of {lowest:g}")
    if at_least is not None and lowest < at_least:
        raise ValueError(f"{name} must be at least {at_least:g}, got a tensor with an entry of {lowest:g}")


def _arguments(
    phi: Tensor, theta: Tensor, vectors: dict[str, Tensor] | None = None, **coefficients: Coefficient
) -> list[Tensor]:
    """Returns theta as [1 or B, N] and the coefficients, all checked as far as csrc/ does not check them itself."""
    for name, value in {"phi": phi, **(vectors or {}), "theta": theta}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.device != phi.device:
            raise ValueError(f"{name} must be on the device of phi, {phi.device}, got {value.device}")
    if phi.dim() != 2:
        raise ValueError(f"phi must have shape [B, N] (one row per task), got {list(phi.shape)}")
    native(phi.device)
    shared = theta.unsqueeze(0) if theta.dim() == 1 else theta
    return [shared, *(as_coefficient(value, name, phi) for name, value in coefficients.items())]


def prox_gradient_(grad: Tensor, phi: Tensor, theta: Tensor, lam: Coefficient) -> Tensor:
    """Adds the penalty's gradient to grad [B, N], that of the loss at phi [B, N], in place: grad ← grad + λ (φ − θ)."""
    torch.ops.imaml_ext.prox_gradient_(grad, phi, *_arguments(phi, theta, vectors={"grad": grad}, lam=lam))
    return grad


def prox_penalty(phi: Tensor, theta: Tensor, lam: Coefficient) -> Tensor:
    """Returns every task's ½ Σ_j λ_j (φ_j − θ_j)², [B] in the compute type; differentiable in all three."""
    return torch.ops.imaml_ext.prox_penalty(phi, *_arguments(phi, theta, lam=lam))


def prox_sgd_step_(phi: Tensor, grad: Tensor, theta: Tensor, lam: Coefficient, lr: Coefficient) -> Tensor:
    """Takes a gradient step on phi [B, N] in place: φ ← φ − η (∇L + λ (φ − θ)), with ∇L = grad [B, N]."""
    torch.ops.imaml_ext.prox_sgd_step_(phi, grad, *_arguments(phi, theta, vectors={"grad": grad}, lam=lam, lr=lr))
    return phi


def prox_momentum_step_(
    phi: Tensor,
    velocity: Tensor,
    grad: Tensor,
    theta: Tensor,
    lam: Coefficient,
    lr: Coefficient,
    momentum: float,
    nesterov: bool = False,
) -> Tensor:
    """Takes a step of torch.optim.SGD along g = ∇L + λ (φ − θ), in place: v ← μ v + g, φ ← φ − η v.

    velocity v is [B, N]; Nesterov's rule is φ ← φ − η (g + μ v).
    """
    arguments = _arguments(phi, theta, vectors={"velocity": velocity, "grad": grad}, lam=lam, lr=lr)
    torch.ops.imaml_ext.prox_momentum_step_(phi, velocity, grad, *arguments, momentum, nesterov)
    return phi


def prox_adam_step_(
    phi: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    theta: Tensor,
    lam: Coefficient,
    lr: Coefficient,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> Tensor:
    """Takes a step of Adam (Kingma and Ba, 2015; torch.optim.Adam's rule) along g = ∇L + λ (φ − θ), in place.

    exp_avg and exp_avg_sq [B, N] are the moments of g and g²; step counts from 1.
    """
    vectors = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "grad": grad}
    arguments = _arguments(phi, theta, vectors=vectors, lam=lam, lr=lr)
    torch.ops.imaml_ext.prox_adam_step_(phi, exp_avg, exp_avg_sq, grad, *arguments, beta1, beta2, eps, step)
    return phi


# --- what torch.compile and autograd need to know -------------------------------------------------------------------

for _name in ("prox_gradient_", "prox_sgd_step_", "prox_momentum_step_", "prox_adam_step_"):
    register_fake(_name)
register_fake("prox_penalty", lambda phi, theta, lam: phi.new_empty(phi.shape[:1], dtype=compute_dtype(phi.dtype)))


def _sum_to(value: Tensor, shape: torch.Size) -> Tensor:
    """Sums over the dimensions along which a tensor of `shape` was broadcast."""
    for dim, size in enumerate(shape):
        if size == 1 and value.shape[dim] != 1:
            value = value.sum(dim, keepdim=True)
    return value


def _penalty_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    phi, theta, lam = ctx.saved_tensors
    difference = phi.to(grad.dtype) - theta.to(grad.dtype)  # [B, N]
    by_phi = grad.unsqueeze(1) * lam * difference  # [B, N]
    needs_phi, needs_theta, needs_lam = ctx.needs_input_grad
    return (
        by_phi.to(phi.dtype) if needs_phi else None,
        _sum_to(-by_phi, theta.shape).to(theta.dtype) if needs_theta else None,
        _sum_to(0.5 * grad.unsqueeze(1) * difference.square(), lam.shape) if needs_lam else None,
    )


if load_error is None:
    torch.library.register_autograd(
        "imaml_ext::prox_penalty",
        _penalty_backward,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
