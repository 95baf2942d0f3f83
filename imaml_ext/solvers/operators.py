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

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext.ops import as_coefficient

if TYPE_CHECKING:
    from imaml_ext.solvers.linear import Solution

Product = Callable[[Tensor], Tensor]  # p [R, N] -> A p [R, N], row r from row r alone
F = TypeVar("F", bound=Callable[..., Any])
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def multi_rhs(function: F) -> F:
    """Marks a function p [B, N, K] -> A p [B, N, K], of K vectors for each of B operators, column k from column k."""
    function.multi_rhs = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Form:
    """How b is written: `pack` makes rows [R, N] of what is written so, and `unpack` the opposite.

    Attributes:
        lead: the shape of what there is one of per system: (), (B,) or (B, K). shapes: those of the leaves of b.
        spec: the structure of b; None for a tensor. name: of the argument b, for messages.
    """

    lead: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    spec: pytree.TreeSpec | None
    dtype: torch.dtype
    device: torch.device
    name: str = "b"

    @classmethod
    def of(cls, b: Any, name: str = "b") -> Form:
        """Raises TypeError or ValueError for what is no right-hand side."""
        if isinstance(b, Tensor):
            _check_leaf(b, name, b)
            lead: tuple[int, ...] = tuple(b.shape[:1]) if b.dim() > 1 else ()
            if b.dim() == 3:
                lead = (b.shape[0], b.shape[2])
                if b.shape[2] == 0:
                    raise ValueError(f"{name} must have at least one right-hand side, got {list(b.shape)} (K = 0)")
            return cls(lead, (b.shape,), None, b.dtype, b.device, name)
        leaves, spec = pytree.tree_flatten(b)
        if not leaves or spec.is_leaf():
            raise TypeError(f"{name} must be a tensor or a nested structure of tensors, got {_name(b)}")
        for leaf in leaves:
            _check_leaf(leaf, f"every tensor of {name}", leaves[0])
            if leaf.dim() == 0 or leaf.shape[0] != leaves[0].shape[0]:
                raise ValueError(
                    f"every tensor of {name} must have the same number of rows [B, …], got "
                    f"{[list(x.shape) for x in leaves]}"
                )
        shapes = tuple(leaf.shape for leaf in leaves)
        return cls((shapes[0][0],), shapes, spec, leaves[0].dtype, leaves[0].device, name)

    @property
    def rows(self) -> int:
        return math.prod(self.lead)

    @property
    def size(self) -> int:
        """N, the unknowns of one system."""
        return sum(math.prod(self._row_shape(shape)) for shape in self.shapes)

    @property
    def columns(self) -> int:
        """K."""
        return self.lead[1] if len(self.lead) == 2 else 1

    def _row_shape(self, shape: torch.Size) -> torch.Size:
        if len(self.lead) == 2:
            return shape[1:2]
        return shape[len(self.lead) :]

    def pack(self, value: Any, name: str) -> Tensor:
        """Rows [R, N] of what is written as b is."""
        leaves = [value]
        if self.spec is not None:
            leaves, spec = pytree.tree_flatten(value)
            if spec != self.spec:
                raise ValueError(
                    f"{name} must have the structure of {self.name}, {_words(self.spec)}, got {_words(spec)}"
                )
        for leaf, shape in zip(leaves, self.shapes, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{name} must be a tensor where {self.name} is, got {_name(leaf)}")
            if leaf.shape != shape:
                raise ValueError(f"{name} must have the shape of {self.name}, {list(shape)}, got {list(leaf.shape)}")
            if leaf.device != self.device:
                raise ValueError(f"{name} must have the device of {self.name}, {self.device}, got {leaf.device}")
            self.check_dtype(leaf, name)
        if len(self.lead) == 2:
            return leaves[0].mT.reshape(self.rows, self.size)
        if len(leaves) == 1:
            return leaves[0].reshape(self.rows, self.size)
        return torch.cat([leaf.reshape(self.rows, math.prod(leaf.shape[1:])) for leaf in leaves], 1)

    def check_dtype(self, value: Tensor, name: str) -> None:
        """Raises TypeError unless it is that of b. Under autocast, that dtype will do for a product."""
        device = self.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if value.dtype != self.dtype and not (autocast and value.dtype == torch.get_autocast_dtype(device)):
            raise TypeError(f"{name} must have the dtype of {self.name}, {self.dtype}, got {value.dtype}")

    def unpack(self, rows: Tensor) -> Any:
        """Rows [R, N], written as b is; views where that is possible."""
        if len(self.lead) == 2:
            return rows.reshape(*self.lead, rows.shape[1]).mT
        if self.spec is None:
            return rows.reshape(self.shapes[0])
        sizes = [math.prod(shape[1:]) for shape in self.shapes]
        leaves = [part.reshape(shape) for part, shape in zip(rows.split(sizes, 1), self.shapes, strict=True)]
        return pytree.tree_unflatten(leaves, self.spec)


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
            raise ValueError(f"{name} must be a number or have the structure of b, {_words(form.spec)}")
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

    def solution(self, flat: Solution) -> Solution:
        """The solution of the rows, in the form of b."""
        form = self.form
        if form is None:
            return flat
        values = {name: v for name, v in vars(flat).items() if name != "x" and isinstance(v, Tensor)}
        scalars: dict[str, Any] = {name: v.reshape(form.lead) for name, v in values.items()}
        lanczos = flat.lanczos
        if lanczos is not None:
            lanczos = type(lanczos)(*(v.reshape((*form.lead, *v.shape[1:])) for v in vars(lanczos).values()))
        return replace(flat, x=form.unpack(flat.x), lanczos=lanczos, **scalars)


def product_of(A: Any, form: Form, name: str, result: Form | None = None) -> Product:
    """An operator in any form, as p [R, N] -> A p [R, N] for the rows of `form`; [R, M] where `result` has M."""
    result = result or form
    if isinstance(A, Tensor):
        return matrix_product(_tensor(A, form, name), A.shape, form, result, name)
    if is_matrix(A):
        return matrix_product(_multiplication(A, form, name), A.shape, form, result, name)
    if not callable(A):
        raise TypeError(f"{name} must be a function, a matrix or an operator that has a shape and @, got {_name(A)}")
    if len(form.lead) == 2 and not getattr(A, "multi_rhs", False):
        batch, columns = form.lead
        wide = A.repeated(columns) if hasattr(A, "repeated") else None  # a curvature operator
        if wide is not None:
            return wide

        def column(part: Tensor) -> Tensor:
            product = A(part)
            if not isinstance(product, Tensor) or product.shape != (batch, result.size):
                got = list(product.shape) if isinstance(product, Tensor) else _name(product)
                raise ValueError(f"{name} must return [{batch}, {result.size}], a product of one column, got {got}")
            result.check_dtype(product, f"what {name} returns")
            return product

        return column_by_column(column, batch, columns)
    return lambda p: result.pack(A(form.unpack(p)), f"what {name} returns")


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
            got = list(Y.shape) if isinstance(Y, Tensor) else _name(Y)
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
    return lambda X: (blocks @ X.reshape(batch * width, -1)).reshape(batch, height, X.shape[-1])


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


def _check_leaf(leaf: Any, name: str, first: Tensor) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{name} must be a tensor, got {_name(leaf)}")
    if leaf.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {leaf.dtype}")
    if leaf.dtype != first.dtype or leaf.device != first.device:
        raise ValueError(
            f"{name} must have one dtype and device, got {first.dtype} on {first.device} and {leaf.dtype} on "
            f"{leaf.device}"
        )


def _name(value: Any) -> str:
    return type(value).__name__


def _words(spec: pytree.TreeSpec | None) -> str:
    """A structure with a dot for each tensor: {'w': ·, 'b': ·}."""
    assert spec is not None
    return str(pytree.tree_unflatten(["·"] * spec.num_leaves, spec)).replace("'·'", "·")


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
