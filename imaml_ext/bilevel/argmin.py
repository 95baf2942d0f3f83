"""argmin over φ of L(φ, η) as a differentiable function of every tensor in η."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imaml_ext.bilevel.arguments import Arguments
from imaml_ext.bilevel.implicit import ImplicitSolution, Reaction
from imaml_ext.bilevel.minimum import Differentiation, InnerProblem, Unfinished, check_call, check_reach
from imaml_ext.inner import InnerSolver, NewtonCG
from imaml_ext.inner.solver import proximal_norm
from imaml_ext.losses.loss import Loss, check_losses, task_rows
from imaml_ext.ops import as_coefficient, prox_penalty
from imaml_ext.ops.calls import eager, is_traced
from imaml_ext.ops.recording import recordable, recording
from imaml_ext.solvers import CG, LinearSolver
from imaml_ext.solvers.differentiable import default_solver
from imaml_ext.solvers.form import Form
from imaml_ext.solvers.operators import System

InnerMinimiser = Callable[[Callable[[Any], Tensor], Any], Any]  # objective, init -> phi


@eager
def argmin(
    loss: Loss | Callable[..., Tensor],
    init: Any,
    args: tuple[Any, ...] = (),
    *,
    inner: InnerSolver | InnerMinimiser | None = None,
    center: Any = None,
    lam: Any = None,
    linear_solver: LinearSolver | None = None,
    damping: float = 0.0,
    curvature: str = "hessian",
    on_breakdown: Reaction = "raise",
    on_unfinished: Unfinished = "warn",
    unfinished_residual: float = 1e-2,
    on_solve: Callable[[ImplicitSolution], None] | None = None,
) -> Any:
    """Returns φ ≈ argmin_φ L(φ, *args), of one problem or of B at once, differentiable in every tensor of `args`.

    The derivative is that of the exact minimiser, at the φ that the inner solver has reached. For an outer gradient v,
    H u = v by the linear solver, and for a tensor w of args w̄ = −∂/∂w (uᵀ ∇_φ L(φ, *args)), one more product whatever
    the number of tensors. It does not depend on the inner solver's path, and neither does memory. φ can be
    differentiated again and again, as often as the loss allows.

    With `center` c and `lam` λ the objective has a proximal term, L + ½ Σ_j λ_j (φ_j − c_j)². Then (H + Λ) u = v, and
    c̄ = Λu, λ̄ = −u ⊙ (φ − c).

    Args:
        loss: loss(phi, *args) -> a number [], of one problem; or losses [B] of B problems, row b from row b of phi
            alone. A `Loss` such as `TaskLoss` is called with rows phi [B, N] and data, and args = (data,).
        init: where the solver begins: a tensor, or a nested structure of tensors of one dtype, float32 or float64. Of B
            problems each tensor is [B, …]; of a
            `Loss`, one row [N] may stand for all. No gradient flows into it.
        args: what the loss takes after phi: nested structures of tensors, shared by the problems or one per problem, as
            the loss reads them, and anything else. The loss must not reach other tensors that require a gradient.
        inner: an inner solver; or a function of your own, inner(objective, init) -> phi in the form of init, where
            objective(phi) is L and its proximal term without a graph into args: an optimiser of torch, L-BFGS, SciPy.
            Unless given, `NewtonCG` of up to 20 steps with up to 100 products each, which stops where the gradient has
            fallen to 1e-12 of its first norm, 1e-6 in float32: for problems of moderate condition. `on_unfinished` says
            what becomes of one whose gradient has not fallen to a thousandth.
        center, lam: of the proximal term, in the form of init or one row [N] for all problems, and a number, [B], [N],
            [B, N] or in the form of init, at least 0; they go together.
        linear_solver: of the derivative; unless given, CG with at most 1,000 products and a relative tolerance of 1e-8
            in float64 and 1e-4 in float32, that looks every 5 products whether it is done.
        damping: δ ≥ 0, added to the matrix of the derivative alone.
        curvature, on_breakdown, on_unfinished, unfinished_residual: as for `prox_solve`.
        on_solve: called in every backward pass with its `ImplicitSolution`, in rows, whose `inner_gradient_norm` tells
            how near φ is to a minimum.

    Returns:
        phi, in the form of init, with a graph where a tensor of args, center or lam requires a gradient.

    Raises:
        TypeError, ValueError: an argument, or what a function returned, of the wrong type, structure, dtype, shape or
            device; or a loss that reaches tensors which require a gradient and are not in args.
        SolveError: in the backward pass; see `on_breakdown` and `on_unfinished`.
        RuntimeError: under a transform of torch.func, is_grads_batched or torch.jit.trace.

    Source: Bengio, Gradient-based optimization of hyperparameters (2000); Domke, Generic methods for optimization-based
    modeling (2012); Pedregosa, Hyperparameter optimization with approximate gradient (2016).
    """
    check_call("argmin")
    if not isinstance(args, tuple):
        raise TypeError(f"args must be a tuple of what loss takes after phi, got {type(args).__name__}")
    if (center is None) != (lam is None):
        raise ValueError("center and lam must be given together, for the proximal term, or neither of them")
    form, in_rows, data = _in_rows(loss, init, args)
    rows = form.pack(_of_all(init, form), "init").detach()
    c = rows if center is None else form.pack(_of_all(center, form), "center")
    if lam is not None:
        lam = System(lambda p: p, rows, form).coefficient(lam, "lam")
    coefficient = as_coefficient(0.0 if lam is None else lam, "lam", rows, at_least=0)
    own, inner = inner is None, _newton(rows.dtype) if inner is None else inner
    derivative = Differentiation.of_call(
        "argmin",
        inner,
        in_rows,
        rows,
        default_solver(rows.dtype) if linear_solver is None else linear_solver,
        damping=damping,
        curvature=curvature,
        on_breakdown=on_breakdown,
        on_unfinished=on_unfinished,
        unfinished_residual=unfinished_residual,
        on_solve=on_solve,
    )
    if lam is None and damping == 0 and on_breakdown == "gradient":
        raise ValueError("on_breakdown must not be 'gradient' without lam and damping, by which it divides")
    problem = InnerProblem.of(in_rows, data, rows, derivative)

    def find(lam_rows: Tensor) -> Tensor:
        plain, detached = problem.at()
        center = c.detach()
        if not callable(inner):
            options: dict[str, Any] = {"lam": lam_rows, "num_tasks": len(rows), "start": rows}
            found = inner.solve(plain, center, detached, measure=own, **options)
            if own and not is_traced():
                first = proximal_norm(plain.gradient(rows, detached).gradient, rows, center, lam_rows)
                derivative.report_unsolved(found.final_gradient_norm, first)
            return found.phi

        with recording():
            at, factor, detached = recordable((c.detach(), lam_rows.detach(), detached))

            def objective(phi: Any) -> Tensor:
                phi = form.pack(phi, "phi")
                losses = plain(phi, detached)
                return (losses if lam is None else losses + prox_penalty(phi, at, factor)).reshape(form.lead)

            phi = inner(objective, form.unpack(rows.clone()))
        return form.pack(phi, "what inner returns").detach().clone(memory_format=torch.contiguous_format)

    return form.unpack(problem.minimiser(find, c, coefficient))


def _newton(dtype: torch.dtype) -> NewtonCG:
    solver = CG(max_iterations=100, rtol=1e-3, check_every=0 if is_traced() else 5)
    options: dict[str, Any] = {"stop_early": False} if is_traced() else {}
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    return NewtonCG(steps=20, linear_solver=solver, relative_tolerance=tolerance, **options)


def _of_all(value: Any, form: Form) -> Any:
    """Of a `Loss`, one row [N] stands for those of all problems [B, N]."""
    one = isinstance(value, Tensor) and len(form.shapes[0]) == 2 and value.shape == form.shapes[0][1:]
    return value.expand(form.shapes[0]) if one else value


class _InRows(Loss):
    """A function of φ in the form of init, as losses [B] of rows [B, N]; its data are `args`."""

    may_reach_others = False  # `_in_rows` has looked

    def __init__(self, function: Callable[..., Tensor], form: Form) -> None:
        self._function, self._form = function, form

    def __call__(self, params: Tensor, data: Any) -> Tensor:
        losses = self._function(self._form.unpack(params), *data)
        if isinstance(losses, Tensor) and losses.shape != self._form.lead:
            raise ValueError(f"loss must return shape {list(self._form.lead)} in every call, got {list(losses.shape)}")
        return check_losses(losses.reshape(-1), self._form.rows, "loss")


def _in_rows(loss: Any, init: Any, args: tuple[Any, ...]) -> tuple[Form, Loss, Any]:
    """The form of φ, the loss of its rows, and the data of that loss.

    A function is called once, at init: whether it returns one number or B tells how many problems there are.
    """
    if isinstance(loss, Loss):
        if len(args) != 1:
            raise ValueError(f"args must be (data,) for a {type(loss).__name__}, got {len(args)} of them")
        rows, tasks = task_rows(init, args[0], None)
        return Form.of_unknowns(rows.expand(tasks, -1), "init", tasks), loss, args[0]
    if not callable(loss):
        raise TypeError(f"loss must be a function or a Loss, got {type(loss).__name__}")
    whole = Form.of_unknowns(init, "init", None)
    with recording():
        leaf = whole.pack(init, "init").detach().clone().requires_grad_()
        losses = loss(whole.unpack(leaf), *recordable(Arguments.of(args).detached()))
    if not isinstance(losses, Tensor):
        raise TypeError(f"loss must return a tensor, got {type(losses).__name__}")
    if losses.dim() > 1:
        raise ValueError(f"loss must return a number [], or one per problem [B], got {list(losses.shape)}")
    if torch.is_grad_enabled() and not is_traced():
        check_reach(losses, [leaf], "argmin")
    form = whole if losses.dim() == 0 else Form.of_unknowns(init, "init", losses.shape[0])
    return form, _InRows(loss, form), args
