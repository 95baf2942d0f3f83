"""Conjugate gradients for many shifts against float64 solves, and how many products they take."""

from collections.abc import Callable

import pytest
import torch
from systems import DEVICES, DTYPES, dense, multiply, reflected, solve_directly
from torch import Tensor

from imaml_ext.solvers import SolveStatus, cg, multi_shift_cg

CONVERGED, SPENT, NEGATIVE, NON_FINITE = 0, 1, 2, 3


class Counted:
    """An operator, and how often it was called."""

    def __init__(self, operator: Callable[[Tensor], Tensor]) -> None:
        self.operator, self.calls = operator, 0

    def __call__(self, p: Tensor) -> Tensor:
        self.calls += 1
        return self.operator(p)


@pytest.mark.parametrize("cols", [1, 31, 100])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_shift_against_direct_solves(cols: int, per_row: bool, dtype: torch.dtype) -> None:
    rows = 5
    matrices, b = dense(rows, cols).to(dtype), torch.randn(rows, cols, dtype=dtype)
    shifts = torch.tensor([3e-2, 0.0, 1.0, 1e-4, 0.3, 1e-4], dtype=dtype)
    if per_row:
        shifts = torch.stack([torch.rand_like(shifts) * 10.0**-row for row in range(rows)])
    damping = 1e-3 + torch.rand(rows, cols, dtype=dtype)
    rtol = 1e-8 if dtype == torch.float64 else 1e-4
    found = multi_shift_cg(
        multiply(matrices), b, shifts, shift=damping, max_iterations=40 * cols + 20, rtol=rtol, check_every=1
    )
    assert found.x.shape == (rows, 6, cols)
    assert (found.status == CONVERGED).all()
    systems = matrices.double().unsqueeze(1) + torch.diag_embed(
        damping.double().unsqueeze(1) + shifts.double().expand(rows, -1).unsqueeze(2)
    )
    right = b.double().unsqueeze(1).expand(-1, 6, -1)
    residual = (right - (systems @ found.x.double().unsqueeze(3)).squeeze(3)).norm(dim=2) / b.double().norm(dim=1)[
        :, None
    ]
    assert (residual <= 1.01 * rtol + 8 * torch.finfo(dtype).eps).all()
    torch.testing.assert_close(found.residual_norm / b.double().norm(dim=1)[:, None], residual, rtol=0, atol=0.1 * rtol)
    direct = solve_directly(systems, right)
    error = (found.x.double() - direct).norm(dim=2) / direct.norm(dim=2)
    assert (error <= 2 * rtol * torch.linalg.cond(systems)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [63, 4100])
def test_shifts_follow_with_the_products_of_the_least(cols: int, dtype: torch.dtype, device: str) -> None:
    systems = reflected(3, cols, device=device)
    systems.d.clamp_(min=0.05)
    b = torch.randn(3, cols, dtype=dtype, device=device)
    shifts = torch.tensor([0.5, 0.02, 4.0, 0.02], dtype=torch.float64, device=device)
    rtol = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 0.05)
    alone = cg(systems, b, shift=0.02, max_iterations=80, rtol=rtol, check_every=1)
    counted = Counted(systems)
    found = multi_shift_cg(counted, b, shifts, max_iterations=80, rtol=rtol, check_every=1)
    assert (found.status == CONVERGED).all()
    steps = alone.iterations.max().item()
    if dtype in (torch.float64, torch.float32):  # else rounding asks for a few more
        assert counted.calls == steps + 4
        torch.testing.assert_close(found.iterations[:, 1], alone.iterations)
    assert torch.equal(found.iterations[:, 1], found.iterations[:, 3])
    assert (found.iterations[:, 2] <= found.iterations[:, 0]).all()
    assert (found.iterations[:, 0] <= found.iterations[:, 1]).all()
    for j, sigma in enumerate(shifts.tolist()):
        # A product in bfloat16 rounds by up to an eighth of rtol: at most 1.034 rtol in 750 draws.
        assert (systems.relative_residual(found.x[:, j], b, sigma) <= 1.01 * rtol + torch.finfo(dtype).eps).all()


def test_a_shift_alone_is_cg() -> None:
    matrices, b = dense(4, 20), torch.randn(4, 20, dtype=torch.float64)
    for products in (0, 1, 5, 300):
        found = multi_shift_cg(
            multiply(matrices), b, torch.zeros(1), shift=0.1, max_iterations=products, rtol=1e-6, check_every=1
        )
        alone = cg(multiply(matrices), b, shift=0.1, max_iterations=products, rtol=1e-6)
        torch.testing.assert_close(found.x[:, 0], alone.x)
        torch.testing.assert_close(found.iterations[:, 0], alone.iterations)
        if products in (0, 300):
            assert torch.equal(found.status[:, 0], alone.status)


