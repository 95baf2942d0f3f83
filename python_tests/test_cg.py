"""imaml_ext.cg against direct float64 solves: accuracy, statuses, independence of the rows."""

import math
import os
import subprocess
import sys
import threading

import pytest
import reference
import torch
from systems import DEVICES, DTYPES, dense, multiply, reflected, solve_directly
from torch import Tensor

from imaml_ext import Solution, SolveError, SolveStatus, cg, ops

C, M, NEG, BAD, SING = 0, 1, 2, 3, 7


@pytest.mark.parametrize(
    ("rows", "cols"),
    [
        *((rows, cols) for cols in (1, 31) for rows in (1, 2, 7, 33)),
        *(pytest.param(rows, 257, marks=pytest.mark.many_iterations) for rows in (1, 7)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_dense_systems_against_direct_solves(rows: int, cols: int, dtype: torch.dtype) -> None:
    matrices = dense(rows, cols).to(dtype)
    b = torch.randn(rows, cols, dtype=dtype)
    rtol = 1e-8 if dtype == torch.float64 else 1e-4
    result = cg(
        multiply(matrices),
        b,
        max_iterations=(40 if dtype == torch.float64 else 3) * cols + 20,
        rtol=rtol,
        check_every=1,
    )

    wide, right = matrices.double(), b.double()
    residual = (right - multiply(wide)(result.x.double())).norm(dim=1) / right.norm(dim=1)
    converged = result.status == C
    # What is measured has the rounding of a product, about u ‖A‖ ‖x‖.
    sizes = torch.linalg.matrix_norm(wide, 2) * result.x.double().norm(dim=1) / right.norm(dim=1)
    limit = rtol + torch.finfo(dtype).eps * sizes
    assert (residual <= limit)[converged].all(), (residual / limit)[converged].max()
    assert ((result.status == C) | (result.status == M) | (dtype == torch.float32)).all()
    if dtype == torch.float64:
        assert converged.all()
    assert converged[0]  # the best conditioned row, whatever the dtype
    direct = solve_directly(wide, right)
    error = (result.x.double() - direct).norm(dim=1) / direct.norm(dim=1)
    condition = torch.linalg.cond(wide)
    assert (error <= 1.01 * limit * condition)[converged].all()
    # The norm reported is the norm of the residual, up to the rounding that the status allows for.
    reported = result.residual_norm / right.norm(dim=1)
    assert ((reported - residual).abs()[converged] <= rtol).all()


@pytest.mark.many_iterations
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
@pytest.mark.parametrize("device", DEVICES)
def test_long_systems_against_their_inverse(rows: int, device: str) -> None:
    systems = reflected(rows, 4097, device=device)
    b = torch.randn(rows, 4097, dtype=torch.float64, device=device)
    rtol = 1e-6
    result = cg(systems, b, max_iterations=20_000, rtol=rtol, check_every=10)
    assert (result.status == C).all()
    assert (systems.relative_residual(result.x, b) <= rtol).all()
    direct = systems.solve(b)
    error = (result.x - direct).norm(dim=1) / direct.norm(dim=1)
    assert (error <= rtol / systems.d.min(1).values * 1.01).all()
    # Rows differ in how much work they are, and each stops for itself.
    if rows > 2:
        assert result.iterations[0] < 3 < 100 < result.iterations[-1]


@pytest.mark.many_iterations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_converged_is_never_said_of_a_residual_that_has_drifted(dtype: torch.dtype) -> None:
    """Ill-conditioned rows in a narrow type: the recurrence reaches any tolerance, b − A x does not."""
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    said = 0
    for rows, cols in [(24, 60), (24, 300), (7, 2000)]:
        systems = reflected(rows, cols)
        systems.d, systems.v = systems.d.to(dtype), systems.v.to(dtype)
        b = torch.randn(rows, cols, dtype=dtype)
        result = cg(systems, b, max_iterations=600, rtol=rtol, check_every=5)
        wide = type(systems)(systems.d.double(), systems.v.double())
        converged = result.status == C
        said += int(converged.sum())
        # The callback itself rounds to the narrow type, by about u ‖A‖ ‖x‖, ‖A‖ being 1.
        rounding = torch.finfo(dtype).eps / 2 * result.x.double().norm(dim=1) / b.double().norm(dim=1)
        assert (wide.relative_residual(result.x, b) <= rtol + rounding)[converged].all()
        measured = result.residual_norm / b.double().norm(dim=1)
        assert (measured[converged] <= rtol * (1 + 1e-12)).all()  # ‖b‖ is summed in another order
    assert said >= 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_broken_rows_get_their_status_and_leave_the_others_bits_alone(dtype: torch.dtype, device: str) -> None:
    rows, cols = 11, 97
    d = 1 + torch.rand(rows, cols, dtype=torch.float64)
    b = torch.randn(rows, cols, dtype=torch.float64)
    broken_d, broken_b = d.clone(), b.clone()
    expected = {
        1: (NEG, "indefinite: the first step is downhill"),
        2: (SING, "zero matrix"),
        3: (BAD, "NaN in b"),
        4: (BAD, "infinity in b"),
        5: (BAD, "NaN out of the operator"),
        6: (BAD, "infinity out of the operator"),
        7: (C, "b = 0"),
        8: (SING, "singular, b not in its range"),
    }
    broken_d[1] = -1.0
    broken_d[2] = 0.0
    broken_b[3, 5] = math.nan
    broken_b[4, 0] = math.inf
    broken_d[5, 7] = math.nan
    broken_d[6, 7] = math.inf
    broken_b[7] = 0.0
    broken_d[8] = 0.0
    broken_d[8, : cols // 2] = 1.0
    d, b, broken_d, broken_b = (t.to(device=device, dtype=dtype) for t in (d, b, broken_d, broken_b))
    healthy = cg(lambda p: d * p, b, max_iterations=8, rtol=1e-3)
    result = cg(lambda p: broken_d * p, broken_b, max_iterations=8, rtol=1e-3)
    for row, (status, why) in expected.items():
        assert result.status[row] == status, (why, SolveStatus(int(result.status[row])))
    assert result.x.isfinite().all()
    assert result.iterations[7] == 0
    assert (result.x[7] == 0).all()
    for row in set(range(rows)) - set(expected):
        assert torch.equal(result.x[row], healthy.x[row])
        assert torch.equal(result.residual_norm[row], healthy.residual_norm[row])
        assert result.status[row] == healthy.status[row]
        assert result.iterations[row] == healthy.iterations[row]
    # Each row alone, too, has the bits that it has in company.
    for row in range(rows):
        alone = cg(lambda p, row=row: broken_d[row : row + 1] * p, broken_b[row : row + 1], max_iterations=8, rtol=1e-3)
        assert torch.equal(alone.x[0], result.x[row])
        assert alone.status[0] == result.status[row]


@pytest.mark.parametrize("device", DEVICES)
def test_the_bits_do_not_depend_on_the_batch_for_long_rows(device: str) -> None:
    """One long row is shared by threads (blocks on CUDA), many are dealt out: the sums are the same."""
    systems = reflected(5, 20001, device=device)
    d = systems.d.float()
    b = torch.randn(5, 20001, device=device)
    together = cg(lambda p: d * p, b, max_iterations=20)
    for row in range(5):
        alone = cg(lambda p, row=row: d[row : row + 1] * p, b[row : row + 1], max_iterations=20)
        assert torch.equal(alone.x[0], together.x[row])


@pytest.mark.cpu_kernels
def test_the_bits_do_not_depend_on_threads_or_instruction_set() -> None:
    program = """
import hashlib, sys, torch
from imaml_ext import cg, ops
from imaml_ext.solvers import minres
torch.set_num_threads(int(sys.argv[1]))
digest = hashlib.sha256()
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for rows, cols in ((1, 1), (3, 37), (1, 9001), (7, 4099)):
        generator = torch.Generator().manual_seed(rows * cols)
        d = (1 + torch.rand(rows, cols, generator=generator, dtype=torch.float64)).to(dtype)
        b = torch.randn(rows, cols, generator=generator, dtype=torch.float64).to(dtype)
        result = cg(lambda p: d * p, b, shift=0.25, max_iterations=7, rtol=1e-12, preconditioner=1 / d)
        other = cg(lambda p: d * p, b, shift=b.abs().to(result.residual_norm.dtype), max_iterations=3)
        least = minres(lambda p: d * p, b, shift=-1.3, max_iterations=7, lanczos=True)
        phi = b.clone()
        ops.prox_momentum_step_(phi, d.clone(), b, d[0].clone(), 0.3, 0.1, 0.9, True)
        ops.prox_adam_step_(phi, d.clone(), d.clone(), b, d[0].clone(), 0.3, 0.1, 0.9, 0.99, 1e-8, 3)
        solved = (result.x, result.residual_norm, other.x, least.x, least.residual_norm, least.lanczos.diagonal)
        for tensor in (*solved, phi, ops.prox_penalty(phi, d, 0.7)):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
print(ops.cpu_capability(), digest.hexdigest())
"""
    ours = subprocess.run([sys.executable, "-c", program, "1"], capture_output=True, text=True, check=True)
    best, digest = ours.stdout.split()
    capabilities = ["default", "avx2", "avx512"]
    for capability in capabilities[: capabilities.index(best) + 1]:
        for threads in ("1", "3"):
            run = subprocess.run(
                [sys.executable, "-c", program, threads],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "IMAML_EXT_CPU_CAPABILITY": capability},
            )
            assert run.stdout.split() == [capability, digest]


@pytest.mark.cpu_kernels
def test_an_unknown_instruction_set_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from imaml_ext import ops; ops.cpu_capability()"],
        capture_output=True,
        text=True,
        env={**os.environ, "IMAML_EXT_CPU_CAPABILITY": "mmx"},
    )
    assert run.returncode != 0
    assert "IMAML_EXT_CPU_CAPABILITY must be default, avx2 or avx512, got mmx" in run.stderr


def _shifts(rows: int, cols: int) -> dict[str, Tensor | float]:
    return {
        "number": 0.3,
        "tensor0": torch.tensor(0.3, dtype=torch.float64),
        "task": torch.rand(rows, dtype=torch.float64),
        "parameter": torch.rand(cols, dtype=torch.float64),
        "element": torch.rand(rows, cols, dtype=torch.float64),
        "column": torch.rand(rows, 1, dtype=torch.float64),
        "row": torch.rand(1, cols, dtype=torch.float64),
        "strided": torch.rand(rows, 2 * cols, dtype=torch.float64)[:, ::2],
    }


def _apart(x: Tensor, y: Tensor) -> Tensor:
    """The distance of two iterates of every row, next to 1 or to their norm."""
    return (x.double() - y.double()).norm(dim=1) / y.double().norm(dim=1).clamp_min(1.0)


@pytest.mark.parametrize("kind", list(_shifts(1, 1)))
@pytest.mark.parametrize("preconditioned", ["no", "diagonal", "callable"])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_agrees_with_the_oracle(kind: str, preconditioned: str, warm: bool, dtype: torch.dtype, device: str) -> None:
    rows, cols = 6, 45
    systems = reflected(rows, cols, device=device)
    systems.d = systems.d.clamp_min(1e-3)
    systems.d[4] *= -1  # indefinite once the shift no longer outweighs it
    shift = _shifts(rows, cols)[kind]
    if isinstance(shift, Tensor):
        shift = shift.to(device)
    b = torch.randn(rows, cols, dtype=torch.float64, device=device).to(dtype)
    b[5, 3] = math.nan
    diagonal = 1 / (0.5 + torch.rand(cols, dtype=torch.float64, device=device))
    preconditioner = {
        "no": None,
        "diagonal": diagonal,
        "callable": lambda r: diagonal.to(r.dtype) * r,
    }[preconditioned]
    x0 = torch.randn_like(b) if warm else None
    for max_iterations in (0, 1, 4, 60):
        arguments = {
            "shift": shift,
            "x0": x0,
            "max_iterations": max_iterations,
            "rtol": {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype],
            "preconditioner": preconditioner,
        }
        ours, oracle = cg(systems, b, **arguments), reference.cg(systems, b, **arguments)
        if max_iterations <= 4 and dtype != torch.bfloat16:
            assert torch.equal(ours.status, oracle.status)
            assert torch.equal(ours.iterations, oracle.iterations)
            tolerance = 1e-10 if dtype == torch.float64 else 2e-4
            # Where pᵀAp nearly vanishes, as it may in the indefinite row, rounding is magnified: how much, the oracle's
            # own distance from float64 tells.
            wide = {**arguments, "x0": None if x0 is None else x0.double()}
            magnified = _apart(oracle.x, reference.cg(systems, b.double(), **wide).x)
            assert (_apart(ours.x, oracle.x) <= tolerance + 4 * magnified).all()
            known = oracle.residual_norm.isfinite()
            assert torch.equal(ours.residual_norm.isfinite(), known)
            off = (ours.residual_norm - oracle.residual_norm).abs()[known]
            allowed = tolerance + (50 * tolerance + 4 * magnified) * oracle.residual_norm
            assert (off <= allowed[known]).all()
        elif dtype != torch.bfloat16:
            # Over many iterations rounding may move the end by a step or two, which at the limit is another status.
            settled = torch.maximum(ours.iterations, oracle.iterations) < 50
            assert torch.equal(ours.status[settled], oracle.status[settled])
            assert (ours.iterations - oracle.iterations).abs().max() <= 0.15 * oracle.iterations.max() + 2
        assert ours.x.isfinite().all()
        assert ours.status[5] == BAD


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_follows_the_oracle(device: str) -> None:
    """A few steps on well-conditioned rows, where both round alike."""
    d = 1 + torch.rand(5, 70, dtype=torch.float64, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        b = torch.randn(5, 70, device=device).to(dtype)
        ours = cg(lambda p: d.to(p.dtype) * p, b, max_iterations=3, rtol=0.0)
        oracle = reference.cg(lambda p: d.to(p.dtype) * p, b, max_iterations=3, rtol=0.0)
        torch.testing.assert_close(ours.x, oracle.x)
        assert torch.equal(ours.iterations, oracle.iterations)


def test_statuses_when_curvature_is_not_positive() -> None:
    b = torch.randn(4, 6, dtype=torch.float64)
    minus = lambda p: -2 * p  # noqa: E731
    # The first step from zero: b / shift, its residual measured where p is b.
    result = cg(minus, b, shift=0.5)
    assert (result.status == NEG).all()
    torch.testing.assert_close(result.x, b / 0.5)
    torch.testing.assert_close(result.residual_norm, (b - (-2 + 0.5) * result.x).norm(dim=1))
    torch.testing.assert_close(cg(minus, b, shift=0.5, max_iterations=1).residual_norm, result.residual_norm)
    assert cg(minus, b, shift=0.5, preconditioner=lambda r: r.flip(1).abs() + r).residual_norm.isnan().all()
    shift = torch.rand(4, 6, dtype=torch.float64)
    result = cg(minus, b, shift=shift)
    torch.testing.assert_close(result.x, b / shift)
    assert result.residual_norm.isnan().all()  # nothing has measured it
    shift[0, 2] = 0.0
    assert cg(minus, b, shift=shift).x[0, 2] == 0
    # No shift, or a warm start: what the row had.
    result = cg(minus, b)
    assert (result.x == 0).all()
    torch.testing.assert_close(result.residual_norm, b.norm(dim=1))
    x0 = torch.randn_like(b)
    result = cg(minus, b, shift=0.5, x0=x0)
    assert torch.equal(result.x, x0)
    torch.testing.assert_close(result.residual_norm, (b + 1.5 * x0).norm(dim=1))
    # Later on: the last good iterate.
    d = torch.tensor([[1.0, 2.0, 3.0, -1e-3, 0.5, 4.0]], dtype=torch.float64)
    ones = torch.ones(1, 6, dtype=torch.float64)
    result = cg(lambda p: d * p, ones, max_iterations=50, rtol=1e-12)
    assert result.status == NEG
    before = cg(lambda p: d * p, ones, max_iterations=int(result.iterations), rtol=1e-12)
    assert torch.equal(before.x, result.x)
    assert before.iterations == result.iterations > 0


def test_a_preconditioner_that_is_not_positive_definite_stops_the_row() -> None:
    b = torch.randn(3, 5, dtype=torch.float64)
    weights = torch.ones(3, 5, dtype=torch.float64)
    weights[1] = -1.0
    for preconditioner in (weights, lambda r: weights * r):
        result = cg(lambda p: 2 * p, b, preconditioner=preconditioner)
        assert result.status.tolist() == [C, NEG, C]
        assert (result.x[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_a_solution_that_overflows_keeps_the_last_finite_iterate(dtype: torch.dtype, device: str) -> None:
    largest = torch.finfo(dtype).max
    d = torch.tensor([[1.0, 1.0], [1e-3, 1e-3]], device=device).to(dtype)
    b = torch.tensor([[0.9, 0.0], [0.9, 0.0]], device=device).to(dtype) * largest
    result = cg(lambda p: d * p, b, rtol=1e-2)
    assert result.x.isfinite().all()
    assert result.status.tolist() == [C, BAD]
    assert (result.x[1] == 0).all()
    # ‖x‖ beyond the largest number is no reason to stop while every entry is below it.
    wide = torch.full((1, 64), 0.5, device=device).to(dtype) * largest
    result = cg(lambda p: p, wide, rtol=1e-2, max_iterations=3)
    assert torch.equal(result.x, wide)


def test_tolerances() -> None:
    systems = reflected(3, 50)
    b = torch.randn(3, 50, dtype=torch.float64)
    rtol = torch.tensor([1e-1, 1e-4, 1e-8], dtype=torch.float64)
    result = cg(systems, b, max_iterations=4000, rtol=rtol, check_every=1)
    assert (systems.relative_residual(result.x, b) <= rtol).all()
    assert (result.status == C).all()
    result = cg(systems, b, max_iterations=4000, rtol=0.0, atol=1e-3, check_every=1)
    assert (systems.relative_residual(result.x, b) * b.norm(dim=1) <= 1e-3).all()
    atol = 1.1 * b.norm(dim=1)
    assert (cg(systems, b, rtol=0.0, atol=atol).iterations == 0).all()
    # Nothing asked for: every iteration is made, unless the residual is measured to be zero.
    result = cg(systems, b, max_iterations=3, rtol=0.0)
    assert (result.status == M).all()
    assert (result.iterations == 3).all()
    result = cg(lambda p: 2 * p, b, max_iterations=5, rtol=0.0)
    assert (result.status == C).all()
    torch.testing.assert_close(result.x, b / 2)


def test_callbacks_are_called_as_often_as_documented() -> None:
    b = torch.randn(4, 9)
    calls = 0

    def hvp(p: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        assert p.shape == (4, 9)
        assert p.is_contiguous()
        return p

    cg(hvp, b, max_iterations=6)
    assert calls == 6
    calls = 0
    cg(hvp, b, max_iterations=6, x0=torch.zeros_like(b))
    assert calls == 7
    calls = 0
    result = cg(hvp, b, max_iterations=6, check_every=3)
    assert calls == 3
    torch.testing.assert_close(result.x, b)
    calls = 0
    cg(hvp, b, max_iterations=0)
    assert calls == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_a_solve_from_nothing_has_the_bits_of_one_from_zero_and_leaves_b_alone(dtype: torch.dtype, device: str) -> None:
    """Without x0 and preconditioner the first call of hvp gets b itself, and no work vector is written before it."""
    rows, cols = 7, 4203
    d = (0.5 + torch.rand(rows, cols, dtype=torch.float64)).to(device=device, dtype=dtype)
    b = torch.randn(rows, cols, dtype=torch.float64).to(device=device, dtype=dtype)
    d[1] = -1
    b[2] = 0
    b[3, 4] = math.nan
    d[4] = 1
    before = b.clone()
    for check_every in (0, 1):
        for max_iterations in (0, 1, 2, 6):
            seen: list[int] = []

            def hvp(p: Tensor, seen: list[int] = seen) -> Tensor:
                seen.append(p.data_ptr())
                assert len(seen) == 1 or p.isfinite().all()
                return d * p

            options = {"shift": 0.3, "max_iterations": max_iterations, "rtol": 1e-3, "check_every": check_every}
            ours = cg(hvp, b, **options)
            assert seen[:1] == [b.data_ptr()][:max_iterations]
            assert b.data_ptr() not in seen[1:]
            zero = cg(lambda p: d * p, b, x0=torch.zeros_like(b), **options)
            for name in ("x", "status", "iterations", "residual_norm"):
                torch.testing.assert_close(
                    getattr(ours, name), getattr(zero, name), rtol=0, atol=0, equal_nan=name == "residual_norm"
                )
            torch.testing.assert_close(b, before, rtol=0, atol=0, equal_nan=True)
    # Every row over before the first step; and a callback that returns b itself.
    over = cg(lambda p: 1 / 0, torch.zeros_like(b), check_every=1)
    assert (over.x == 0).all()
    returned = cg(lambda p: p, b, max_iterations=3)
    torch.testing.assert_close(returned.x[[0, 1, 2, 4, 5, 6]], b[[0, 1, 2, 4, 5, 6]])
    torch.testing.assert_close(b, before, rtol=0, atol=0, equal_nan=True)


def _same_bits(ours: Solution, other: Solution, rows: slice = slice(None)) -> None:
    """That `ours` is those rows of the other solution."""
    for name in ("x", "status", "iterations", "residual_norm"):
        torch.testing.assert_close(getattr(ours, name), getattr(other, name)[rows], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("preconditioned", ["no", "diagonal", "shared", "callable"])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_blocks_of_rows_have_the_bits_of_the_batch(
    rows: int, preconditioned: str, warm: bool, dtype: torch.dtype, device: str
) -> None:
    cols = 533
    d = 0.1 + torch.rand(rows, cols, dtype=torch.float64)
    b = torch.randn(rows, cols, dtype=torch.float64)
    if rows > 5:
        d[1] = -4.0  # indefinite under every shift below
        b[2] = 0.0
        b[3, 5] = math.nan
        d[4, 7] = math.inf
        d[5] = 1.0  # done after one step
    d, b = d.to(device=device, dtype=dtype), b.to(device=device, dtype=dtype)
    inverse = 1 / (0.5 + torch.rand(rows, cols, dtype=torch.float64, device=device)).to(dtype)
    whole, blocks = {
        "no": (None, None),
        "diagonal": (inverse, inverse),
        "shared": (inverse[:1], inverse[:1]),
        "callable": (lambda r: inverse * r, lambda r, rows: inverse[rows] * r),
    }[preconditioned]
    x0 = torch.randn_like(b) if warm else None
    shifts = [0.5, torch.rand(rows, 1), torch.rand(1, cols), torch.rand(rows, cols)]
    for shift, check_every, max_iterations in zip(shifts, (0, 1, 0, 3), (6, 40, 1, 0), strict=True):
        options = {
            "shift": shift.to(device) if isinstance(shift, Tensor) else shift,
            "x0": x0,
            "max_iterations": max_iterations,
            "rtol": torch.full((rows,), 1e-2, device=device).cumsum(0),
            "check_every": check_every,
        }
        together = cg(lambda p: d * p, b, preconditioner=whole, **options)
        if rows > 5 and max_iterations >= 6:
            assert set(together.status.tolist()) >= {C, NEG, BAD}
        for size in (1, 2, 5, rows, rows + 3):
            apart = cg(lambda p, rows: d[rows] * p, b, preconditioner=blocks, rows_per_block=size, **options)
            _same_bits(apart, together)


def test_blocks_of_long_rows_have_the_bits_of_the_batch() -> None:
    """Rows that threads share where a block has fewer than there are threads."""
    d = 0.1 + torch.rand(5, 20001)
    b = torch.randn(5, 20001)
    together = cg(lambda p: d * p, b, max_iterations=8, rtol=0.0)
    buffer = torch.empty(2, 20001)
    for size in (1, 2):
        apart = cg(
            lambda p, rows: torch.mul(d[rows], p, out=buffer[: len(p)]),
            b,
            max_iterations=8,
            rtol=0.0,
            rows_per_block=size,
        )
        _same_bits(apart, together)


def test_every_block_is_solved_before_the_next() -> None:
    d = torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0]).unsqueeze(1) * torch.linspace(1, 2, 9)
    d[:3] = 1.0  # done after a step and a measurement
    b = torch.randn(7, 9)
    calls: list[tuple[str, slice]] = []

    def hvp(p: Tensor, rows: slice) -> Tensor:
        calls.append(("H", rows))
        assert p.shape == d[rows].shape
        assert p.is_contiguous()
        return d[rows] * p

    def preconditioner(r: Tensor, rows: slice) -> Tensor:
        calls.append(("M", rows))
        return r / d[rows]

    blocks = [slice(0, 3), slice(3, 6), slice(6, 7)]
    cg(hvp, b, max_iterations=2, rows_per_block=3)
    assert calls == [("H", rows) for rows in blocks for _ in range(2)]
    calls.clear()
    cg(hvp, b, max_iterations=2, rows_per_block=3, x0=b, preconditioner=preconditioner)
    assert calls == [(which, rows) for rows in blocks for which in "HMHMH"]
    calls.clear()
    cg(hvp, b, max_iterations=4, rows_per_block=3, check_every=1)
    assert calls == [("H", blocks[0])] * 2 + [("H", rows) for rows in blocks[1:] for _ in range(4)]


def test_an_exception_in_a_later_block_comes_out_whole() -> None:
    reason = RuntimeError("rows 4 to 6")

    def hvp(p: Tensor, rows: slice) -> Tensor:
        if rows.start == 4:
            raise reason
        return 2 * p

    with pytest.raises(RuntimeError) as caught:
        cg(hvp, torch.randn(7, 5), rows_per_block=2)
    assert caught.value is reason
    assert torch.equal(cg(hvp, torch.ones(3, 5), rows_per_block=2).x, torch.full((3, 5), 0.5))


def test_empty_systems() -> None:
    for shape in ((0, 5), (3, 0), (0, 0)):
        for result in (
            cg(lambda p: p, torch.zeros(shape)),
            cg(lambda p, rows: p, torch.zeros(shape), rows_per_block=2),
        ):
            assert result.x.shape == shape
            assert result.status.tolist() == [C] * shape[0]
            result.raise_if_failed()


def test_odd_but_lawful_callbacks() -> None:
    systems = reflected(3, 8)
    b = torch.randn(3, 8, dtype=torch.float64)
    plain = cg(systems, b, max_iterations=6)
    transposed = cg(lambda p: systems(p).t().contiguous().t(), b, max_iterations=6)
    assert torch.equal(plain.x, transposed.x)
    scattered = cg(systems, b.t().contiguous().t(), max_iterations=6)
    assert torch.equal(plain.x, scattered.x)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    tracked = cg(lambda p: weight * systems(p), b.clone().requires_grad_(), max_iterations=6)
    assert torch.equal(plain.x, tracked.x)
    assert not tracked.x.requires_grad
    identity = cg(lambda p: p, b)  # returns its argument
    assert torch.equal(identity.x, b)
    nested = cg(lambda p: cg(lambda q: 2 * q, p).x, b)  # solves inside a solve
    torch.testing.assert_close(nested.x, 2 * b)


def test_an_exception_in_a_callback_comes_out_whole() -> None:
    class MineError(Exception):
        pass

    reason = MineError("at iteration 2", 42)
    calls = 0

    def hvp(p: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise reason
        return 2 * p + p.roll(1, 1)

    b = torch.randn(2, 5, dtype=torch.float64)
    with pytest.raises(MineError) as caught:
        cg(hvp, b)
    assert caught.value is reason
    assert "hvp" in [entry.name for entry in caught.traceback]

    def interrupted(p: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cg(interrupted, b)
    with pytest.raises(ZeroDivisionError):
        cg(lambda p: p, b, preconditioner=lambda r: r / (1 // 0))


def test_other_threads_run_while_the_loop_does() -> None:
    b = torch.randn(4, 50)
    results = []

    def work() -> None:
        results.append(cg(lambda p: 3 * p, b, max_iterations=50, rtol=0.0).x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 4
    assert all(torch.equal(x, results[0]) for x in results)


def test_raise_if_failed_says_which_rows_and_what_to_do() -> None:
    d = torch.tensor([[1.0, 2.0], [-1.0, 1.0], [math.nan, 1.0], [1.0, 1.0]])
    b = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    result = cg(lambda p: d * p, b, max_iterations=2)
    with pytest.raises(SolveError) as caught:
        result.raise_if_failed()
    message = str(caught.value)
    assert "MAX_ITERATIONS in 1 of 4 rows (0): " in message
    assert "NEGATIVE_CURVATURE in 1 of 4 rows (1): " in message
    assert "NON_FINITE in 1 of 4 rows (2): " in message
    for status in list(SolveStatus)[1:4]:
        assert status.advice in message
    cg(lambda p: p, b).raise_if_failed()


B23 = torch.ones(2, 3)


def same(p: Tensor) -> Tensor:
    return p


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, B23, {}), TypeError, "A must be a function, a matrix or an operator that has a shape and @, got int"),
        ((same, [1.0], {}), TypeError, "every tensor of b must be a tensor, got float"),
        ((same, B23.int(), {}), TypeError, "b must be float32, float64, bfloat16 or float16, got torch.int32"),
        ((same, B23, {"shift": "1"}), TypeError, "shift must be a number or a tensor, got str"),
        ((same, B23, {"shift": torch.ones(2, 2)}), ValueError, r"shift must be a number, \[2\] .* got \[2, 2\]"),
        ((same, B23, {"shift": torch.ones(4)}), ValueError, r"shift must be .* got \[4\]"),
        ((same, B23, {"shift": torch.ones(2, dtype=torch.int64)}), TypeError, "shift must be a floating-point tensor"),
        (
            (same, torch.ones(3, 3), {"shift": torch.ones(3)}),
            ValueError,
            r"shift of shape \[3\] could be one",
        ),
        ((same, B23, {"shift": torch.ones(2, device="meta")}), ValueError, "shift must be on cpu, got meta"),
        ((same, B23, {"x0": 0.0}), TypeError, "x0 must be a tensor, got float"),
        ((same, B23, {"x0": torch.ones(3, 2)}), ValueError, r"x0 must have the shape of b, \[2, 3\], got \[3, 2\]"),
        ((same, B23, {"x0": B23.double()}), TypeError, "x0 must have the dtype of b, float32, got float64"),
        ((same, B23, {"max_iterations": -1}), ValueError, "max_iterations must be at least 0, got -1"),
        ((same, B23, {"max_iterations": 2.0}), TypeError, "max_iterations must be an integer, got 2.0"),
        ((same, B23, {"check_every": -1}), ValueError, "check_every must be at least 0, got -1"),
        ((same, B23, {"rows_per_block": 0}), ValueError, "rows_per_block must be at least 1, got 0"),
        ((same, B23, {"rows_per_block": 1.0}), TypeError, "rows_per_block must be an integer, got 1.0"),
        ((same, B23, {"rows_per_block": 1}), TypeError, "takes 1 positional argument but 2 were given"),
        (
            (lambda p, rows: B23, B23, {"rows_per_block": 1}),
            ValueError,
            r"what A returns must have the shape of b\[rows\], \[1, 3\], got \[2, 3\]",
        ),
        (
            (lambda p, rows: p, B23, {"rows_per_block": 1, "preconditioner": lambda r, rows: r[:, :1]}),
            ValueError,
            r"what preconditioner returns must have the shape of b\[rows\], \[1, 3\], got \[1, 1\]",
        ),
        ((same, B23, {"rtol": -1e-3}), ValueError, "rtol must be at least 0, got -0.001"),
        ((same, B23, {"rtol": math.nan}), ValueError, "rtol must be at least 0, got nan"),
        ((same, B23, {"atol": torch.zeros(3)}), ValueError, r"atol must be a number or have shape \[2\], got \[3\]"),
        ((same, B23, {"rtol": "small"}), TypeError, "rtol must be a number or a tensor, got str"),
        ((same, B23, {"preconditioner": 1.0}), TypeError, "preconditioner must be a tensor or callable, got float"),
        ((same, B23, {"preconditioner": torch.ones(5)}), ValueError, r"preconditioner must be .* got \[5\]"),
        (
            (same, B23, {"preconditioner": lambda r: r[0]}),
            ValueError,
            "what preconditioner returns must have the shape of b",
        ),
        ((lambda p: None, B23, {}), TypeError, "A must return a tensor, got NoneType"),
        ((lambda p: p[:1], B23, {}), ValueError, r"what A returns must have the shape of b, \[2, 3\], got \[1, 3\]"),
        ((lambda p: p.double(), B23, {}), TypeError, "what A returns must have the dtype of b, float32, got float64"),
        ((lambda p: p.to("meta"), B23, {}), ValueError, "what A returns must be on the device of b, cpu, got meta"),
    ],
)
def test_bad_arguments(arguments: tuple, error: type[Exception], message: str) -> None:
    hvp, b, options = arguments
    with pytest.raises(error, match=message):
        cg(hvp, b, **options)


@pytest.mark.cuda
def test_no_host_synchronisation_and_graph_capture() -> None:
    d = 1 + torch.rand(6, 3001, device="cuda")
    b = torch.randn(6, 3001, device="cuda")
    eager = cg(lambda p: d * p, b, shift=0.1)  # also warms up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cg(lambda p: d * p, b, shift=0.1, x0=torch.zeros_like(b), preconditioner=lambda r: r / d)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cg(lambda p: d * p, b, shift=0.1)
    b.copy_(torch.randn_like(b))
    graph.replay()
    fresh = cg(lambda p: d * p, b, shift=0.1)
    torch.cuda.synchronize()
    assert torch.equal(captured.x, fresh.x)
    assert torch.equal(captured.status, fresh.status)
    assert not torch.equal(fresh.x, eager.x)


@pytest.mark.cuda
def test_cpu_and_cuda_agree() -> None:
    systems = reflected(9, 777)
    on_card = reflected(9, 777)
    on_card.d, on_card.v = systems.d.cuda(), systems.v.cuda()
    b = torch.randn(9, 777, dtype=torch.float64)
    host = cg(systems, b, max_iterations=40, shift=0.01)
    card = cg(on_card, b.cuda(), max_iterations=40, shift=0.01)
    torch.testing.assert_close(card.x.cpu(), host.x, rtol=1e-8, atol=1e-8)
    assert torch.equal(card.iterations.cpu(), host.iterations)
    assert torch.equal(card.status.cpu(), host.status)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [9_000, 25_001, 60_000, 300_001])
@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_any_length_are_solved_by_the_same_recurrence(dtype: torch.dtype, cols: int, device: str) -> None:
    """Long rows are shared by more threads, and on CUDA leave shared memory: not to be seen in the result."""
    d = (0.5 + torch.rand(2, cols, dtype=torch.float64)).to(device=device, dtype=dtype)
    b, x0 = torch.randn(2, 2, cols, dtype=torch.float64).to(device=device, dtype=dtype)
    M = (1 / (d.double() + 0.5)).to(torch.float64 if dtype == torch.float64 else torch.float32)
    for options in ({}, {"preconditioner": M}, {"x0": x0}):
        arguments = {"shift": 0.5, "max_iterations": 3, "rtol": 0.0, **options}
        ours, oracle = cg(lambda p: d * p, b, **arguments), reference.cg(lambda p: d * p, b, **arguments)
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        apart = (ours.x.double() - oracle.x.double()).norm(dim=1) / oracle.x.double().norm(dim=1)
        assert apart.max() <= tolerance
        assert torch.equal(ours.status, oracle.status)
        torch.testing.assert_close(ours.residual_norm, oracle.residual_norm, rtol=100 * tolerance, atol=tolerance)


@pytest.mark.parametrize("cols", [3, 30, 130, 2000, 120_001, 262_144])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_the_fate_of_a_row_is_its_own_at_every_length(dtype: torch.dtype, cols: int, device: str) -> None:
    """However many threads, blocks and launches a row has, its neighbours change none of its bits."""
    d = (1 + torch.rand(5, cols, dtype=torch.float64)).to(device=device, dtype=dtype)
    b = torch.randn(5, cols, dtype=torch.float64).to(device=device, dtype=dtype)
    d[1] = 1.0  # done after one step
    d[2] = -4.0
    b[3, cols // 2] = math.nan
    b[4] = 0.0
    options = {"shift": 0.5, "max_iterations": 3, "rtol": 5e-3 if dtype == torch.bfloat16 else 1e-3}
    together = cg(lambda p: d * p, b, **options)
    assert together.status.tolist()[1:] == [C, NEG, BAD, C]
    assert together.status[0] in (C, M)
    assert together.iterations.tolist()[1:] == [1, 0, 0, 0]
    expected = (b[:2].double() / (d[:2].double() + 0.5)).to(dtype)
    within = 0.03 if dtype == torch.bfloat16 else 0.01
    assert ((together.x[:2] - expected).norm(dim=1) <= within * expected.norm(dim=1)).all()
    torch.testing.assert_close(together.x[2], b[2] / 0.5)
    assert (together.x[3:] == 0).all()
    for row in (0, 2):
        alone = cg(lambda p, row=row: d[row : row + 1] * p, b[row : row + 1].clone(), **options)
        _same_bits(alone, together, slice(row, row + 1))


@pytest.mark.parametrize("cols", [31, 40, 200, 1001, 1008, 16_384, 30_003, 240_008])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_the_bits_do_not_depend_on_where_rows_begin(dtype: torch.dtype, cols: int, device: str) -> None:
    """Rows that begin at a multiple of 16 bytes are read by other instructions than those that do not."""
    rows = 2
    d, b, x0, inverse = torch.rand(4, rows, cols, dtype=torch.float64).to(device=device, dtype=dtype) + 0.5

    def at_offset(tensor: Tensor, offset: int) -> Tensor:
        memory = torch.full((tensor.numel() + offset,), math.nan, dtype=tensor.dtype, device=device)
        memory[offset:] = tensor.flatten()
        return memory[offset:].view(tensor.shape)

    for options in ({}, {"preconditioner": inverse.to(ops.compute_dtype(dtype)), "x0": x0}):
        arguments = {"shift": 0.5, "max_iterations": 3, "rtol": 0.0, **options}
        aligned = cg(lambda p: d * p, b, **arguments)
        for offset in (1, 3):
            moved = cg(lambda p, offset=offset: at_offset(d * p, offset), at_offset(b, offset), **arguments)
            _same_bits(moved, aligned)
    assert torch.equal(ops.prox_penalty(at_offset(b, 1), at_offset(d, 3), 0.7), ops.prox_penalty(b, d, 0.7))


@pytest.mark.parametrize("cols", [32, 200, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_coefficients_whose_rows_lie_apart(dtype: torch.dtype, cols: int, device: str) -> None:
    """The first row of such a view begins at a multiple of 16 bytes, like the vectors; the others do not."""
    rows = 3
    d, b, theta = torch.rand(3, rows, cols, dtype=torch.float64).to(device=device, dtype=dtype) + 0.5
    shift, inverse = torch.rand(2, rows, cols, device=device, dtype=ops.compute_dtype(dtype)) + 0.5

    def apart(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, 1))[:, :cols]

    results = [
        cg(lambda p: d * p, b, shift=s, preconditioner=m, max_iterations=3, rtol=0.0)
        for s, m in ((shift, inverse), (apart(shift), apart(inverse)))
    ]
    _same_bits(*results)
    assert torch.equal(ops.prox_penalty(b, theta, apart(shift)), ops.prox_penalty(b, theta, shift))
    steps = [
        ops.prox_sgd_step_(b.clone(), d, theta, lam, lr) for lam, lr in ((shift, inverse), map(apart, (shift, inverse)))
    ]
    assert torch.equal(*steps)


@pytest.mark.parametrize("cols", [0, 1, 3, 30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_many_short_rows(dtype: torch.dtype, cols: int, device: str) -> None:
    rows = 5000 if cols == 3 else 333
    d = (1 + torch.rand(rows, cols, dtype=torch.float64)).to(device=device, dtype=dtype)
    b = torch.randn(rows, cols, dtype=torch.float64).to(device=device, dtype=dtype)
    rtol = 5e-2 if dtype == torch.bfloat16 else 1e-2
    result = cg(lambda p: d * p, b, shift=0.5, max_iterations=8, rtol=rtol)
    assert (result.status == C).all()
    expected = b.double() / (d.double() + 0.5)
    assert ((result.x.double() - expected).norm(dim=1) <= 3 * rtol * expected.norm(dim=1)).all()
