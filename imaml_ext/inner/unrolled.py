"""Gradient descent on the proximal problem as a differentiable function of θ, λ and the learning rate η."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from imaml_ext import ops
from imaml_ext.inner.gradient_descent import GradientDescent
from imaml_ext.losses.curvature import task_gradient
from imaml_ext.losses.loss import Loss
from imaml_ext.losses.shared import SharedLinearisation

State = tuple[Tensor, ...]  # φ, then the moments that the optimiser keeps, all [B, N]
_ENTRIES = 1 << 20  # of [B, N] that are differentiated at a time, where memory is to be saved


def unroll(
    solver: GradientDescent, loss: Loss, theta: Tensor, data: Any, lam: Tensor | None, *, checkpoint: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns φ [B, N] after the steps of `solver` from θ, and the losses [steps, B] before each.

    φ has a graph into theta and lam, and into the solver's lr where that is a tensor that requires a gradient.

    Args:
        theta: [B, N]. lam: [1 or B, 1 or N]; None: there is no proximal term.
        checkpoint: keep the iterates φ_k alone, N numbers per step and as many for each moment of the rule, and not
            what the network computed on the way. The backward sweep then takes the gradient at each φ_k anew and
            multiplies by its Hessian once: one more gradient per step, and the memory of one step at a time.

    Raises:
        ValueError: the solver has a tolerance: the number of steps is then no differentiable function of θ.

    Source: Maclaurin, Duvenaud, Adams, Gradient-based hyperparameter optimization through reversible learning (2015),
    for the backward sweep; Finn, Abbeel, Levine, Model-agnostic meta-learning (2017).
    """
    if solver.tolerance is not None:
        raise ValueError(f"tolerance must be None where the inner steps are differentiated, got {solver.tolerance}")
    lr = ops.as_coefficient(solver.rate(loss, theta.detach()), "lr", theta.detach())
    batches = [loss.prepared(part) for part in solver.batches(loss.prepared(data))]
    if checkpoint:
        return _Replayed.apply(theta, lam, lr, loss.shared, solver, loss, batches)
    losses = []
    state = _initial(solver, theta)
    for step in range(solver.steps):
        here = loss(state[0], batches[step % len(batches)])  # [B]
        grad = task_gradient(here, state[0], create_graph=True)
        state = _next(solver, step, state, grad, theta, lam, lr)
        losses.append(here.detach())
    return _last(solver, state[0], theta, lam, lr), torch.stack(losses) if losses else theta.new_empty(0, len(theta))


def _initial(solver: GradientDescent, theta: Tensor) -> State:
    zero = theta.new_zeros(()).expand_as(theta)
    return (theta.view_as(theta), *(zero for _ in range(solver.moments)))  # φ, a node beside θ


def _next(
    solver: GradientDescent, step: int, state: State, grad: Tensor, theta: Tensor, lam: Tensor | None, lr: Tensor
) -> State:
    """The rule of `ops.prox_…_step_` in differentiable operations: a function of the state, grad = ∇L(φ), θ and λ."""
    phi, *moments = state
    g = grad if lam is None or solver.proximal == "after" else grad + lam * (phi - theta)
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


def _last(solver: GradientDescent, phi: Tensor, theta: Tensor, lam: Tensor | None, lr: Tensor) -> Tensor:
    return phi if lam is None or solver.proximal == "gradient" else phi - lr * lam * (phi - theta)


