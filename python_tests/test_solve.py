"""imaml_ext.solve: derivatives against finite differences and closed forms, transforms, torch.compile, failures."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from imaml_ext import CG, Solution, SolveError, SolveWarning, WarmStart, cg, solve
from imaml_ext.solvers import MINRES

B, N, K = 2, 4, 3
DOUBLE = torch.float64
TIGHT = CG(max_iterations=40, rtol=1e-12, check_every=1)


def definite(W: Tensor) -> Tensor:
    return W @ W.mT / 4 + torch.eye(N, dtype=W.dtype)


def product(p: Tensor, A: Tensor) -> Tensor:
    return torch.einsum("...ij,...j->...i", A, p)


def tree(flat: Tensor) -> dict[str, Tensor]:
    return {"a": flat[:, :2], "c": flat[:, 2:].reshape(-1, 2, 1)}


def flat(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([parts["a"], parts["c"].reshape(-1, 2)], 1)


def of_structures(b: Tensor, W: Tensor, s: Tensor) -> Tensor:
    def multiply(p: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
        return tree(product(flat(p), definite(given["W"])))

    return flat(solve(multiply, tree(b), parameters=({"W": W},), shift=s, linear_solver=TIGHT).x)


CASES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "function": lambda b, W, s: solve(product, b, parameters=(definite(W),), shift=s, linear_solver=TIGHT).x,
    "dense": lambda b, W, s: solve(definite(W), b, shift=s, linear_solver=TIGHT).x,
    "sparse": lambda b, W, s: solve(definite(W).to_sparse_coo(), b, shift=s, linear_solver=TIGHT).x,
    "shared sparse": lambda b, W, s: solve(definite(W)[0].to_sparse_coo(), b, shift=s, linear_solver=TIGHT).x,
    "columns": lambda b, W, s: (
        solve(definite(W), b.unsqueeze(2) * torch.arange(1.0, 3), shift=s, linear_solver=TIGHT).x
    ),
    "one system": lambda b, W, s: solve(definite(W)[0], b[0], shift=s[0], linear_solver=TIGHT).x,
    "structures": of_structures,
    "minres": lambda b, W, s: solve(definite(W) - 3 * torch.eye(N), b, shift=s, linear_solver=MINRES(60, 1e-12)).x,
}


def inputs(*, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    b, W = torch.randn(B, N, dtype=DOUBLE), torch.randn(B, N, N, dtype=DOUBLE)
    s = 0.5 + torch.rand(B, dtype=DOUBLE)
    return tuple(value.requires_grad_(grad) for value in (b, W, s))  # type: ignore[return-value]


@pytest.mark.parametrize("case", CASES)
def test_first_and_second_derivatives_in_every_argument(case: str) -> None:
    assert gradcheck(CASES[case], inputs())
    assert gradgradcheck(CASES[case], inputs())


@pytest.mark.parametrize("shape", [(), (N,), (B, N)])
def test_derivatives_in_shifts_of_every_shape(shape: tuple[int, ...]) -> None:
    b, W, _ = inputs()
    s = (0.5 + torch.rand(shape, dtype=DOUBLE)).requires_grad_()
    assert gradcheck(CASES["function"], (b, W, s))


def test_the_derivative_is_that_of_a_direct_solve() -> None:
    b, W, s = inputs()
    v = torch.randn(B, N, dtype=DOUBLE)
    exact = torch.linalg.solve(definite(W) + torch.diag_embed(s.unsqueeze(1).expand(B, N)), b.unsqueeze(2))[:, :, 0]
    expected = torch.autograd.grad((exact * v).sum(), (b, W, s))
    for case in ("function", "dense", "sparse", "structures"):
        found = torch.autograd.grad((CASES[case](b, W, s) * v).sum(), (b, W, s))
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9)


def test_a_scalar_right_hand_side_has_its_gradient() -> None:
    b, a = torch.tensor(3.0, dtype=DOUBLE, requires_grad=True), torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)
    x = solve(lambda p, a: a * p, b, parameters=(a,), linear_solver=TIGHT).x
    grads = torch.autograd.grad(x, (b, a))
    assert [float(value) for value in (x, *grads)] == pytest.approx([1.5, 0.5, -0.75])


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (1, 2, 1)])
def test_vmap_equals_a_loop(dims: tuple[int | None, ...]) -> None:
    samples = 3
    every = [
        torch.stack([v.detach() for v in values]) for values in zip(*(inputs() for _ in range(samples)), strict=True)
    ]
    arguments = [v[0] if d is None else v.movedim(0, d) for v, d in zip(every, dims, strict=True)]
    for case in ("function", "structures", "one system"):
        found = torch.func.vmap(CASES[case], in_dims=dims)(*arguments)
        for i in range(samples):
            one = CASES[case](*[v if d is None else v.select(d, i) for v, d in zip(arguments, dims, strict=True)])
            assert torch.equal(found[i], one)


def test_grad_and_vmap_of_torch_func() -> None:
    def outer(b: Tensor, W: Tensor, s: Tensor) -> Tensor:
        return (CASES["function"](b, W, s) ** 3).sum()

    every = [inputs() for _ in range(3)]
    stacked = [torch.stack([v.detach() for v in values]) for values in zip(*every, strict=True)]
    together = torch.func.vmap(torch.func.grad(outer, (0, 1, 2)))(*stacked)
    for i, one in enumerate(every):
        for found, expected in zip(together, torch.autograd.grad(outer(*one), one), strict=True):
            torch.testing.assert_close(found[i], expected, rtol=1e-10, atol=1e-10)
    b, W, s = (v.detach() for v in every[0])
    hessian = torch.func.jacrev(torch.func.grad(lambda b: outer(b, W, s)))(b)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(lambda b: outer(b, W, s), b))


def test_one_full_graph_under_torch_compile() -> None:
    """Its bits are those of an eager solve: the same fused ops, in a graph."""
    few = CG(max_iterations=5, rtol=1e-12)

    def outer(b: Tensor, W: Tensor, s: Tensor) -> Tensor:
        data = 2 * b.detach()
        found = solve(lambda p, A: product(p, A) + 0 * data, b, parameters=(definite(W),), shift=s, linear_solver=few)
        return (found.x**2).sum()

    arguments = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(outer, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        torch.autograd.grad(compiled(*arguments), arguments),
        torch.autograd.grad(outer(*arguments), arguments),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.long
def test_compiled_by_inductor() -> None:
    b, W, s = inputs()
    few = CG(max_iterations=5, rtol=1e-12)

    def outer(b: Tensor, W: Tensor, s: Tensor) -> Tensor:
        return (solve(definite(W), b, shift=s, linear_solver=few).x ** 2).sum()

    torch._dynamo.reset()
    found = torch.autograd.grad(torch.compile(outer, fullgraph=True)(b, W, s), (b, W, s))
    for value, expected in zip(found, torch.autograd.grad(outer(b, W, s), (b, W, s)), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch._dynamo.reset()


def test_a_trace_marks_failed_rows() -> None:
    """No value can be looked at in a graph, so that a row that does not converge is NaN there."""
    A = torch.diag_embed(torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 10.0, 100.0, 1000.0]], dtype=DOUBLE))
    b, two = torch.ones(B, N, dtype=DOUBLE), CG(max_iterations=2, rtol=1e-12)
    torch._dynamo.reset()
    for on_failure, is_nan in (("raise", [False, True]), ("ignore", [False, False])):
        call = torch.compile(
            lambda b, how=on_failure: solve(A, b, linear_solver=two, on_failure=how).x, fullgraph=True, backend="eager"
        )
        assert call(b).isnan().any(1).tolist() == is_nan
    torch._dynamo.reset()


def test_an_operator_that_differentiates_a_function_of_its_own() -> None:
    """A Hessian-vector product by two calls of autograd.grad, about a leaf that A makes in every call."""
    phi, b = torch.randn(B, N, dtype=DOUBLE), torch.randn(B, N, dtype=DOUBLE, requires_grad=True)

    def hvp(p: Tensor, theta: Tensor, *, create_graph: bool = True) -> Tensor:
        here = phi.clone().requires_grad_()
        loss = (torch.log(1 + torch.exp(here * theta)) + here**2).sum()
        (gradient,) = torch.autograd.grad(loss, here, create_graph=True)
        return torch.autograd.grad(gradient, here, p, create_graph=create_graph)[0]

    theta = torch.rand(N, dtype=DOUBLE, requires_grad=True)
    assert gradcheck(lambda b, theta: solve(hvp, b, parameters=(theta,), linear_solver=TIGHT).x, (b, theta))
    found = solve(lambda p, t: hvp(p, t, create_graph=False), b, parameters=(theta,)).x
    with pytest.raises(
        ValueError, match=r"A must depend on its parameters .* autograd.grad must do so with create_graph"
    ):
        found.sum().backward()
    found = solve(lambda p, t: product(p, definite(t.detach().diag_embed())[0]), b[0], parameters=(theta[None],)).x
    with pytest.raises(ValueError, match="A must depend on its parameters by differentiable operations"):
        found.sum().backward()


def test_a_parameter_that_nothing_depends_on_has_a_gradient_of_zero() -> None:
    b, W, s = inputs()
    x = solve(lambda p, A, unused: product(p, A), b, parameters=(definite(W), s)).x
    assert not torch.autograd.grad(x.sum(), s)[0].any()


@pytest.mark.parametrize(
    ("dtype", "condition"), [(DOUBLE, 1e4), (torch.float32, 100.0), (torch.bfloat16, 4.0)], ids=str
)
def test_the_defaults_serve_every_type(dtype: torch.dtype, condition: float) -> None:
    Q = torch.linalg.qr(torch.randn(B, 100, 100, dtype=DOUBLE)).Q
    A = ((Q * torch.logspace(0, -math.log10(condition), 100, dtype=DOUBLE)) @ Q.mT).to(dtype)
    solve(A, torch.randn(B, 100).to(dtype))


def test_a_tensor_that_was_not_told_of_is_an_error() -> None:
    b, W, _ = inputs()
    with pytest.raises(ValueError, match="A must not reach tensors that require a gradient and are not in parameters"):
        solve(lambda p: product(p, definite(W)), b)
    with torch.no_grad():
        solve(lambda p: product(p, definite(W)), b)
    with pytest.raises(ValueError, match="parameters must be empty where A is no function"):
        solve(definite(W), b, parameters=(W,))
    with pytest.raises(TypeError, match="parameters must be a tuple or a list, got Tensor"):
        solve(product, b, parameters=W)
    with pytest.raises(TypeError, match="parameters must be tensors or nested structures of tensors, got float"):
        solve(product, b, parameters=(1.0,))
    with pytest.raises(TypeError, match="linear_solver must be a LinearSolver such as CG"):
        solve(definite(W), b, linear_solver=3)
    with pytest.raises(ValueError, match="A must be symmetric"):
        solve(W, b, check_symmetry=True)


def test_failures_are_raised_or_reported_forward_and_backward() -> None:
    d = torch.tensor([[1.0, 1.0], [1.0, 50.0]], dtype=DOUBLE, requires_grad=True)
    b = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=DOUBLE, requires_grad=True)
    short = CG(max_iterations=2, rtol=1e-9)

    def x(on_failure: str, **options: Any) -> Solution:
        return solve(lambda p, d: d * p, b, parameters=(d,), linear_solver=short, on_failure=on_failure, **options)

    with pytest.raises(SolveError, match="MAX_ITERATIONS in 1 of 2 systems of solve"):
        x("raise")
    with pytest.warns(SolveWarning, match="MAX_ITERATIONS in 1 of 2 systems of solve"):
        x("warn")
    assert x("ignore").status.tolist() == [0, 1]
    # Forward from the exact solution, so that the backward pass alone fails.
    exact = (b / d).detach()
    with pytest.raises(SolveError, match="1 of 2 systems of a backward pass of solve"):
        x("raise", x0=exact).x.sum().backward()
    told: list[Solution] = []
    with pytest.warns(SolveWarning, match="a backward pass of solve"):
        x("warn", x0=exact, on_solve=told.append).x.sum().backward()
    assert told[0].status.tolist() == [0, 1]


def test_a_warm_start_serves_the_backward_pass_too() -> None:
    b, W, s = inputs()
    warm, told = WarmStart(), []
    solver = CG(max_iterations=40, rtol=1e-8, check_every=1)
    for _ in range(2):
        found = solve(definite(W), b, shift=s, x0=warm, linear_solver=solver, on_solve=told.append)
        (found.x**2).sum().backward()
    assert found.iterations.tolist() == told[1].iterations.tolist() == [0, 0]
    assert min(told[0].iterations.tolist()) > 0
    # Another shape begins afresh.
    assert solve(definite(W)[:1], b[:1], x0=warm, linear_solver=solver).status.tolist() == [0]


def test_memory_does_not_grow_with_the_iterations() -> None:
    d = torch.linspace(1, 30, 500, dtype=DOUBLE).repeat(2, 1).requires_grad_()
    kept = []
    for count in (5, 50):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
            kept.clear()
            found = solve(
                lambda p, d: d * p, d.detach() * 2, parameters=(d,), linear_solver=CG(count), on_failure="ignore"
            )
            assert sum(kept) <= 3 * d.numel()
        found.x.sum().backward()
        del found
        gc.collect()


def test_the_solution_is_that_of_cg() -> None:
    b, W, s = inputs(grad=False)
    direct = cg(definite(W), b, shift=s, max_iterations=40, rtol=1e-12, check_every=1)
    found = solve(definite(W), b, shift=s, linear_solver=TIGHT)
    for name in ("x", "status", "iterations", "residual_norm"):
        assert torch.equal(getattr(found, name), getattr(direct, name))


@pytest.mark.parametrize("form", ["function", "dense"])
def test_a_transform_inside_a_compiled_function(form: str) -> None:
    b, w = torch.randn(B, N), 1 + torch.rand(B, N)
    few = CG(max_iterations=6)

    def outer(w: Tensor) -> Tensor:
        if form == "dense":
            return solve(torch.diag_embed(w), b, linear_solver=few).x.sum()
        return solve(lambda p, w: w * p, b, parameters=(w,), linear_solver=few).x.sum()

    def gradient(w: Tensor) -> Tensor:
        return torch.func.grad(outer)(w)

    torch._dynamo.reset()
    found = torch.compile(gradient, backend="eager", fullgraph=True)(w)
    torch.testing.assert_close(found, -b / w**2, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_what_a_transform_would_lose_is_an_error() -> None:
    b, w = torch.randn(B, N), 1 + torch.rand(B, N)
    for operator, parameters in ((lambda w: lambda p: w * p, ()), (lambda w: lambda p, v: w * v * p, (w,))):
        with pytest.raises(ValueError, match="A must not reach tensors that require a gradient"):
            torch.func.grad(lambda v, o=operator, q=parameters: solve(o(v), b, parameters=q).x.sum())(w)
    x = solve(lambda p, w: w * p, b, parameters=(w.requires_grad_(),)).x
    with pytest.raises(RuntimeError, match="one outer gradient at a time"):
        torch.autograd.grad(x, w, torch.stack([b, b]), is_grads_batched=True)


def test_an_operator_with_a_graph_of_its_own_is_an_error() -> None:
    class Operator:
        def __init__(self, matrix: Tensor) -> None:
            self.matrix, self.shape = matrix, matrix.shape

        def __matmul__(self, X: Tensor) -> Tensor:
            return self.matrix @ X

    matrix = (2 * torch.eye(N)).requires_grad_()
    with pytest.raises(ValueError, match="A must not reach tensors that require a gradient"):
        solve(Operator(matrix), torch.ones(N, requires_grad=True))
    solve(Operator(matrix.detach()), torch.ones(N, requires_grad=True)).x.sum().backward()


def test_an_index_among_the_parameters_has_no_derivative() -> None:
    b, w, turned = torch.randn(N), 1 + torch.rand(N), torch.randperm(N)

    def outer(w: Tensor) -> Tensor:
        return solve(lambda p, w, index: w[index] * p, b, parameters=(w, turned)).x.sum()

    gradient = torch.autograd.grad(outer(w.requires_grad_()), w)[0]
    torch.testing.assert_close(torch.func.grad(outer)(w.detach()), gradient)
    torch.testing.assert_close(gradient[turned], -b / w.detach()[turned] ** 2, rtol=1e-3, atol=1e-3)


def test_sparse_layouts_without_a_derivative_are_named() -> None:
    A = torch.eye(N, dtype=DOUBLE).to_sparse_csc().requires_grad_()
    with pytest.raises(ValueError, match="A must be sparse_coo, or a sparse_csr"):
        solve(A, torch.ones(N, dtype=DOUBLE))
