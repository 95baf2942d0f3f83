"""Every form of A and b gives the solution of the dense systems that it means, in the form of b."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from imaml_ext import CG, MLP, Solution, TaskLoss, WarmStart, cg, solve
from imaml_ext.batch import TaskData
from imaml_ext.solvers import (
    MINRES,
    FixedPoint,
    Jacobi,
    Neumann,
    Nystrom,
    check_symmetry,
    extreme_eigenvalues,
    logdet,
    lsqr,
    minres,
    multi_rhs,
    multi_shift_cg,
    trace_of,
)

B, N, K = 3, 7, 5
DOUBLE = torch.float64
TIGHT = {"max_iterations": 60, "rtol": 1e-11}


def definite(*lead: int, size: int = N) -> Tensor:
    root = torch.randn(*lead, size, size, dtype=DOUBLE)
    return root @ root.mT / size + torch.eye(size, dtype=DOUBLE)


class Matmul:
    """An operator as other libraries write them: a shape and @, for tensors [(B,) N, K] alone."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.calls = matrix, matrix.shape, 0

    def __matmul__(self, X: Tensor) -> Tensor:
        assert X.dim() == self.matrix.dim()
        self.calls += 1
        return self.matrix @ X


def function(A: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda p: torch.einsum("...ij,...j->...i", A, p)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "function": function,
    "dense": lambda A: A,
    "coo": lambda A: A.to_sparse_coo(),
    "matmul": Matmul,
}


@pytest.mark.parametrize("form", FORMS)
def test_right_hand_sides_of_every_shape(form: str) -> None:
    A, b = definite(B), torch.randn(B, N, K, dtype=DOUBLE)
    exact = torch.linalg.solve(A, b)
    of = FORMS[form]
    for operator, right, solution, lead in (
        (of(A), b, exact, (B, K)),
        (of(A), b[:, :, :1], exact[:, :, :1], (B, 1)),
        (of(A), b[:, :, 0], exact[:, :, 0], (B,)),
        (of(A[0]), b[0, :, 0], exact[0, :, 0], ()),
        (of(A[0]), b[0].mT, exact[0].mT, (K,)),  # one matrix, shared by all rows
        (of(A[0]), b[:1], exact[:1], (1, K)),
    ):
        found = cg(operator, right, **TIGHT)
        assert found.x.shape == right.shape
        torch.testing.assert_close(found.x, solution, rtol=1e-9, atol=1e-9)
        for value in (found.status, found.iterations, found.residual_norm):
            assert value.shape == lead
        found.raise_if_failed()


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
@pytest.mark.parametrize("batched", [True, False])
def test_sparse_layouts(layout: torch.layout, batched: bool) -> None:
    if batched and layout != torch.sparse_coo:  # their blocks must hold equally many entries
        A = torch.diag_embed(1 + torch.rand(B, N, dtype=DOUBLE))
        sparse = A.to_sparse(layout=layout)
    else:
        A = definite(B) * (torch.rand(N, N) < 0.4).logical_or(torch.eye(N).bool())
        A = (A + A.mT) / 2 + N * torch.eye(N, dtype=DOUBLE)
        A = A if batched else A[0]
        sparse = A.to_sparse(layout=layout)
    b = torch.randn(B, N, dtype=DOUBLE)
    found = cg(sparse, b, shift=0.25, **TIGHT)
    exact = torch.linalg.solve(A + 0.25 * torch.eye(N, dtype=DOUBLE), b.unsqueeze(2))[:, :, 0]
    torch.testing.assert_close(found.x, exact, rtol=1e-9, atol=1e-9)


class Parts(NamedTuple):
    weight: Tensor
    rest: dict[str, Tensor]


def parts(flat: Tensor) -> Parts:
    rows = flat.shape[0]
    return Parts(flat[:, :4].reshape(rows, 2, 2), {"bias": flat[:, 4:6], "scale": flat[:, 6]})


def flat(tree: Parts) -> Tensor:
    rows = tree.weight.shape[0]
    return torch.cat([tree.weight.reshape(rows, 4), tree.rest["bias"], tree.rest["scale"].reshape(rows, 1)], 1)


