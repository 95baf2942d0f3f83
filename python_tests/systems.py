"""Random symmetric systems with known spectra, for the tests of the solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
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


def multiply(matrices: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda p: (matrices @ p.unsqueeze(2)).squeeze(2)


def solve_directly(matrices: Tensor, b: Tensor) -> Tensor:
    """A⁻¹ b of positive definite matrices [..., N, N], right-hand sides [..., N].

    By Cholesky, because LU is not always to be had: with some builds of torch 2.15, batched LU gives wrong pivots once
    torch.set_num_threads has lowered and raised the number of threads.
    """
    return torch.cholesky_solve(b.unsqueeze(-1), torch.linalg.cholesky(matrices)).squeeze(-1)
