"""The solvers, each called as its users call it: its own interface, the tolerance that is asked, enough iterations."""

from __future__ import annotations

import importlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .system import Outcome, Products, System

Vectors = Callable[[Tensor], Tensor]


class Solver(ABC):
    """Attributes: name: in the table. package: its distribution. call: how it is called, for the page. offers: the
    options of `System.needs` that its interface has. module: what must be importable.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    module: ClassVar[str]
    call: ClassVar[str]
    offers: ClassVar[frozenset[str]] = frozenset()

    def missing(self) -> str:
        """Why it cannot be called here; "" where it can."""
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            return f"not installed: {error}"
        return ""

    def version(self) -> str | None:
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    @abstractmethod
    def solve(self, system: System, products: Products) -> Outcome: ...


class Ours(Solver):
    name, package, module = "imaml_ext", "imaml-ext", "imaml_ext"
    call = "`imaml_ext.cg(…, check_every=1)`, the whole batch; its status per row"
    offers = frozenset({"x0", "preconditioner"})

    def solve(self, system: System, products: Products) -> Outcome:
        import imaml_ext

        M = system.preconditioner
        result = imaml_ext.cg(
            products,
            system.b,
            x0=system.x0,
            rtol=system.rtol,
            max_iterations=system.max_iterations,
            preconditioner=None if M is None else lambda r: torch.einsum("bij,bj->bi", M, r.double()).to(r.dtype),
            check_every=1,
        )
        return Outcome(result.x, result.status != imaml_ext.SolveStatus.CONVERGED)


def linear_cg_options(rtol: float, dtype: torch.dtype) -> dict[str, float]:
    """The tolerance for `linear_cg`. Its defaults of 1e-10 for the others end a solve at residuals of about 1e-5."""
    return {"tolerance": rtol, "stop_updating_after": rtol / 10, "eps": torch.finfo(dtype).tiny}


class LinearOperator(Solver):
    name, package, module = "linear_operator", "linear_operator", "linear_operator"
    call = (
        "`linear_cg(tolerance=rtol, stop_updating_after=rtol / 10, eps=tiny)`, the whole batch; its warning, for "
        "all rows"
    )
    offers = frozenset({"x0", "preconditioner"})

    def solve(self, system: System, products: Products) -> Outcome:
        from linear_operator.utils.linear_cg import linear_cg
        from linear_operator.utils.warnings import NumericalWarning

        if isinstance(system.rtol, Tensor):
            raise NotOfferedError("one tolerance for all rows")
        vector = system.b.dim() == 2
        M = system.preconditioner
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            x = linear_cg(
                products,
                system.b.unsqueeze(2) if vector else system.b,
                max_iter=system.max_iterations,
                max_tridiag_iter=0,
                **linear_cg_options(system.rtol, system.b.dtype),
                initial_guess=None if system.x0 is None else system.x0.unsqueeze(2),
                preconditioner=None if M is None else lambda r: (M @ r.double()).to(r.dtype),
            )
        return Outcome(x, torch.tensor(any(issubclass(w.category, NumericalWarning) for w in heard)))


class NotOfferedError(Exception):
    """What a case needs is not in the interface; says what."""


# --- solvers of one system, which users call in a loop --------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One system. b: [N], [N, K] or without dimensions; matvec and precondition take and return tensors like b."""

    b: Tensor
    matvec: Vectors
    rtol: float
    max_iterations: int
    x0: Tensor | None
    precondition: Vectors | None
    A: Tensor
    count: Callable[[int], object]  # records products that were made without matvec


class Looped(Solver):
    """A call per row; and per right-hand side, unless `columns`, where a row's are given together."""

    columns: ClassVar[bool] = False
    warning: ClassVar[type[Warning] | None] = None  # the category with which it reports

    @abstractmethod
    def solve_row(self, row: Row) -> tuple[Tensor, bool | None]:
        """x, and whether the outputs report a failure, None where they never do."""

    def solve(self, system: System, products: Products) -> Outcome:
        x = torch.full(system.b.shape, torch.nan, dtype=system.b.dtype)
        single = system.b.dim() == 2 or self.columns
        failed = torch.zeros(system.b.shape[:1] if single else (len(x), x.shape[2]), dtype=torch.bool)
        raised: dict[int, str] = {}
        reports = False
        for index in range(len(x)):
            for column in [...] if single else range(x.shape[2]):
                where = (index, ...) if single else (index, slice(None), column)
                mark = index if single else (index, column)
                try:
                    with warnings.catch_warnings(record=True) as heard:
                        warnings.simplefilter("always")
                        value, said = self.solve_row(self._row(system, products, index, where))
                except NotOfferedError:
                    raise
                except Exception as error:  # of whatever kind: this is other people's code
                    raised[index] = f"{type(error).__name__}: {error}".splitlines()[0]
                    failed[mark], reports = True, True
                    continue
                x[where] = value.reshape(x[where].shape)
                if self.warning is not None:
                    said = bool(said) or any(issubclass(w.category, self.warning) for w in heard)
                if said is not None:
                    failed[mark], reports = said, True
        return Outcome(x, failed if reports else None, raised)

    def _row(self, system: System, products: Products, index: int, where: tuple[Any, ...]) -> Row:
        b = system.b[where]
        rows, shape = torch.tensor([index]), b.shape

        def matvec(p: Tensor) -> Tensor:
            return _Product.apply(p.reshape(1, -1, *p.shape[1:]), products, rows).reshape(p.shape)

        M = None if system.preconditioner is None else system.preconditioner[index]
        return Row(
            b=b.reshape(()) if system.zero_dim else b,
            matvec=matvec,
            rtol=system.tolerances()[index],
            max_iterations=system.max_iterations,
            x0=None if system.x0 is None else system.x0[index].reshape(shape),
            precondition=None if M is None else lambda r: (M @ r.double()).to(r.dtype),
            A=system.A[index],
            count=lambda made: products.count[index : index + 1].add_(made),
        )


