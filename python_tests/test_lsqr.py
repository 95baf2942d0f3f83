"""imaml_ext.solvers.lsqr against numpy.linalg.lstsq and SciPy in float64: solutions, statuses, independence of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from systems import DEVICES, DTYPES
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from imaml_ext import SolveError
from imaml_ext.solvers import LeastSquaresSolution, lsqr

F64, F32 = torch.float64, torch.float32
C, MAX, BAD, DIVERGED, STAG = 0, 1, 3, 6, 8
SHAPES = [(1, 1, 1), (3, 7, 5), (2, 5, 9), (4, 31, 16), (3, 20, 33), (2, 300, 40), (1, 40, 300)]


def matrices(rows: int, m: int, n: int, conditions: Tensor | float, rank: int | None = None) -> Tensor:
    """Random [B, m, n] float64 whose singular values go from 1 to 1/κ_b; `rank` of them are not 0."""
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(rows, size, k, dtype=F64)).Q for size in (m, n))
    conditions = torch.as_tensor(conditions, dtype=F64).expand(rows)
    exponents = torch.linspace(0, 1, k if rank is None else rank, dtype=F64)
    values = torch.zeros(rows, k, dtype=F64)
    values[:, : len(exponents)] = conditions.unsqueeze(1) ** -exponents
    return (U * values.unsqueeze(1)) @ V.mT


def products(M: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return lambda p: torch.einsum("bmn,bn->bm", M, p), lambda q: torch.einsum("bmn,bm->bn", M, q)


def solved(M: Tensor, y: Tensor, **options: Any) -> LeastSquaresSolution:
    matvec, rmatvec = products(M)
    return lsqr(matvec, y, rmatvec=rmatvec, n=M.shape[2], **options)


def directly(M: Tensor, y: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """The minimiser of least norm, by NumPy in float64; shift is a number, [B] or [B, n]."""
    rows, _, n = M.shape
    shift = torch.as_tensor(shift, dtype=F64)
    damping = (shift.reshape(-1, 1) if shift.dim() < 2 else shift).expand(rows, n)
    found = []
    for A, b, s in zip(M.double().cpu().numpy(), y.double().cpu().numpy(), damping.numpy(), strict=True):
        stacked = np.vstack([A, np.diag(np.sqrt(s))])
        found.append(np.linalg.lstsq(stacked, np.concatenate([b, np.zeros(n)]), rcond=1e-13)[0])
    return torch.as_tensor(np.array(found))


def gradient(M: Tensor, y: Tensor, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """‖Mᵀ(y − M x) − shift x‖ in float64, [B]."""
    M, y, x = M.double(), y.double(), x.double()
    shift = torch.as_tensor(shift, dtype=F64)
    matvec, rmatvec = products(M)
    damping = shift.reshape(-1, 1) if shift.dim() < 2 else shift
    return (rmatvec(y - matvec(x)) - damping * x).norm(dim=1)


def scale_of_gradient(M: Tensor, y: Tensor) -> Tensor:
    return products(M.double())[1](y.double()).norm(dim=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("damping", ["none", "number", "row", "unknown"])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_random_problems_against_lstsq(shape: tuple[int, int, int], damping: str, dtype: torch.dtype) -> None:
    rows, m, n = shape
    M, y = matrices(rows, m, n, 30.0).to(dtype), torch.randn(rows, m, dtype=dtype)
    shift: Any = {
        "none": 0.0,
        "number": 0.3,
        "row": 0.1 + torch.rand(rows, 1, dtype=F64),
        "unknown": 0.01 + torch.rand(rows, n, dtype=F64),
    }[damping]
    rtol = 1e-10 if dtype == F64 else 1e-4
    found = solved(M, y, shift=shift, rtol=rtol, max_iterations=6 * min(m, n) + 60, check_every=4)
    assert found.status.tolist() == [C] * rows
    residual = (y.double() - products(M.double())[0](found.x.double())).norm(dim=1)
    consistent = residual <= 1.05 * rtol * y.norm(dim=1)  # where there is no damping
    assert (consistent | (gradient(M, y, found.x, shift) <= 1.05 * rtol * scale_of_gradient(M, y))).all()
    expected = directly(M, y, shift)
    error = (found.x.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert (error <= rtol * 3000).all()  # κ² = 900
    torch.testing.assert_close(found.residual_norm, residual, rtol=10 * rtol, atol=10 * rtol)


@pytest.mark.parametrize(("m", "n"), [(30, 12), (12, 30), (20, 20)])
def test_of_rank_deficient_problems_it_finds_the_solution_of_least_norm(m: int, n: int) -> None:
    M = matrices(4, m, n, 20.0, rank=7)
    y = torch.randn(4, m, dtype=F64)
    y[1] = products(M)[0](torch.randn(4, n, dtype=F64))[1]  # in the range of M
    found = solved(M, y, rtol=1e-11, max_iterations=60)
    assert found.status.tolist() == [C] * 4
    torch.testing.assert_close(found.x, directly(M, y), rtol=1e-8, atol=1e-9)
    # From elsewhere, the part of x0 in the kernel of M stays.
    x0 = torch.randn(4, n, dtype=F64)
    other = solved(M, y, x0=x0, rtol=1e-11, max_iterations=60)
    in_kernel = x0 - (torch.linalg.pinv(M, rtol=1e-10) @ (M @ x0.unsqueeze(2))).squeeze(2)
    torch.testing.assert_close(other.x, found.x + in_kernel, rtol=1e-7, atol=1e-8)


def test_mixed_conditioning_in_one_batch() -> None:
    conditions = torch.logspace(0, 5, 6, dtype=F64)
    M, y = matrices(6, 60, 25, conditions), torch.randn(6, 60, dtype=F64)
    found = solved(M, y, rtol=1e-9, max_iterations=1500, check_every=10)
    assert found.status.tolist() == [C] * 6
    assert (gradient(M, y, found.x) <= 1.01e-9 * scale_of_gradient(M, y)).all()
    assert found.iterations[0] < 4 < 25 <= found.iterations[-1]


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_every_iterate_minimises_over_its_krylov_space(shift: float) -> None:
    M, y = matrices(2, 14, 9, 8.0), torch.randn(2, 14, dtype=F64)
    for k in (1, 2, 4):
        found = solved(M, y, shift=shift, rtol=0.0, max_iterations=k)
        assert found.iterations.tolist() == [k] * 2
        for row in range(2):
            A, b = M[row], y[row]
            vectors = [A.mT @ b]
            for _ in range(k - 1):
                vectors.append(A.mT @ (A @ vectors[-1]))
            Q = torch.linalg.qr(torch.stack(vectors, 1)).Q
            stacked = torch.cat([A, math.sqrt(shift) * torch.eye(9, dtype=F64)]) @ Q
            best = Q @ torch.linalg.lstsq(stacked, torch.cat([b, torch.zeros(9, dtype=F64)]).unsqueeze(1)).solution
            torch.testing.assert_close(found.x[row], best[:, 0], rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(found.residual_norm[row], (b - A @ best[:, 0]).norm(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("damp", [0.0, 0.7])
def test_as_many_steps_as_lsqr_of_scipy(damp: float) -> None:
    M, y = matrices(1, 80, 50, 100.0), torch.randn(1, 80, dtype=F64)
    for steps in (3, 10):
        theirs = scipy.sparse.linalg.lsqr(M[0].numpy(), y[0].numpy(), damp=damp, atol=0, btol=0, iter_lim=steps)
        ours = solved(M, y, shift=damp**2, rtol=0.0, max_iterations=steps)
        torch.testing.assert_close(ours.x[0], torch.as_tensor(theirs[0]), rtol=1e-9, atol=1e-11)
        with_damping = math.hypot(float(ours.residual_norm), damp * float(ours.x.norm()))
        torch.testing.assert_close(with_damping, float(theirs[4]), rtol=1e-9, atol=0)
        # Theirs is an estimate by recurrence.
        torch.testing.assert_close(float(ours.gradient_norm), float(theirs[7]), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 12, 12), (2, 40, 9), (2, 9, 40)], ids=str)
def test_a_consistent_system_ends_by_its_residual_or_its_gradient(shape: tuple[int, int, int]) -> None:
    rows, m, n = shape
    M = matrices(rows, m, n, 10.0)
    y = products(M)[0](torch.randn(rows, n, dtype=F64))
    found = solved(M, y, rtol=1e-6, max_iterations=100)
    assert found.status.tolist() == [C] * rows
    by_gradient = gradient(M, y, found.x) <= 1.01e-6 * scale_of_gradient(M, y)
    assert (by_gradient | (found.residual_norm <= 1.01e-6 * y.norm(dim=1))).all()
    residual = (y - products(M)[0](found.x)).norm(dim=1)
    torch.testing.assert_close(found.residual_norm, residual, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("of_residual", "iterations"), [(0.9e-6, 0), (1.1e-6, 1)])
def test_the_residual_alone_ends_a_row(of_residual: float, iterations: int) -> None:
    """It begins with an error where M is 1; y is where M is 1e-3, so that the gradient is far above its own limit."""
    M = torch.diag_embed(torch.tensor([[1.0, 1e-3]], dtype=F64))
    y = torch.tensor([[0.0, 1.0]], dtype=F64)
    x0 = torch.tensor([[of_residual, 1e3]], dtype=F64)
    found = solved(M, y, x0=x0, rtol=1e-6, max_iterations=20)
    assert found.status.tolist() == [C]
    assert found.iterations.tolist() == [iterations]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_broken_rows_get_their_status_and_leave_the_others_bits_alone(dtype: torch.dtype, device: str) -> None:
    d = (1 + torch.rand(9, 23, dtype=F64)).to(device)  # the first 23 of 31 rows of M; the others are 0
    y = torch.randn(9, 31, dtype=F64).to(device)
    shift = torch.full((9, 1), 0.25, dtype=F64, device=device)
    broken_d, broken_y, broken_shift = d.clone(), y.clone(), shift.clone()
    broken_y[1, 3] = math.nan
    broken_y[2, 0] = -math.inf
    broken_y[3] = 0.0
    broken_y[4, :23] = 0.0  # orthogonal to the range
    broken_d[5, 7] = math.nan
    broken_d[6, 7] = math.inf
    broken_shift[7] = math.nan
    broken_y[8] = 0.0
    broken_d[8, 1] = math.nan
    expected = {1: BAD, 2: BAD, 3: C, 4: C, 5: BAD, 6: BAD, 7: BAD, 8: C}

    def run(d: Tensor, y: Tensor, shift: Tensor) -> LeastSquaresSolution:
        d = d.to(dtype)
        rtol = {F64: 1e-9, F32: 1e-5}.get(dtype, 3e-2)
        return lsqr(
            lambda p: torch.nn.functional.pad(d * p, (0, 8)), y.to(dtype), rmatvec=lambda q: d * q[:, :23], n=23,
            shift=shift, rtol=rtol, max_iterations=40,
        )  # fmt: skip

    whole, broken = run(d, y, shift), run(broken_d, broken_y, broken_shift)
    assert broken.x.isfinite().all()
    for row in range(9):
        if row not in expected:
            assert whole.status[row] == C
            for name, value in vars(whole).items():
                assert value is None or torch.equal(value[row], getattr(broken, name)[row])
        else:
            assert broken.status[row] == expected[row], row
            if expected[row] == C:
                assert broken.x[row].count_nonzero() == 0
                assert broken.iterations[row] == 0
    with pytest.raises(SolveError, match=r"NON_FINITE in 5 of 9 rows \(1, 2, 5, 6, 7\)"):
        broken.raise_if_failed()


def test_y_orthogonal_to_the_range_but_for_rounding() -> None:
    M, y = matrices(5, 40, 12, 50.0), torch.randn(5, 40, dtype=F64)
    Q = torch.linalg.qr(M).Q
    for _ in range(2):
        y = y - (Q @ (Q.mT @ y.unsqueeze(2))).squeeze(2)
    found = solved(M, y, max_iterations=30)
    assert found.status.tolist() == [C] * 5
    assert (found.x.norm(dim=1) <= 1e-12 * y.norm(dim=1)).all()
    # As far as float32 can tell, rounding has turned y towards the range.
    narrow = solved(M.float(), y.float(), max_iterations=60)
    assert set(narrow.status.tolist()) <= {C, STAG, MAX}
    assert (narrow.x.norm(dim=1) <= 1e-4 * y.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("damped", [False, True])
def test_powers_of_two_change_no_bit_but_of_exponents(dtype: torch.dtype, damped: bool) -> None:
    M, y = matrices(3, 17, 11, 5.0).to(dtype), torch.randn(3, 17, dtype=F64).to(dtype)
    most = {F64: 300, F32: 61, torch.bfloat16: 61, torch.float16: 5}[dtype]  # at −61 the shift is nearly subnormal
    shift = 0.125 if damped else 0.0
    plain = solved(M, y, shift=shift, rtol=1e-3, max_iterations=8)
    for of_M, of_y in ((0, most), (0, -most), (most, 0), (-most, 0), (-most, most), (most // 2, most // 3)):
        scaled = solved(
            torch.ldexp(M, torch.tensor(of_M)).to(dtype), torch.ldexp(y, torch.tensor(of_y)).to(dtype),
            shift=shift * 2.0 ** (2 * of_M), rtol=1e-3, max_iterations=8,
        )  # fmt: skip
        back = torch.ldexp(scaled.x.double(), torch.tensor(of_M - of_y))
        if dtype == torch.float16:  # small entries of M and of products are subnormal; such a rounding moves x by u κ²
            rounding = 2.0**-11 * 5.0**2 * plain.x.double().norm(dim=1)
            assert ((back - plain.x.double()).norm(dim=1) <= 4 * rounding).all()
            continue
        assert torch.equal(scaled.status, plain.status)
        assert torch.equal(scaled.iterations, plain.iterations)
        assert torch.equal(back, plain.x.double())
        assert torch.equal(scaled.residual_norm * 2.0**-of_y, plain.residual_norm)


@pytest.mark.parametrize(
    ("of_M", "of_y"), [(1e150, 1e-150), (1e-200, 1e-100), (1e200, 1e100), (1.0, 1e307), (1.0, 1e-306)]
)
def test_magnitudes_at_the_ends_of_float64(of_M: float, of_y: float) -> None:
    M, y = matrices(3, 20, 8, 10.0), torch.randn(3, 20, dtype=F64) / 10
    expected = directly(M, y)
    found = solved(M * of_M, y * of_y, rtol=1e-10, max_iterations=60)
    assert found.status.tolist() == [C] * 3
    torch.testing.assert_close(found.x / (of_y / of_M), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_warm_starts(shift: float) -> None:
    M, y = matrices(4, 25, 10, 20.0), torch.randn(4, 25, dtype=F64)
    expected = directly(M, y, shift)
    x0 = expected.clone()
    x0[1] = 1e6 * torch.randn(10, dtype=F64)
    x0[2] = 0.0
    x0[3, 4] = math.nan
    calls = [0, 0]
    matvec, rmatvec = products(M)

    def counted(p: Tensor) -> Tensor:
        calls[0] += 1
        return matvec(p)

    def counted_adjoint(q: Tensor) -> Tensor:
        calls[1] += 1
        return rmatvec(q)

    found = lsqr(counted, y, rmatvec=counted_adjoint, shift=shift, x0=x0, rtol=1e-9, max_iterations=60)
    assert calls == [61, 62]
    assert found.status.tolist() == [C, C, C, BAD]
    assert found.iterations[0] == 0
    assert torch.equal(found.x[0], x0[0])
    torch.testing.assert_close(found.x[:3], expected[:3], rtol=1e-6, atol=1e-7)
    # Without iterations it measures.
    measured = solved(M, y, shift=shift, x0=x0, max_iterations=0)
    assert measured.status.tolist() == [C, MAX, MAX, BAD]
    assert torch.equal(measured.x[:3], x0[:3])
    assert measured.x[3].count_nonzero() == 0
    torch.testing.assert_close(measured.gradient_norm[1:3], gradient(M, y, x0, shift)[1:3], rtol=1e-10, atol=0)
    # A structure's form is that of x.
    parts = {"a": expected[:, :4].clone(), "b": expected[:, 4:].reshape(4, 2, 3).clone()}
    again = lsqr(
        lambda p: matvec(torch.cat([p["a"], p["b"].flatten(1)], 1)), y, shift=shift, x0=parts, rtol=1e-9,
        rmatvec=lambda q: {"a": rmatvec(q)[:, :4], "b": rmatvec(q)[:, 4:].reshape(4, 2, 3)},
    )  # fmt: skip
    assert again.x["b"].shape == (4, 2, 3)
    assert again.status.tolist() == [C] * 4


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
def test_converged_is_said_of_measured_gradients_alone(dtype: torch.dtype) -> None:
    M = matrices(12, 50, 20, torch.logspace(0, 4, 12, dtype=F64)).to(dtype)
    y = torch.randn(12, 50, dtype=F64).to(dtype)
    for rtol in ({F32: 1e-5}.get(dtype, 5e-2), 1e-9):
        found = solved(M, y, rtol=rtol, max_iterations=400, check_every=10)
        true = gradient(M, y, found.x) / scale_of_gradient(M, y)
        # The products round by u ‖M‖ of what they are given, and y − M x is stored.
        sizes = y.double().norm(dim=1) + found.x.double().norm(dim=1)
        rounding = torch.finfo(dtype).eps * 4 * sizes / scale_of_gradient(M, y)
        converged = found.status == C
        assert (true <= rtol + rounding)[converged].all()
        stagnated = found.status == STAG
        assert (converged | stagnated | (found.status == MAX)).all()
        measured = found.gradient_norm / scale_of_gradient(M, y)
        assert ((measured - true).abs() <= rounding + 1e-3 * true)[converged | stagnated].all()
        if rtol == 1e-9:
            assert stagnated[:6].all()
            # What is left is of the size of rounding.
            assert (true <= 20 * rounding)[:6].all()
        else:
            assert converged[:4].all()


def test_rows_have_the_same_bits_alone_and_for_any_number_of_threads() -> None:
    rows, m, n = 3, 9000, 5003
    d, y = 1 + torch.rand(rows, n), torch.randn(rows, m)

    def run(rows: slice, threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = lsqr(
                lambda p: torch.nn.functional.pad(d[rows] * p, (0, m - n)), y[rows], n=n, shift=0.1,
                rmatvec=lambda q: d[rows] * q[:, :n], max_iterations=6,
            )  # fmt: skip
        finally:
            torch.set_num_threads(before)
        return [value for value in vars(found).values() if value is not None]

    whole = run(slice(None), 1)
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(whole, run(slice(None), threads), strict=True))
    for row in range(rows):
        alone = run(slice(row, row + 1), 2)
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(whole, alone, strict=True))


def test_an_rmatvec_that_is_not_the_adjoint() -> None:
    M, y = matrices(3, 12, 7, 5.0), torch.randn(3, 12, dtype=F64)
    matvec, rmatvec = products(M)
    for dtype in (F64, F32, torch.bfloat16):
        fine = products(M.to(dtype))
        lsqr(fine[0], y.to(dtype), rmatvec=fine[1], n=7, check_adjoint=True)
    with pytest.raises(ValueError, match=r"rmatvec must be the adjoint of M, .* in rows \[0, 1, 2\]: they differ by"):
        lsqr(matvec, y, rmatvec=lambda q: q[:, :7], n=7, check_adjoint=True)
    # Unchecked, what is minimised grows.
    found = lsqr(matvec, y, rmatvec=lambda q: -rmatvec(q), n=7)
    assert found.status.tolist() == [DIVERGED] * 3
    assert found.broke_down.all()
    assert (found.residual_norm <= 2.01 * y.norm(dim=1)).all()


def forms(M: Tensor) -> dict[str, Any]:
    one = M[0]
    dense = one.numpy()
    return {
        "dense": one,
        "dense, one per row": one.expand(3, *one.shape),
        "sparse": one.to_sparse(),
        "csr": one.to_sparse_csr(),
        "sparse, one per row": one.expand(3, *one.shape).to_sparse(),
        "NumPy": dense,
        "SciPy, sparse": scipy.sparse.csr_array(dense),
        "SciPy, operator": scipy.sparse.linalg.aslinearoperator(dense),
        "function": lambda p: p @ one.mT,
    }


@pytest.mark.parametrize("name", forms(torch.ones(1, 2, 3, dtype=F64)))
def test_forms_of_operators_and_right_hand_sides(name: str) -> None:
    M = matrices(1, 11, 6, 10.0)
    y = torch.randn(3, 11, 2, dtype=F64)
    operator = forms(M)[name]
    n = 6 if name == "function" else None
    expected = directly(M.expand(6, 11, 6), y.mT.reshape(6, 11)).reshape(3, 2, 6).mT
    many = lsqr(operator, y, n=n, rtol=1e-11, check_adjoint=True)
    assert many.x.shape == (3, 6, 2)
    assert many.status.shape == many.gradient_norm.shape == (3, 2)
    torch.testing.assert_close(many.x, expected, rtol=1e-8, atol=1e-9)
    rows = lsqr(operator, y[:, :, 0], n=n, rtol=1e-11)
    torch.testing.assert_close(rows.x, expected[:, :, 0], rtol=1e-8, atol=1e-9)
    if "per row" not in name:
        single = lsqr(operator, y[0, :, 0], n=n, rtol=1e-11)
        assert single.status.shape == ()
        torch.testing.assert_close(single.x, expected[0, :, 0], rtol=1e-8, atol=1e-9)


def test_the_adjoint_of_a_function_is_derived() -> None:
    """A convolution: its transpose is written down nowhere."""
    kernel = torch.randn(1, 1, 5, dtype=F64)
    y = torch.randn(4, 30, dtype=F64)

    def blurred(p: Tensor) -> Tensor:
        return torch.nn.functional.conv1d(p.unsqueeze(1), kernel)[:, 0]

    M = blurred(torch.eye(34, dtype=F64)).mT
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            found = lsqr(blurred, y, n=34, shift=0.01, rtol=1e-10, check_adjoint=True)
        assert found.x.requires_grad is False
        torch.testing.assert_close(found.x, directly(M.expand(4, 30, 34), y, 0.01), rtol=1e-7, atol=1e-8)
    weight = torch.ones(30, dtype=F64, requires_grad=True)
    for without_graph in (lambda p: blurred(p.detach()), lambda p: blurred(p.detach()) * weight):
        with pytest.raises(TypeError, match="rmatvec must be given where M cannot be differentiated"):
            lsqr(without_graph, y, n=34)


def test_products_are_counted_and_traced() -> None:
    M, y = matrices(2, 8, 5, 3.0), torch.randn(2, 8, dtype=F64)
    seen: list[int] = []

    def matvec(p: Tensor) -> Tensor:
        seen.append(len(seen))
        return products(M)[0](p)

    lsqr(matvec, y, rmatvec=products(M)[1], n=5, max_iterations=40)
    assert len(seen) == 40
    seen.clear()
    lsqr(matvec, y, rmatvec=products(M)[1], n=5, max_iterations=40, check_every=2)
    assert len(seen) <= 12

    def solution(M: Tensor, y: Tensor) -> Tensor:
        return solved(M, y, max_iterations=12).x

    traced = make_fx(solution)(M, y)
    M, y = matrices(2, 8, 5, 3.0), torch.randn(2, 8, dtype=F64)
    assert torch.equal(traced(M, y), solution(M, y))
    with pytest.raises(ValueError, match="check_every must be 0 where lsqr is traced"):
        make_fx(lambda M, y: solved(M, y, check_every=1).x)(M, y)


def test_sizes_of_nothing() -> None:
    assert solved(torch.ones(0, 4, 3), torch.ones(0, 4)).x.shape == (0, 3)
    none = solved(torch.ones(2, 4, 0), torch.ones(2, 4))
    assert none.x.shape == (2, 0)
    assert none.status.tolist() == [C, C]
    assert solved(torch.ones(2, 0, 3), torch.ones(2, 0)).status.tolist() == [C, C]


M43, Y4 = torch.ones(2, 4, 3), torch.ones(2, 4)
X3 = torch.ones(2, 3)


def tall(p: Tensor) -> Tensor:
    return torch.nn.functional.pad(p, (0, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lsqr(tall, Y4), ValueError, "n, the number of unknowns of a row, must be given"),
        (lambda: solved(M43, Y4, shift=-1.0), ValueError, "shift must be at least 0, got -1"),
        (lambda: solved(M43, Y4, rtol=-1.0), ValueError, "rtol must be at least 0"),
        (lambda: solved(M43, Y4, max_iterations=-1), ValueError, "max_iterations must be at least 0"),
        (lambda: lsqr(M43, torch.ones(2, 5)), ValueError, r"M must have shape \[5, 3\] or .*got \[2, 4, 3\]"),
        (lambda: lsqr(M43.double(), Y4), TypeError, "M must have the dtype of x, torch.float32, got torch.float64"),
        (lambda: lsqr(M43, Y4.int()), TypeError, "y must be float32, float64"),
        (lambda: lsqr(M43, Y4[:, :, None][:, :, :0]), ValueError, "y must have at least one right-hand side"),
        (lambda: lsqr(M43, Y4, x0=torch.ones(3, 3)), ValueError, "x0 must have the number of rows and right-hand"),
        (lambda: lsqr(M43, Y4, x0=X3.double()), TypeError, "x0 must have the dtype of y"),
        (lambda: lsqr(tall, Y4, n=2, x0=X3), ValueError, "n must be the number of unknowns of x0, 3, got 2"),
        (
            lambda: lsqr(lambda p: p, Y4, n=3, rmatvec=lambda q: q[:, :3]),
            ValueError,
            r"what M returns must have the shape of y, \[2, 4\], got \[2, 3\]",
        ),
        (
            lambda: lsqr(tall, Y4, n=3, rmatvec=lambda q: q),
            ValueError,
            r"what rmatvec returns must have the shape of x, \[2, 3\], got \[2, 4\]",
        ),
        (lambda: lsqr(tall, Y4, n=3, rmatvec=lambda q: 1.0), TypeError, "what rmatvec returns must be a tensor"),
        (lambda: lsqr(3, Y4, n=3), TypeError, "M must be a function, a matrix or an operator"),
        (
            lambda: lsqr(tall, Y4, n=3, rmatvec=lambda q: q.mul_(2)[:, :3]),
            ValueError,
            "rmatvec must leave its argument",
        ),
        (
            lambda: torch.func.grad(lambda y: solved(M43, y).x.sum())(Y4),
            RuntimeError,
            "lsqr must be called outside the transforms",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
