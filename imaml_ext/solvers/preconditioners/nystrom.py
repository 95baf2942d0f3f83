"""The randomised Nyström preconditioner: the largest eigenvalues of H, from a few products with random vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from imaml_ext.ops import Coefficient
from imaml_ext.ops.calls import is_transformed
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

_PIECE = 4096  # columns that the CPU multiplies at a time: all at once take it twice as long


@dataclass(frozen=True)
class Nystrom(Preconditioner):
    """Takes the r largest eigenvalues out: M = (U (Λ − λ_r) Uᵀ + λ_r + shift)⁻¹, for H ≈ U Λ Uᵀ of rank r.

    U and Λ come from H Ω, for random signs Ω [N, r] that all rows share (Gaussian in the source). With a shift that is
    a number, M is that of the source up to a factor, and the condition number of M (H + shift) is about
    (λ_r + shift) / shift. What is known of H serves every shift, also one per parameter.

    H may be indefinite: eigenvalues of the core Ωᵀ H Ω that do not exceed its most negative one, or rounding, are left
    out. A row is `fallback` where none is left, or a product is not finite.

    Source: Frangella, Tropp, Udell, Randomized Nyström preconditioning (2021).
    """

    # Rank r of the approximation, which spends r products and keeps r vectors per row.
    rank: Annotated[int, COUNT] = 20
    seed: Annotated[int, NOT_NEGATIVE] = 0  # Of the test matrix.

    def make(self, operator: Any, like: Tensor, shift: Coefficient = 0.0) -> MadePreconditioner:
        shift_rows(shift, like)
        rank, size = min(self.rank, like.shape[1]), like.shape[1]
        omega = drawn(self.seed, like, rank)
        if size < max(4 * rank, 256):  # taller columns are next to orthogonal, and their length changes nothing
            omega = torch.linalg.qr(omega).Q
        omega = omega.to(like.dtype).to(omega.dtype)  # as the products see it
        image = products(operator, omega, like, "Nystrom")  # H Ω [B, N, r]
        known = _approximation(omega.mT, image.mT.contiguous(), torch.finfo(like.dtype).eps)
        return _made(known, shift, shape_of(like), rank)


@dataclass(frozen=True, eq=False)
class _Approximation:
    """Uᵀ Λ U of every row: U [B, r, N] of orthonormal rows, eigenvalues Λ [B, r] ≥ 0 in descending order."""

    vectors: Tensor
    values: Tensor


def _approximation(omega: Tensor, image: Tensor, eps: float) -> _Approximation:
    """H ≈ Yᵀ C⁺ Y for Y = Ω H [B, r, N] and C = Ω Yᵀ, with Ω [r, N]; in rows, as the products come."""
    largest = image.abs().amax((1, 2), keepdim=True)  # [B, 1, 1]; entries next to 1 in what follows
    finite = largest.isfinite()
    scale = torch.where(finite & (largest > 0), largest, 1)
    image = (image / scale).masked_fill_(~finite, 0)
    core = _inner(image, omega)  # = V diag(w) Vᵀ
    w, v = torch.linalg.eigh((core + core.mT) / 2)  # [B, r], [B, r, r]
    least = torch.maximum(-w[:, :1], eps * w.shape[1] * w[:, -1:].abs())
    kept = w > least.clamp(min=torch.finfo(torch.float64).tiny)
    root = v * torch.where(kept, w, torch.inf).rsqrt().unsqueeze(1)
    u, values = _orthonormal(_times(root.mT.to(image.dtype), image))
    values = values * scale.squeeze(2)
    return _Approximation(u, torch.where(values.isfinite().all(1, keepdim=True), values, 0))


def _orthonormal(factor: Tensor) -> tuple[Tensor, Tensor]:
    """U [B, r, N] of orthonormal rows and Λ [B, r] ≥ 0, descending, with Uᵀ Λ U = Fᵀ F; a row of F may be 0.

    It uses the Gram matrix of the rows at length 1. Its condition number is moderate, as they are images of orthogonal
    vectors. Householder's method takes several times as long for few long rows.
    """
    length = torch.linalg.vector_norm(factor, dim=2, keepdim=True).double()  # [B, r, 1]
    safe = torch.where(length > 0, length, 1)
    gram = _inner(factor, factor) / safe / safe.mT
    g, w = torch.linalg.eigh(gram)  # Q = g^(−½) Wᵀ diag(1 / length) F is orthonormal
    root = g.clamp(min=g.shape[1] * torch.finfo(factor.dtype).eps).sqrt().unsqueeze(1)
    _, s, vh = torch.linalg.svd(length * w * root)  # = A for Fᵀ F = Qᵀ Aᵀ A Q
    turn = vh / root @ w.mT / safe.mT
    return _times(turn.to(factor.dtype), factor), s.square().to(factor.dtype)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ [*, r, s] in float64, of a [*, r, N] and b [*, s, N]: sums of 1024 in their dtype, and these in float64.

    A float32 sum of all N, with as many roundings, would leave U far less orthonormal than its entries are exact.
    """
    whole = a.shape[-1] // 1024 * 1024
    split = [x[..., :whole].unflatten(-1, (-1, 1024)).transpose(-3, -2) for x in (a, b)]  # [*, N / 1024, r, 1024]
    return (split[0] @ split[1].mT).double().sum(-3) + (a[..., whole:] @ b[..., whole:].mT).double()