class _Replayed(torch.autograd.Function):
    """theta [B, N], lam or None, lr [1 or B, 1 or N], shared [N_s] or None -> φ [B, N] and losses [steps, B].

    Differentiated by an adjoint sweep over the iterates that it keeps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        theta: Tensor,
        lam: Tensor | None,
        lr: Tensor,
        shared: Tensor | None,
        solver: GradientDescent,
        loss: Loss,
        batches: list[Any],
    ) -> tuple[Tensor, Tensor]:
        loss = loss if shared is None else loss.sharing(shared.detach())
        after = lam is not None and solver.proximal == "after"
        lam_of_steps = theta.new_zeros(1, 1) if lam is None or after else lam
        state = _initial(solver, theta)
        kept: list[Tensor] = []
        losses = theta.new_empty(solver.steps, len(theta))
        for step in range(solver.steps):
            kept += state
            losses[step], _, grad = loss.gradient(state[0], batches[step % len(batches)])
            state = tuple(vector.clone(memory_format=torch.contiguous_format) for vector in state)
            solver.step_(step, state, grad, theta, lam_of_steps, lr)
        ctx.save_for_backward(theta, lam, lr, *kept, *state[: int(after)])
        ctx.solver, ctx.loss, ctx.batches = solver, loss, batches
        ctx.mark_non_differentiable(losses)
        phi = _last(solver, state[0], theta, lam, lr)
        return phi if solver.steps else phi.clone(), losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, phi_bar: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        solver: GradientDescent = ctx.solver
        theta, lam, lr, *kept = ctx.saved_tensors
        width = 1 + solver.moments
        constants = {"theta": theta, "lam": lam, "lr": lr}
        needed = dict(zip((*constants, "shared"), ctx.needs_input_grad, strict=False))
        needed["theta"] = lam is not None  # φ_0 = θ comes at the end
        totals = {name: torch.zeros_like(value) for name, value in constants.items() if needed[name]}
        by_shared = torch.zeros_like(ctx.loss.shared) if needed["shared"] else None

        bars = [phi_bar.clone(), *(torch.zeros_like(theta) for _ in range(solver.moments))]
        if len(kept) > solver.steps * width:
            _pull_back_(lambda phi, **constants: (_last(solver, phi, **constants),), kept[-1:], bars, constants, totals)
        for step in reversed(range(solver.steps)):
            state, data = kept[step * width : (step + 1) * width], ctx.batches[step % len(ctx.batches)]
            at: Any = (
                ctx.loss.linearize(state[0], data)
                if by_shared is None
                else SharedLinearisation(ctx.loss, state[0], data)
            )

            def rule(*inputs: Tensor, step: int = step, **constants: Tensor) -> State:
                return _next(solver, step, inputs[:width], inputs[width], **constants)

            bars.append(torch.empty_like(theta))  # ḡ, of the gradient, which is an input of the rule
            _pull_back_(rule, [*state, at.gradient], bars, constants, totals)
            del at.gradient  # and its memory, before the product
            if by_shared is None:
                bars[0] += at(bars.pop())  # φ_k is in ∇L(φ_k) too: H ḡ
            else:
                product, of_shared = at(bars.pop())
                bars[0] += product
                by_shared += of_shared
        totals["theta"] = totals["theta"] + bars[0] if "theta" in totals else bars[0]
        return *(totals.get(name) for name in constants), by_shared, None, None, None


def _pull_back_(
    function: Callable[..., State],
    inputs: Sequence[Tensor],
    bars: Sequence[Tensor],
    constants: Mapping[str, Any],
    totals: Mapping[str, Tensor],
) -> None:
    """Puts the cotangents of the inputs [B, N] in place of those of the outputs, for an elementwise function.

    A part of the columns at a time, so that what is computed on the way takes little memory.

    Args:
        bars: of the outputs, which come first, and room for those of further inputs.
        constants: keywords of the function, [1 or B, 1 or N] or None.
        totals: what the cotangents of some of them are added to.
    """
    rows, columns = inputs[0].shape
    size = max(_ENTRIES // rows, 1)
    for part in (slice(first, first + size) for first in range(0, columns, size)):
        leaves = [value[:, part].detach().requires_grad_() for value in inputs]
        factors = {name: value if value is None else _columns(value, part) for name, value in constants.items()}
        learnt = {name: _columns(constants[name], part).detach().requires_grad_() for name in totals}
        with torch.enable_grad():
            outputs = function(*leaves, **factors | learnt)
        wanted = [*leaves, *learnt.values()]
        above = [bar[:, part] for bar in bars[: len(outputs)]]
        found = torch.autograd.grad(outputs, wanted, above, allow_unused=True, materialize_grads=True)
        for bar, value in zip(bars, found[: len(leaves)], strict=False):
            bar[:, part] = value
        for total, value in zip(totals.values(), found[len(leaves) :], strict=True):
            _columns(total, part).add_(value)


def _columns(value: Tensor, part: slice) -> Tensor:
    return value[:, part] if value.shape[1] > 1 else value