@pytest.mark.parametrize(
    "solver",
    [CG(**TIGHT), MINRES(**TIGHT), Neumann(200, 1e-11), FixedPoint(0.02, 4000, 1e-11)],
    ids=lambda s: s.kind_name,
)
def test_structures_and_many_right_hand_sides_by_every_solver(solver: Any) -> None:
    A, b = definite(B) / 4, torch.randn(B, N, dtype=DOUBLE)
    shift = 3.0 + torch.rand(B, N, dtype=DOUBLE)
    exact = torch.linalg.solve(A + torch.diag_embed(shift), b.unsqueeze(2))[:, :, 0]
    for x0 in (None, parts(exact), parts(torch.randn(B, N, dtype=DOUBLE))):
        found = solver.solve(lambda p: parts(function(A)(flat(p))), parts(b), parts(shift), x0)
        found.raise_if_failed()
        assert isinstance(found.x, Parts)
        torch.testing.assert_close(flat(found.x), exact, rtol=1e-8, atol=1e-9)
    many = torch.randn(B, N, K, dtype=DOUBLE)
    found = solver.solve(A, many, shift)
    torch.testing.assert_close(found.x, torch.linalg.solve(A + torch.diag_embed(shift), many), rtol=1e-8, atol=1e-9)


def test_a_tensor_of_four_dimensions_is_a_structure() -> None:
    d, b = 1 + torch.rand(B, 2, 3, 2, dtype=DOUBLE), torch.randn(B, 2, 3, 2, dtype=DOUBLE)
    found = cg(lambda p: d * p, b, shift=torch.full_like(d, 0.5), preconditioner=1 / (d + 0.5), **TIGHT)
    torch.testing.assert_close(found.x, b / (d + 0.5))
    assert found.iterations.tolist() == [1] * B


def test_a_number_is_a_system() -> None:
    found = cg(lambda p: 4 * p, torch.tensor(2.0), max_iterations=3)
    assert float(found.x) == 0.5
    assert found.x.shape == found.status.shape == ()


def test_products_of_many_right_hand_sides_share_a_call_where_the_operator_can() -> None:
    A, b = definite(B), torch.randn(B, N, K, dtype=DOUBLE)
    shapes: list[torch.Size] = []

    def each(p: Tensor) -> Tensor:
        shapes.append(p.shape)
        return function(A)(p)

    @multi_rhs
    def together(p: Tensor) -> Tensor:
        shapes.append(p.shape)
        return A @ p

    one_by_one = cg(each, b, max_iterations=6)
    assert shapes == [torch.Size([B, N])] * (6 * K)
    shapes.clear()
    shared = cg(together, b, max_iterations=6)
    assert shapes == [torch.Size([B, N, K])] * 6
    torch.testing.assert_close(one_by_one.x, shared.x)
    operator = Matmul(A)
    cg(operator, b, max_iterations=6)
    assert operator.calls == 6


def test_what_there_is_one_of_per_system_with_many_right_hand_sides() -> None:
    A, b = definite(B), torch.randn(B, N, K, dtype=DOUBLE)
    exact = torch.linalg.solve(
        A + torch.diag_embed(torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)[:, None].expand(B, N)), b
    )
    shift = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)
    rtol = torch.logspace(-12, -3, B * K, dtype=DOUBLE).reshape(B, K)
    found = cg(
        A, b, shift=shift, rtol=rtol, max_iterations=60, x0=torch.randn_like(b), preconditioner=torch.ones(N).double()
    )
    found.raise_if_failed()
    residual = (b - A @ found.x - shift[:, None, None] * found.x).norm(dim=1)
    assert bool((residual <= rtol * b.norm(dim=1) * (1 + 1e-6)).all())
    again = cg(A, b, shift=shift, x0=found.x, max_iterations=0)
    torch.testing.assert_close(again.residual_norm, residual)
    by_function = cg(
        A, b, shift=shift, preconditioner=lambda r: torch.linalg.solve(A, r.unsqueeze(2))[:, :, 0], **TIGHT
    )
    torch.testing.assert_close(by_function.x, exact, rtol=1e-8, atol=1e-9)


def solved_backwards(A: Any, b: Tensor) -> Solution:
    solution = solve(A, b.requires_grad_(), x0=WarmStart(), check_symmetry=True)
    assert torch.autograd.grad(solution.x.sum(), b)[0].shape == b.shape
    return solution


