"""Gradient descent on the proximal problem as a differentiable function of θ, λ and the learning rate η."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imaml_ext import ops
from imaml_ext.inner.gradient_descent import GradientDescent
from imaml_ext.losses.curvature import task_gradient
from imaml_ext.losses.loss import Loss

State = tuple[Tensor, ...]  # φ, then the moments that the optimiser keeps, all [B, N]


def unroll(
    solver: GradientDescent, loss: Loss, theta: Tensor, data: Any, lam: Tensor, *, checkpoint: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns φ [B, N] after the steps of `solver` from θ, and the losses [steps, B] before each.

    φ has a graph into theta and lam, and into the solver's lr where that is a tensor that requires a gradient.

    Args:
        theta: [B, N]. lam: [1 or B, 1 or N].
        checkpoint: keep the iterates φ_k alone, N numbers per step, and not what the network computed on the way. The
            backward sweep then takes the gradient at each φ_k anew and multiplies by its Hessian once: one more
            gradient a step, and the memory of one step at a time.

    Raises:
        ValueError: the solver has a tolerance: the number of steps is then no differentiable function of θ.

    Source: Maclaurin, Duvenaud, Adams, Gradient-based hyperparameter optimization through reversible learning (2015),
    for the backward sweep; Finn, Abbeel, Levine, Model-agnostic meta-learning (2017).
    """
    if solver.tolerance is not None:
        raise ValueError(f"tolerance must be None where the inner steps are differentiated, got {solver.tolerance}")
    lr = ops.as_coefficient(solver.rate(loss, theta.detach()), "lr", theta.detach())
    if checkpoint:
        return _Replayed.apply(theta, lam, lr, solver, loss, solver.batches(data))
    losses = []
    batches = solver.batches(data)
    state = _initial(solver, theta)
    for step in range(solver.steps):
        here = loss(state[0], batches[step % len(batches)])  # [B]
        grad = task_gradient(here, state[0], create_graph=True)
        state = _next(solver, step, state, grad, theta, lam, lr)
        losses.append(here.detach())
    return _last(solver, state[0], theta, lam, lr), torch.stack(losses) if losses else theta.new_empty(0, len(theta))


def _initial(solver: GradientDescent, theta: Tensor) -> State:
    moments = {"sgd": 0, "momentum": 1, "adam": 2}[solver.optimizer]
    # φ is a node of its own: the gradient in φ is not the one in θ.
    return (theta.clone(), *(torch.zeros_like(theta) for _ in range(moments)))


def _next(
    solver: GradientDescent, step: int, state: State, grad: Tensor, theta: Tensor, lam: Tensor, lr: Tensor
) -> State:
    """The rule of `ops.prox_…_step_` in differentiable operations: a function of the state, grad = ∇L(φ), θ and λ."""
    phi, *moments = state
    g = grad if solver.proximal == "after" else grad + lam * (phi - theta)
    if solver.optimizer == "sgd":
        return (phi - lr * g,)
    if solver.optimizer == "momentum":
        velocity = solver.momentum * moments[0] + g
        return phi - lr * (g + solver.momentum * velocity if solver.nesterov else velocity), velocity
    beta1, beta2 = solver.betas
    first = beta1 * moments[0] + (1 - beta1) * g
    second = beta2 * moments[1] + (1 - beta2) * g.square()
    # √ has no derivative at 0. There every gradient so far was 0, and so is `first`, the factor of that derivative.
    root = torch.where(second > 0, second, 1.0).sqrt() * (second > 0)
    denominator = root / (1 - beta2 ** (step + 1)) ** 0.5 + solver.eps
    return phi - lr / (1 - beta1 ** (step + 1)) * first / denominator, first, second


def _last(solver: GradientDescent, phi: Tensor, theta: Tensor, lam: Tensor, lr: Tensor) -> Tensor:
    return phi - lr * lam * (phi - theta) if solver.proximal == "after" else phi


class _Replayed(torch.autograd.Function):
    """theta [B, N], lam [1 or B, 1 or N] -> φ [B, N] and losses [steps, B], differentiated by an adjoint sweep."""

    @staticmethod
    def forward(
        ctx: Any,
        theta: Tensor,
        lam: Tensor,
        lr: Tensor,
        solver: GradientDescent,
        loss: Loss,
        batches: list[Any],
    ) -> tuple[Tensor, Tensor]:
        states = [_initial(solver, theta)]
        losses = theta.new_empty(solver.steps, len(theta))
        for step in range(solver.steps):
            losses[step], _, grad = loss.gradient(states[-1][0], batches[step % len(batches)])
            states.append(_next(solver, step, states[-1], grad, theta, lam, lr))
        ctx.save_for_backward(theta, lam, lr, *(vector for state in states for vector in state))
        ctx.solver, ctx.loss, ctx.batches = solver, loss, batches
        ctx.mark_non_differentiable(losses)
        return _last(solver, states[-1][0], theta, lam, lr), losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, phi_bar: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        solver: GradientDescent = ctx.solver
        theta, lam, lr, *vectors = ctx.saved_tensors
        width = len(vectors) // (solver.steps + 1)
        states = [tuple(vectors[i : i + width]) for i in range(0, len(vectors), width)]
        last, start = states[-1], states[0]

        # λ, and η where it is asked for, are elementwise factors of every step; a plain η is a constant of the rule.
        learns_lr = ctx.needs_input_grad[2]
        constants = (theta, lam, lr) if learns_lr else (theta, lam)

        def end(phi: Tensor, theta: Tensor, lam: Tensor, lr: Tensor = lr) -> State:
            return (_last(solver, phi, theta, lam, lr),)

        phi_bar, *totals = _vector_jacobian(end, (last[0], *constants), (phi_bar,))
        bars: State = (phi_bar, *(torch.zeros_like(vector) for vector in start[1:]))
        for step in reversed(range(solver.steps)):
            operator = ctx.loss.linearize(states[step][0], ctx.batches[step % len(ctx.batches)])

            def rule(*inputs: Tensor, step: int = step) -> State:
                state, (grad, theta, lam, *rate) = inputs[:width], inputs[width:]
                return _next(solver, step, state, grad, theta, lam, *rate or (lr,))

            phi_bar, *rest = _vector_jacobian(rule, (*states[step], operator.gradient, *constants), bars)
            moment_bars, (grad_bar, *by) = rest[: width - 1], rest[width - 1 :]
            bars = (phi_bar + operator(grad_bar.contiguous()), *moment_bars)  # φ_k is in ∇L(φ_k) too: H ḡ
            totals = [total + bar for total, bar in zip(totals, by, strict=True)]
        theta_bar, lam_bar, *lr_bar = totals
        return theta_bar + bars[0], lam_bar, lr_bar[0] if learns_lr else None, None, None, None  # φ_0 = θ


def _vector_jacobian(function: Callable[..., State], inputs: State, bars: State) -> State:
    """The cotangents of the inputs of an elementwise function from those of its outputs."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    with torch.enable_grad():
        outputs = function(*leaves)
    return torch.autograd.grad(outputs, leaves, bars, allow_unused=True, materialize_grads=True)
