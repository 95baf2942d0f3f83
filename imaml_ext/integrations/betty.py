"""A solver for Betty's hypergradients: `install()` makes it a `type` of its `Config`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imaml_ext.checks import check_number
from imaml_ext.integrations.outcome import Reaction, check_reactions, report
from imaml_ext.solvers import CG, LinearSolver


def install(
    name: str = "imaml_cg",
    *,
    solver: LinearSolver | None = None,
    shift: float = 0.0,
    on_breakdown: Reaction = "raise",
    on_unfinished: Reaction = "warn",
) -> str:
    """Adds a solver to those of Betty, and returns its name: `Config(type=install(), cg_iterations=20, …)`.

    The hypergradient is −∂²L/∂θ∂φ (H + shift)⁻¹ v, with L the loss of the lower problem and H its Hessian in the
    trainable parameters φ. `Config.cg_alpha` scales the steps of Betty's own iteration. H⁻¹ has no such factor, and
    the setting changes nothing here.

    Args:
        name: what `Config.type` calls it; one that was installed before under this name is replaced.
        solver: any linear solver, such as `MINRES(…)` where H may be indefinite. Unless it is given, conjugate
            gradients with at most `Config.cg_iterations` products end at a relative residual of 1e-5.
        shift: δ ≥ 0.
        on_breakdown: what is done where H + shift is not what the solver needs, or a number is not finite: "raise" a
            `SolveError`, "warn" by a `SolveWarning` or "ignore". Both of these go on with the last good iterate.
        on_unfinished: the same where the products are spent before the tolerance is met.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, or the name of one of Betty's own methods.
    """
    from betty import hypergradient

    if solver is not None and not isinstance(solver, LinearSolver):
        raise TypeError(f"solver must be a LinearSolver such as CG(), got {type(solver).__name__}")
    check_number("shift", shift, at_least=0)
    check_reactions(on_breakdown=on_breakdown, on_unfinished=on_unfinished)
    if not isinstance(hypergradient.jvp_fn_mapping.get(name), _Hypergradient | None):
        raise ValueError(f"name must not be that of one of Betty's own methods, got {name!r}")
    hypergradient.jvp_fn_mapping[name] = _Hypergradient(solver, shift, on_breakdown, on_unfinished)
    return name


class _Hypergradient:
    """What Betty calls for the best-response Jacobian of a problem."""

    def __init__(
        self, solver: LinearSolver | None, shift: float, on_breakdown: Reaction, on_unfinished: Reaction
    ) -> None:
        self.solver, self.shift = solver, shift
        self.reactions: dict[str, Any] = {"on_breakdown": on_breakdown, "on_unfinished": on_unfinished}

    def __call__(self, vector: Sequence[Tensor], curr: Any, prev: Any, sync: bool = False) -> list[Tensor] | None:
        """The hypergradient for the parameters of `prev`; with `sync`, of Betty 0.2, added to their `.grad`.

        Args:
            vector: v, as the trainable parameters of `curr`.
            curr: the lower problem. prev: the problem above it, on whose parameters the loss of `curr` depends.
        """
        if curr.paths:
            raise ValueError(f"problem {curr.name!r} must have no lower problem to be differentiated implicitly")
        with torch.enable_grad():
            loss = curr.training_step_exec(curr.cur_batch)
            params = list(curr.trainable_parameters())
            gradient = torch.autograd.grad(
                loss["loss"] if isinstance(loss, dict) else loss, params, create_graph=True, materialize_grads=True
            )
        kept = [i for i, g in enumerate(gradient) if g.requires_grad]  # the others are constant
        outputs = [gradient[i] for i in kept]

        def hvp(p: list[Tensor]) -> list[Tensor]:
            weights = [p[i][0] for i in kept]
            product = torch.autograd.grad(outputs, params, weights, retain_graph=True, materialize_grads=True)
            return [part.unsqueeze(0) for part in product]

        solver = self.solver or CG(max_iterations=curr.config.cg_iterations, check_every=1)
        solution = solver.solve(hvp, [v.detach().unsqueeze(0) for v in vector], self.shift)
        report(solution, **self.reactions, what="hypergradients of Betty")
        weights = [-solution.x[i][0] for i in kept]
        upper = list(prev.trainable_parameters())
        if sync:
            torch.autograd.backward(outputs, grad_tensors=weights, inputs=upper)
            return None
        return list(torch.autograd.grad(outputs, upper, weights, materialize_grads=True))
