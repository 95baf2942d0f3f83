"""The solvers of JAX, which users batch by `vmap`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .solvers import Solver
from .system import Outcome, Products, System

Vectors = Callable[[Any], Any]


class Vmapped(Solver):
    """One system as a JAX function, mapped over the rows, and over the right-hand sides of each."""

    offers = frozenset({"x0", "preconditioner", "a scalar without dimensions"})

    @abstractmethod
    def solve_one(self, matvec: Vectors, b: Any, rtol: Any, x0: Any, M: Vectors | None, steps: int) -> tuple[Any, Any]:
        """x [N], and whether a failure is reported, None where that never is."""

    def solve(self, system: System, products: Products) -> Outcome:
        import jax

        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # a callback would wait for what waits for it
        M = system.preconditioner

        def one(index: Any, b: Any, rtol: Any, x0: Any) -> tuple[Any, Any]:
            matvec = _callback(lambda p, rows: products(p, rows), index)
            precondition = None
            if M is not None:
                precondition = _callback(lambda r, rows: _precondition(M, r, rows), index)
            return self.solve_one(matvec, b, rtol, x0, precondition, system.max_iterations)

        b = system.b.squeeze(1) if system.zero_dim else system.b
        x0 = None if system.x0 is None else system.x0.numpy()
        rows, rtol = np.arange(len(b)), np.array(system.tolerances())
        mapped = one if b.dim() < 3 else jax.vmap(one, in_axes=(None, 1, None, None), out_axes=(1, 0))
        x, failed = jax.vmap(mapped, in_axes=(0, 0, 0, None if x0 is None else 0))(rows, b.numpy(), rtol, x0)
        x = torch.from_numpy(np.array(x)).reshape(system.b.shape)
        return Outcome(x, None if failed is None else torch.from_numpy(np.array(failed)))


def _precondition(M: Tensor, r: Tensor, rows: Tensor) -> Tensor:
    return torch.einsum("bij,bj->bi", M[rows], r.double()).to(r.dtype)


def _callback(function: Callable[[Tensor, Tensor], Tensor], index: Any) -> Vectors:
    """A linear function of vectors [N] or [] of row `index`, computed outside of JAX for all mapped ones at once."""
    import jax

    def outside(index: Any, p: Any) -> np.ndarray:
        p = np.asarray(p)
        index = np.broadcast_to(np.asarray(index), p.shape[: max(np.ndim(index), 0)])
        length = p.shape[-1] if p.ndim > index.ndim else 1
        rows = torch.from_numpy(index.reshape(-1).copy())
        vectors = torch.from_numpy(p.reshape(len(rows), length).copy())
        return function(vectors, rows).numpy().reshape(p.shape)

    @jax.custom_jvp
    def linear(p: Any) -> Any:
        result = jax.ShapeDtypeStruct(p.shape, p.dtype)
        return jax.pure_callback(outside, result, index, p, vmap_method="broadcast_all")

    linear.defjvp(lambda primals, tangents: (linear(*primals), linear(*tangents)))
    return linear


class Jax(Vmapped):
    name, package, module = "JAX", "jax", "jax"
    call = "`jax.scipy.sparse.linalg.cg(tol=rtol)`, `vmap` over rows; reports nothing"

    def solve_one(self, matvec: Vectors, b: Any, rtol: Any, x0: Any, M: Vectors | None, steps: int) -> tuple[Any, Any]:
        from jax.scipy.sparse.linalg import cg

        return cg(matvec, b, x0=x0, tol=rtol, atol=0.0, maxiter=steps, M=M)


class Lineax(Vmapped):
    name, package, module = "lineax", "lineax", "lineax"
    call = "`linear_solve(…, CG(rtol=0, atol=rtol ‖b‖, norm=two_norm), throw=False)`, `vmap` over rows; its result"

    def solve_one(self, matvec: Vectors, b: Any, rtol: Any, x0: Any, M: Vectors | None, steps: int) -> tuple[Any, Any]:
        import jax
        import jax.numpy as jnp
        import lineax as lx
        from lineax.internal import two_norm

        like = jax.ShapeDtypeStruct(b.shape, b.dtype)

        def operator(function: Vectors) -> Any:
            return lx.FunctionLinearOperator(function, like, lx.positive_semidefinite_tag)

        options = {} if x0 is None else {"y0": x0}
        if M is not None:
            options["preconditioner"] = operator(M)
        # Its own rule is entry by entry, |r_i| <= rtol |b_i|: what the others do is rtol ‖b‖ in the 2-norm.
        size = two_norm(b) if b.ndim else jnp.abs(b)
        solver = lx.CG(rtol=0.0, atol=(rtol * size).astype(b.dtype), norm=two_norm, max_steps=steps)
        solution = lx.linear_solve(operator(matvec), b, solver, options=options, throw=False)
        return solution.value, solution.result != lx.RESULTS.successful
