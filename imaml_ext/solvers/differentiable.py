"""The linear solve as a differentiable function of b, of the shift, and of what A depends on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.utils import _pytree as pytree

from imaml_ext.checks import check_choice
from imaml_ext.errors import SolveError, SolveWarning
from imaml_ext.ops import as_coefficient
from imaml_ext.ops.calls import is_traced, is_transformed
from imaml_ext.solvers import operators
from imaml_ext.solvers.cg import CG
from imaml_ext.solvers.form import Form
from imaml_ext.solvers.linear import LinearSolver, SetUp, Solution
from imaml_ext.solvers.operators import System, is_matrix, matrix_product, product_of

OnFailure = Literal["raise", "warn", "ignore"]
_UNNAMED = (
    "A must not reach tensors that require a gradient and are not in parameters: name them there, and take them as "
    "arguments after p, or detach them"
)
_RTOL = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_EAGER = {dtype: CG(max_iterations=1000, rtol=rtol, check_every=5) for dtype, rtol in _RTOL.items()}
_TRACED = {dtype: CG(max_iterations=100, rtol=rtol) for dtype, rtol in _RTOL.items()}


def default_solver(dtype: torch.dtype) -> CG:
    """Returns what `solve` solves by unless it is told."""
    return (_TRACED if is_traced() else _EAGER)[dtype]


@dataclass(eq=False)
class WarmStart:
    """Where a solve and its backward pass begin: at what they found the last time, in the loop around them.

    Give one object as `x0` to every call of one solve. A call of other shapes begins from 0.

    Attributes:
        x, u: rows [R, N] of the last solve and of the last backward pass, or None.
    """

    x: Tensor | None = None
    u: Tensor | None = None


def solve(
    A: Any,
    b: Any,
    *,
    parameters: Any = (),
    shift: Any = 0.0,
    x0: Any = None,
    linear_solver: LinearSolver | None = None,
    on_failure: OnFailure = "raise",
    on_solve: Callable[[Solution], None] | None = None,
    check_symmetry: bool = False,
) -> Solution:
    """Solves (A_b + diag(shift)) x_b = b_b as `imaml_ext.cg` does; x is differentiable, any number of times.

    The derivative is that of the exact solution, at the x that was found: for x̄ a second solve gives u = A⁻¹ x̄, and
    then b̄ = u, shift̄ = −u ⊙ x, and for a tensor w that A depends on w̄ = −∂/∂w (uᵀ A(w) x). Its accuracy is that of
    the two solves. Memory does not depend on the number of iterations.

    torch.func.grad and vmap can stand around it (the systems of a vmap are solved as one batch), and torch.compile with
    fullgraph=True, whose graph holds every one of max_iterations products.

    Args:
        A, b, shift, x0: as for `imaml_ext.cg`. A function is called as A(p, *parameters). The tensors of a dense or
            sparse A, and of an operator of linear_operator, are differentiable without being named.
        parameters: the tensors that a function A depends on and that take part in the derivative, or nested structures
            of them. A must not reach others that require a gradient. The products of the solve are those of detached
            parameters; one more, in the backward pass, is differentiated. So an A that calls `autograd.grad` must do so
            with create_graph=True.
        x0: also a `WarmStart`, for the backward pass too.
        linear_solver: unless given, `CG` with rtol 1e-8 in float64, 1e-4 in float32, 1e-2 in float16 and 3e-2 in
            bfloat16. It makes at most 1,000 products, and looks every 5 whether all rows are done; in a trace, 100.
        on_failure: of a row that does not end CONVERGED, here or in a backward pass: "raise" an error, "warn" by a
            `SolveWarning`, or "ignore". The first two wait for the device. In a trace, where no value can be looked at,
            they give that row NaN in place of x.
        on_solve: called with the `Solution` of every backward pass, in rows [R, N]. With `set_up`, as what is returned,
            where linear_solver makes a preconditioner; each pass makes its own.
        check_symmetry: as for `imaml_ext.cg`.

    Returns:
        A `Solution` whose x has a graph.

    Raises:
        TypeError, ValueError: as for `imaml_ext.cg`; or A reaches tensors that require a gradient and are not named.
        SolveError: see `on_failure`; also in the backward pass.

    Source: Christianson, Reverse accumulation and implicit functions (1998); Bai, Koltun, Kolter (2020).
    """
    check_choice("on_failure", on_failure, get_args(OnFailure))
    form = Form.of(b)
    if linear_solver is None:
        linear_solver = default_solver(form.dtype)
    elif not isinstance(linear_solver, LinearSolver):
        raise TypeError(f"linear_solver must be a LinearSolver such as CG(), got {type(linear_solver).__name__}")
    function, tensors = _parametrised(A, form, parameters)
    if check_symmetry:
        operators.check_symmetry(lambda p: function(p, *tensors), form.pack(b, "b"))
    rows = form.pack(b, "b")
    system = System(function, rows, form)
    warm = x0 if isinstance(x0, WarmStart) else WarmStart()
    start = warm.x if isinstance(x0, WarmStart) else system.rows(x0, "x0")
    check = not isinstance(A, Tensor)
    problem = _Problem(function, linear_solver, on_failure, on_solve, warm, check, torch.is_grad_enabled())
    shift_rows = as_coefficient(system.coefficient(shift, "shift"), "shift", rows)
    if isinstance(x0, WarmStart) and start is not None and (start.shape, start.dtype) != (rows.shape, rows.dtype):
        start = None
    if is_traced():  # of names of their own: a trace loses the derivative in a tensor that a transform has just wrapped
        tensors = tuple(tensor.view_as(tensor) for tensor in tensors)
    elif is_transformed() and check:
        product = function(rows.detach(), *(tensor.detach() for tensor in tensors))
        if product.requires_grad:
            raise ValueError(_UNNAMED)
    found = _Solve.apply(problem, rows, shift_rows, start, *tensors)
    if isinstance(x0, WarmStart) and not is_traced() and not is_transformed():
        warm.x = found[0].detach()
    return system.solution(problem.told(found))


def _parametrised(A: Any, form: Form, parameters: Any) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A as function(p [R, N], *tensors) -> [R, N], and the tensors."""
    if not isinstance(parameters, (tuple, list)):
        raise TypeError(f"parameters must be a tuple or a list, got {type(parameters).__name__}")
    if isinstance(A, Tensor) or is_matrix(A):
        if parameters:
            raise ValueError("parameters must be empty where A is no function, as its tensors are its own")
        if isinstance(A, Tensor) and A.layout != torch.strided:
            return _sparse(A, form)
        if isinstance(A, Tensor):
            product_of(A, form, "A")  # checks it, here and not in a trace of the function
            return lambda p, A: matrix_product(A.__matmul__, A.shape, form, form, "A")(p), (A,)
        if hasattr(A, "representation") and hasattr(A, "representation_tree"):  # linear_operator
            tree = A.representation_tree()
            return lambda p, *tensors: product_of(tree(*tensors), form, "A")(p), tuple(A.representation())
        return lambda p: product_of(A, form, "A")(p), ()
    leaves, spec = pytree.tree_flatten(tuple(parameters))
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"parameters must be tensors or nested structures of tensors, got {type(leaf).__name__}")
    marked = getattr(A, "multi_rhs", False)

    def function(p: Tensor, *tensors: Tensor) -> Tensor:
        def product(q: Any) -> Any:
            return A(q, *pytree.tree_unflatten(list(tensors), spec))

        product.multi_rhs = marked  # type: ignore[attr-defined]
        return product_of(product if callable(A) else A, form, "A")(p)

    return function, tuple(leaves)


