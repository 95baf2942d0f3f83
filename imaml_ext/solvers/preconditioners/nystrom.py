"""The randomised Nyström preconditioner: the largest eigenvalues of H, from a few products with random vectors."""

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


@dataclass(frozen=True)
class Nystrom(Preconditioner):
    """Takes the r largest eigenvalues out: M = (U (Λ − λ_r) Uᵀ + λ_r + shift)⁻¹, for H ≈ U Λ Uᵀ of rank r.

    U and Λ come from H Ω, for an orthonormal Gaussian Ω [N, r] that all rows share. With a shift that is a number, M is
    that of the source up to a factor, and the condition number of M (H + shift) is about (λ_r + shift) / shift. What is
    known of H serves every shift, also one per parameter.

    H may be indefinite: eigenvalues of the core Ωᵀ H Ω that do not exceed its most negative one, or rounding, are left
    out. A row is `fallback` where none is left, or a product is not finite.

    Source: Frangella, Tropp, Udell, Randomized Nyström preconditioning (2021).
    """

    # Rank r of the approximation, which spends r products and keeps r vectors per row.
    rank: Annotated[int, COUNT] = 20
    seed: Annotated[int, NOT_NEGATIVE] = 0  # Of the test matrix.

    def make(self, operator: Any, like: Tensor, shift: Coefficient = 0.0) -> MadePreconditioner:
        shift_rows(shift, like)
        rank = min(self.rank, like.shape[1])
        omega = torch.linalg.qr(drawn(self.seed, like, rank, signs=False)).Q  # [N, r]
        omega = omega.to(like.dtype).to(omega.dtype)  # as the products see it
        image = products(operator, omega, like, "Nystrom")  # H Ω [B, N, r]
        known = _approximation(omega, image, torch.finfo(like.dtype).eps)
        return _made(known, shift, shape_of(like), rank)


@dataclass(frozen=True, eq=False)
class _Approximation:
    """U Λ Uᵀ of every row: U [B, N, r] orthonormal, eigenvalues Λ [B, r] ≥ 0 in descending order."""

    vectors: Tensor
    values: Tensor


def _approximation(omega: Tensor, image: Tensor, eps: float) -> _Approximation:
    largest = image.abs().amax((1, 2), keepdim=True)  # [B, 1, 1]; entries next to 1 in what follows
    scale = torch.where(largest.isfinite() & (largest > 0), largest, 1)
    image = torch.where(largest.isfinite(), image / scale, 0)
    # Y = H Ω + ν Ω, of H + ν: rounding makes no eigenvalue of its core negative. C = Ωᵀ Y = V diag(w) Vᵀ.
    nu = eps * torch.linalg.vector_norm(image, dim=(1, 2))  # [B]
    image = image + nu.view(-1, 1, 1) * omega
    core = (omega.mT @ image).double()
    w, v = torch.linalg.eigh((core + core.mT) / 2)  # [B, r], [B, r, r]
    least = torch.maximum(-w[:, :1], eps * len(w[0]) * w[:, -1:].abs())
    kept = w > least.clamp(min=torch.finfo(torch.float64).tiny)
    # H + ν ≈ Y C⁺ Yᵀ = F Fᵀ, F = Y V₊ w₊^(−½) = U diag(s) Wᵀ
    root = v * torch.where(kept, w, torch.inf).rsqrt().unsqueeze(1)
    q, r = torch.linalg.qr(image @ root.to(image.dtype))
    u, s, _ = torch.linalg.svd(r)
    return _Approximation(q @ u, (s.square() - nu.unsqueeze(1)).clamp(min=0) * scale.squeeze(2))


@dataclass(frozen=True, eq=False)
class _MadeNystrom(MadePreconditioner):
    """M = D^(−½) (1 − U diag(taken) Uᵀ) D^(−½)."""

    known: _Approximation
    like: Tensor
    scale: Tensor  # D^(−½) [B, 1 or N]
    vectors: Tensor  # U [B, N, r]
    taken: Tensor  # [B, r], below 1

    def __call__(self, r: Tensor, rows: slice = ALL) -> Tensor:
        columns = r if r.dim() == 3 else r.unsqueeze(2)  # [k, N, K]
        u, scale = self.vectors[rows], self.scale[rows].unsqueeze(2)
        y = scale * columns
        y = scale * torch.baddbmm(y, u, self.taken[rows].unsqueeze(2) * (u.mT @ y), alpha=-1)
        return y.to(r.dtype).view(r.shape)

    def for_shift(self, shift: Coefficient) -> MadePreconditioner:
        return _made(self.known, shift, self.like, 0)


def _made(known: _Approximation, shift: Coefficient, like: Tensor, spent: int) -> MadePreconditioner:
    u, values = known.vectors, known.values
    fallback, least = values[:, :1] <= 0, values[:, -1:]  # [B, 1], λ_r [B, 1]
    excess = values - least
    eps = torch.finfo(u.dtype).eps
    d = shift_rows(shift, like) + least  # D [B, 1 or N]
    d = torch.where(fallback, torch.where(d > 0, d, 1), torch.maximum(d, eps * values[:, :1]))
    if d.shape[1] > 1:  # U sqrt(Λ − λ_r) next to D is no longer orthogonal
        q, r = torch.linalg.qr(u * excess.sqrt().unsqueeze(1) * d.rsqrt().unsqueeze(2))
        left, s, _ = torch.linalg.svd(r)
        u, excess = q @ left, s.square()
    else:
        excess = excess / d
    # Rounding leaves 1 − U diag(taken) Uᵀ positive definite up to here.
    taken = (excess / (1 + excess)).clamp(max=1 - 8 * eps)
    return _MadeNystrom(spent, fallback[:, 0], known, like, d.rsqrt(), u, taken)
