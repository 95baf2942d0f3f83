"""What `imaml_ext.cg` says of a row is true: of known matrices, in every dtype, under every preconditioner."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import reference
import reference_minres
import torch
from systems import DTYPES, known_matrices, multiply, residual_in_long_double, singular_matrices, spd
from torch import Tensor

from imaml_ext import Solution, SolveStatus, cg
from imaml_ext.solvers import MINRES

C, M, NEG, BAD, SING, STAG = 0, 1, 2, 3, 7, 8
F32, F64 = torch.float32, torch.float64


def times(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda p: p @ matrix  # symmetric


def preconditioners(matrix: Tensor, dtype: torch.dtype) -> Iterator[Callable[[Tensor], Tensor] | Tensor | None]:
    """None, the diagonal, and a dense inverse in the vectors' type."""
    yield None
    diagonal = 1 / matrix.diagonal()
    wide = torch.float64 if dtype == F64 else F32
    if diagonal.to(dtype).isfinite().all():
        yield diagonal.to(wide)
    inverse = torch.linalg.inv(matrix)
    yield times(((inverse + inverse.mT) / 2).to(dtype))


def check_measured(matrix: Tensor, x: Tensor, b: Tensor, said: float) -> tuple[float, float]:
    """`said` is ‖b − A x‖ but for the rounding of a product in the vectors' type; returns both."""
    true = residual_in_long_double(matrix, x, b)
    # The rounding of a sum of N terms.
    u = torch.finfo(b.dtype).eps / 2
    size = float((matrix.double().abs() @ x.double().abs()).norm()) + float(b.double().norm())
    rounding = 2 * u * math.sqrt(len(matrix)) * size
    assert abs(true - said) <= rounding + 0.01 * true
    return true, rounding


def check_claims(matrix: Tensor, b: Tensor, solution: Solution, rtol: float) -> None:
    """b, x: [1, N]. `matrix` in the vectors' type."""
    status, norm = int(solution.status), float(b.double().norm())
    assert solution.x.isfinite().all()
    if status in (C, STAG) and float(solution.residual_norm) != math.inf:
        true, rounding = check_measured(matrix, solution.x[0], b[0], float(solution.residual_norm))
    if status == C:
        measured = (b.double() - times(matrix)(solution.x).double()).norm()
        assert float(measured) <= rtol * norm * (1 + 4 * torch.finfo(b.dtype).eps)
        assert true <= 3 * rtol * norm + rounding


TOLERANCES = {
    F64: (1e-4, 1e-8, 1e-13),
    F32: (1e-2, 1e-5),
    torch.bfloat16: (1e-1, 1e-2, 1e-3),
    torch.float16: (2e-2, 2e-3),
}


def sweep(matrices: dict[str, Tensor], dtype: torch.dtype, iterations: int) -> Counter[int]:
    said: Counter[int] = Counter()
    for matrix in matrices.values():
        narrow = matrix.to(dtype)
        if not narrow.isfinite().all():
            continue
        for preconditioner in preconditioners(matrix, dtype):
            for rtol in TOLERANCES[dtype]:
                b = torch.randn(1, len(matrix), dtype=F64).to(dtype)
                options = {"rtol": rtol, "max_iterations": iterations, "check_every": 5}
                solution = cg(times(narrow), b, preconditioner=preconditioner, **options)
                check_claims(narrow, b, solution, rtol)
                said[int(solution.status)] += 1
    return said


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_claim_about_a_known_matrix_is_false(dtype: torch.dtype) -> None:
    said = sweep(known_matrices(), dtype, 150)
    assert said[C] >= 6  # of 78 to 126; 12 to 85 in 40 sessions
    assert said[STAG] >= 1  # 6 to 20 in 140 or more draws of each dtype


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_claim_is_false_in_a_larger_sweep(dtype: torch.dtype) -> None:
    for condition in (1, 30, 1e3, 1e6, 1e9):
        sweep({str(cols): spd(cols, condition) for cols in (1, 2, 7, 33, 100)}, dtype, 600)
    for _ in range(8):
        sweep(known_matrices(), dtype, 600)


