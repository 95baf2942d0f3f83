"""What a linear solver takes for A and b, read as the rows that it works on.

A solver's loop knows one form: an operator [R, N] -> [R, N] and b [R, N], one system per row. `System.read` makes it of
every other form, and `System.solution` writes what comes out in the form of b:

    b                                   rows         status, iterations, residual_norm
    [N], or a number []                 1 × N        []
    [B, N]                              B × N        [B]
    [B, N, K]: K right-hand sides       B K × N      [B, K]
    a nested structure of [B, …], also
    one tensor of four dimensions       B × ΣN       [B]

A is a function that takes and returns the form of b; a dense or sparse matrix [N, N] (shared by all rows) or [B, N, N];
or any object with a `shape` (…, N, N) that multiplies by `@`, such as the operators of SciPy, curvlinops and
linear_operator. With K right-hand sides a function is given one of them at a time, [B, N], unless it is marked by
`multi_rhs`: then it is given all of them, [B, N, K], in one call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext.ops import as_coefficient
from imaml_ext.solvers.form import Form, in_words, type_name

if TYPE_CHECKING:
    from imaml_ext.solvers.linear import Solution

Product = Callable[[Tensor], Tensor]  # p [R, N] -> A p [R, N], row r from row r alone
F = TypeVar("F", bound=Callable[..., Any])


def multi_rhs(function: F) -> F:
    """Marks a function p [B, N, K] -> A p [B, N, K], of K vectors for each of B operators, column k from column k."""
    function.multi_rhs = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class System:
    """(A_r + diag(shift)) x_r = b_r for every row r, and the form that it was written in.

    Attributes:
        operator: p [R, N] -> A p [R, N]. b: [R, N]. form: None where A and b are rows as they stand.
    """

    operator: Callable[..., Tensor]
    b: Tensor
    form: Form | None

    @classmethod
    def read(cls, A: Any, b: Any) -> System:
        """Raises TypeError or ValueError for an A or b of no form that the module names, or not fitting each other."""
        if isinstance(b, Tensor) and b.dim() == 2 and callable(A) and not isinstance(A, Tensor) and not is_matrix(A):
            Form.of(b)
            return cls(A, b, None)
        form = Form.of(b)
        A = A.detach() if isinstance(A, Tensor) else A
        return cls(product_of(A, form, "A"), form.pack(b, "b").contiguous(), form)

    def rows(self, value: Any, name: str) -> Any:
        """A vector, written as b is, as rows [R, N]; None stays None."""
        return value if value is None or self.form is None else self.form.pack(value, name)

    def product(self, M: Any, name: str) -> Any:
        """What is given in a form of A, as an operator on rows."""
        return M if M is None or self.form is None else product_of(M, self.form, name)

    def coefficient(self, value: Any, name: str) -> Any:
        """A number, [B], [N], [B, N], or a structure like b of numbers and tensors, as one for rows."""
        form = self.form
        if form is None or not isinstance(value, Tensor):
            if form is None or form.spec is None or not isinstance(value, (dict, list, tuple)):
                return value
            return self._structure(value, name, form)
        if not form.lead:
            return value.reshape(1, -1) if value.shape == form.shapes[0] and value.dim() > 0 else value
        if form.spec is None and value.dim() > 2 and value.shape == form.shapes[0] and form.columns == 1:
            return value.reshape(form.rows, form.size)
        like = self.b[:: form.columns]  # [B, N]
        value = as_coefficient(value, name, like)
        return value.repeat_interleave(form.columns, 0) if value.shape[0] > 1 and form.columns > 1 else value

    def _structure(self, value: Any, name: str, form: Form) -> Tensor:
        leaves, spec = pytree.tree_flatten(value)
        if spec != form.spec:
            raise ValueError(f"{name} must be a number or have the structure of b, {in_words(form.spec)}")
        try:
            wide = [torch.as_tensor(v, dtype=self.b.dtype, device=self.b.device).expand(s)
                    for v, s in zip(leaves, form.shapes, strict=True)]  # fmt: skip
        except RuntimeError as error:
            raise ValueError(f"every part of {name} must broadcast to that of b: {error}") from None
        return form.pack(pytree.tree_unflatten(wide, spec), name)

    def tolerance(self, value: Any, name: str) -> Any:
        """A number, or one per system, as one per row."""
        if self.form is None or not isinstance(value, Tensor) or value.dim() == 0:
            return value
        lead = self.form.lead
        if value.shape != lead and value.shape != lead[:1]:
            raise ValueError(f"{name} must be a number or have shape {list(lead)}, got {list(value.shape)}")
        return (value if value.shape == lead else value.unsqueeze(1).expand(lead)).reshape(-1)

    def options(self, shift: Any, x0: Any, rtol: Any, atol: Any) -> dict[str, Any]:
        """The arguments of these names, for rows."""
        tolerances = {name: self.tolerance(value, name) for name, value in (("rtol", rtol), ("atol", atol))}
        return {"shift": self.coefficient(shift, "shift"), "x0": self.rows(x0, "x0"), **tolerances}

    def solution(self, flat: Solution) -> Solution:
        """The solution of the rows, in the form of b."""
        form = self.form
        if form is None:
            return flat
        values = {name: v for name, v in vars(flat).items() if name != "x" and isinstance(v, Tensor)}
        scalars: dict[str, Any] = {name: v.reshape(form.lead) for name, v in values.items()}
        lanczos, set_up = flat.lanczos, flat.set_up
        if lanczos is not None:
            lanczos = type(lanczos)(*(v.reshape((*form.lead, *v.shape[1:])) for v in vars(lanczos).values()))
        if set_up is not None:
            set_up = replace(set_up, fallback=set_up.fallback.reshape(form.lead))
        return replace(flat, x=form.unpack(flat.x), lanczos=lanczos, set_up=set_up, **scalars)


def product_of(A: Any, form: Form, name: str, result: Form | None = None) -> Product:
    """An operator in any form, as p [R, N] -> A p [R, N] for the rows of `form`; [R, M] where `result` has M."""
    result = result or form
    if isinstance(A, Tensor):
        return matrix_product(_tensor(A, form, name), A.shape, form, result, name)
    if is_matrix(A):
        return matrix_product(_multiplication(A, form, name), A.shape, form, result, name)
    if not callable(A):
        raise TypeError(
            f"{name} must be a function, a matrix or an operator that has a shape and @, got {type_name(A)}"
        )
    if len(form.lead) == 2 and not getattr(A, "multi_rhs", False):
        batch, columns = form.lead
        wide = A.of_columns(columns) if hasattr(A, "of_columns") else None  # a curvature operator
        if wide is not None:
            return wide

        def column(part: Tensor) -> Tensor:
            product = A(part)
            if not isinstance(product, Tensor) or product.shape != (batch, result.size):
                got = list(product.shape) if isinstance(product, Tensor) else type_name(product)
                raise ValueError(f"{name} must return [{batch}, {result.size}], a product of one column, got {got}")
            result.check_dtype(product, f"what {name} returns")
            return product

        return column_by_column(column, batch, columns)
    subject = f"what {name} returns"
    return lambda p: result.pack(A(form.unpack(p)), subject)


def column_by_column(product: Product, rows: int, columns: int) -> Product:
    """p [R K, N] -> A p for K vectors per row, by one call of `product` [R, N] for each k."""

    def one_by_one(p: Tensor) -> Tensor:
        parts = p.reshape(rows, columns, p.shape[1]).unbind(1)
        # Copied, as the memory may be that of the next product too.
        return torch.stack([product(part.contiguous()).clone() for part in parts], 1).flatten(0, 1)

    return one_by_one


def is_matrix(A: Any) -> bool:
    """Whether A multiplies by @, as a tensor and the operators of other libraries do."""
    return hasattr(A, "shape") and hasattr(A, "__matmul__")


def matrix_product(multiply: Callable[[Tensor], Tensor], shape: Any, form: Form, result: Form, name: str) -> Product:
    """multiply: X [(B,) N, K] -> A X [(B,) M, K]."""
    rows, size, batch = form.rows, form.size, form.lead[:1]
    lead, sizes = tuple(shape[:-2]), (result.size, size)
    if tuple(shape[-2:]) != sizes or lead not in ((), batch):
        expected = f"{list(sizes)}" + (f" or {[batch[0], *sizes]}" if batch else "")
        why = f"as b has {size} unknowns" if form is result else f"as {result.name} and {form.name} have these sizes"
        raise ValueError(f"{name} must have shape {expected}, {why}, got {list(shape)}")

    def product(p: Tensor) -> Tensor:
        X = p.mT if lead == () else p.reshape(*lead, form.columns, size).mT
        Y = multiply(X)
        expected = [*X.shape[:-2], result.size, X.shape[-1]]
        if not isinstance(Y, Tensor) or list(Y.shape) != expected:
            got = list(Y.shape) if isinstance(Y, Tensor) else type_name(Y)
            raise ValueError(f"{name} must give {expected} for {list(X.shape)}, got {got}")
        return Y.mT.reshape(rows, result.size)

    return product


def _tensor(A: Tensor, form: Form, name: str) -> Callable[[Tensor], Tensor]:
    if A.dtype != form.dtype:
        raise TypeError(f"{name} must have the dtype of {form.name}, {form.dtype}, got {A.dtype}")
    if A.device != form.device:
        raise ValueError(f"{name} must have the device of {form.name}, {form.device}, got {A.device}")
    if A.layout == torch.strided:
        return A.__matmul__
    if A.dense_dim() > 0:
        raise ValueError(f"{name} must have no dense dimensions where it is sparse, got {A.dense_dim()}")
    if A.dim() == 2:
        return (A if A.layout in (torch.sparse_coo, torch.sparse_csr) else A.to_sparse_coo()).__matmul__
    return _block_diagonal(A)


def _block_diagonal(A: Tensor) -> Callable[[Tensor], Tensor]:
    """A sparse [B, M, N] as one sparse matrix of B blocks, which every layout's kernels can multiply by."""
    batch, height, width = A.shape
    coo = A.to_sparse_coo().coalesce()
    block, row, column = coo.indices()
    indices = torch.stack([block * height + row, block * width + column])
    shape = (batch * height, batch * width)
    blocks = torch.sparse_coo_tensor(indices, coo.values(), shape, check_invariants=False, is_coalesced=True)
    return lambda X: (blocks @ X.reshape(batch * width, X.shape[-1])).reshape(batch, height, X.shape[-1])