OF_MANY: dict[str, Callable[[Any, Tensor], Solution]] = {
    "cg": lambda A, b: cg(A, b, check_symmetry=True, lanczos=True),
    "cg, preconditioned": lambda A, b: cg(A, b, shift=1.0, preconditioner=Nystrom()),
    "solve": solved_backwards,
    "minres": lambda A, b: minres(A, b, check_symmetry=True, check_every=2),
    "neumann": lambda A, b: Neumann().solve(A, b, shift=3.0),
    "fixed point": lambda A, b: FixedPoint(lr=0.1).solve(A, b),
    "lsqr": lambda A, b: lsqr(A, b, n=b.shape[0 if b.dim() == 1 else 1], check_adjoint=True),
}
OF_ONE: dict[str, Callable[[Any, Tensor], Any]] = {
    "multi-shift": lambda A, b: multi_shift_cg(A, b, torch.tensor([0.0, 1.0])),
    "traces": lambda A, b: trace_of(A, torch.exp, b, generator=torch.Generator(), definite=False, probes=1),
    "log-determinants": lambda A, b: logdet(A, b, generator=torch.Generator(), probes=1),
    "eigenvalues": lambda A, b: extreme_eigenvalues(A, b, generator=torch.Generator()),
}


@pytest.mark.parametrize("entry", [*OF_MANY, *OF_ONE])
def test_no_systems_and_systems_of_no_unknowns(entry: str) -> None:
    for shape in ((0,), (0, N), (B, 0), (0, 0), (B, 0, K), (0, N, K)):
        size = shape[min(1, len(shape) - 1)]
        shared, each = torch.eye(size), torch.eye(size).repeat(*shape[:1], 1, 1)
        for A in (lambda p: p, shared, shared.to_sparse(), *((each, each.to_sparse()) if len(shape) > 1 else ())):
            if entry in OF_MANY:
                solution = OF_MANY[entry](A, torch.zeros(shape))
                assert solution.x.shape == shape
                assert not solution.status.any()
            elif len(shape) == 3 or (size == 0 and entry != "multi-shift"):
                with pytest.raises(ValueError, match=r"(b|like) must have (one right-hand|at least one unknown)"):
                    OF_ONE[entry](A, torch.zeros(shape))
            else:
                OF_ONE[entry](A, torch.zeros(shape))
    parts = {"a": torch.zeros(0, 2, 3), "b": torch.zeros(0, 4)}
    assert cg(lambda p: p, parts).x["a"].shape == (0, 2, 3)


