"""A linear solver for TorchOpt's implicit differentiation: `linear_solve=` of a module, `solve=` of `custom_root`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from imaml_ext.checks import check_choice, check_int
from imaml_ext.integrations.outcome import Reaction, check_reactions, report
from imaml_ext.solvers import Solution, SolveStatus, cg
from imaml_ext.solvers.minres import minres

Method = Literal["auto", "cg", "minres"]
Product = Callable[[Any], Any]  # a tree of tensors -> one of the same structure


def solve_symmetric(
    *,
    ridge: float | None = None,
    init: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Product | None = None,
    method: Method = "auto",
    on_breakdown: Reaction = "raise",
    on_unfinished: Reaction = "warn",
    on_solve: Callable[[Solution], None] | None = None,
) -> Callable[[Product, Any], Any]:
    """Returns a solver (matvec, b) -> x of A x = b for a symmetric A, in place of those of `torchopt.linear_solve`.

    TorchOpt's A is the derivative of an optimality condition, so that its sign is that of the condition: the Hessian of
    a loss that is minimised, or minus that of one that is maximised. With "auto" conjugate gradients work on A. If they
    meet negative curvature on the first step, they work on −A x = −b. If they break down later, or again, MINRES begins
    anew on A. The status decides this, and the x of a solve that broke down is never taken for a solution.

    Args:
        ridge: the system is (A + ridge) x = b. init: a tree like b, where the solve begins.
        rtol, atol: the solve ends when ‖b − A x‖ was measured to be at most max(rtol ‖b‖, atol).
        maxiter: the largest number of products with A, of each method; 10 times the unknowns unless given.
        M: r -> M r, the product of a tree with an approximation of A⁻¹ of the sign of A. MINRES works without it.
        method: "cg" for a positive definite A, "minres" for a symmetric one, or "auto".
        on_breakdown: what is done where A is not what the method needs, or a number is not finite: "raise" a
            `SolveError`, "warn" by a `SolveWarning` or "ignore". Both of these return the last good iterate.
        on_unfinished: the same where the products are spent before the tolerance is met.
        on_solve: called with the `Solution` of every solve, whose x is a list of the leaves [1, …].

    The solver raises RuntimeError if b or a product requires a gradient while gradients are recorded, as none flows
    through x.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """
    check_choice("method", method, get_args(Method))
    check_reactions(on_breakdown=on_breakdown, on_unfinished=on_unfinished)
    if method == "minres" and M is not None:
        raise ValueError("M must be None where method is 'minres', which has no preconditioner")
    if maxiter is not None:
        check_int("maxiter", maxiter, minimum=0)

    def solve(matvec: Product, b: Any) -> Any:
        system = _System(matvec, b, M)
        found = system.solve(
            method,
            0.0 if ridge is None else ridge,
            init,
            {"rtol": rtol, "atol": atol, "max_iterations": 10 * system.size if maxiter is None else maxiter},
        )
        if on_solve is not None:
            on_solve(found)
        report(found, on_breakdown=on_breakdown, on_unfinished=on_unfinished, what="systems of TorchOpt")
        return system.tree(found.x)

    return solve


class _System:
    """A x = b of TorchOpt as one row: trees are lists of leaves [1, …]."""

    def __init__(self, matvec: Product, b: Any, M: Product | None) -> None:
        from torchopt import pytree

        self.pytree, self.matvec, self.M = pytree, matvec, M
        leaves, self.spec = pytree.tree_flatten(b)
        if not leaves:
            raise ValueError(f"b must have at least one tensor, got {b!r}")
        self.b = self.rows(b, "b")
        self.size = sum(leaf.numel() for leaf in leaves)

    def tree(self, leaves: list[Tensor]) -> Any:
        return self.pytree.tree_unflatten(self.spec, [leaf[0] for leaf in leaves])

    def rows(self, tree: Any, name: str) -> list[Tensor]:
        leaves, spec = self.pytree.tree_flatten(tree)
        if spec != self.spec:
            raise ValueError(f"{name} must have the structure of b, {self.spec}, got {spec}")
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
            raise RuntimeError(
                f"{name} must not require a gradient while gradients are recorded, as none flows through the solution: "
                "differentiate once (create_graph=False), call within torch.no_grad(), or use imaml_ext.solve"
            )
        return [leaf.detach().unsqueeze(0) for leaf in leaves]

    def product(self, function: Product, name: str, sign: int) -> Product:
        def multiply(leaves: list[Tensor]) -> list[Tensor]:
            rows = self.rows(function(self.tree(leaves)), name)
            return rows if sign > 0 else [-row for row in rows]

        return multiply

    def solve(self, method: Method, ridge: float, init: Any, options: dict[str, Any]) -> Solution:
        options |= {"x0": None if init is None else self.rows(init, "init"), "check_every": 1}

        def by_cg(sign: int) -> Solution:
            b = [sign * leaf for leaf in self.b]
            M = None if self.M is None else self.product(self.M, "what M returns", sign)
            A = self.product(self.matvec, "what matvec returns", sign)
            return cg(A, b, shift=sign * ridge, preconditioner=M, **options)

        if method != "minres":
            found = by_cg(1)
            if method == "auto" and found.status == SolveStatus.NEGATIVE_CURVATURE and found.iterations == 0:
                found = by_cg(-1)
            if method == "cg" or not found.broke_down:
                return found
        return minres(self.product(self.matvec, "what matvec returns", 1), self.b, shift=ridge, **options)