def test_rows_of_every_fate_side_by_side() -> None:
    cols = 30
    matrices, b = dense(5, cols), torch.randn(5, cols, dtype=torch.float64)
    matrices[1] -= 0.05 * torch.eye(cols)  # indefinite with the least shift, and definite with the others
    b[2, 3] = torch.nan
    b[3] = 0.0
    matrices[4] = 2 * torch.eye(cols)  # converges at once
    shifts = torch.tensor([0.5, 0.0, 0.1], dtype=torch.float64)
    options = {"max_iterations": 3000, "rtol": 1e-8, "check_every": 1}
    found = multi_shift_cg(multiply(matrices), b, shifts, **options)
    assert found.status[0].tolist() == [CONVERGED] * 3
    assert found.status[1].tolist() == [CONVERGED, NEGATIVE, CONVERGED]
    assert found.status[2].tolist() == [NON_FINITE] * 3
    assert (found.x[2] == 0).all()
    assert found.status[3].tolist() == [CONVERGED] * 3
    assert (found.x[3] == 0).all()
    assert (found.iterations[3] == 0).all()
    assert found.status[4].tolist() == [CONVERGED] * 3
    assert found.iterations[4].tolist() == [1, 1, 1]
    exact = solve_directly(matrices[1] + 0.1 * torch.eye(cols, dtype=torch.float64), b[1])
    torch.testing.assert_close(found.x[1, 2], exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cols", [17, 5000])
def test_a_row_alone_has_the_bits_that_it_has_in_company(cols: int) -> None:
    d, b = 0.01 + torch.rand(4, cols), torch.randn(4, cols)
    d[1] = 3.0  # converges at once
    d[2, 1] = torch.nan
    shifts = torch.tensor([0.2, 0.0, 5.0])
    options = {"max_iterations": 150, "rtol": 1e-4, "check_every": 1}
    found = multi_shift_cg(lambda p: d * p, b, shifts, **options)
    assert found.status[2].tolist() == [NON_FINITE] * 3
    for row in range(4):
        own = d[row : row + 1]
        alone = multi_shift_cg(lambda p, own=own: own * p, b[row : row + 1], shifts, **options)
        assert torch.equal(alone.x[0], found.x[row])
        assert torch.equal(alone.status[0], found.status[row])


def test_without_looking_the_products_are_fixed() -> None:
    matrices, b = dense(3, 25)[1:], torch.randn(2, 25, dtype=torch.float64)
    for products in (0, 4, 200):
        counted = Counted(multiply(matrices))
        found = multi_shift_cg(counted, b, torch.tensor([1.0, 0.5, 2.0]), max_iterations=products, rtol=1e-8)
        assert counted.calls == products + 3
        assert (found.status == (CONVERGED if products == 200 else SPENT)).all()
        measured = torch.stack(
            [b - multiply(matrices)(found.x[:, j]) - s * found.x[:, j] for j, s in enumerate((1.0, 0.5, 2.0))], 1
        )
        torch.testing.assert_close(found.residual_norm, measured.norm(dim=2), rtol=1e-6, atol=1e-14)


def test_float32_goes_on_from_what_was_measured() -> None:
    """Where the residual by recurrence has left b − A x, no status hides it."""
    systems = reflected(2, 500)
    systems.d.clamp_(min=1e-4)
    b, shifts = torch.randn(2, 500), torch.logspace(-4, 0, 6)
    rtol = 1e-6
    found = multi_shift_cg(systems, b, shifts, max_iterations=3000, rtol=rtol, check_every=1)
    for j, sigma in enumerate(shifts.tolist()):
        residual = systems.relative_residual(found.x[:, j], b, sigma)
        converged = found.status[:, j] == CONVERGED
        slack = 100 * torch.finfo(torch.float32).eps * found.x[:, j].double().norm(dim=1) / b.double().norm(dim=1)
        assert (residual[converged] <= (rtol + slack)[converged]).all()
    assert set(found.status.flatten().tolist()) <= {CONVERGED, int(SolveStatus.STAGNATED)}
    assert (found.status[:, -1] == CONVERGED).all()


def test_many_shifts() -> None:
    matrices, b = dense(1, 40), torch.randn(1, 40, dtype=torch.float64)
    shifts = torch.logspace(-3, 3, 200, dtype=torch.float64)[torch.randperm(200)]
    found = multi_shift_cg(multiply(matrices), b, shifts, max_iterations=400, rtol=1e-10, check_every=1)
    assert (found.status == CONVERGED).all()
    exact = solve_directly(matrices + shifts.view(-1, 1, 1) * torch.eye(40, dtype=torch.float64), b.expand(200, -1))
    error = (found.x[0] - exact).norm(dim=1) / exact.norm(dim=1)
    assert (error <= 5.1e-8).all()  # rtol times the largest condition number, 500


def test_other_forms_of_the_system() -> None:
    matrix, b = dense(2, 12)[1] + 0.1 * torch.eye(12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    shifts = torch.tensor([0.0, 0.7, 0.2], dtype=torch.float64)
    options = {"max_iterations": 100, "rtol": 1e-10, "check_every": 1}
    exact = solve_directly(matrix + torch.diag_embed(shifts.unsqueeze(1).expand(3, 12)), b.expand(3, 12))
    for A in (matrix, lambda p: matrix @ p):
        found = multi_shift_cg(A, b, shifts, **options)
        assert found.status.tolist() == [CONVERGED] * 3
        torch.testing.assert_close(found.x, exact)
    both = torch.stack([b, -2 * b])
    columns = Counted(lambda p: matrix @ p if p.dim() == 3 else p @ matrix)
    columns.multi_rhs = True
    found = multi_shift_cg(columns, both, shifts, **options)
    assert columns.calls == found.iterations.max() + 1  # all shifts are measured in one call
    torch.testing.assert_close(found.x, torch.stack([exact, -2 * exact]))

    def parts(p: dict[str, Tensor]) -> dict[str, Tensor]:
        q = torch.cat([p["u"].flatten(1), p["v"]], 1) @ matrix
        return {"u": q[:, :8].view(-1, 2, 4), "v": q[:, 8:]}

    found = multi_shift_cg(parts, {"u": both[:, :8].reshape(2, 2, 4), "v": both[:, 8:]}, shifts, **options)
    assert found.x["u"].shape == (2, 3, 2, 4)
    assert found.residual_norm.shape == (2, 3)
    torch.testing.assert_close(found.x["v"], torch.stack([exact, -2 * exact])[..., 8:])
    with pytest.raises(ValueError, match=r"b must have one right-hand side per row, got \[2, 12, 3\]"):
        multi_shift_cg(matrix, both.unsqueeze(2).expand(-1, -1, 3), shifts)


@pytest.mark.parametrize(
    ("shifts", "error", "message"),
    [
        (0.5, TypeError, "shifts must be a floating-point tensor, got float"),
        (torch.tensor([1, 2]), TypeError, "shifts must be a floating-point tensor, got torch.int64"),
        (torch.tensor(1.0), ValueError, r"shifts must have shape \[J\] or \[2, J\] with J ≥ 1, got \[\]"),
        (torch.ones(0), ValueError, r"with J ≥ 1, got \[0\]"),
        (torch.ones(3, 4), ValueError, r"with J ≥ 1, got \[3, 4\]"),
        (torch.tensor([1.0, -0.5]), ValueError, "shifts must be at least 0, got a tensor with an entry of -0.5"),
    ],
)
def test_bad_shifts(shifts, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        multi_shift_cg(lambda p: p, torch.randn(2, 5), shifts)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 5)}, ValueError, r"x must be contiguous of shape \[B, J, N\], got \[2, 5\]"),
        ({"x": torch.zeros(2, 5, 3).mT}, ValueError, "x must be contiguous"),
        ({"r": None}, ValueError, "r must be given unless this is the last step"),
        ({"r": torch.zeros(2, 4)}, ValueError, r"r must have shape \[2, 5\], got \[2, 4\]"),
        ({"p": torch.zeros(2, 3, 5).double()}, TypeError, "p must be float32, got float64"),
        ({"state": torch.zeros(2, 10).double()}, ValueError, r"state must have shape \[2, 12\], got \[2, 10\]"),
        ({"sigma": torch.zeros(2, 1).double()}, ValueError, r"sigma must have shape \[2, 3\], got \[2, 1\]"),
    ],
)
def test_bad_arguments_of_the_op(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "r": torch.zeros(2, 5),
        "state": torch.zeros(2, 12).double(),
        "sigma": torch.zeros(2, 3).double(),
        "x": torch.zeros(2, 3, 5),
        "p": torch.zeros(2, 3, 5),
        "shift_state": torch.zeros(2, 3, 5).double(),
    }
    with pytest.raises(error, match=message):
        torch.ops.imaml_ext.cg_shifts_step_(*{**arguments, **changes}.values())
