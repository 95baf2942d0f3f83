"""Lanczos tridiagonals of conjugate gradients, and what is computed from them, against dense float64 matrices."""

from collections.abc import Callable

import pytest
import torch
from systems import DEVICES, dense, multiply, reflected
from torch import Tensor

from imaml_ext.errors import SolveError
from imaml_ext.solvers import CG, Lanczos, cg, extreme_eigenvalues, logdet, trace_of

CONVERGED, NEGATIVE, NON_FINITE = 0, 2, 3


def tridiagonal(lanczos: Lanczos, row: int) -> Tensor:
    m = int(lanczos.steps[row])
    off = lanczos.off_diagonal[row, : max(m - 1, 0)]
    return lanczos.diagonal[row, :m].diag() + off.diag(1) + off.diag(-1)


def by_projection(A: Tensor, b: Tensor, m: int) -> Tensor:
    """Vᵀ A V [m, m] for an orthonormal basis V of the Krylov space by Gram and Schmidt, positive off the diagonal."""
    basis = [b / b.norm()]
    for _ in range(m - 1):
        w = A @ basis[-1]
        for _ in range(3):
            for v in basis:
                w = w - v * (v @ w)
        basis.append(w / w.norm())
    V = torch.stack(basis, 1)
    return V.mT @ A @ V


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preconditioner", [None, "diagonal", "callable"])
@pytest.mark.parametrize("blocks", [None, 2])
def test_coefficients_are_those_of_the_projected_matrix(
    preconditioner: str | None, blocks: int | None, device: str
) -> None:
    rows, cols, m = 3, 40, 8
    matrices = (dense(rows, cols) + 0.05 * torch.eye(cols, dtype=torch.float64)).to(device)
    b = torch.randn(rows, cols, dtype=torch.float64, device=device)
    shift = 0.1 + torch.rand(cols, dtype=torch.float64, device=device)
    diagonal = 0.5 + torch.rand(rows, cols, dtype=torch.float64, device=device)
    made = {
        None: None,
        "diagonal": diagonal,
        "callable": (lambda r: diagonal * r) if blocks is None else (lambda r, rows: diagonal[rows] * r),
    }
    operator: Callable = multiply(matrices) if blocks is None else (lambda p, rows: multiply(matrices[rows])(p))
    found = cg(
        operator, b, shift=shift, max_iterations=m, rtol=0.0, preconditioner=made[preconditioner],
        rows_per_block=blocks, lanczos=True,
    ).lanczos  # fmt: skip
    assert found is not None
    assert found.steps.tolist() == [m] * rows
    assert found.diagonal.shape == (rows, m)
    assert found.off_diagonal.shape == (rows, m - 1)
    for row in range(rows):
        root = diagonal[row].sqrt() if preconditioner else torch.ones_like(shift)
        A = root.unsqueeze(1) * (matrices[row] + shift.diag()) * root
        torch.testing.assert_close(tridiagonal(found, row), by_projection(A, root * b[row], m), rtol=1e-6, atol=1e-7)


def test_the_last_bits_of_the_solution_do_not_change_where_coefficients_are_kept() -> None:
    matrices, b = dense(3, 20), torch.randn(3, 20, dtype=torch.float64)
    plain, kept = (cg(multiply(matrices), b, max_iterations=30, lanczos=keep) for keep in (False, True))
    assert plain.lanczos is None
    assert kept.lanczos is not None
    assert torch.equal(plain.x, kept.x)
    assert torch.equal(plain.status, kept.status)
    assert CG().solve(multiply(matrices), b).lanczos is None


@pytest.mark.parametrize("check_every", [1, 3])
@pytest.mark.parametrize("blocks", [None, 1])
def test_stopping_early_changes_no_table(check_every: int, blocks: int | None) -> None:
    eye = torch.eye(20, dtype=torch.float64)
    matrices = torch.stack([eye, *(dense(2, 20) + 0.5 * eye)])  # the first row is done after one step
    b = torch.randn(3, 20, dtype=torch.float64)

    def product(p: Tensor, rows: slice = slice(None)) -> Tensor:
        return multiply(matrices[rows])(p)

    options = {"max_iterations": 40, "rtol": 1e-4, "lanczos": True, "rows_per_block": blocks}
    early, late = (cg(product, b, check_every=k, **options) for k in (check_every, 0))
    assert early.lanczos is not None
    assert late.lanczos is not None
    assert early.lanczos.steps.max() < 40
    for name in ("diagonal", "off_diagonal", "steps"):
        assert torch.equal(getattr(early.lanczos, name), getattr(late.lanczos, name))
    nothing = cg(product, torch.zeros(3, 20, dtype=torch.float64), check_every=check_every, **options).lanczos
    assert nothing is not None
    assert nothing.diagonal.shape == (3, 40)
    assert not nothing.diagonal.any()
    assert nothing.steps.tolist() == [0] * 3


