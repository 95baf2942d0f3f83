"""MINRES against direct solves: indefinite matrices, statuses, independence of the rows."""

import math

import pytest
import reference_minres
import torch
from meta_tasks import F64, HostWatch, regression, relative
from systems import DEVICES, DTYPES, known_matrices, multiply, residual_in_long_double, singular_matrices
from torch import Tensor

from imaml_ext import CG, IMAML, GradientDescent, Solution, SolveError, SolveStatus
from imaml_ext.settings import from_json, to_json
from imaml_ext.solvers import MINRES, LinearSolver, minres

B, N = 5, 23


def symmetric(eigenvalues: Tensor) -> Tensor:
    """Random symmetric matrices [B, N, N] with the eigenvalues [B, N]."""
    q = torch.linalg.qr(torch.randn(*eigenvalues.shape, eigenvalues.shape[-1], dtype=F64)).Q
    return (q * eigenvalues.unsqueeze(1)) @ q.mT


def solve_symmetric(A: Tensor, b: Tensor) -> Tensor:
    """A⁻¹ b of symmetric matrices [B, N, N] of any definiteness."""
    values, vectors = torch.linalg.eigh(A)
    return (vectors @ ((vectors.mT @ b.unsqueeze(2)) / values.unsqueeze(2))).squeeze(2)


def indefinite(rows: int = B, size: int = N) -> Tensor:
    """Eigenvalues of either sign, between 0.3 and 2 in size."""
    values = 0.3 + 1.7 * torch.rand(rows, size, dtype=F64)
    return symmetric(values * torch.where(torch.arange(size) % 2 == 0, 1.0, -1.0))


@pytest.mark.parametrize("form", ["number", "[B]", "[N]", "[B, N]"])
def test_indefinite_systems_against_direct_solves(form: str) -> None:
    A, b = indefinite(), torch.randn(B, N, dtype=F64)
    shape = {"number": (), "[B]": (B,), "[N]": (N,), "[B, N]": (B, N)}[form]
    shift = 0.2 * torch.rand(shape, dtype=F64)
    rows = shift.unsqueeze(1) if form == "[B]" else shift
    expected = solve_symmetric(A + rows.expand(B, N).diag_embed(), b)
    solution = MINRES(max_iterations=20 * N, rtol=1e-11).solve(multiply(A), b, shift)
    solution.raise_if_failed()
    residual = (b - multiply(A)(solution.x) - rows * solution.x).norm(dim=1)
    torch.testing.assert_close(solution.residual_norm, residual, rtol=1e-2, atol=1e-14)
    assert (residual <= 1.01e-11 * b.norm(dim=1)).all()
    assert relative(solution.x, expected) < 1e-6


