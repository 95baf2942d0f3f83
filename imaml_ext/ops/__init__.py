"""The door to the native ops: broadcasting rules and dtypes in, `torch.ops.imaml_ext` underneath.

Everything is batched over tasks: `phi`, `grad` and the optimiser's moments are [B, N], one row a task. `theta` is [N]
(shared, never copied) or [B, N]. A coefficient (`lam`, `lr`) is a number, one a task [B], one a parameter [N], or one
an element [B, N]; [B, 1] and [1, N] say the same without ambiguity, which B == N needs.

Vectors may be float32, float64, bfloat16 or float16; arithmetic is done in float32 (float64 for float64), sums are
accumulated in float64 in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imaml_ext._native import error as load_error
from imaml_ext._native import native

__all__ = [
    "Coefficient",
    "as_coefficient",
    "cpu_capability",
    "prox_adam_step_",
    "prox_gradient_",
    "prox_momentum_step_",
    "prox_penalty",
    "prox_sgd_step_",
]

Coefficient = float | Tensor


def cpu_capability() -> str:
    """The instruction set of the CPU kernels: "default", "avx2" or "avx512"."""
    return str(native().cpu_capability())


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that arithmetic on vectors of `dtype` is done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_coefficient(value: Coefficient, name: str, like: Tensor) -> Tensor:
    """A coefficient as a tensor [1 or B, 1 or N] in the compute type of `like` [B, N]; nothing is copied to broadcast.

    Raises:
        TypeError: not a number or a floating-point tensor.
        ValueError: a shape that does not fit, a 1-D tensor where B == N, or another device.
    """
    rows, cols = like.shape
    dtype = compute_dtype(like.dtype)
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    if not isinstance(value, Tensor):
        return torch.full((1, 1), float(value), dtype=dtype, device=like.device)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}")
    if value.dim() == 0:
        value = value.reshape(1, 1)
    elif value.dim() == 1 and rows == cols and rows != 1:
        raise ValueError(
            f"{name} of shape [{rows}] could be one a task or one a parameter, as both are {rows}: "
            f"give it as [{rows}, 1] or [1, {rows}]"
        )
    elif value.dim() == 1 and value.shape[0] == rows:
        value = value.reshape(rows, 1)
    elif value.dim() == 1 and value.shape[0] == cols:
        value = value.reshape(1, cols)
    fits = value.dim() == 2 and value.shape[0] in (1, rows) and value.shape[1] in (1, cols)
    if not fits:
        raise ValueError(
            f"{name} must be a number, [{rows}] (one a task), [{cols}] (one a parameter) or [{rows}, {cols}], "
            f"got {list(value.shape)}"
        )
    value = value.to(dtype)
    return value if value.shape[1] == 1 or value.stride(1) == 1 else value.contiguous()


def _check(phi: Tensor, **others: Tensor) -> None:
    """What the dispatcher needs before an op of csrc/ can check the rest: tensors, on one device, phi by rows."""
    for name, value in {"phi": phi, **others}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.device != phi.device:
            raise ValueError(f"{name} must be on the device of phi, {phi.device}, got {value.device}")
    if phi.dim() != 2:
        raise ValueError(f"phi must have shape [B, N] (one row a task), got {list(phi.shape)}")
    native()


def _theta(theta: Tensor) -> Tensor:
    return theta.unsqueeze(0) if theta.dim() == 1 else theta


def prox_gradient_(grad: Tensor, phi: Tensor, theta: Tensor, lam: Coefficient) -> Tensor:
    """grad ← grad + λ (φ − θ), in place: the gradient of L(φ) + ½ Σ λ (φ − θ)² from that of L.

    Args:
        grad, phi: [B, N]. theta: [N] or [B, N]. lam: a coefficient.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit; names the argument.
    """
    _check(phi, grad=grad, theta=theta)
    torch.ops.imaml_ext.prox_gradient_(grad, phi, _theta(theta), as_coefficient(lam, "lam", phi))
    return grad


def prox_penalty(phi: Tensor, theta: Tensor, lam: Coefficient) -> Tensor:
    """½ Σ_j λ_j (φ_j − θ_j)² of every task: [B] in float32 (float64 for float64 vectors). Differentiable in all three.

    Args:
        phi: [B, N]. theta: [N] or [B, N]. lam: a coefficient.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit; names the argument.
    """
    _check(phi, theta=theta)
    return torch.ops.imaml_ext.prox_penalty(phi, _theta(theta), as_coefficient(lam, "lam", phi))


def prox_sgd_step_(phi: Tensor, grad: Tensor, theta: Tensor, lam: Coefficient, lr: Coefficient) -> Tensor:
    """φ ← φ − η (∇L + λ (φ − θ)), in place.

    Args:
        phi, grad: [B, N]. theta: [N] or [B, N]. lam, lr: coefficients.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit; names the argument.
    """
    _check(phi, grad=grad, theta=theta)
    torch.ops.imaml_ext.prox_sgd_step_(
        phi, grad, _theta(theta), as_coefficient(lam, "lam", phi), as_coefficient(lr, "lr", phi)
    )
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
    """v ← μ v + g, φ ← φ − η v (Nesterov: φ ← φ − η (g + μ v)), g = ∇L + λ (φ − θ), in place; as torch.optim.SGD.

    Args:
        phi, velocity, grad: [B, N]. theta: [N] or [B, N]. lam, lr: coefficients.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit; names the argument.
    """
    _check(phi, velocity=velocity, grad=grad, theta=theta)
    torch.ops.imaml_ext.prox_momentum_step_(
        phi,
        velocity,
        grad,
        _theta(theta),
        as_coefficient(lam, "lam", phi),
        as_coefficient(lr, "lr", phi),
        momentum,
        nesterov,
    )
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
    """One step of Adam (Kingma and Ba, 2015; torch.optim.Adam's rule) along g = ∇L + λ (φ − θ), in place.

    Args:
        phi, exp_avg, exp_avg_sq, grad: [B, N]. theta: [N] or [B, N]. lam, lr: coefficients. step: counts from 1.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, a step below 1; names the argument.
    """
    _check(phi, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, grad=grad, theta=theta)
    torch.ops.imaml_ext.prox_adam_step_(
        phi,
        exp_avg,
        exp_avg_sq,
        grad,
        _theta(theta),
        as_coefficient(lam, "lam", phi),
        as_coefficient(lr, "lr", phi),
        beta1,
        beta2,
        eps,
        step,
    )
    return phi


def _sum_to(value: Tensor, shape: torch.Size) -> Tensor:
    """Sums over the dimensions along which a tensor of `shape` was broadcast."""
    for dim, size in enumerate(shape):
        if size == 1 and value.shape[dim] != 1:
            value = value.sum(dim, keepdim=True)
    return value


def _penalty_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _penalty_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    phi, theta, lam = ctx.saved_tensors
    dtype = grad.dtype
    difference = phi.to(dtype) - theta.to(dtype)  # [B, N]
    by_phi = grad.unsqueeze(1) * lam * difference  # [B, N]
    needs_phi, needs_theta, needs_lam = ctx.needs_input_grad
    return (
        by_phi.to(phi.dtype) if needs_phi else None,
        _sum_to(-by_phi, theta.shape).to(theta.dtype) if needs_theta else None,
        _sum_to(0.5 * grad.unsqueeze(1) * difference.square(), lam.shape) if needs_lam else None,
    )


def _register() -> None:
    """What `torch.compile` and autograd need to know of the ops; their implementations are in csrc/."""
    for name in (
        "cg_begin_",
        "cg_direction_",
        "cg_step_",
        "prox_gradient_",
        "prox_sgd_step_",
        "prox_momentum_step_",
        "prox_adam_step_",
    ):
        torch.library.register_fake(f"imaml_ext::{name}", lambda *args, **kwargs: None)

    @torch.library.register_fake("imaml_ext::prox_penalty")
    def _(phi: Tensor, theta: Tensor, lam: Tensor) -> Tensor:
        return phi.new_empty((phi.shape[0],), dtype=compute_dtype(phi.dtype))

    @torch.library.register_fake("imaml_ext::network_outputs")
    def _(params: Tensor, x: Tensor, network: list[int]) -> Tensor:
        return params.new_empty((*x.shape[:2], network[-4]))

    @torch.library.register_fake("imaml_ext::network_gradient")
    def _(params: Tensor, x: Tensor, y: Tensor, network: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        outputs = params.new_empty((*x.shape[:2], network[-4]))
        return params.new_empty(x.shape[:1]), outputs, torch.empty_like(params)

    @torch.library.register_fake("imaml_ext::network_descend_")
    def _(
        phi: Tensor, theta: Tensor, lam: Tensor, lr: Tensor, x: Tensor, y: Tensor, network: list[int], steps: int
    ) -> Tensor:
        return phi.new_empty((steps, phi.shape[0]))

    @torch.library.register_fake("imaml_ext::network_linearise")
    def _(params: Tensor, x: Tensor, y: Tensor, network: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outputs = params.new_empty((*x.shape[:2], network[-4]))
        size = native().network_tape_size(network, x.shape[1], params.element_size())
        tape = params.new_empty((x.shape[0], size), dtype=torch.uint8)
        return params.new_empty(x.shape[:1]), outputs, torch.empty_like(params), tape

    @torch.library.register_fake("imaml_ext::network_product")
    def _(params: Tensor, tape: Tensor, y: Tensor, p: Tensor, network: list[int], gauss_newton: bool) -> Tensor:
        return torch.empty_like(p)

    @torch.library.register_fake("imaml_ext::network_curvature")
    def _(params: Tensor, tape: Tensor, y: Tensor, p: Tensor, network: list[int]) -> Tensor:
        return p.new_empty(p.shape[:1], dtype=torch.float64)

    torch.library.register_autograd("imaml_ext::prox_penalty", _penalty_backward, setup_context=_penalty_setup)


if load_error is None:
    _register()