@pytest.mark.parametrize("m", [0, 1, 2])
def test_few_steps(m: int) -> None:
    d, b = 1 + torch.rand(4, 5), torch.randn(4, 5)
    found = cg(lambda p: d * p, b, max_iterations=m, rtol=0.0, lanczos=True).lanczos
    assert found is not None
    assert found.steps.tolist() == [m] * 4
    assert found.diagonal.shape == (4, m)
    assert found.off_diagonal.shape == (4, max(m - 1, 0))
    assert found.steps.dtype == torch.int32
    assert found.diagonal.dtype == torch.float64
    if m:
        rayleigh = (b.double() * d * b).sum(1) / b.double().square().sum(1)
        torch.testing.assert_close(found.diagonal[:, 0], rayleigh, rtol=1e-5, atol=0)


def test_a_table_ends_with_its_row() -> None:
    """At the first measurement, at breakdown, and before rows that never began."""
    cols = 12
    d = 1 + torch.arange(cols, dtype=torch.float64).repeat(5, 1)
    b = torch.ones(5, cols, dtype=torch.float64)
    d[0] = 2.0  # exact after a step
    b[1, 3:] = 0.0  # after three
    d[2, :4] = -1.0
    b[3] = 0.0
    b[4, 0] = torch.nan
    found = cg(lambda p: d * p, b, max_iterations=9, rtol=1e-10, lanczos=True)
    assert found.lanczos is not None
    steps = found.lanczos.steps.tolist()
    assert steps[:2] == [1, 3]
    assert steps[3:] == [0, 0]
    assert steps[2] == found.iterations[2]
    assert found.status[2] == NEGATIVE
    for row, m in enumerate(steps):
        assert (found.lanczos.diagonal[row, :m] > 0).all()
        assert (found.lanczos.diagonal[row, m:] == 0).all()
        assert (found.lanczos.off_diagonal[row, max(m - 1, 0) :] == 0).all()
    torch.testing.assert_close(torch.linalg.eigvalsh(tridiagonal(found.lanczos, 1)), d[1, :3], rtol=1e-10, atol=0)


def test_a_restart_ends_the_table_too() -> None:
    systems = reflected(1, 300)
    systems.d.clamp_(min=1e-4)
    found = cg(systems, torch.randn(1, 300), max_iterations=2000, rtol=2e-6, check_every=1, lanczos=True)
    assert found.lanczos is not None
    assert 0 < found.lanczos.steps[0] <= found.iterations[0]
    assert (found.lanczos.diagonal[0] > 0).sum() == found.lanczos.steps[0]


@pytest.mark.parametrize("device", DEVICES)
def test_traces_against_dense(device: str) -> None:
    rows, cols = 3, 30
    matrices = (dense(rows, cols) + 0.02 * torch.eye(cols, dtype=torch.float64)).to(device)
    like = torch.empty(rows, cols, dtype=torch.float64, device=device)
    generator = torch.Generator(device).manual_seed(int(torch.randint(1 << 30, ())))
    shift = torch.rand(rows, dtype=torch.float64, device=device)
    eigenvalues = torch.linalg.eigvalsh(matrices + torch.diag_embed(shift.unsqueeze(1).expand(-1, cols)))
    for function in (torch.log, torch.reciprocal, torch.sqrt, lambda x: x.square()):
        found = trace_of(multiply(matrices), function, like, generator=generator, shift=shift, probes=200, steps=cols)
        exact = function(eigenvalues).sum(1)
        assert (found.status == CONVERGED).all()
        assert ((found.value - exact).abs() <= 6 * found.standard_error + 1e-6 * exact.abs()).all()
        assert (found.standard_error <= 0.2 * function(eigenvalues).norm(dim=1)).all()
    found = logdet(multiply(matrices), like, generator=generator, shift=shift, probes=200, steps=cols)
    assert ((found.value - eigenvalues.log().sum(1)).abs() <= 6 * found.standard_error + 1e-9).all()