class _Product(torch.autograd.Function):
    """A product with a symmetric matrix, counted, whose transposed product is counted too."""

    @staticmethod
    def forward(p: Tensor, products: Products, rows: Tensor) -> Tensor:
        return products(p, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.products, ctx.rows = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Product.apply(grad, ctx.products, ctx.rows), None, None


class TorchOpt(Looped):
    name, package, module = "TorchOpt", "torchopt", "torchopt"
    call = "`linear_solve.solve_cg(rtol=…)`, a loop over rows; reports nothing"
    offers = frozenset({"x0", "preconditioner", "a scalar without dimensions"})

    def solve_row(self, row: Row) -> tuple[Tensor, None]:
        from torchopt.linear_solve import solve_cg

        solve = solve_cg(rtol=row.rtol, atol=0.0, maxiter=row.max_iterations, init=row.x0, M=row.precondition)
        return solve(row.matvec, row.b), None


class TorchOptNormal(Looped):
    name, package, module = "TorchOpt, normal", "torchopt", "torchopt"
    call = "`linear_solve.solve_normal_cg(rtol=…)`, whose tolerance is that of AᵀA, a loop over rows; reports nothing"
    offers = frozenset({"x0", "a scalar without dimensions"})

    def solve_row(self, row: Row) -> tuple[Tensor, None]:
        from torchopt.linear_solve import solve_normal_cg

        solve = solve_normal_cg(rtol=row.rtol, atol=0.0, maxiter=row.max_iterations, init=row.x0)
        return solve(row.matvec, row.b), None


class Curvlinops(Looped):
    name, package, module = "curvlinops", "curvlinops-for-pytorch", "curvlinops"
    call = "`CGInverseLinearOperator(A, …) @ b` with the options of linear_operator, a loop over rows; its warning"
    offers = frozenset({"preconditioner"})
    columns = True

    def solve_row(self, row: Row) -> tuple[Tensor, bool]:
        from curvlinops import CGInverseLinearOperator
        from curvlinops._torch_base import PyTorchLinearOperator
        from linear_operator.utils.warnings import NumericalWarning

        class Operator(PyTorchLinearOperator):
            SELF_ADJOINT = True
            dtype, device = row.b.dtype, row.b.device

            def _matmat(self, X: list[Tensor]) -> list[Tensor]:
                return [row.matvec(X[0])]

        options: dict[str, Any] = {} if row.precondition is None else {"preconditioner": row.precondition}
        shape = [tuple(row.b.shape[:1])]
        options |= linear_cg_options(row.rtol, row.b.dtype)
        operator = Operator(shape, shape)
        inverse = CGInverseLinearOperator(operator, max_iter=row.max_iterations, max_tridiag_iter=0, **options)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            x = inverse @ row.b
        return x, any(issubclass(w.category, NumericalWarning) for w in heard)


def _numpy(vectors: Vectors) -> Callable[[np.ndarray], np.ndarray]:
    return lambda v: vectors(torch.from_numpy(np.ascontiguousarray(v))).numpy()


class SciPy(Looped):
    name, package, module = "SciPy", "scipy", "scipy"
    call = "`scipy.sparse.linalg.cg(rtol=…, atol=0)`, a loop over rows; its info"
    offers = frozenset({"x0", "preconditioner"})
    warning = RuntimeWarning

    def solve_row(self, row: Row) -> tuple[Tensor, bool]:
        from scipy.sparse.linalg import LinearOperator, cg

        def operator(vectors: Vectors) -> LinearOperator:
            return LinearOperator((len(row.b),) * 2, matvec=_numpy(vectors), dtype=row.b.numpy().dtype)

        x, info = cg(
            operator(row.matvec),
            row.b.numpy(),
            x0=None if row.x0 is None else row.x0.numpy(),
            rtol=row.rtol,
            atol=0.0,
            maxiter=row.max_iterations,
            M=None if row.precondition is None else operator(row.precondition),
        )
        return torch.from_numpy(x), info != 0


class CuPy(Looped):
    name, package, module = "CuPy", "cupy", "cupy"
    call = "`cupyx.scipy.sparse.linalg.cg(rtol=…, atol=0)` on a GPU, a loop over rows; its info"
    offers = frozenset({"x0", "preconditioner"})

    def missing(self) -> str:
        return super().missing() or ("" if torch.cuda.is_available() else "no CUDA device")

    def solve_row(self, row: Row) -> tuple[Tensor, bool]:
        import cupy
        from cupyx.scipy.sparse.linalg import LinearOperator, cg

        def operator(vectors: Vectors) -> LinearOperator:
            def matvec(v: Any) -> Any:
                return cupy.asarray(_numpy(vectors)(cupy.asnumpy(v)))

            return LinearOperator((len(row.b),) * 2, matvec=matvec, dtype=row.b.numpy().dtype)

        rtol = "rtol" if "rtol" in signature(cg).parameters else "tol"  # its name depends on the release
        x, info = cg(
            operator(row.matvec),
            cupy.asarray(row.b.numpy()),
            x0=None if row.x0 is None else cupy.asarray(row.x0.numpy()),
            atol=0.0,
            **{rtol: row.rtol},
            maxiter=row.max_iterations,
            M=None if row.precondition is None else operator(row.precondition),
        )
        return torch.from_numpy(cupy.asnumpy(x)), info != 0


class Hypergrad(Looped):
    name, package, module = "hypertorch", "hypergrad", "hypergrad.CG_torch"
    call = "`hypergrad.CG_torch.cg(epsilon=rtol ‖b‖)`, a loop over rows; reports nothing"
    offers = frozenset({"a scalar without dimensions"})

    def solve_row(self, row: Row) -> tuple[Tensor, None]:
        from hypergrad.CG_torch import cg

        def products(p: list[Tensor]) -> list[Tensor]:
            return [row.matvec(p[0])]

        epsilon = row.rtol * float(row.b.norm())
        return cg(products, [row.b], max_iter=row.max_iterations, epsilon=epsilon)[0], None


class Dattri(Looped):
    name, package, module = "dattri", "dattri", "dattri.func.hessian"
    call = "`ihvp_at_x_cg(tol=rtol, max_iter=3 N)`, a loop over rows; reports nothing, and makes all max_iter steps"
    columns = True

    def solve_row(self, row: Row) -> tuple[Tensor, None]:
        from dattri.func.hessian import ihvp_at_x_cg

        def loss(x: Tensor) -> Tensor:
            return 0.5 * x.double() @ (row.A @ x.double())

        at = torch.zeros(len(row.b), dtype=row.b.dtype)
        # Its tol is not used: it makes all of these steps, and too many of them end in 0/0. Of N to 4 N steps for each
        # case alike, 3 N give the most right answers.
        steps = min(row.max_iterations, 3 * len(row.b))
        inverse = ihvp_at_x_cg(loss, at, max_iter=steps, tol=row.rtol)
        row.count(steps + 1)  # it begins at x = b
        return inverse(row.b.T if row.b.dim() == 2 else row.b).T, None


class PyDVL(Looped):
    name, package, module = "pyDVL", "pyDVL", "pydvl.influence.torch.operator"
    call = "`CgOperator(rtol=…, atol=0)`, a loop over rows, `use_block_cg` for several right-hand sides; its warning"
    offers = frozenset({"preconditioner"})
    columns = True
    warning = UserWarning

    def solve_row(self, row: Row) -> tuple[Tensor, None]:
        from pydvl.influence.torch.base import TensorOperator
        from pydvl.influence.torch.operator import CgOperator
        from pydvl.influence.torch.preconditioner import Preconditioner

        class Operator(TensorOperator):
            device, dtype, input_size = row.b.device, row.b.dtype, len(row.b)

            def to(self, device: torch.device) -> Operator:
                return self

            def _apply_to_vec(self, vec: Tensor) -> Tensor:
                return row.matvec(vec)

            def _apply_to_mat(self, mat: Tensor) -> Tensor:
                return row.matvec(mat.T).T

        class Given(Preconditioner):
            is_fitted, modify_regularization_requires_fit = True, False

            def _fit(self, operator: TensorOperator, regularization: float | None = None) -> Given:
                return self

            def _solve(self, rhs: Tensor) -> Tensor:
                assert row.precondition is not None
                return row.precondition(rhs)

            def to(self, device: torch.device) -> Given:
                return self

        inverse = CgOperator(
            Operator(),
            rtol=row.rtol,
            atol=0.0,
            maxiter=row.max_iterations,
            preconditioner=None if row.precondition is None else Given(),
            use_block_cg=row.b.dim() == 2,
        )
        return inverse.apply(row.b.T if row.b.dim() == 2 else row.b).T, None
