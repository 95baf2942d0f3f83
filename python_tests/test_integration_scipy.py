"""The solvers with SciPy's signatures beside SciPy's own."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from libraries import library

from imaml_ext.errors import SolveError, SolveWarning
from imaml_ext.integrations import scipy as ours
from imaml_ext.solvers import SolveStatus

pytestmark = pytest.mark.long
sparse = library("scipy.sparse")
linalg = library("scipy.sparse.linalg")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))


def normal(shape: int | tuple[int, ...]) -> np.ndarray:
    return torch.randn(shape, dtype=torch.float64).numpy()


def definite(size: int, condition: float = 100.0) -> np.ndarray:
    Q, _ = np.linalg.qr(normal((size, size)))
    return (Q * np.geomspace(1, condition, size)) @ Q.T


def forms(A: np.ndarray) -> dict[str, Any]:
    return {
        "array": A,
        "csr": sparse.csr_array(A),
        "coo matrix": sparse.coo_matrix(A),
        "LinearOperator of a matrix": linalg.aslinearoperator(A),
        "LinearOperator of a function": linalg.LinearOperator(A.shape, matvec=lambda v: A @ v),
    }


@pytest.mark.parametrize("form", forms(np.eye(2)))
@pytest.mark.parametrize("size", [1, 7, 40])
def test_cg_as_scipys(form: str, size: int) -> None:
    A, b, x0 = definite(size), normal(size), normal(size)
    for options in ({}, {"x0": x0}, {"M": np.diag(1 / np.diag(A))}, {"rtol": 0, "atol": 1e-9}):
        options = {"rtol": 1e-11, **options}
        x, info = ours.cg(forms(A)[form], b, **options)
        expected, _ = linalg.cg(forms(A)[form], b, **options)
        assert info == 0
        assert isinstance(info, int)
        assert x.shape == expected.shape
        assert x.dtype == expected.dtype
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-7 * abs(expected).max())


def test_columns_are_solved_together_as_one_by_one() -> None:
    A, B = definite(30), normal((30, 4)) * [1, 1e-6, 0, 1e6]
    for form in forms(A).values():
        x, info = ours.cg(form, B, x0=np.ones_like(B), rtol=1e-10, maxiter=500)
        assert info.tolist() == [0, 0, 0, 0]
        for column in range(4):
            alone, _ = ours.cg(form, B[:, column], x0=np.ones(30), rtol=1e-10, maxiter=500)
            np.testing.assert_allclose(x[:, column], alone, rtol=1e-7, atol=1e-12 * abs(alone).max())
    x, info = ours.cg(A, B[:, :1], rtol=1e-10)
    assert (x.shape, info) == ((30,), 0)


@pytest.mark.parametrize(("a", "b", "expected"), [("f4", "f4", "f4"), ("f8", "f4", "f8"), ("i8", "f4", "f8")])
def test_dtypes_are_those_of_scipy(a: str, b: str, expected: str) -> None:
    A, v = np.diag([1, 2, 4]).astype(a), np.ones(3, dtype=b)
    x, info = ours.cg(A, v)
    theirs, _ = linalg.cg(A, v)
    assert x.dtype == theirs.dtype == np.dtype(expected)
    np.testing.assert_allclose(x, [1, 0.5, 0.25], rtol=1e-5)
    assert info == 0


def test_identity_that_returns_its_argument() -> None:
    b = normal(5)
    x, info = ours.cg(linalg.LinearOperator((5, 5), matvec=lambda v: v, dtype=float), b)
    assert info == 0
    np.testing.assert_array_equal(x, b)


@pytest.mark.parametrize("warm", [False, True])
def test_callback_sees_every_iterate_of_scipy(warm: bool) -> None:
    A, b = definite(25, 10), normal(25)
    x0 = b / 2 if warm else None  # with A near I: the first direction is near x0
    if warm:
        A = np.eye(25) + 1e-3 * A
    seen: dict[str, list[np.ndarray]] = {"ours": [], "theirs": []}
    x, _ = ours.cg(A, b, x0, rtol=1e-6, callback=lambda v: seen["ours"].append(v))
    linalg.cg(A, b, x0, rtol=1e-6, callback=lambda v: seen["theirs"].append(v.copy()))
    assert len(seen["ours"]) == len(seen["theirs"]) > 2
    for mine, theirs in zip(*seen.values(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-7 * abs(theirs).max())
    np.testing.assert_allclose(seen["ours"][-1], x, rtol=0, atol=1e-12 * abs(x).max())


def test_info_tells_the_status() -> None:
    A, b = definite(20, 1e4), normal(20)
    x, info = ours.cg(A, b, maxiter=3)
    assert info == 3
    np.testing.assert_allclose(x, linalg.cg(A, b, maxiter=3)[0], rtol=1e-8)
    assert ours.cg(A, b, maxiter=0)[1] == 1  # where SciPy's info is 0 for an x that solves nothing
    assert ours.cg(-A, b)[1] == -SolveStatus.NEGATIVE_CURVATURE
    b[3] = np.nan
    assert ours.cg(A, b)[1] == -SolveStatus.NON_FINITE
    B = np.stack([b, np.ones(20)], 1)
    assert ours.cg(A, B, maxiter=1000)[1].tolist() == [-SolveStatus.NON_FINITE, 0]


def test_minres_as_scipys() -> None:
    Q, _ = np.linalg.qr(normal((24, 24)))
    A, b = (Q * np.concatenate([-np.linspace(1, 3, 5), np.linspace(1, 5, 19)])) @ Q.T, normal(24)
    for shift in (0.0, 0.3):
        x, info = ours.minres(A, b, rtol=1e-10, shift=shift)
        assert info == 0
        np.testing.assert_allclose(x, linalg.minres(A, b, rtol=1e-13, shift=shift)[0], rtol=0, atol=1e-7)
        np.testing.assert_allclose(x, np.linalg.solve(A - shift * np.eye(24), b), rtol=0, atol=1e-7)


def test_inverse_finds_the_least_eigenvalues() -> None:
    A = sparse.diags_array([np.full(59, -1.0), np.arange(60) / 6 + 2, np.full(59, -1.0)], offsets=[-1, 0, 1]).tocsr()
    values = np.linalg.eigvalsh(A.toarray())[:3]
    operator = ours.inverse(A, rtol=1e-12)
    found = linalg.eigsh(A, k=3, sigma=0, OPinv=operator, return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found), values, rtol=1e-9)
    B = normal((60, 5))
    for product in (operator @ B, operator.H @ B, ours.inverse(A, method="minres", rtol=1e-12, maxiter=200) @ B):
        np.testing.assert_allclose(product, np.linalg.solve(A.toarray(), B), rtol=0, atol=1e-8)
    np.testing.assert_allclose(operator @ B[:, :1], np.linalg.solve(A.toarray(), B[:, :1]), rtol=0, atol=1e-8)


def test_inverse_raises_or_reports_where_a_solve_fails() -> None:
    A, b = np.diag([1.0, 2.0, -5.0]), np.ones(3)
    with pytest.raises(SolveError, match="NEGATIVE_CURVATURE in 1 of 1 columns of an inverse product"):
        ours.inverse(A) @ b
    with pytest.warns(SolveWarning, match="NEGATIVE_CURVATURE"):
        ours.inverse(A, on_failure="warn") @ b
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.inverse(A, on_failure="ignore") @ b
    with pytest.raises(SolveError, match="MAX_ITERATIONS"):
        ours.inverse(definite(20, 1e4), maxiter=2) @ np.ones(20)


def test_bad_input_gets_a_sentence() -> None:
    A, b = definite(4), np.ones(4)
    with pytest.raises(TypeError, match="A must have real numbers, got complex128"):
        ours.cg(A + 0j, b)
    with pytest.raises(ValueError, match=r"A must be an operator of shape \[N, N\], got ndarray of shape \[4, 3\]"):
        ours.cg(A[:, :3], b)
    with pytest.raises(ValueError, match=r"b must have shape \[4\] or \[4, K\], as A has 4 rows, got \[5\]"):
        ours.cg(A, np.ones(5))
    with pytest.raises(ValueError, match=r"b must have shape .*, got \[4, 0\]"):
        ours.cg(A, np.ones((4, 0)))
    with pytest.raises(ValueError, match=r"x0 must have the shape of b, \[4\], got \[3\]"):
        ours.cg(A, b, np.ones(3))
    with pytest.raises(ValueError, match=r"M must have shape .*, got \[3, 3\]"):
        ours.cg(A, b, M=np.eye(3))
    with pytest.raises(ValueError, match="callback must be None where b has more than one column, got 2 columns"):
        ours.cg(A, np.ones((4, 2)), callback=print)
    with pytest.raises(ValueError, match="M must be None and atol must be 0"):
        ours.inverse(A, method="minres", M=np.eye(4))


def test_scipys_example_gives_the_same() -> None:
    from integration_examples import scipy as example
    from integrations import difference

    runs = [example.example(ours, size=60, columns=3) for ours in (False, True)]
    assert difference(*runs) <= 1e-5
    assert runs[1].products <= runs[0].products + 3 * 3  # ours measures b − A x at the end of a column