def test_as_many_products_as_distinct_eigenvalues_and_one_that_measures() -> None:
    values = torch.tensor([-2.0, -0.5, 1.0, 3.0], dtype=F64)[torch.arange(N) % 4].expand(B, N)
    A, b = symmetric(values), torch.randn(B, N, dtype=F64)
    calls = 0

    def counted(p: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return multiply(A)(p)

    solution = MINRES(max_iterations=5, rtol=1e-10).solve(counted, b)
    assert calls == 5
    assert (solution.status == SolveStatus.CONVERGED).all()
    assert solution.iterations.tolist() == [4] * B
    unmeasured = MINRES(max_iterations=4, rtol=1e-10).solve(multiply(A), b)
    assert (unmeasured.status == SolveStatus.MAX_ITERATIONS).all()  # nothing has measured it yet
    torch.testing.assert_close(unmeasured.x, solution.x)


def test_the_residual_never_grows_and_is_the_least_of_the_krylov_space() -> None:
    A, b = indefinite(), torch.randn(B, N, dtype=F64)
    norms = [b.norm(dim=1)]
    for k in range(1, 9):
        solution = MINRES(max_iterations=k, rtol=0.0).solve(multiply(A), b)
        residual = (b - multiply(A)(solution.x)).norm(dim=1)
        torch.testing.assert_close(solution.residual_norm, residual, rtol=1e-8, atol=1e-12)
        assert (residual <= norms[-1] * (1 + 1e-12)).all()
        norms.append(residual)
        power, columns = b, []
        for _ in range(k):
            columns.append(power)
            power = multiply(A)(power)
        images = multiply(A)
        space = torch.stack([images(column) for column in columns], 2)  # [B, N, k]
        least = b - (space @ torch.linalg.lstsq(space, b.unsqueeze(2)).solution).squeeze(2)
        torch.testing.assert_close(residual, least.norm(dim=1), rtol=1e-6, atol=1e-10)


def test_positive_definite_systems_as_conjugate_gradients() -> None:
    A, b = symmetric(0.5 + torch.rand(B, N, dtype=F64)), torch.randn(B, N, dtype=F64)
    found, expected = (solver(max_iterations=60, rtol=1e-12).solve(multiply(A), b) for solver in (MINRES, CG))
    torch.testing.assert_close(found.x, expected.x, rtol=1e-9, atol=1e-11)


def test_statuses_of_rows_side_by_side() -> None:
    """Converges; b = 0; NaN in b; infinity in a product; singular with b outside the range; too few iterations."""
    values = torch.rand(6, N, dtype=F64) + 0.5
    values[4] = torch.arange(N) % 2  # two eigenvalues, of which one is 0
    values[5] = torch.logspace(-7, 0, N, dtype=F64)
    A, b = symmetric(values), torch.randn(6, N, dtype=F64)
    clean = MINRES(max_iterations=40, rtol=1e-9).solve(multiply(A), b)
    b[1] = 0
    b[2, 3] = math.nan
    A[3, 0, 0] = math.inf
    solution = MINRES(max_iterations=40, rtol=1e-9).solve(multiply(A), b)
    names = [SolveStatus(status).name for status in solution.status.tolist()]
    assert names == ["CONVERGED", "CONVERGED", "NON_FINITE", "NON_FINITE", "SINGULAR", "MAX_ITERATIONS"]
    assert torch.equal(solution.x[[0, 5]], clean.x[[0, 5]])  # whatever their neighbours do
    assert solution.iterations[1] == 0
    assert not solution.x[:4][1:].any()
    assert solution.x.isfinite().all()
    # Of all x, the singular row's has the least residual: the part of b that A cannot reach.
    q = torch.linalg.eigh(A[4])
    outside = q.eigenvectors[:, q.eigenvalues.abs() < 1e-8]
    torch.testing.assert_close(solution.residual_norm[4], (outside.T @ b[4]).norm())
    assert solution.broke_down.tolist() == [False] * 4 + [True, False]
    with pytest.raises(SolveError, match=r"SINGULAR in 1 of 6 rows \(4\): .* raise shift"):
        solution.raise_if_failed(unfinished=False)


def test_converged_is_measured_where_rounding_drives_the_recurrence_away() -> None:
    """κ = 10² in float32: what is called CONVERGED has that residual in float64 too, but for the product's rounding."""
    values = torch.logspace(-2, 0, 60, dtype=F64) * torch.where(torch.arange(60) % 3 == 0, -1.0, 1.0)
    A = symmetric(values.expand(24, 60)).float()
    b = torch.randn(24, 60)
    solution = MINRES(max_iterations=600, rtol=1e-3).solve(multiply(A), b)
    converged = solution.status == SolveStatus.CONVERGED
    assert converged.any()
    residual = (b.double() - multiply(A.double())(solution.x.double())).norm(dim=1) / b.double().norm(dim=1)
    floor = 60 * torch.finfo(torch.float32).eps * solution.x.double().norm(dim=1) / b.double().norm(dim=1)
    assert (residual <= 1e-3 + floor)[converged].all()


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_what_it_says_of_known_matrices_was_measured(dtype: torch.dtype) -> None:
    """Shifted to be indefinite too. A row that is done has the residual that it reports."""
    said = set()
    small = [matrix for matrix in {**known_matrices(), **singular_matrices()}.values() if len(matrix) <= 24]
    for matrix in small:
        for shift in (0.0, -float(matrix.diagonal().mean())):
            A = (matrix + shift * torch.eye(len(matrix), dtype=F64)).to(dtype)
            b, rtol = torch.randn(1, len(A), dtype=dtype), 1e-8 if dtype == F64 else 1e-5
            solution = MINRES(max_iterations=100, rtol=rtol).solve(lambda p: p @ A, b)  # noqa: B023
            said.add(int(solution.status))
            assert solution.x.isfinite().all()
            if solution.status == SolveStatus.MAX_ITERATIONS:
                continue
            true, norm = residual_in_long_double(A, solution.x[0], b[0]), float(b.double().norm())
            rounding = len(A) * torch.finfo(dtype).eps * float((A.abs() @ solution.x[0].abs()).norm())
            assert float(solution.residual_norm) == pytest.approx(true, rel=1.0, abs=rounding)
            assert true <= (3 * rtol if solution.status == SolveStatus.CONVERGED else 2) * norm
    assert said >= {SolveStatus.CONVERGED, SolveStatus.SINGULAR}


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_what_the_type_cannot_reach_stagnates(dtype: torch.dtype) -> None:
    d, b = 1 + torch.rand(3, 400, dtype=dtype), torch.randn(3, 400, dtype=dtype)
    solution = MINRES(max_iterations=200, rtol=1e-30).solve(lambda p: d * p, b)
    assert solution.status.tolist() == [SolveStatus.STAGNATED] * 3
    torch.testing.assert_close(solution.x, b / d)


def test_nothing_waits_for_the_device() -> None:
    A, b = indefinite(), torch.randn(B, N, dtype=F64)
    with HostWatch() as watch:
        MINRES(max_iterations=7).solve(multiply(A), b, torch.rand(B, dtype=F64))
    assert watch.seen == []


def test_the_implicit_gradient_where_the_hessian_is_indefinite() -> None:
    """Conjugate gradients meet negative curvature; MINRES solves the system, as a dense solve does."""
    loss, theta, episodes = regression(3)
    theta = theta + torch.randn_like(theta)
    lam, inner = 0.05, GradientDescent(steps=1, lr=0.01)
    algorithm = IMAML(loss, lam=lam, inner=inner, linear_solver=MINRES(max_iterations=600, rtol=1e-12))
    phi = algorithm.adapt(theta, episodes.support)
    n = theta.numel()
    product = loss.linearize(phi, episodes.support)
    H = torch.stack([product(torch.eye(n, dtype=F64)[i].expand(3, n).contiguous()) for i in range(n)], 2)
    assert (torch.linalg.eigvalsh(H).min(1).values < -lam).any()
    v = loss.gradient(phi, episodes.query).gradient
    expected = (lam * solve_symmetric(H + lam * torch.eye(n, dtype=F64), v)).mean(0)
    meta = algorithm.meta_gradient(theta, episodes)
    assert relative(meta.gradient, expected) < 1e-6
    assert float(meta.metrics["singular"]) == 0
    by_cg = IMAML(loss, lam=lam, inner=inner, linear_solver=CG(max_iterations=600, rtol=1e-12))
    assert float(by_cg.meta_gradient(theta, episodes).metrics["negative_curvature"]) > 0


def test_it_is_chosen_by_name_and_read_back() -> None:
    solver = LinearSolver.kind("minres")(max_iterations=9, rtol=1e-3)
    assert from_json(LinearSolver, to_json(solver)) == solver == MINRES(max_iterations=9, rtol=1e-3)
    with pytest.raises(ValueError, match=r"MINRES\.max_iterations must be at least 1, got 0"):
        MINRES(max_iterations=0)


# --- the native loop -------------------------------------------------------------------------------------------------


def rows_of_every_fate(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Matrices [8, N, N] and b: definite, indefinite, singular with b in its range and not, of A = 0, NaN, b = 0."""
    values = 0.3 + 1.7 * torch.rand(8, N, dtype=F64)
    values[1:5] *= torch.where(torch.arange(N) % 2 == 0, 1.0, -1.0)
    values[3:5, : N // 2] = 0.0
    values[5] = 0.0
    A, b = symmetric(values), torch.randn(8, N, dtype=F64)
    b[3] = multiply(A[3:4])(b[3:4])[0]
    b[6, 2] = math.nan
    b[7] = 0.0
    return A.to(dtype), b.to(dtype)


@pytest.mark.parametrize("form", ["number", "[B]", "[N]", "[B, N]"])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_agrees_with_the_oracle(form: str, warm: bool, dtype: torch.dtype) -> None:
    """The same statuses after the same numbers of steps, while the steps are few enough for rounding not to matter."""
    A, b = rows_of_every_fate(dtype)
    shape = {"number": (), "[B]": (8,), "[N]": (N,), "[B, N]": (8, N)}[form]
    shift = 0.0 if form == "number" else 0.01 * torch.rand(shape, dtype=dtype)
    x0 = torch.randn(8, N, dtype=dtype) if warm else None
    for budget in (1, 2, 5, 9):
        options = {"shift": shift, "x0": x0, "max_iterations": budget, "rtol": 0.3 if budget == 9 else 1e-5}
        ours, oracle = minres(multiply(A), b, **options), reference_minres.minres(multiply(A), b, **options)
        assert ours.status.tolist() == oracle.status.tolist()
        assert ours.iterations.tolist() == oracle.iterations.tolist()
        close = 1e-9 if dtype == F64 else 1e-2
        torch.testing.assert_close(ours.x, oracle.x, rtol=close, atol=close)
        torch.testing.assert_close(ours.residual_norm, oracle.residual_norm, rtol=close, atol=close, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_fate(dtype: torch.dtype, device: str) -> None:
    A, b = (t.to(device) for t in rows_of_every_fate(dtype))
    rtol = {F64: 1e-10, torch.float32: 1e-4}.get(dtype, 0.1)
    solution = minres(multiply(A), b, max_iterations=80, rtol=rtol)
    C, SINGULAR, BAD = SolveStatus.CONVERGED, SolveStatus.SINGULAR, SolveStatus.NON_FINITE
    assert solution.status[[0, 1, 2, 3, 5, 6, 7]].tolist() == [C, C, C, C, SINGULAR, BAD, C]
    assert solution.status[4] != C
    assert solution.x.isfinite().all()
    assert not solution.x[5:].any()
    converged = solution.status[:5] == C
    residual = (b.double() - multiply(A.double())(solution.x.double())).norm(dim=1)[:5]
    rounding = N * torch.finfo(dtype).eps * (solution.x.double().norm(dim=1) * 2)[:5]
    assert (residual <= rtol * b[:5].double().norm(dim=1) + rounding)[converged].all()


def same_bits(ours: Solution, other: Solution, rows: slice = slice(None)) -> None:
    for name in ("x", "status", "iterations", "residual_norm"):
        torch.testing.assert_close(getattr(ours, name), getattr(other, name)[rows], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [3, 40, 1001, 9001])
def test_a_row_alone_in_company_and_in_a_block_has_the_same_bits(dtype: torch.dtype, cols: int, device: str) -> None:
    d = torch.randn(7, cols, dtype=F64).to(dtype).to(device)
    b = torch.randn(7, cols, dtype=F64).to(dtype).to(device)
    x0 = torch.randn(7, cols, dtype=F64).to(dtype).to(device)
    b[2, 1], d[4, 0] = math.nan, math.inf
    for start in (None, x0):
        options = {"shift": 0.1, "max_iterations": 12, "rtol": 1e-2}
        together = minres(lambda p: d * p, b, x0=start, **options)
        same_bits(minres(lambda p, rows: d[rows] * p, b, x0=start, rows_per_block=3, **options), together)
        for row in (0, 4, 6):
            one = slice(row, row + 1)
            of_row = None if start is None else start[one]
            same_bits(minres(lambda p, one=one: d[one] * p, b[one], x0=of_row, **options), together, one)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [40, 1008, 16_384])
def test_the_bits_do_not_depend_on_where_rows_begin(dtype: torch.dtype, cols: int, device: str) -> None:
    tensors = [torch.randn(2, cols, dtype=F64).to(dtype).to(device) for _ in range(3)]
    found = []
    for offset in (0, 1):
        moved = [torch.empty(2 * cols + offset, dtype=dtype, device=device)[offset:].view(2, cols) for _ in tensors]
        for to, tensor in zip(moved, tensors, strict=True):
            to.copy_(tensor)
        d, b, x0 = moved
        found.append(minres(lambda p, d=d: d * p, b, x0=x0, max_iterations=5, rtol=0.0))
    same_bits(*found)


def test_powers_of_two_change_no_bit() -> None:
    """Not of A, and not of b, but in the exponents of x and of the residual."""
    A, b = rows_of_every_fate(F64)
    A, b = A[:5], b[:5]
    plain = minres(multiply(A), b, max_iterations=60, rtol=1e-9)
    for of_A, of_b in ((0, 700), (0, -700), (400, 0), (-400, 0), (650, 600), (-700, -650)):
        scaled = minres(lambda p, f=2.0**of_A: f * multiply(A)(p), 2.0**of_b * b, max_iterations=60, rtol=1e-9)
        assert torch.equal(scaled.status, plain.status)
        assert torch.equal(scaled.iterations, plain.iterations)
        assert torch.equal(scaled.x * 2.0**of_A, plain.x * 2.0**of_b)
        assert torch.equal(scaled.residual_norm, plain.residual_norm * 2.0**of_b)


@pytest.mark.parametrize("scale_b", [1e-300, 1e-160, 1.0, 1e200, 1e300])
@pytest.mark.parametrize("scale_A", [1e-280, 1e-120, 1.0, 1e120, 1e280])
def test_float64_of_any_magnitude(scale_A: float, scale_b: float) -> None:
    """Where x is a number, it is found."""
    A, b = indefinite(3), torch.randn(3, N, dtype=F64)
    solution = minres(lambda p: scale_A * multiply(A)(p), scale_b * b, max_iterations=60, rtol=1e-8)
    size = math.log10(scale_b) - math.log10(scale_A)
    if size > 306:
        assert (solution.status == SolveStatus.NON_FINITE).all()
    elif size > -290:
        assert (solution.status == SolveStatus.CONVERGED).all()
        expected = solve_symmetric(A, b)
        assert relative(solution.x / scale_b * scale_A, expected) < 1e-6
    assert solution.x.isfinite().all()


def test_norms_beyond_the_largest_number_of_the_type() -> None:
    """Of float32 and float16 vectors whose elements are numbers: 4,000 elements near the largest have such a norm."""
    for dtype in (torch.float32, torch.float16):
        b = torch.full((1, 4000), 0.5 * torch.finfo(dtype).max, dtype=dtype)
        solution = minres(lambda p: 100 * p, b, rtol=1e-2)
        assert solution.status.tolist() == [SolveStatus.CONVERGED]
        torch.testing.assert_close(solution.x, b / 100, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_solution_that_overflows_keeps_the_last_finite_iterate(dtype: torch.dtype) -> None:
    small, large = (0.25, 0.5 * torch.finfo(dtype).max) if dtype == torch.float16 else (1e-3, 1e37)
    d = torch.tensor([[small, 1.0, -1.0], [1.0, 2.0, -1.0]], dtype=dtype)
    b = torch.tensor([[large, 1.0, 1.0], [1.0, 1.0, 1.0]], dtype=dtype)
    solution = minres(lambda p: d * p, b, max_iterations=8, rtol=1e-3)
    assert solution.status.tolist() == [SolveStatus.NON_FINITE, SolveStatus.CONVERGED]
    assert solution.x.isfinite().all()


def test_warm_starts() -> None:
    A, b = indefinite(), torch.randn(B, N, dtype=F64)
    calls = []

    def counted(p: Tensor) -> Tensor:
        calls.append(p.clone())
        return multiply(A)(p)

    exact = solve_symmetric(A, b)
    found = minres(counted, b, x0=exact, max_iterations=3, check_every=1)
    assert len(calls) == 1
    assert torch.equal(found.x, exact)
    assert found.status.tolist() == [SolveStatus.CONVERGED] * B
    assert not found.iterations.any()

    far = exact + 1e3 * torch.randn(B, N, dtype=F64)
    found = minres(counted, b, x0=far, max_iterations=60, rtol=1e-9)
    assert len(calls) == 62  # one for x0, and max_iterations
    found.raise_if_failed()
    assert relative(found.x, exact) < 1e-6
    unchanged = minres(counted, b, x0=far, max_iterations=0)
    assert torch.equal(unchanged.x, far)
    torch.testing.assert_close(unchanged.residual_norm, (b - multiply(A)(far)).norm(dim=1))

    # None is better than the start: its x is given back. And one that is not finite is no iterate.
    stagnant = minres(counted, b, x0=exact, max_iterations=200, rtol=0.0)
    assert (stagnant.status == SolveStatus.STAGNATED).all()
    assert (stagnant.residual_norm <= (b - multiply(A)(exact)).norm(dim=1) * (1 + 1e-6)).all()
    far[1, 1] = math.nan
    found = minres(counted, b, x0=far, max_iterations=60)
    assert found.status[1] == SolveStatus.NON_FINITE
    assert not found.x[1].any()


def test_it_looks_as_often_as_it_is_told() -> None:
    A, b = indefinite(), torch.randn(B, N, dtype=F64)
    calls = []
    for check_every in (0, 1, 4):
        count = 0

        def counted(p: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return multiply(A)(p)

        solution = minres(counted, b, max_iterations=100, rtol=1e-6, check_every=check_every)
        assert (solution.status == SolveStatus.CONVERGED).all()
        calls.append(count)
    assert calls[0] == 100
    assert calls[1] == int(solution.iterations.max()) + 1  # and the one that measures
    assert calls[1] <= calls[2] < calls[1] + 4
    assert calls[2] % 4 == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lanczos_coefficients_are_those_of_the_krylov_space(dtype: torch.dtype) -> None:
    m = 6
    A, b = indefinite().to(dtype), torch.randn(B, N, dtype=F64).to(dtype)
    b[2] = 0.0
    found = minres(multiply(A), b, shift=0.25, max_iterations=m, rtol=0.0, lanczos=True)
    wide, power, columns = A.double() + 0.25 * torch.eye(N, dtype=F64), b.double(), []
    for _ in range(m):
        columns.append(power)
        power = multiply(wide)(power)
    Q = torch.linalg.qr(torch.stack(columns, 2)).Q  # [B, N, m]
    expected = Q.mT @ wide @ Q
    lanczos = found.lanczos
    assert lanczos is not None
    assert lanczos.steps.tolist() == [m, m, 0, m, m]
    assert not lanczos.diagonal[2].any()
    close = {F64: 1e-9, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}[dtype]
    solved = [0, 1, 3, 4]
    diagonal = expected.diagonal(dim1=1, dim2=2)[solved]
    off_diagonal = expected.diagonal(1, 1, 2).abs()[solved]
    torch.testing.assert_close(lanczos.diagonal[solved], diagonal, rtol=close, atol=close)
    torch.testing.assert_close(lanczos.off_diagonal[solved], off_diagonal, rtol=close, atol=close)


def test_lanczos_coefficients_end_with_the_krylov_space() -> None:
    values = torch.tensor([-2.0, -0.5, 1.0, 3.0], dtype=F64)[torch.arange(N) % 4].expand(B, N)
    A, b = symmetric(values), torch.randn(B, N, dtype=F64)
    lanczos = minres(lambda p, rows: multiply(A[rows])(p), b, max_iterations=9, rows_per_block=2, lanczos=True).lanczos
    assert lanczos is not None
    assert lanczos.steps.tolist() == [4] * B
    assert not lanczos.diagonal[:, 4:].any()
    assert not lanczos.off_diagonal[:, 3:].any()
    T = lanczos.diagonal[:, :4].diag_embed()
    T = T + lanczos.off_diagonal[:, :3].diag_embed(1) + lanczos.off_diagonal[:, :3].diag_embed(-1)
    torch.testing.assert_close(torch.linalg.eigvalsh(T), values[:, :4], rtol=1e-8, atol=1e-8)
    assert minres(multiply(A), b).lanczos is None


def test_every_form_of_the_problem() -> None:
    A = indefinite(1)[0]
    b = torch.randn(B, N, 3, dtype=F64)
    solution = minres(A, b, max_iterations=200, rtol=1e-10, lanczos=True)
    assert solution.status.shape == (B, 3)
    assert solution.lanczos is not None
    assert solution.lanczos.diagonal.shape == (B, 3, 200)
    torch.testing.assert_close(A @ solution.x, b, rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match="A must be symmetric"):
        minres(torch.randn(N, N, dtype=F64), b, check_symmetry=True)
    with pytest.raises(ValueError, match="rows_per_block must be None where b is not"):
        minres(A, b, rows_per_block=1)


def test_a_callback_that_writes_to_its_argument_is_an_error() -> None:
    with pytest.raises(ValueError, match="minres: A must leave its argument as it is, but has written to it"):
        minres(lambda p: p.mul_(2), torch.ones(1, 3))
    with pytest.raises(TypeError, match="minres: A must return a tensor, got NoneType"):
        minres(lambda p: None, torch.ones(1, 3))