def test_operators_of_scipy() -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    sparse = pytest.importorskip("scipy.sparse")
    A, b = definite(), torch.randn(B, N, K, dtype=DOUBLE)
    exact = torch.linalg.solve(A, b)
    products: list[np.ndarray] = []
    lazy = linalg.LinearOperator((N, N), matvec=lambda x: (products.append(x), A.numpy() @ x)[1], dtype=np.float64)
    for operator in (linalg.aslinearoperator(A.numpy()), sparse.csr_array(A.numpy()), lazy):
        torch.testing.assert_close(cg(operator, b[:, :, 0], **TIGHT).x, exact[:, :, 0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(cg(operator, b[0, :, 0], **TIGHT).x, exact[0, :, 0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(cg(operator, b, **TIGHT).x, exact, rtol=1e-9, atol=1e-9)
        single = cg(operator, b[0, :, 0].float(), max_iterations=60)
        assert single.x.dtype == torch.float32
    assert products
    with pytest.raises(
        ValueError, match="A is an operator of NumPy and SciPy, for which b must be float32 or float64 on"
    ):
        cg(lazy, torch.ones(N, dtype=torch.bfloat16))


def test_the_batched_operators_of_scipy() -> None:
    """SciPy 1.18: shape (B, N, N), and matmat of [B, N, K]. The class here has what is called of theirs."""
    A, b = definite(B), torch.randn(B, N, K, dtype=DOUBLE)
    linalg = pytest.importorskip("scipy.sparse.linalg")

    class Batched(Matmul):
        def matmat(self, X: np.ndarray) -> np.ndarray:
            assert isinstance(X, np.ndarray)
            return self.matrix.numpy() @ X

    Batched.__module__ = linalg.LinearOperator.__module__
    torch.testing.assert_close(cg(Batched(A), b, **TIGHT).x, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        cg(Batched(A), b[:, :, 0], **TIGHT).x, torch.linalg.solve(A, b)[:, :, 0], rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("solve", [cg, CG(60).solve], ids=["cg", "CG"])
def test_bad_forms_are_named(solve: Callable[..., Any]) -> None:
    A, b = definite(B), torch.randn(B, N, dtype=DOUBLE)
    tree = parts(b)
    for error, words, arguments, options in (
        (TypeError, "A must be a function, a matrix or an operator .*got int", (3, b), {}),
        (TypeError, "b must be a tensor or a nested structure of tensors, got str", (A, "b"), {}),
        (TypeError, "every tensor of b must be a tensor, got float", (A, [b, 1.0]), {}),
        (TypeError, "b must be float32, .*got torch.int64", (A, b.long()), {}),
        (ValueError, r"at least one right-hand side, got \[3, 7, 0\] \(K = 0\)", (A, b.new_zeros(B, N, 0)), {}),
        (ValueError, r"A must have shape \[7, 7\] or \[3, 7, 7\], .*got \[3, 7, 6\]", (A[:, :, :6], b), {}),
        (ValueError, r"A must have shape \[7, 7\] or \[3, 7, 7\], .*got \[2, 7, 7\]", (A[:2], b), {}),
        (ValueError, r"A must have shape \[7, 7\], .*got \[3, 7, 7\]", (A, b[0]), {}),
        (ValueError, r"A must have shape .*got \[7\]", (A[0, 0], b), {}),
        (TypeError, "A must have the dtype of b, torch.float64, got torch.float32", (A.float(), b), {}),
        (ValueError, "A must have the device of b, cpu, got meta", (A.to("meta"), b), {}),
        (ValueError, "one dtype and device, got .* on cpu and .* on meta", (A, [b, b.to("meta")]), {}),
        (ValueError, r"the same number of rows \[B, …\], got \[\[3, 7\], \[2, 7\]\]", (A, [b, b[:2]]), {}),
        (ValueError, "x0 must have the structure of b, .*got Parts", (lambda p: p, [b]), {"x0": tree}),
        (ValueError, r"x0 must have the shape of b, \[3, 7\], got \[3, 6\]", (A, b), {"x0": b[:, :6]}),
        (ValueError, "x0 must have the device of b, cpu, got meta", (A, b), {"x0": b.to("meta")}),
        (ValueError, "what A returns must have the structure of b", (lambda p: [p.weight], tree), {}),
        (ValueError, r"what A returns must have the shape of b, \[7\], got \[6\]", (lambda p: p[:6], b[0]), {}),
        (
            ValueError,
            "A must return .* a product of one column",
            (lambda p: p[:, :2], b.unsqueeze(2).repeat(1, 1, 2)),
            {},
        ),
        (ValueError, "shift must be a number or have the structure of b", (lambda p: p, tree), {"shift": [1.0]}),
        (ValueError, "every part of shift must broadcast", (lambda p: p, [b]), {"shift": [torch.ones(5)]}),
    ):
        with pytest.raises(error, match=words):
            solve(*arguments, **options)
    for words, options in (
        ("rtol must be a number or have shape", {"rtol": torch.ones(2)}),
        ("rows_per_block must be None where b is not", {"rows_per_block": 1}),
    ):
        with pytest.raises(ValueError, match=words):
            cg(A, b.unsqueeze(2), **options)


def test_symmetry_is_checked_on_request() -> None:
    for dtype, seen, hidden in ((torch.float64, 1e-9, 1e-18), (torch.float32, 1e-1, 1e-9), (torch.bfloat16, 5.0, 1e-9)):
        A = definite(B, size=40).to(dtype)
        b = torch.randn(B, 40, dtype=dtype)
        skew = torch.randn(40, 40, dtype=dtype)
        cg(A, b, check_symmetry=True)
        check_symmetry(A + hidden * skew, b)
        wrong = A.clone()
        wrong[1] += seen * (skew - skew.mT)
        with pytest.raises(ValueError, match=r"A must be symmetric, got qᵀAp ≠ pᵀAq .* in systems \[1\]"):
            cg(wrong, b, check_symmetry=True)
        with pytest.raises(ValueError, match="A must be symmetric"):
            check_symmetry(lambda p, wrong=wrong: [function(wrong)(p[0])], [b])


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize(("tasks", "columns"), [(1, 23), (1, 1), (B, K), (B, 1)])
def test_many_right_hand_sides_on_the_curvature_of_a_network(engine: str, kind: str, tasks: int, columns: int) -> None:
    """By blocks of some of them, of tasks, or all at once: as one by one, to the last bit of the native engine."""
    model = MLP(2, (5,), 3)
    loss = TaskLoss(model, "cross_entropy", engine=engine)
    phi = torch.randn(tasks, model.num_parameters, dtype=DOUBLE)
    data = TaskData(torch.randn(tasks, 4, 2, dtype=DOUBLE), torch.randint(3, (tasks, 4)))
    operator = loss.linearize(phi, data, kind)
    b = torch.randn(tasks, model.num_parameters, columns, dtype=DOUBLE)
    made = Nystrom(rank=7).make(operator, b[:, :, 0], 30.0)
    x0 = made(b)
    for options in ({}, {"preconditioner": made}, {"preconditioner": made, "x0": x0}):
        found = cg(operator, b, shift=30.0, max_iterations=80, rtol=1e-10, check_every=3, **options)
        found.raise_if_failed()
        for k in range(columns):
            warm = {name: v[:, :, k].contiguous() if name == "x0" else v for name, v in options.items()}
            one = cg(operator, b[:, :, k].contiguous(), shift=30.0, max_iterations=80, rtol=1e-10, **warm)
            torch.testing.assert_close(found.x[:, :, k], one.x, rtol=1e-8, atol=1e-10)
            if engine == "native" and not options:
                assert torch.equal(found.x[:, :, k], one.x)
            assert found.iterations[:, k].tolist() == one.iterations.tolist()


def test_an_operator_may_return_the_same_memory_again() -> None:
    d, b = 1 + torch.rand(2, N, dtype=DOUBLE), torch.randn(2, N, K, dtype=DOUBLE)
    memory = torch.empty(2, N, dtype=DOUBLE)
    found = cg(lambda p: torch.mul(d, p, out=memory), b, x0=torch.randn_like(b), **TIGHT)
    torch.testing.assert_close(found.x, b / d.unsqueeze(2), rtol=1e-9, atol=1e-9)
    shifts = torch.tensor([0.5, 0.0, 2.0], dtype=DOUBLE)
    path = multi_shift_cg(lambda p: torch.mul(d, p, out=memory), b[:, :, 0], shifts, check_every=1, **TIGHT)
    torch.testing.assert_close(path.x, b[:, None, :, 0] / (d[:, None] + shifts[:, None]), rtol=1e-9, atol=1e-9)


def test_a_product_of_another_dtype_is_an_error_in_every_form() -> None:
    tree, many = [torch.ones(B, N, dtype=DOUBLE)] * 2, torch.ones(B, N, K, dtype=DOUBLE)
    for operator, b in (
        (lambda p: [p[0], p[1].float()], tree),
        (lambda p: p.float(), many),
        (lambda p: p.float(), many[0, 0]),
    ):
        with pytest.raises(TypeError, match="what A returns must have the dtype of b"):
            cg(operator, b)


def test_coefficients_of_one_system_and_of_many_columns() -> None:
    A = definite(B)
    for b in (torch.randn(N, dtype=DOUBLE), torch.randn(B, N, K, dtype=DOUBLE)):
        lead = cg(A if b.dim() > 1 else A[0], b, lanczos=True, max_iterations=4).lanczos
        assert lead is not None
        assert lead.diagonal.shape == (*b.shape[:1], *b.shape[2:], 4)[0 if b.dim() > 1 else 1 :]
    with pytest.raises(ValueError, match="shift must be a number"):
        cg(A[0], torch.ones(N, dtype=DOUBLE), shift=torch.ones(2, 2, dtype=DOUBLE))


def test_rows_some_at_a_time_with_what_multiplies_all_of_them() -> None:
    d, b = 1 + torch.rand(B, N, dtype=DOUBLE), torch.randn(B, N, dtype=DOUBLE)
    options: dict[str, Any] = {"rows_per_block": 2, "check_symmetry": True, **TIGHT}
    found = cg(lambda p, rows: d[rows] * p, b, preconditioner=Jacobi(probes=1), **options)
    torch.testing.assert_close(found.x, b / d)
    assert found.iterations.tolist() == [1] * B
    torch.testing.assert_close(minres(lambda p, rows: d[rows] * p, b, **options).x, b / d)