@pytest.mark.parametrize(
    ("dtype", "rtol", "condition", "share"),
    [(F32, 1e-5, 500, 0.5), (torch.bfloat16, 1e-2, 10, 0.9), (torch.float16, 1e-2, 100, 0.9)],
    ids=str,
)
def test_rows_whose_residual_meets_the_tolerance_are_converged(
    dtype: torch.dtype, rtol: float, condition: float, share: float
) -> None:
    """Tolerances near what the dtype can reach: nearly all rows get there, and none goes on for ever."""
    A = torch.stack([spd(100, condition) for _ in range(24)]).to(dtype)
    b = torch.randn(24, 100, dtype=F64).to(dtype)
    solution = cg(multiply(A), b, rtol=rtol, max_iterations=1000, check_every=1)
    assert set(solution.status.tolist()) <= {C, STAG}
    assert (solution.status == C).double().mean() >= share  # float32: 19 to 24 of 24 in 116 draws; the others: all
    assert solution.iterations.max() < 300
    residual = (b.double() - multiply(A.double())(solution.x.double())).norm(dim=1) / b.double().norm(dim=1)
    assert (residual[solution.status == C] <= 2 * rtol).all()
    oracle = reference.cg(multiply(A), b, rtol=rtol, max_iterations=1000, check_every=1)
    assert (solution.iterations - oracle.iterations).abs().double().mean() <= 0.1 * oracle.iterations.double().mean()


