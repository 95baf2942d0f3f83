"""The diagonal preconditioner, from an estimate of the diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from imaml_ext.ops import Coefficient
from imaml_ext.settings import COUNT, NOT_NEGATIVE
from imaml_ext.solvers.preconditioners.preconditioner import (
    ALL,
    MadePreconditioner,
    Preconditioner,
    drawn,
    products,
    shape_of,
    shift_rows,
)

# An entry of diag(H) + shift below so much of the shift is noise of the estimate, or curvature that it hides.
_LEAST_PART_OF_SHIFT = 0.1


@dataclass(frozen=True)
class Jacobi(Preconditioner):
    """Divides by the diagonal: M = 1 / (diag(H) + shift), diag(H) estimated as the mean of z ∘ (H z) over signs z.

    Exact where H is diagonal. Elsewhere entry i has the variance Σ_{j ≠ i} H_ij² / probes, and is moved towards the
    mean of its row as far as it is noise. An entry of diag(H) + shift that is no larger than a tenth of its shift is
    replaced by the shift, or by the row's mean where the shift is 0.

    Source: Bekas, Kokiopoulou, Saad, An estimator for the diagonal of a matrix (2007); the probes are Hutchinson's
    (1989).
    """

    probes: Annotated[int, COUNT] = 8  # Products that the estimate of the diagonal spends.
    seed: Annotated[int, NOT_NEGATIVE] = 0  # Of the probes.

    def make(self, operator: Any, like: Tensor, shift: Coefficient = 0.0) -> MadePreconditioner:
        z = drawn(self.seed, like, self.probes)
        samples = z * products(operator, z, like, "Jacobi")  # [B, N, probes]
        return _made(_shrunk(samples), shift, shape_of(like), self.probes)


def _shrunk(samples: Tensor) -> Tensor:
    """The mean over samples [B, N, K], moved towards the row's mean as far as it is noise: [B, N].

    x̄ + τ² / (τ² + σ²) (x − x̄), where σ² is the variance of x, and τ² what is left of the variance within the row.
    """
    estimate = samples.mean(2)
    if samples.shape[2] == 1:
        return estimate
    noise = samples.var(2) / samples.shape[2]
    variance, mean = torch.var_mean(estimate, 1, correction=0, keepdim=True)
    signal = (variance - noise.mean(1, keepdim=True)).clamp(min=0)
    return torch.where(noise > 0, torch.lerp(mean, estimate, signal / (signal + noise)), estimate)


@dataclass(frozen=True, eq=False)
class _MadeJacobi(MadePreconditioner):
    estimate: Tensor  # diag(H) [B, N]
    like: Tensor
    inverse: Tensor  # [B, N]

    @property
    def diagonal(self) -> Tensor:
        return self.inverse

    def __call__(self, r: Tensor, rows: slice = ALL) -> Tensor:
        inverse = self.inverse[rows]
        return ((inverse if r.dim() == 2 else inverse.unsqueeze(2)) * r).to(r.dtype)

    def for_shift(self, shift: Coefficient) -> MadePreconditioner:
        return _made(self.estimate, shift, self.like, 0)


def _made(estimate: Tensor, shift: Coefficient, like: Tensor, spent: int) -> MadePreconditioner:
    rows = shift_rows(shift, like)
    entries = estimate + rows
    fallback = ~estimate.isfinite().all(1)
    trusted = (entries > _LEAST_PART_OF_SHIFT * rows) & (entries > 0)
    mean = torch.where(trusted, entries, 0).sum(1, keepdim=True) / trusted.sum(1, keepdim=True)
    fallback = fallback | ~(mean > 0)[:, 0]
    entries = torch.where(trusted, entries, torch.where(rows > 0, rows, mean))
    entries = torch.where(fallback.unsqueeze(1), torch.where(rows > 0, rows, 1), entries)
    return _MadeJacobi(spent, fallback, estimate, like, 1 / entries)
