"""Stopping on the device: `cg(…, check_every=k)` inside a captured CUDA graph is a while node of it.

What needs no GPU is tested elsewhere: the arrangement of the loop in cpp_tests/test_device_loop.cpp, and what it asks
before each round in test_ops.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from systems import DTYPES, needs_while_nodes
from torch import Tensor

from imaml_ext import cg
from imaml_ext.solvers import Solution, SolveStatus

pytestmark = pytest.mark.cuda
ROWS, COLS = 9, 3001


class Systems:
    """Diagonal systems on the GPU that end in every way, which count the calls of `hvp` and the products made."""

    def __init__(self, dtype: torch.dtype) -> None:
        conditions = torch.logspace(0, 3, ROWS, dtype=torch.float64).unsqueeze(1)
        d = conditions ** -torch.rand(ROWS, COLS, dtype=torch.float64)
        b = torch.randn(ROWS, COLS, dtype=torch.float64)
        d[1], d[2, 7], d[3] = -1, torch.nan, 0.75
        b[4, 0], b[5] = torch.inf, 0
        self.d, self.b = d.to("cuda", dtype), b.to("cuda", dtype)
        self.calls = 0
        self.products = torch.zeros((), dtype=torch.int64, device="cuda")

    def hvp(self, p: Tensor, rows: slice = slice(None)) -> Tensor:
        self.calls += 1
        self.products += 1
        return self.d[rows] * p

    def counted(self, solve: Callable[[], Solution]) -> tuple[Solution, int]:
        self.products.zero_()
        solution = solve()
        return solution, int(self.products)


def capture(solve: Callable[[], Solution]) -> Callable[[], Solution]:
    """Returns a function that replays the solve; it has been called before, as torch's notes on CUDA graphs have it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        solve()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        solution = solve()

    def replay() -> Solution:
        graph.replay()
        return solution

    return replay


def assert_same_bits(ours: Solution, expected: Solution) -> None:
    for name in ("x", "status", "iterations", "residual_norm"):
        mine, other = getattr(ours, name), getattr(expected, name)
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