def _multiplication(A: Any, form: Form, name: str) -> Callable[[Tensor], Tensor]:
    if not any(base.__module__.split(".")[0] in ("scipy", "numpy") for base in type(A).__mro__):
        return A.__matmul__
    if form.device.type != "cpu" or form.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} is an operator of NumPy and SciPy, for which {form.name} must be float32 or float64 on the CPU, "
            f"got {form.dtype} on {form.device}"
        )
    matmat = getattr(A, "matmat", A.__matmul__)

    def multiply(X: Tensor) -> Tensor:
        Y = torch.from_numpy(np.ascontiguousarray(matmat(X.detach().numpy())))
        if not Y.is_floating_point():
            raise TypeError(f"{name} must give real floating-point numbers, got {Y.dtype}")
        return Y.to(form.dtype)  # SciPy's operators are of float64 unless told otherwise

    return multiply


def check_symmetry(A: Any, b: Any, *, probes: int = 3, seed: int = 0) -> None:
    """Raises ValueError unless qᵀ A p = pᵀ A q within rounding, for random p and q: 2 products per probe.

    An operator that is not symmetric in about 1e-4 of its norm is found out in float32, and in 1e-13 in float64.

    Args:
        A, b: as for `imaml_ext.cg`; of b the form alone counts. probes: pairs of normal vectors, drawn from `seed`.
    """
    system = System.read(A, b)
    like = system.b
    generator = torch.Generator().manual_seed(seed)
    worst = torch.zeros(len(like), dtype=torch.float64, device=like.device)
    for _ in range(probes):
        p, q = (torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like) for _ in range(2))
        Ap, Aq = (system.operator(v).detach().double() for v in (p, q))
        difference = ((q.double() * Ap).sum(1) - (p.double() * Aq).sum(1)).abs()
        worst = torch.maximum(worst, difference / (Ap.norm(dim=1) + Aq.norm(dim=1)).clamp(min=1e-300))
    wrong = ~(worst <= min(1000 * torch.finfo(like.dtype).eps, 0.1))  # NaN too
    if bool(wrong.any()):
        rows = wrong.nonzero().flatten().tolist()
        raise ValueError(
            f"A must be symmetric, got qᵀAp ≠ pᵀAq for random p and q in systems {rows[:8]}: they differ by "
            f"{float(worst.max()):.2g} of ‖Ap‖ + ‖Aq‖"
        )