def test_traces_of_indefinite_matrices() -> None:
    rows, cols = 3, 20
    matrices = dense(rows, cols) - 0.4 * torch.eye(cols, dtype=torch.float64)
    matrices[1] = -torch.eye(cols)
    matrices[2, 4, 4] = torch.nan
    like, generator = torch.empty(rows, cols, dtype=torch.float64), torch.Generator().manual_seed(0)
    exact = torch.linalg.eigvalsh(matrices[:2])
    for function in (torch.exp, torch.tanh, lambda x: x**3):
        found = trace_of(multiply(matrices), function, like, generator=generator, probes=100, definite=False)
        assert found.status.tolist() == [CONVERGED, CONVERGED, NON_FINITE]
        error = (found.value[:2] - function(exact).sum(1)).abs()
        assert (error <= 6 * found.standard_error[:2] + 1e-9).all()
        assert found.value[2].isnan()


def test_the_log_determinant_of_a_diagonal_needs_no_luck() -> None:
    """Every ±1 probe gives the trace of a diagonal matrix exactly, and a preconditioner is subtracted exactly."""
    d = 10.0 ** torch.linspace(-3, 3, 8, dtype=torch.float64).repeat(2, 1)
    d[1] *= 5
    generator = torch.Generator().manual_seed(0)
    exact = d.log().sum(1)
    plain = logdet(lambda p: d * p, d, generator=generator, probes=3, steps=60)
    torch.testing.assert_close(plain.value, exact, rtol=1e-6, atol=1e-6)
    assert (plain.standard_error <= 1e-5).all()
    rough = 1 / (d * (1 + 0.3 * torch.rand_like(d)))
    few = logdet(lambda p: d * p, d, generator=generator, probes=2, steps=4, preconditioner=rough)
    torch.testing.assert_close(few.value, exact, rtol=1e-4, atol=1e-4)
    one = logdet(lambda p: d * p, d, generator=generator, probes=1, steps=60)
    assert one.standard_error.isnan().all()
    assert one.value.isfinite().all()


def test_the_standard_error_is_the_spread_of_estimates() -> None:
    matrix = dense(2, 24)[1:] + 0.1 * torch.eye(24, dtype=torch.float64)
    like = torch.empty(300, 24, dtype=torch.float64)
    found = logdet(
        lambda p: p @ matrix[0], like, generator=torch.Generator().manual_seed(3), probes=12, steps=24
    )  # 300 estimates of one number
    exact = torch.linalg.slogdet(matrix[0]).logabsdet
    spread = found.value.std()
    torch.testing.assert_close(found.standard_error.square().mean().sqrt(), spread, rtol=0.2, atol=0)
    assert (found.value.mean() - exact).abs() <= 5 * spread / 300**0.5