@needs_while_nodes
@pytest.mark.parametrize(("check_every", "max_iterations"), [(1, 1), (1, 30), (3, 30), (4, 30), (7, 5)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_replay_has_the_bits_of_the_eager_solve_and_its_products(
    dtype: torch.dtype, check_every: int, max_iterations: int
) -> None:
    systems = Systems(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    diagonal = 0.5 + torch.rand(COLS, dtype=wide, device="cuda")
    x0 = torch.randn(ROWS, COLS, device="cuda").to(dtype)
    for options in (
        {},
        {"shift": torch.rand(ROWS, 1, dtype=wide, device="cuda"), "x0": x0},
        {"preconditioner": diagonal},
        {"preconditioner": diagonal - 0.6},  # not positive definite
        {"preconditioner": lambda r: diagonal.to(dtype) * r},
        {"rows_per_block": 4},
    ):

        def solve(options: dict = options) -> Solution:
            limits = {"rtol": 1e-2, "check_every": check_every, "max_iterations": max_iterations}
            return cg(systems.hvp, systems.b, **limits, **options)

        expected, products = systems.counted(solve)
        replay = capture(solve)
        for _ in range(2):
            ours, made = systems.counted(replay)
            assert_same_bits(ours, expected)
            assert made == products


@needs_while_nodes
def test_a_callback_is_captured_once_for_each_iteration_of_a_round_and_of_the_last() -> None:
    systems = Systems(torch.float32)
    for check_every, max_iterations, calls in ((1, 500, 2), (5, 500, 10), (5, 501, 6), (7, 6, 6)):
        replay = capture(
            lambda k=check_every, n=max_iterations: cg(systems.hvp, systems.b, check_every=k, max_iterations=n)
        )
        systems.calls = 0
        replay()
        assert systems.calls == 0
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cg(systems.hvp, systems.b, check_every=check_every, max_iterations=max_iterations)
        assert systems.calls == calls


@needs_while_nodes
def test_each_replay_stops_when_its_own_rows_are_done() -> None:
    systems = Systems(torch.float64)
    systems.d.fill_(2)
    systems.b.normal_()

    def solve() -> Solution:
        return cg(systems.hvp, systems.b, check_every=1, max_iterations=200, rtol=1e-6)

    replay = capture(solve)
    spread = torch.linspace(1, 9, COLS, dtype=torch.float64, device="cuda")
    counts = []
    for d, b in ((2.0, 1.0), (spread, 1.0), (2.0, 0.0), (spread, 1.0)):
        systems.d.copy_(torch.as_tensor(d))
        systems.b.normal_().mul_(b)
        expected, products = systems.counted(solve)
        ours, made = systems.counted(replay)
        assert_same_bits(ours, expected)
        assert (ours.status == SolveStatus.CONVERGED).all()
        assert made == products
        counts.append(made)
    assert counts[0] == 2  # a step, and a measurement
    assert counts[1] > 5
    assert counts[2] == 0
    assert max(counts) < 100


@needs_while_nodes
def test_the_memory_of_a_body_is_the_graph_s() -> None:
    """What the callback allocates in the body is its own at every round, whatever is allocated between replays."""
    d, b = 1 + 9 * torch.rand(64, 5000, device="cuda"), torch.randn(64, 5000, device="cuda")

    def solve() -> Solution:
        return cg(lambda p: torch.stack([d * p, p]).cumsum(0)[0], b, check_every=2, max_iterations=50)

    expected, replay = solve(), capture(solve)
    for _ in range(3):
        held = [torch.full((64, 5000), torch.nan, device="cuda") for _ in range(30)]
        assert_same_bits(replay(), expected)
        assert all(bool(tensor.isnan().all()) for tensor in held)


@contextlib.contextmanager
def lost_capture() -> Iterator[None]:
    """A capture in which something fails, whose own end may then fail too."""
    current, graph = torch.cuda.current_stream(), torch.cuda.graph(torch.cuda.CUDAGraph())
    graph.__enter__()
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):
            graph.__exit__(None, None, None)
        torch.cuda.set_stream(current)


@needs_while_nodes
def test_what_a_callback_raises_in_a_capture_comes_out_unchanged() -> None:
    b = torch.randn(3, 50, device="cuda")
    cg(lambda p: 2 * p, b)
    with lost_capture(), pytest.raises(ZeroDivisionError):
        cg(lambda p: p * (1 / 0), b, check_every=1)
    assert_same_bits(cg(lambda p: 2 * p, b), cg(lambda p: 2 * p, b, check_every=1))


@needs_while_nodes
def test_random_numbers_in_a_callback_are_refused() -> None:
    b = torch.randn(3, 50, device="cuda")
    with lost_capture(), pytest.raises(RuntimeError, match="RNG within"):
        cg(lambda p: 2 * p + 0 * torch.rand_like(p), b, check_every=1)


@needs_while_nodes
def test_a_backward_pass_of_an_earlier_forward_pass_is_right_or_refused() -> None:
    w = torch.randn(3, 50, device="cuda", requires_grad=True)
    b = torch.randn(3, 50, device="cuda")

    def solve() -> Solution:
        (gradient,) = torch.autograd.grad(((2 + w.sin()) * w * w).sum(), w, create_graph=True)
        return cg(lambda p: torch.autograd.grad(gradient, w, p, retain_graph=True)[0], b, shift=30, check_every=1)

    expected, current = solve(), torch.cuda.current_stream()
    try:
        ours = capture(solve)()
    except RuntimeError:
        torch.cuda.set_stream(current)  # where the end of the capture has failed, torch leaves its stream in place
        return
    assert_same_bits(ours, expected)


@pytest.mark.skipif(hasattr(torch.cuda.CUDAGraph, "begin_capture_to_while_node"), reason="torch 2.14 or later")
def test_an_older_torch_is_told_what_is_needed() -> None:
    b = torch.randn(3, 50, device="cuda")
    with (
        lost_capture(),
        pytest.raises(NotImplementedError, match=r"needs torch 2.14 or later, .* check_every=0 can be"),
    ):
        cg(lambda p: 2 * p, b, check_every=1)
