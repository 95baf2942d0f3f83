"""`imaml_ext.integrations.curvlinops` against curvlinops itself and dense float64."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import library
from torch import Tensor, nn

from imaml_ext import SolveError, SolveStatus, SolveWarning

curvlinops = library("curvlinops")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from integration_examples import curvlinops as published  # noqa: E402

from imaml_ext.integrations.curvlinops import CGInverseLinearOperator  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.cpu_kernels]


def dense(size: int, *, shapes: list[tuple[int, ...]] | None = None) -> tuple[Any, Tensor]:
    """A positive definite operator on parameters of these shapes, and its matrix [N, N]."""
    from curvlinops._torch_base import PyTorchLinearOperator

    shapes = shapes or [(size,)]
    S = torch.randn(size, size, dtype=torch.float64)
    A = S @ S.T / size + 0.1 * torch.eye(size, dtype=torch.float64)

    class Dense(PyTorchLinearOperator):
        dtype, device, SELF_ADJOINT = A.dtype, A.device, True

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            Y = A @ torch.cat([x.flatten(end_dim=-2) for x in X])
            return [y.reshape(x.shape) for x, y in zip(X, Y.split([x.shape[:-1].numel() for x in X]), strict=True)]

    return Dense(shapes, shapes), A


@pytest.mark.parametrize("settings", [published.SETTINGS, [{"tolerance": 1e-7}]])
def test_the_published_example_with_one_line_changed(settings: Sequence[dict[str, Any]]) -> None:
    theirs, ours = (published.example(ours, settings=settings) for ours in (False, True))
    torch.testing.assert_close(ours.result, theirs.result, rtol=0, atol=1e-5 * float(theirs.result.abs().max()))
    assert ours.products < theirs.products
    A, gradient = published.damped_ggn()
    torch.testing.assert_close(A @ ours.result[0], gradient, rtol=1e-4, atol=1e-5)  # the example's own check


@pytest.mark.parametrize("kind", ["GGNLinearOperator", "HessianLinearOperator"])
@pytest.mark.parametrize("loss", ["MSELoss", "CrossEntropyLoss"])
def test_a_linearised_operator_is_the_operator_at_the_present_parameters(kind: str, loss: str) -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5)).double()
    passes = 0

    class Batches(list[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal passes
            passes += 1
            return super().__iter__()

    def targets(n: int) -> Tensor:
        return torch.randn(n, 5).double() if loss == "MSELoss" else torch.randint(5, (n,))

    data = Batches((torch.randn(n, 4).double(), targets(n)) for n in (6, 9))
    weights = [network[0].weight, network[2].bias, network[2].weight]  # not all, and not in order
    curvature = getattr(curvlinops, kind)(network, getattr(nn, loss)(), weights, data)
    identity = curvlinops.examples.IdentityLinearOperator([w.shape for w in weights], weights[0].device, torch.float64)
    A = 3.0 * (curvature + 5.0 * identity)
    inverse = CGInverseLinearOperator(A, tolerance=1e-11, max_iter=200, linearize=True)
    for columns in (1, 3):
        with torch.no_grad():
            weights[0].add_(0.1 * torch.randn_like(weights[0]))
        b = torch.randn(A.shape[0], columns, dtype=torch.float64)
        passes = 0
        x = inverse @ b
        assert passes == 1
        assert inverse.solution.status.tolist() == [SolveStatus.CONVERGED] * columns
        torch.testing.assert_close(A @ x, b, rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="linearize must be False where A has no GGNLinearOperator or Hessian"):
        CGInverseLinearOperator(3.0 * identity, linearize=True)


def test_a_column_stops_on_its_own_residual() -> None:
    A, matrix = dense(60)
    eigenvectors = torch.linalg.eigh(matrix).eigenvectors
    b = torch.cat([eigenvectors[:, :31], torch.randn(60, 1, dtype=torch.float64)], 1)  # 31 columns need one step
    tolerance = 1e-6
    inverse = CGInverseLinearOperator(A, tolerance=tolerance)
    ours, theirs = inverse @ b, curvlinops.CGInverseLinearOperator(A, tolerance=tolerance) @ b
    residuals = (b - matrix @ ours).norm(dim=0) / b.norm(dim=0)
    assert (residuals <= 1.001 * tolerance).all()
    assert inverse.solution.status.tolist() == [SolveStatus.CONVERGED] * 32
    assert inverse.solution.iterations[:31].max() == 1
    assert inverse.solution.iterations[31] > 10
    torch.testing.assert_close(inverse.solution.residual_norm, (b - matrix @ ours).norm(dim=0), rtol=1e-3, atol=1e-12)
    assert float((b - matrix @ theirs)[:, 31].norm() / b[:, 31].norm()) > 2 * tolerance  # theirs stops by the mean


def test_it_multiplies_what_curvlinops_multiplies() -> None:
    A, matrix = dense(31, shapes=[(4, 5), (11,)])
    inverse = CGInverseLinearOperator(A, tolerance=1e-12, max_iter=200)
    b = torch.randn(31, 3, dtype=torch.float64)
    x = torch.linalg.solve(matrix, b)
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(inverse @ b, x, **close)
    torch.testing.assert_close(inverse @ b[:, 0], x[:, 0], **close)
    assert inverse.solution.x.shape == (31, 1)
    assert inverse.solution.status.shape == (1,)
    for columns in ((), (3,)):  # lists of tensors, one per parameter
        wanted = x if columns else x[:, 0]
        given = b if columns else b[:, 0]
        found = inverse @ [given[:20].reshape(4, 5, *columns), given[20:].reshape(11, *columns)]
        assert [part.shape for part in found] == [(4, 5, *columns), (11, *columns)]
        torch.testing.assert_close(torch.cat([part.reshape(-1, *columns) for part in found]), wanted, **close)
    torch.testing.assert_close((A @ inverse) @ b, b, **close)  # composed
    torch.testing.assert_close(inverse.adjoint() @ b, x, **close)
    torch.testing.assert_close(torch.from_numpy(inverse.to_scipy() @ b.numpy()), x, **close)


def test_a_preconditioner_and_a_guess_save_products() -> None:
    A, matrix = dense(40)
    b = torch.randn(40, 2, dtype=torch.float64)
    inverse_matrix = torch.linalg.inv(matrix)
    plain = CGInverseLinearOperator(A, tolerance=1e-8)
    plain @ b
    for options in (
        {"preconditioner": lambda r: inverse_matrix @ r},
        {"preconditioner": curvlinops.examples.TensorLinearOperator(inverse_matrix)},
        {"initial_guess": inverse_matrix @ b},
    ):
        faster = CGInverseLinearOperator(A, tolerance=1e-8, **options)
        torch.testing.assert_close(faster @ b, inverse_matrix @ b, rtol=0, atol=1e-6)
        assert faster.solution.iterations.max() <= 2 < plain.solution.iterations.min()


def test_failures_are_told() -> None:
    A, _ = dense(30)
    b = torch.randn(30, 2, dtype=torch.float64)
    with pytest.warns(SolveWarning, match="MAX_ITERATIONS in 2 of 2 columns"):
        CGInverseLinearOperator(A, tolerance=1e-8, max_iter=3) @ b
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CGInverseLinearOperator(A, max_iter=3) @ b  # three products were asked for, and no tolerance
    with pytest.raises(SolveError, match="NEGATIVE_CURVATURE in 2 of 2 columns"):
        CGInverseLinearOperator(-1.0 * A) @ b
    with pytest.warns(SolveWarning, match="NEGATIVE_CURVATURE in 2 of 2 columns"):
        CGInverseLinearOperator(-1.0 * A, on_breakdown="warn") @ b
    b[3, 1] = torch.nan
    with pytest.raises(SolveError, match=r"NON_FINITE in 1 of 2 columns \(1\)"):
        CGInverseLinearOperator(A) @ b