def _sparse(A: Tensor, form: Form) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """By gathering and adding, which autograd differentiates any number of times in the entries that are there."""
    product_of(A.detach(), form, "A")  # checks it
    if A.layout != torch.sparse_coo and A.requires_grad and (A.layout != torch.sparse_csr or A.dim() == 3):
        raise ValueError(f"A must be sparse_coo, or a sparse_csr [N, N], to be differentiated, got {A.layout}")
    coo = A.to_sparse_coo().coalesce()
    *block, row, column = coo.indices().unbind()
    batch = A.shape[0] if block else 1
    size, rows = form.size, form.rows

    def function(p: Tensor, values: Tensor) -> Tensor:
        columns = form.columns if block else rows
        X = p.reshape(batch, columns, size).movedim(2, 1).reshape(batch * size, columns)
        base = block[0] * size if block else 0
        terms = values.unsqueeze(1) * X[base + column]
        return torch.zeros_like(X).index_add(0, base + row, terms).reshape(batch, size, columns).mT.reshape(rows, size)

    return function, (coo.values(),)


@dataclass(frozen=True, eq=False)
class _Problem:
    """What a solve is, beside its tensors."""

    function: Callable[..., Tensor]  # p [R, N], *parameters -> A p [R, N]
    solver: LinearSolver
    on_failure: OnFailure
    on_solve: Callable[[Solution], None] | None
    warm: WarmStart
    check: bool = False  # whether A might reach tensors that take part in a derivative
    differentiable: bool = False  # whether autograd records
    what: str = "systems of solve"
    set_ups: list[SetUp] = field(default_factory=list)  # what its solve has spent on a preconditioner, if it has one

    def backward(self) -> _Problem:
        return replace(self, check=False, what="systems of a backward pass of solve", set_ups=[])

    def told(self, found: Any) -> Solution:
        return replace(Solution(*found), set_up=self.set_ups[0] if self.set_ups else None)

    def solution(self, b: Tensor, shift: Tensor, x0: Tensor | None, parameters: tuple[Tensor, ...]) -> Solution:
        parameters = tuple(tensor.detach() for tensor in parameters)
        check = self.check and not is_traced()

        def operator(p: Tensor) -> Tensor:
            nonlocal check
            if is_traced():
                return self.function(p, *parameters)
            with torch.enable_grad():  # as A has it in `imaml_ext.cg`
                product = self.function(p, *parameters)
            if check and self.differentiable and reaches_others(product):
                raise ValueError(_UNNAMED)
            check = False
            return product.detach()

        solution = self.solver.solve_rows(operator, b, shift=shift, x0=x0)
        if solution.set_up is not None:
            self.set_ups.append(solution.set_up)
        if self.on_failure == "ignore":
            return solution
        if is_traced():
            failed = (solution.status != 0).unsqueeze(1)
            return replace(solution, x=torch.where(failed, torch.nan, solution.x))
        try:
            solution.raise_if_failed(what=self.what)
        except SolveError as error:
            if self.on_failure == "raise":
                raise
            warnings.warn(str(error), SolveWarning, stacklevel=2)
        return solution