def _times(a: Tensor, v: Tensor) -> Tensor:
    """a v [B, k, N] of a [B, k, r] and v [B, r, N], for few k and r."""
    if not v.is_cpu or a.requires_grad or is_transformed() or torch.compiler.is_compiling():
        return a @ v
    out = v.new_empty((len(v), a.shape[1], v.shape[2]))
    for part, of in zip(out.split(_PIECE, 2), v.split(_PIECE, 2), strict=True):
        torch.bmm(a, of, out=part)
    return out


@dataclass(frozen=True, eq=False)
class _MadeNystrom(MadePreconditioner):
    """M = D⁻¹ + Vᵀ diag(weights) V."""

    known: _Approximation
    like: Tensor
    inverse: Tensor  # D⁻¹ [B, 1, 1 or N]
    vectors: Tensor  # V [B, r, N]
    weights: Tensor  # [B, 1, r], negative

    def __call__(self, r: Tensor, rows: slice = ALL) -> Tensor:
        columns = (r.mT if r.dim() == 3 else r.unsqueeze(1)).to(self.vectors.dtype)  # [k, K, N]
        v = self.vectors[rows]
        y = _times((self.weights[rows] * _inner(columns, v)).to(v.dtype), v).addcmul_(self.inverse[rows], columns)
        return (y.mT if r.dim() == 3 else y.squeeze(1)).to(r.dtype)

    def for_shift(self, shift: Coefficient) -> MadePreconditioner:
        return _made(self.known, shift, self.like, 0)


def _made(known: _Approximation, shift: Coefficient, like: Tensor, spent: int) -> MadePreconditioner:
    v, values = known.vectors, known.values
    eps, least = torch.finfo(v.dtype).eps, values[:, -1:]  # λ_r [B, 1]
    d = shift_rows(shift, like) + least  # D [B, 1 or N]
    fallback = (values[:, :1] <= 0) | ~d.isfinite().all(1, keepdim=True)  # [B, 1]
    excess = torch.where(fallback, 0, values - least)
    d = torch.where(fallback, torch.where(d > 0, d, 1), torch.maximum(d, eps * values[:, :1]))
    one_per_unknown = d.shape[1] > 1
    if one_per_unknown:  # U sqrt(Λ − λ_r) next to D is no longer orthogonal
        v, excess = _orthonormal(v * excess.sqrt().unsqueeze(2) * d.rsqrt().unsqueeze(1))
        v = v * d.rsqrt().unsqueeze(1)
    else:
        excess = excess / d
    # Rounding leaves 1 − Uᵀ diag(taken) U positive definite up to here.
    taken = (excess / (1 + excess)).clamp(max=1 - 64 * eps)
    weights = -(taken if one_per_unknown else taken / d).unsqueeze(1)
    return _MadeNystrom(spent, fallback[:, 0], known, like, d.reciprocal().unsqueeze(1), v, weights)