def test_an_unreachable_tolerance_ends_in_the_accuracy_reached() -> None:
    A = spd(60, 1e3).float()
    b = torch.randn(1, 60)
    calls = 0

    def counted(p: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return p @ A

    solution = cg(counted, b, rtol=1e-9, max_iterations=10_000, check_every=1)
    assert solution.status.tolist() == [STAG]
    assert calls < 3000  # 561 to 1,130 in 4,300 draws
    torch.testing.assert_close(float(solution.residual_norm), float((b - times(A)(solution.x)).double().norm()))
    assert solution.residual_norm < 1e-3 * b.norm()
    assert "residual_norm is what this dtype" in SolveStatus.STAGNATED.advice
    solution.raise_if_failed(unfinished=False)  # as one that has spent its iterations


def test_products_in_less_precision_than_the_vectors() -> None:
    """As under autocast: what is claimed is true of the callback's own products."""
    A = spd(50, 10).float()
    narrow = A.bfloat16()

    def hvp(p: Tensor) -> Tensor:
        return (p.bfloat16() @ narrow).float()

    b = torch.randn(8, 50)
    for solver in (lambda rtol: cg(hvp, b, rtol=rtol, max_iterations=200, check_every=1),
                   lambda rtol: MINRES(max_iterations=200, rtol=rtol).solve(hvp, b)):  # fmt: skip
        for rtol, expected in ((1e-5, STAG), (5e-2, C)):
            solution = solver(rtol)
            assert (solution.status == expected).all()
            # Of all rows at once: alone, a row's product may be rounded otherwise, by a part of its residual.
            measured = (b - hvp(solution.x)).norm(dim=1)
            torch.testing.assert_close(solution.residual_norm.float(), measured, rtol=1e-4, atol=0)


def test_a_solution_that_underflows_is_no_solution() -> None:
    b = 1e-30 * torch.randn(3, 20)
    solution = cg(lambda p: 1e20 * p, b, max_iterations=30)
    assert (solution.status == STAG).all()
    assert not solution.x.any()
    torch.testing.assert_close(solution.residual_norm, b.double().norm(dim=1))
    A = 1e2 * torch.stack([spd(20, 3) for _ in range(16)])
    b = (1e-4 * torch.randn(16, 20)).half()
    half = cg(multiply(A.half()), b, rtol=2e-2, max_iterations=60)
    residual = (b.double() - multiply(A.half().double())(half.x.double())).norm(dim=1) / b.double().norm(dim=1)
    assert set(half.status.tolist()) <= {C, STAG}
    assert (residual[half.status == C] <= 3e-2).all()
    assert (half.residual_norm / b.double().norm(dim=1) - residual).abs().max() < 0.03


@pytest.mark.parametrize("scale_b", [1e-300, 1e-200, 1e-160, 1.0, 1e80, 1e200, 1e300])
def test_float64_of_any_magnitude(scale_b: float) -> None:
    d = torch.tensor([[1.0, 2.0, 3.0, 5.0, 0.5]], dtype=F64)
    b = torch.randn(4, 5, dtype=F64)
    for scale_A in (1e-300, 1e-100, 1.0, 1e80, 1e150):
        expected = (b / d) * (scale_b / scale_A)
        product = (5 * b).abs().max() * scale_b * scale_A
        if not expected.isfinite().all() or product > 1e308 or expected.abs().min() < 1e-290 or product < 1e-290:
            continue
        for options in ({}, {"preconditioner": torch.ones(5, dtype=F64)}, {"x0": expected * torch.rand(4, 5)}):
            solution = cg(lambda p: (scale_A * d) * p, scale_b * b, max_iterations=12, rtol=1e-12, **options)  # noqa: B023
            assert solution.status.tolist() == [C] * 4, (scale_A, options)
            torch.testing.assert_close(solution.x, expected, rtol=1e-10, atol=0)
            assert (solution.residual_norm <= 1e-12 * scale_b * b.norm(dim=1) * (1 + 1e-9)).all()
    minres = MINRES(max_iterations=12, rtol=1e-12).solve(lambda p: d * p, scale_b * b)
    assert minres.status.tolist() == [C] * 4
    torch.testing.assert_close(minres.x, (b / d) * scale_b, rtol=1e-10, atol=0)


@pytest.mark.parametrize("exponent", [-800, -400, 300, 800])
def test_powers_of_two_change_no_bit(exponent: int) -> None:
    A, b = spd(30, 100), torch.randn(3, 30, dtype=F64)
    scale = 2.0**exponent
    plain, scaled = (cg(times(A), f * b, max_iterations=40, rtol=1e-9) for f in (1.0, scale))
    assert torch.equal(scaled.x, scale * plain.x)
    assert torch.equal(scaled.status, plain.status)
    assert torch.equal(scaled.iterations, plain.iterations)
    torch.testing.assert_close(scaled.residual_norm, scale * plain.residual_norm, rtol=1e-14, atol=0)


def test_a_norm_beyond_the_largest_number_is_not_finite() -> None:
    solution = cg(lambda p: p, torch.full((1, 100), 1e308, dtype=F64))
    assert solution.status.tolist() == [BAD]
    zero = cg(lambda p: p, torch.zeros(1, 5, dtype=F64), x0=torch.full((1, 5), 1e200, dtype=F64))
    assert zero.status.tolist() == [C]
    assert not zero.x.any()


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_singular_and_inconsistent_systems(dtype: torch.dtype) -> None:
    """x stays near the least-squares solution, and the residual near that of x = 0 or below.

    Not of a row that has spent its iterations: in place of the kernel the rounded matrix has an eigenvalue of about
    u ‖A‖. Where that is positive, the row may be on its way to the solution of the rounded system.
    """
    for name, matrix in singular_matrices().items():
        A, b = matrix.to(dtype), torch.randn(8, len(matrix), dtype=dtype)
        solution = cg(multiply(A.expand(8, -1, -1)), b, max_iterations=400, rtol=1e-8 if dtype == F64 else 1e-5)
        assert set(solution.status.tolist()) <= {SING, STAG, M}, name
        if name != "gram of rank N - 1":  # whose least eigenvalue beside 0 is nearly 0 too
            assert (solution.status == SING).sum() >= 6, name
        rows = solution.status == SING
        residual = (b.double() - multiply(matrix.expand(8, -1, -1))(solution.x.double())).norm(dim=1)
        pseudo = b.double() @ torch.linalg.pinv(matrix, rtol=1e-10)
        assert (residual[rows] <= 6 * b.double().norm(dim=1)[rows]).all(), name
        near = solution.x.double().norm(dim=1) <= 1e4 * pseudo.norm(dim=1)
        assert near[solution.status != M].all(), name  # in 15,000 draws of rank N - 1, 11 rows ended as M far away
        assert solution.broke_down[rows].all()
    assert "singular to working precision" in SolveStatus.SINGULAR.advice


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_no_step_is_taken_along_a_kernel(dtype: torch.dtype) -> None:
    """Few products, so that a row that had run off would still be away."""
    matrices = singular_matrices()
    del matrices["gram of rank N - 1"]  # whose least eigenvalue beside 0 may be as good as 0
    for name, matrix in matrices.items():
        A, b = matrix.to(dtype), torch.randn(16, len(matrix), dtype=dtype)
        pseudo = (b.double() @ torch.linalg.pinv(matrix, rtol=1e-10)).norm(dim=1)
        for k in (len(matrix), 30):
            solution = cg(times(A), b, max_iterations=k, rtol=1e-8 if dtype == F64 else 1e-5)
            assert (solution.x.double().norm(dim=1) <= 1e4 * pseudo).all(), name


def test_consistent_singular_systems_are_solved() -> None:
    for matrix in singular_matrices().values():
        b = torch.randn(3, len(matrix), dtype=F64) @ matrix
        solution = cg(times(matrix), b, max_iterations=400, rtol=1e-6, check_every=1)
        assert (solution.status == C).all()
        assert ((b - solution.x @ matrix).norm(dim=1) <= 2e-6 * b.norm(dim=1)).all()


def test_a_positive_definite_matrix_at_the_edge_of_the_dtype_is_told_so() -> None:
    for status in (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.SINGULAR):
        assert "to working precision" in status.advice
    for dtype, condition in ((F64, 1e11), (F32, 1e5)):  # well below 1 / (8 u)
        for _ in range(4):
            A, b = spd(30, condition).to(dtype), torch.randn(1, 30, dtype=dtype)
            solution = cg(times(A), b, max_iterations=300, rtol=1e-4)
            assert int(solution.status) in (C, M, STAG)


def test_a_budget_without_a_tolerance_is_spent_on_steps() -> None:
    """With rtol = 0 every product is a step, whatever the residual; and a tolerance that is not met changes no bit."""
    A, b = spd(40, 30), torch.randn(2, 40, dtype=F64)
    for k in (1, 2, 5, 60):
        free = cg(times(A), b, max_iterations=k, rtol=0.0)
        assert free.iterations.tolist() == [k] * 2
    strict = cg(times(A), b, max_iterations=5, rtol=1e-5)
    assert torch.equal(strict.x, cg(times(A), b, max_iterations=5, rtol=0.0).x)
    assert strict.iterations.tolist() == [5] * 2


def test_measuring_an_unfinished_row() -> None:
    """The recurrence's residual is an estimate; a warm start without iterations measures it, by one product."""
    A, b = spd(40, 1e4).float(), torch.randn(2, 40)
    unfinished = cg(times(A), b, max_iterations=300, rtol=0.0)
    measured = cg(times(A), b, x0=unfinished.x, max_iterations=0)
    assert torch.equal(measured.x, unfinished.x)
    for x, row, said in zip(measured.x, b, measured.residual_norm, strict=True):
        check_measured(A, x, row, float(said))
    assert (unfinished.residual_norm < 0.1 * measured.residual_norm).all()
    # The last product is a step: nothing has measured what it led to.
    one_step = cg(lambda p: 2 * p, b, max_iterations=1)
    assert one_step.status.tolist() == [M, M]
    assert cg(lambda p: 2 * p, b, max_iterations=2).status.tolist() == [C, C]
    assert cg(lambda p: 2 * p, b, x0=one_step.x, max_iterations=0).status.tolist() == [C, C]


def test_a_callback_that_writes_to_its_argument_is_an_error() -> None:
    b = torch.randn(2, 5)
    with pytest.raises(ValueError, match="A must leave its argument as it is, but has written to it"):
        cg(lambda p: p.mul_(2), b)
    for preconditioner in (lambda r: r.mul_(0.5), lambda r: r.zero_()):
        with pytest.raises(ValueError, match="preconditioner must leave its argument"):
            cg(lambda p: 2 * p, b, preconditioner=preconditioner)


def test_work_vectors_are_not_those_of_another_mode() -> None:
    weight, b = torch.ones(5, requires_grad=True), torch.randn(2, 5)
    seen: list[Tensor] = []

    def hvp(p: Tensor) -> Tensor:
        seen.append(p)
        return weight * p * (1 + p.square())  # whose gradient needs p

    with torch.inference_mode():
        cg(lambda p: 2 * p, torch.randn(2, 5), max_iterations=3)
    cg(hvp, b, max_iterations=3)
    assert not any(p.is_inference() for p in seen)


def test_statuses_have_the_numbers_of_the_native_part() -> None:
    header = Path(__file__).parents[1] / "csrc/common/row.h"
    named = dict(re.findall(r"  k(\w+) = (\d+),", header.read_text()))
    assert named.pop("Iterating") == str(reference.ITERATING)
    assert named.pop("Verifying") == str(reference.VERIFYING)
    assert named.pop("Suspect") == str(reference_minres.SUSPECT)
    ours = {status.name.title().replace("_", ""): str(int(status)) for status in SolveStatus}
    assert named.items() <= ours.items()
