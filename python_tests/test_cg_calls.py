"""cg and the other solvers as Python programs call them: tracers, torch.compile, torch.func, autocast, results kept."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from systems import dense, multiply, solve_directly
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from imaml_ext import CG, GradientDescent, Solution, SolveStatus, cg
from imaml_ext.solvers import MINRES, FixedPoint, Neumann, minres


class Solver(torch.nn.Module):
    """All that cg, or another solver, returns for a diagonal matrix, as a function of b."""

    def __init__(self, rows: int, cols: int, *, solve: Callable[..., Solution] = cg, **options: Any) -> None:
        super().__init__()
        self.solve, self.options = solve, options
        self.register_buffer("d", 1 + torch.rand(rows, cols))

    def hvp(self, p: Tensor, rows: slice = slice(None)) -> Tensor:
        return self.d[rows] * p

    def forward(self, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = self.solve(self.hvp, b, shift=0.5, max_iterations=7, rtol=1e-4, **self.options)
        return found.x, found.status, found.iterations, found.residual_norm


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "warm start": {"x0": torch.ones(3, 23)},
    "diagonal": {"preconditioner": 1 / (1 + torch.arange(23.0))},
    "callable": {"preconditioner": lambda r: r / 2},
    "blocks": {"rows_per_block": 2},
    "minres": {"solve": minres},
    "minres in blocks from a warm start": {"solve": minres, "x0": torch.ones(3, 23), "rows_per_block": 2},
}


def traced_by_make_fx(module: Solver, b: Tensor) -> Callable[[Tensor], Any]:
    return make_fx(module)(b)


def exported(module: Solver, b: Tensor) -> Callable[[Tensor], Any]:
    return torch.export.export(module, (b,), strict=False).module()


def traced_by_jit(module: Solver, b: Tensor) -> Callable[[Tensor], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and warns of every shape
        return torch.jit.trace(module, (b,), check_trace=False)


@pytest.mark.parametrize("trace", [traced_by_make_fx, exported, traced_by_jit])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_trace_solves_for_the_inputs_that_it_is_given(options: str, trace: Callable[..., Any]) -> None:
    """Not for those that it was traced with: other values, of other statuses and numbers of iterations."""
    module = Solver(3, 23, **OPTIONS[options])
    program = trace(module, torch.randn(3, 23))
    other = torch.randn(3, 23)
    other[0] = 0.0
    other[1, 5] = float("nan")
    expected = module(other)
    assert expected[1].tolist()[0] == SolveStatus.CONVERGED or "warm start" in options
    assert expected[1].tolist()[1] == SolveStatus.NON_FINITE
    for found, value in zip(program(other), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=0, equal_nan=True)


def test_an_exported_program_survives_a_file_and_functionalization() -> None:
    module = Solver(4, 19)
    program = torch.export.export(module, (torch.randn(4, 19),), strict=False)
    file = io.BytesIO()
    torch.export.save(program.run_decompositions(), file)
    file.seek(0)
    b = torch.randn(4, 19)
    for found, value in zip(torch.export.load(file).module()(b), module(b), strict=True):
        assert torch.equal(found, value)


def test_fake_tensors_give_fake_results() -> None:
    with FakeTensorMode():
        x, status, iterations, residual = Solver(6, 17)(torch.randn(6, 17))
    assert (x.shape, status.shape, iterations.shape, residual.shape) == ((6, 17), (6,), (6,), (6,))
    assert (x.dtype, status.dtype, residual.dtype) == (torch.float32, torch.int32, torch.float64)


@pytest.mark.parametrize("trace", [traced_by_make_fx, exported, traced_by_jit])
@pytest.mark.parametrize("solve", [cg, minres])
def test_a_trace_cannot_look_whether_all_rows_are_done(
    solve: Callable[..., Solution], trace: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=rf"check_every must be 0 where {solve.__name__} is traced, .*got 2"):
        trace(Solver(3, 23, solve=solve, check_every=2), torch.randn(3, 23))


@pytest.mark.parametrize("options", ["plain", "warm start", "diagonal", "callable"])
def test_torch_compile_takes_cg_into_its_graph(options: str) -> None:
    module = Solver(3, 23, **OPTIONS[options])

    def function(b: Tensor) -> tuple[Tensor, ...]:
        x, status, *rest = module(2 * b)
        return x.sin() + status.unsqueeze(1), *rest

    b, other = torch.randn(3, 23), torch.randn(3, 23)
    other[0], other[1, 5] = 0.0, float("nan")
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for values in (b, other):
        for found, expected in zip(compiled(values), function(values), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    program = torch.export.export(module, (b,), strict=True).module()
    for found, expected in zip(program(other), module(other), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"check_every": 1}, "check_every must be 0"), ({"rows_per_block": 1}, "rows_per_block must be")],
)
def test_what_a_compiled_graph_cannot_do_is_said(options: dict[str, Any], words: str) -> None:
    module = Solver(3, 23, **options)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=words):
        torch.compile(module, backend="eager", fullgraph=True)(torch.randn(3, 23))
    torch._dynamo.reset()


def _with_tangent(function: Callable[[Tensor], Any], value: Tensor) -> Any:
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        return function(forward.make_dual(value, torch.ones_like(value)))


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda function, value: torch.func.grad(lambda v: function(v).sum())(value),
    "jvp": lambda function, value: torch.func.jvp(function, (value,), (value,)),
    "vmap": lambda function, value: torch.func.vmap(function)(torch.stack([value, value])),
    "dual": _with_tangent,
}


@pytest.mark.parametrize("solver", [CG(), MINRES(), Neumann(), FixedPoint(lr=0.1)], ids=lambda s: s.kind_name)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func_are_refused_whichever_argument_they_reach(transform: str, solver: Any) -> None:
    b, d, shift = torch.randn(2, 5), 1 + torch.rand(2, 5), torch.tensor([[0.5], [0.7]])
    calls = {
        "b": (b, lambda b: solver.solve(lambda p: d * p, b, shift).x),
        "shift": (shift, lambda shift: solver.solve(lambda p: d * p, b, shift).x),
        "the result of A": (d, lambda d: solver.solve(lambda p: d * p, b, shift).x),
    }
    for argument, (value, call) in calls.items():
        words = (
            f"{argument} must have no tangent" if transform == "dual" else f"outside .*torch.func.*got {argument} from"
        )
        with pytest.raises(RuntimeError, match=words):
            TRANSFORMS[transform](call, value)


def test_cg_is_free_inside_a_vmap_that_does_not_reach_it() -> None:
    b, d = torch.randn(2, 5), 1 + torch.rand(2, 5)
    x = cg(lambda p: d * p, b).x
    scaled = torch.func.vmap(lambda scale: scale * cg(lambda p: d * p, b).x)(torch.tensor([1.0, 2.0]))
    assert torch.equal(scaled, torch.stack([x, 2 * x]))


@pytest.mark.parametrize("solver", [CG(40, rtol=1e-3), MINRES(40, rtol=1e-3), FixedPoint(0.5, 90)], ids=type)
def test_under_autocast_products_come_back_in_the_dtype_of_b(solver: Any) -> None:
    matrices = dense(1, 8)[0].float() / 4 + torch.eye(8)
    b = torch.randn(3, 8)
    exact = solve_directly(matrices.double().expand(3, 8, 8), b.double())

    def product(p: Tensor) -> Tensor:
        return p @ matrices  # bfloat16 under autocast

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(b).dtype == torch.bfloat16
        found = solver.solve(product, b)
    assert found.x.dtype == torch.float32
    assert float((found.x - exact).norm() / exact.norm()) < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        preconditioned = cg(product, b, preconditioner=lambda r: r @ torch.eye(8), max_iterations=20)
    assert float((preconditioned.x - exact).norm() / exact.norm()) < 0.05
    # Only that dtype, and only there.
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match="dtype of b, float32, got float64"),
    ):
        solver.solve(lambda p: p.double(), b)
    with pytest.raises(TypeError, match="what A returns must have the dtype of b, float32, got bfloat16"):
        solver.solve(lambda p: p.bfloat16(), b)


@pytest.mark.parametrize("solver", [CG(), MINRES(), Neumann(), FixedPoint(lr=0.1)], ids=lambda s: s.kind_name)
def test_every_solver_demands_the_same_of_operator_and_b(solver: Any) -> None:
    b = torch.randn(2, 5)
    for error, words, operator, right in (
        (TypeError, "A must be a function, a matrix or an operator that has a shape and @, got int", 3, b),
        (TypeError, "every tensor of b must be a tensor, got float", multiply, [1.0]),
        (TypeError, "b must be float32, .*got torch.int64", multiply, b.long()),
        (TypeError, "A must return a tensor, got float", lambda p: 1.0, b),
        (ValueError, r"what A returns must have the shape of b, \[2, 5\], got \[2, 1\]", lambda p: p[:, :1], b),
        (TypeError, "what A returns must have the dtype of b, float32, got float64", lambda p: p.double(), b),
        (
            ValueError,
            "what A returns must have the device of b, cpu, got meta|what A returns must be on the device",
            lambda p: p.to("meta"),
            b,
        ),
    ):
        with pytest.raises(error, match=words):
            solver.solve(operator, right, 0.5)


def test_a_solution_is_copied_pickled_and_loaded_as_weights() -> None:
    d = 1 + torch.rand(4, 6)
    found = cg(lambda p: d * p, torch.randn(4, 6), max_iterations=20, lanczos=True)
    file = io.BytesIO()
    torch.save({"solution": found}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["solution"]
    for copied in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found), loaded):
        assert isinstance(copied, Solution)
        for name in ("x", "status", "iterations", "residual_norm"):
            assert torch.equal(getattr(copied, name), getattr(found, name))
        assert copied.lanczos is not None
        assert torch.equal(copied.lanczos.diagonal, found.lanczos.diagonal)
        copied.raise_if_failed()


def test_solutions_are_compared_as_objects() -> None:
    b = torch.randn(4, 6)
    found, again = (cg(lambda p: 2 * p, b) for _ in range(2))
    assert found == found
    assert found != again
    assert len({found, again, found}) == 2


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64, np.int64, np.uint8])
def test_numbers_of_numpy_are_numbers(number: Any) -> None:
    b, d = torch.randn(3, 4), 1 + torch.rand(3, 4)
    two = number(2)
    found = cg(lambda p: d * p, b, shift=two, rtol=number(0), atol=number(0), max_iterations=np.int64(4))
    expected = cg(lambda p: d * p, b, shift=2.0, rtol=0.0, max_iterations=4)
    assert torch.equal(found.x, expected.x)
    assert CG(rtol=two, max_iterations=np.int32(3)) == CG(rtol=2.0, max_iterations=3)
    settings = GradientDescent(lr=two)
    assert settings == GradientDescent(lr=2.0)
    assert type(settings.lr) is float
    for refused in (np.bool_(True), np.array([2.0]), "2"):
        with pytest.raises(TypeError, match="shift must be a number or a tensor, got"):
            cg(lambda p: d * p, b, shift=refused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_beyond_the_range_of_the_arithmetic_is_refused(dtype: torch.dtype) -> None:
    b = torch.randn(3, 4)
    words = r"shift must be at most 3.4e\+38, the largest torch.float32, got 1e\+39"
    with pytest.raises(ValueError, match=words):
        cg(lambda p: p, b.to(dtype), shift=1e39)
    assert cg(lambda p: p, b.double(), shift=1e39).status.tolist() == [0] * 3