def _references(leaf: Tensor) -> int:
    return sys.getrefcount(leaf)


def _references_of_the_graph() -> int:
    """What `_references` says of a leaf that a graph alone holds: another number in a backward pass, or torch."""
    with torch.enable_grad():
        node: Any = (2 * torch.zeros(1, requires_grad=True)).grad_fn
    leaf = node.next_functions[0][0].variable
    return _references(leaf)


def reaches_others(product: Tensor, but: Sequence[Tensor] = ()) -> bool:
    """Whether a product has a graph to a leaf that A has not made itself: one that somebody beside the graph holds.

    The leaves `but` do not count.
    """
    known_leaves = {id(leaf) for leaf in but}
    if product.is_leaf:
        return product.requires_grad and id(product) not in known_leaves
    waiting: list[Any] = [product.grad_fn]
    known: set[Any] = set()
    of_the_graph = _references_of_the_graph()
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known_leaves and _references(leaf) > of_the_graph:
            return True
        waiting += [following for following, _ in node.next_functions]
    return False


class _Solve(torch.autograd.Function):
    """problem, b [R, N], shift [1 or R, 1 or N], x0 [R, N] or None, *parameters -> x, status, iterations, ‖r‖."""

    @staticmethod
    def forward(
        problem: _Problem, b: Tensor, shift: Tensor, x0: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = problem.solution(b, shift, x0, parameters)
        return found.x, found.status, found.iterations, found.residual_norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        problem, _, shift, _, *parameters = inputs
        ctx.problem = problem
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[0], shift, *parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if not is_traced() and is_legacy_batchedtensor(grad):
            raise RuntimeError(
                "the gradient of solve is taken for one outer gradient at a time: use torch.func.vmap or jacrev in "
                "place of is_grads_batched=True and vectorize=True"
            )
        x, shift, *parameters = ctx.saved_tensors
        problem = ctx.problem.backward()
        needs = ctx.needs_input_grad
        u = _adjoint(problem, grad, shift, parameters)
        by_shift = (-u * x).sum_to_size(shift.shape) if needs[2] else None
        by_parameters: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if is_traced():  # which does not tell what a transform around it needs
            needs = (*needs[:4], *(w.is_floating_point() for w in parameters))
        if any(needs[4:]):
            by_parameters = _pulled_back(problem.function, x, parameters, -u, needs[4:])
        return None, u if needs[1] else None, by_shift, None, *by_parameters

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        """The systems of all samples as one batch [V R, N]."""
        problem, b, shift, x0, *parameters = inputs
        samples = info.batch_size

        def rows(value: Tensor, dim: int | None, size: int) -> Tensor:
            value = value.movedim(dim, 0) if dim is not None else value.unsqueeze(0)
            return value.expand(samples, size, value.shape[2]).reshape(samples * size, -1)

        _, b_dim, shift_dim, x0_dim, *parameter_dims = in_dims
        count = b.shape[0] if b_dim is None else b.movedim(b_dim, 0).shape[1]
        flat_b = rows(b, b_dim, count)
        flat_shift = shift if shift_dim is None and shift.shape[0] == 1 else rows(shift, shift_dim, count)
        flat_x0 = None if x0 is None else rows(x0, x0_dim, count)

        def function(p: Tensor, *tensors: Tensor) -> Tensor:
            each = torch.vmap(problem.function, in_dims=(0, *parameter_dims))
            return each(p.reshape(samples, count, -1), *tensors).reshape(p.shape)

        found = _Solve.apply(
            replace(problem, function=function, warm=WarmStart(), set_ups=[]), flat_b, flat_shift, flat_x0, *parameters
        )
        return tuple(value.reshape(samples, count, *value.shape[1:]) for value in found), (0, 0, 0, 0)


def _adjoint(problem: _Problem, grad: Tensor, shift: Tensor, parameters: list[Tensor]) -> Tensor:
    """u = A⁻¹ x̄, begun where the last backward pass has ended."""
    warm, plain = problem.warm, not is_traced() and not is_transformed()
    start = warm.u if plain and warm.u is not None and warm.u.shape == grad.shape else None
    found = _Solve.apply(problem, grad.contiguous(), shift, start, *parameters)
    if plain:
        if warm.x is not None:
            warm.u = found[0].detach()
        if problem.on_solve is not None:
            problem.on_solve(problem.told(tuple(value.detach() for value in found)))
    return found[0]


def _pulled_back(
    function: Callable[..., Tensor], x: Tensor, parameters: list[Tensor], cotangent: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """cotangentᵀ ∂(A x)/∂w for each w of the parameters, with a graph where the backward pass has one."""
    if is_transformed() or is_traced():
        real = [w for w in parameters if w.is_floating_point() or w.is_complex()]  # an index has no derivative

        def of_real(*tensors: Tensor) -> Tensor:
            rest = iter(tensors)
            return function(x, *(next(rest) if w.is_floating_point() or w.is_complex() else w for w in parameters))

        pulled = iter(torch.func.vjp(of_real, *real)[1](cotangent))
        return tuple(next(pulled) if w.is_floating_point() or w.is_complex() else None for w in parameters)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if create_graph:  # of other names, so that only what A itself makes of w counts, and not the way through x
            parameters = [w.view_as(w) for w in parameters]
        else:
            x, parameters = (
                x.detach(),
                [w.detach().requires_grad_(need) for w, need in zip(parameters, needs, strict=True)],
            )
        product = function(x, *parameters)
        wanted = [w for w, need in zip(parameters, needs, strict=True) if need]
        found: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if product.requires_grad:
            found = torch.autograd.grad(product, wanted, cotangent, create_graph=create_graph, allow_unused=True)
    if all(value is None for value in found):
        raise ValueError(
            "A must depend on its parameters by differentiable operations, got products that depend on none of them: "
            "an A that calls autograd.grad must do so with create_graph=True, and outside torch.no_grad"
        )
    rest = iter(found)
    given = ((w, next(rest)) if need else (w, None) for w, need in zip(parameters, needs, strict=True))
    return tuple(
        (torch.zeros_like(w) if value is None else value) if need else None
        for (w, value), need in zip(given, needs, strict=True)
    )
