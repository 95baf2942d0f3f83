"""A root x of F(x, η) = 0 as a differentiable function of every tensor in η."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imaml_ext.bilevel.arguments import Arguments, pulled_back
from imaml_ext.bilevel.minimum import check_call, check_one_gradient, check_reach
from imaml_ext.ops.calls import eager, is_traced
from imaml_ext.ops.recording import recordable, recording
from imaml_ext.solvers import MINRES, LinearSolver, Solution, check_symmetry, solve
from imaml_ext.solvers.differentiable import OnFailure, default_solver
from imaml_ext.solvers.form import Form

TransposedSolver = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]  # p -> Jᵀp, v [B, N] -> u with Jᵀu = v


@eager
def root(
    condition: Callable[..., Any],
    init: Any,
    args: tuple[Any, ...] = (),
    *,
    inner: Callable[[Callable[[Any], Any], Any], Any],
    batched: bool | None = None,
    linear_solver: LinearSolver | TransposedSolver | None = None,
    on_failure: OnFailure = "raise",
    on_solve: Callable[[Solution], None] | None = None,
) -> Any:
    """Returns x with F(x, *args) ≈ 0 as `inner` has found it, differentiable in every tensor of `args`.

    The derivative is that of the exact root, at the x that was found. For an outer gradient v, Jᵀu = v with
    J = ∂F/∂x by the linear solver, and for a tensor w of args w̄ = −∂/∂w (uᵀ F(x, *args)). Memory does not depend on
    the path of `inner`. x can be differentiated again and again where the linear solver is one of this library.

    CG and MINRES need a symmetric J, as of a gradient; J may be indefinite for MINRES. Every backward pass compares
    qᵀJp with pᵀJq for a random pair, at the price of two products, and refuses another J. Hand over a function for
    that: it solves Jᵀu = v in its own way, such as GMRES, or `imaml_ext.lsqr`, which takes any matrix.

    Args:
        condition: F(x, *args) -> what has the form of x. A fixed point x = T(x) is the root of T(x) − x.
        init: where `inner` begins: a tensor or a nested structure of tensors of one dtype. No gradient flows into it.
        args: what the condition takes after x: nested structures of tensors, and anything else. The condition must not
            reach other tensors that require a gradient.
        inner: inner(condition, init) -> x in the form of init, for condition(x) without a graph into args.
        batched: whether init holds B problems, [B, …] each, row b of F from row b of x alone, which are then solved
            each with a tolerance of its own. Unless given, it does where it is one tensor of two dimensions or more.
        linear_solver: a `LinearSolver`, MINRES unless given; or a function (p -> Jᵀp, v [B, N]) -> u [B, N].
        on_failure, on_solve: as for `imaml_ext.solve`, in the backward pass; not of a function.

    Raises:
        TypeError, ValueError: an argument, or what a function returned, of the wrong type, structure, dtype, shape or
            device; a condition that reaches tensors which require a gradient and are not in args; or, in the backward
            pass, a J that is not symmetric.
        SolveError: in the backward pass; see `on_failure`.
        RuntimeError: under a transform of torch.func, is_grads_batched or torch.jit.trace.

    Source: Christianson, Reverse accumulation and implicit functions (1998); Bai, Kolter, Koltun, Deep equilibrium
    models (2019).
    """
    check_call("root")
    for name, function in (("condition", condition), ("inner", inner)):
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}")
    if not isinstance(args, tuple):
        raise TypeError(f"args must be a tuple of what condition takes after x, got {type(args).__name__}")
    if batched is None:
        batched = isinstance(init, Tensor) and init.dim() > 1
    form = Form.of_unknowns(init, "init", _problems(init) if batched else None)
    given = Arguments.of(args)
    detached = given.detached()
    with recording():
        detached = recordable(detached)
        found = inner(lambda x: condition(x, *detached), form.unpack(form.pack(init, "init").detach().clone()))
    x = form.pack(found, "what inner returns").detach().clone()
    if torch.is_grad_enabled() and not is_traced():
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            value = form.pack(condition(form.unpack(leaf), *detached), "what condition returns")
        check_reach(value, [leaf], "root", "condition")
    solver = linear_solver
    if solver is None:
        like = default_solver(form.dtype)
        solver = MINRES(max_iterations=like.max_iterations, rtol=like.rtol, check_every=like.check_every)
    if not isinstance(solver, LinearSolver) and not callable(solver):
        raise TypeError(f"linear_solver must be a LinearSolver or a function, got {type(solver).__name__}")
    problem = _Problem(condition, form, given, solver, on_failure, on_solve)
    return form.unpack(_Root.apply(problem, x, *given.tensors))


def _problems(init: Any) -> int:
    return Form.of(init, "init").lead[0]


@dataclass(frozen=True, eq=False)
class _Problem:
    """F(x, η) = 0 in rows x [B, N], and how its linear systems are solved."""

    condition: Callable[..., Any]
    form: Form
    given: Arguments
    solver: LinearSolver | TransposedSolver
    on_failure: OnFailure
    on_solve: Callable[[Solution], None] | None

    def value(self, x: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """F [B, N] with a graph into x and η."""
        return self.form.pack(self.condition(self.form.unpack(x), *self.given.filled(tensors)), "condition's value")

    def product(self, p: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
        """Jᵀp [B, N], with a graph into p, x and η where these have one."""
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        value = self.value(x, tensors)
        if not value.requires_grad:
            raise ValueError("condition must depend on x by differentiable operations, got a constant")
        return torch.autograd.grad(value, x, p, create_graph=True, allow_unused=True, materialize_grads=True)[0]

    def adjoint(self, x: Tensor, v: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """u [B, N] with Jᵀu = v; with a graph where autograd records."""
        plain = x.detach(), *(w.detach() for w in tensors)
        if not isinstance(self.solver, LinearSolver):
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "root must have a LinearSolver as its linear_solver to be differentiated twice, got a function"
                )
            with torch.enable_grad():
                u = self.solver(lambda p: self.product(p, *plain), v.detach())
            if not isinstance(u, Tensor) or u.shape != v.shape or u.dtype != v.dtype:
                got = f"{list(u.shape)} {u.dtype}" if isinstance(u, Tensor) else type(u).__name__
                raise ValueError(f"linear_solver must return u {list(v.shape)}, {v.dtype}, got {got}")
            return u.detach()
        if not is_traced():
            try:
                with torch.enable_grad():
                    check_symmetry(lambda p: self.product(p, *plain).detach(), v.detach(), probes=1)
            except ValueError as error:
                raise ValueError(
                    "condition must have a symmetric Jacobian in x for CG and MINRES, got "
                    f"{str(error).partition(', got ')[2]}: give linear_solver a function that solves Jᵀu = v, such as "
                    "GMRES or imaml_ext.lsqr"
                ) from None
        options: dict[str, Any] = {"linear_solver": self.solver, "on_failure": self.on_failure}
        solution = solve(self.product, v, parameters=(x, *tensors), on_solve=self.on_solve, **options)
        if self.on_solve is not None:
            self.on_solve(solution)
        return solution.x


class _Root(torch.autograd.Function):
    """problem, x [B, N] as it was found, *tensors of η -> x."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, x: Tensor, *tensors: Tensor) -> Tensor:
        x = x.clone()
        ctx.save_for_backward(x, *tensors)
        ctx.problem = problem
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_one_gradient(grad, "root")
        x, *tensors = ctx.saved_tensors
        problem: _Problem = ctx.problem
        again = torch.is_grad_enabled()
        u = problem.adjoint(x, grad.contiguous(), tuple(tensors))
        with torch.enable_grad():
            x = x.view_as(x) if again else x.detach()
            tensors = [w.view_as(w) if again else w.detach().requires_grad_() for w in tensors]
            value = problem.value(x, tuple(tensors))
        return None, None, *pulled_back(value, tensors, -u, ctx.needs_input_grad[2:])