def test_a_row_that_is_not_definite_has_no_log_determinant() -> None:
    matrices = dense(4, 10) + 0.1 * torch.eye(10, dtype=torch.float64)
    matrices[1] -= torch.eye(10)
    matrices[2, 3, 3] = torch.nan
    like, options = torch.empty(4, 10, dtype=torch.float64), {"probes": 4, "steps": 10}
    found = logdet(multiply(matrices), like, generator=torch.Generator().manual_seed(0), **options)
    assert found.status.tolist() == [CONVERGED, NEGATIVE, NON_FINITE, CONVERGED]
    assert found.value.isnan().tolist() == found.standard_error.isnan().tolist() == [False, True, True, False]
    with pytest.raises(SolveError, match=r"NEGATIVE_CURVATURE in 1 of 4 rows \(1\).*; NON_FINITE in 1 of 4 rows \(2\)"):
        found.raise_if_failed()
    again = logdet(multiply(matrices), like, generator=torch.Generator().manual_seed(0), **options)
    assert torch.equal(again.value[0], found.value[0])  # the generator alone decides the probes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_extreme_eigenvalues_against_dense(dtype: torch.dtype, device: str) -> None:
    rows, cols = 5, 50
    matrices = dense(rows, cols) - 0.3 * torch.eye(cols, dtype=torch.float64)
    matrices[1] = 0.7 * torch.eye(cols)  # its Krylov space has one dimension
    matrices[2] = (torch.arange(cols) < 3).double().diag() - 2.0 * (torch.arange(cols) == 9).double().diag()
    matrices = matrices.to(device)
    shift = torch.linspace(-1, 1, rows, dtype=dtype, device=device)
    exact = torch.linalg.eigvalsh(matrices) + shift.double().unsqueeze(1)
    like = torch.empty(rows, cols, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(int(torch.randint(1 << 30, ())))
    rounding = 1e-9 if dtype == torch.float64 else 2e-5
    for steps in (10, cols, 2 * cols):
        found = extreme_eigenvalues(multiply(matrices.to(dtype)), like, generator=generator, shift=shift, steps=steps)
        for value, bound, end in (
            (found.smallest, found.smallest_error, exact[:, 0]),
            (found.largest, found.largest_error, exact[:, -1]),
        ):
            nearest = (exact - value.unsqueeze(1)).abs().amin(1)
            assert (nearest <= bound + rounding).all()
            if steps >= cols:
                torch.testing.assert_close(value, end, rtol=0, atol=100 * rounding)
        assert (found.smallest >= exact[:, 0] - rounding).all()
        assert (found.largest <= exact[:, -1] + rounding).all()


def test_other_forms_of_the_matrix() -> None:
    A = dense(2, 9)[1] + torch.eye(9, dtype=torch.float64)
    like = torch.empty(9, dtype=torch.float64)
    exact = torch.linalg.eigvalsh(A)
    found = logdet(A, like, generator=torch.Generator().manual_seed(0), probes=300, steps=9)
    assert found.value.shape == found.status.shape == ()
    assert (found.value - exact.log().sum()).abs() <= 6 * found.standard_error
    parts = {"u": like[:4].view(1, 2, 2), "v": like[4:].view(1, 5)}

    def product(p: dict[str, Tensor]) -> dict[str, Tensor]:
        q = torch.cat([p["u"].flatten(1), p["v"]], 1) @ A
        return {"u": q[:, :4].view(-1, 2, 2), "v": q[:, 4:]}

    again = logdet(product, parts, generator=torch.Generator().manual_seed(0), probes=300, steps=9)
    torch.testing.assert_close(again.value, found.value.view(1))
    ends = extreme_eigenvalues(A, like, generator=torch.Generator().manual_seed(0), shift=-3.0)
    torch.testing.assert_close(torch.stack([ends.smallest, ends.largest]), exact[[0, -1]] - 3.0)


def test_extreme_eigenvalues_of_a_row_that_is_not_finite() -> None:
    matrices = dense(3, 10)
    matrices[1, 2, 2] = torch.inf
    like = torch.empty(3, 10, dtype=torch.float64)
    found = extreme_eigenvalues(multiply(matrices), like, generator=torch.Generator().manual_seed(0))
    assert found.smallest.isnan().tolist() == found.largest_error.isnan().tolist() == [False, True, False]


def kernel(distance: Tensor, kind: str) -> Tensor:
    if kind == "rbf":
        return torch.exp(-0.5 * distance.square())
    scaled = 3**0.5 * distance
    return (1 + scaled) * torch.exp(-scaled)  # Matérn 3/2


@pytest.mark.long
@pytest.mark.parametrize("kind", ["rbf", "matern"])
def test_the_log_determinant_of_a_gaussian_process(kind: str) -> None:
    points = torch.rand(2000, 2, dtype=torch.float64)
    K = kernel(torch.cdist(points, points) / 0.2, kind)
    exact = torch.linalg.slogdet(K + 1e-2 * torch.eye(2000, dtype=torch.float64)).logabsdet
    like = torch.empty(1, 2000, dtype=torch.float64)
    found = logdet(lambda p: p @ K, like, generator=torch.Generator().manual_seed(1), shift=1e-2, probes=32, steps=100)
    assert found.status.item() == CONVERGED
    assert abs(found.value - exact) <= 0.01 * abs(exact)
    assert found.standard_error <= 0.003 * abs(exact)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"probes": 0}, ValueError, "probes must be at least 1, got 0"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"preconditioner": -torch.ones(5)}, ValueError, "preconditioner must be above 0"),
    ],
)
def test_bad_arguments(options, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        logdet(lambda p: p, torch.empty(2, 5), generator=torch.Generator(), **options)
