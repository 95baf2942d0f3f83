"""Random symmetric systems with known spectra, for the tests of the solver."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
needs_while_nodes = pytest.mark.skipif(
    not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_while_node"), reason="torch before 2.14"
)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Systems:
    """H_b = Q_b diag(d_b) Q_b with the reflection Q = I − 2 v vᵀ: any size, exact inverse, no matrix."""

    d: Tensor  # [B, N]
    v: Tensor  # [B, N], unit rows

    def reflect(self, p: Tensor) -> Tensor:
        v = self.v.to(p.dtype)
        return p - 2 * v * (v * p).sum(1, keepdim=True)

    def __call__(self, p: Tensor) -> Tensor:
        return self.reflect(self.d.to(p.dtype) * self.reflect(p))

    def solve(self, b: Tensor) -> Tensor:
        return self.reflect(self.reflect(b.double()) / self.d)

    def relative_residual(self, x: Tensor, b: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        """‖b − (H + shift) x‖ / ‖b‖ in float64, [B]."""
        x, b = x.double(), b.double()
        return (b - self(x) - shift * x).norm(dim=1) / b.norm(dim=1)


def spectrum(rows: int, cols: int, conditions: Tensor) -> Tensor:
    """Log-uniform spectra in [1/κ_b, 1], both ends present where N > 1; [B, N] float64."""
    exponents = torch.rand(rows, cols, dtype=torch.float64)
    exponents[:, 0] = 0
    exponents[:, -1] = 1 if cols > 1 else 0
    return conditions.unsqueeze(1) ** -exponents


def conditions(rows: int) -> Tensor:
    """From 1 to 1e6, side by side."""
    return torch.logspace(0, 6, rows, dtype=torch.float64) if rows > 1 else torch.tensor([1e3], dtype=torch.float64)


def reflected(rows: int, cols: int, *, device: str = "cpu") -> Systems:
    v = torch.randn(rows, cols, dtype=torch.float64)
    v /= v.norm(dim=1, keepdim=True)
    return Systems(spectrum(rows, cols, conditions(rows)).to(device), v.to(device))


def dense(rows: int, cols: int) -> Tensor:
    """Dense symmetric positive definite matrices with the same spectra, [B, N, N] float64."""
    q = torch.linalg.qr(torch.randn(rows, cols, cols, dtype=torch.float64)).Q
    a = (q * spectrum(rows, cols, conditions(rows)).unsqueeze(1)) @ q.mT
    return (a + a.mT) / 2


def spd(cols: int, condition: float) -> Tensor:
    """A random symmetric positive definite matrix [N, N] float64, its eigenvalues spaced evenly on a log scale."""
    q = torch.linalg.qr(torch.randn(cols, cols, dtype=torch.float64)).Q
    a = (q * torch.logspace(0, -math.log10(condition), cols, dtype=torch.float64)) @ q.mT
    return (a + a.mT) / 2


def known_matrices() -> dict[str, Tensor]:
    """Positive definite test matrices of the literature [N, N] float64, of condition numbers from 10 to 1e16."""
    i = torch.arange(1, 41, dtype=torch.float64)
    row, column = i.unsqueeze(1), i
    pascal = torch.tensor([[math.comb(j + k, j) for k in range(12)] for j in range(12)], dtype=torch.float64)
    moler = 2 * torch.eye(20, dtype=torch.float64) - torch.ones(20, 20, dtype=torch.float64).tril()
    laplacian = 2 * torch.eye(40, dtype=torch.float64) - (row - column).abs().eq(1).double()
    strakos = 1e-3 + (i[:24] - 1) / 23 * (1 - 1e-3) * 0.8 ** (24 - i[:24])
    return {
        "hilbert": (1 / (row + column - 1))[:9, :9],
        "hilbert, singular to working precision": (1 / (row + column - 1))[:12, :12],
        "pascal": pascal[:8, :8],
        "pascal, large": pascal,
        "moler": moler @ moler.mT,
        "minij": torch.minimum(row, column),
        "lehmer": torch.minimum(row, column) / torch.maximum(row, column),
        "kms": 0.99 ** (row - column).abs(),
        "laplacian": laplacian,
        "biharmonic": laplacian @ laplacian,
        "strakos": strakos.diag(),
        "random, 10": spd(40, 10),
        "random, 1e4": spd(40, 1e4),
        "random, 1e12": spd(20, 1e12),
    }


def singular_matrices() -> dict[str, Tensor]:
    """Positive semi-definite matrices [N, N] float64 with a kernel."""
    edges = (torch.rand(30, 30, dtype=torch.float64) < 0.3).double().triu(1)
    edges[torch.arange(29), torch.arange(1, 30)] = 1
    edges = edges + edges.mT
    i = torch.arange(40)
    cycle = ((i.unsqueeze(1) - i) % 40).unsqueeze(0).eq(torch.tensor([1, 39]).view(2, 1, 1)).double().sum(0)
    thin, wide = torch.randn(20, 5, dtype=torch.float64), torch.randn(50, 49, dtype=torch.float64)
    return {
        "graph": edges.sum(1).diag() - edges,
        "cycle": 2 * torch.eye(40, dtype=torch.float64) - cycle,
        "gram of rank 5": thin @ thin.mT,
        "gram of rank N - 1": wide @ wide.mT,
        "projection": (torch.arange(20) % 2).double().diag(),
    }


def residual_in_long_double(matrix: Tensor, x: Tensor, b: Tensor) -> float:
    """‖b − A x‖ in extended precision, of the numbers as they are."""
    A, x64, b64 = (t.double().numpy().astype(np.longdouble) for t in (matrix, x, b))
    r = b64 - A @ x64
    return float(np.sqrt((r * r).sum()))


def multiply(matrices: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda p: (matrices @ p.unsqueeze(2)).squeeze(2)


def solve_directly(matrices: Tensor, b: Tensor) -> Tensor:
    """A⁻¹ b of positive definite matrices [..., N, N], right-hand sides [..., N].

    By Cholesky, because LU is not always to be had: with some builds of torch 2.15, batched LU gives wrong pivots once
    torch.set_num_threads has lowered and raised the number of threads.
    """
    return torch.cholesky_solve(b.unsqueeze(-1), torch.linalg.cholesky(matrices)).squeeze(-1)
