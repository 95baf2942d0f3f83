"""The Kronecker-factored preconditioner (KFAC) of a network's curvature, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from imaml_ext.ops import Coefficient, compute_dtype
from imaml_ext.settings import NOT_NEGATIVE
from imaml_ext.solvers.preconditioners.preconditioner import (
    ALL,
    MadePreconditioner,
    Preconditioner,
    shape_of,
    shift_rows,
)


class KroneckerBlock(NamedTuple):
    """The curvature of one layer, ≈ A ⊗ G: entry (i o, j p) is A_ij G_op.

    Attributes:
        columns: [I, O] int64, the parameter that multiplies input i into output o; a bias is one more input.
        inputs: A [B, I, I]. outputs: G [B, O, O]; both symmetric positive semi-definite.
    """

    columns: Tensor
    inputs: Tensor
    outputs: Tensor


class KroneckerFactors(NamedTuple):
    """What an operator hands to `KFAC`: blocks of distinct parameters, and the diagonal of the curvature elsewhere.

    Attributes:
        diagonal: [B, N] ≥ 0; not read where a block is.
        products: what they have cost per row, in products with the curvature, rounded up.
    """

    blocks: tuple[KroneckerBlock, ...]
    diagonal: Tensor
    products: int


@dataclass(frozen=True)
class KFAC(Preconditioner):
    """Inverts layer by layer: M = (A ⊗ G + shift)⁻¹ for a layer with a weight, 1 / (diagonal + shift) elsewhere.

    The operator must have a method `kronecker_factors(samples=…, seed=…) -> KroneckerFactors`, as has what `TaskLoss`
    linearises, of `Conv4`, `MLP` and the Linear and Conv2d layers of a module. They approximate the Gauss-Newton
    matrix, also for a solve with the Hessian. Eigendecompositions of A and G put the shift inside exactly, so that no
    damping is split between the factors; a shift per parameter is taken as its mean over a layer.

    Source: Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature (2015); for
    convolutions Grosse and Martens (2016); eigenbases as in George et al. (2018).
    """

    # Random combinations of the outputs that are sent back through the network; 0: every output, which is exact.
    samples: Annotated[int, NOT_NEGATIVE] = 0
    seed: Annotated[int, NOT_NEGATIVE] = 0  # Of the signs that keep the examples apart.

    def make(self, operator: Any, like: Tensor, shift: Coefficient = 0.0) -> MadePreconditioner:
        shift_rows(shift, like)
        factors_of = getattr(operator, "kronecker_factors", None)
        if factors_of is None:
            raise TypeError(
                "operator must have kronecker_factors for KFAC, as has the curvature of a TaskLoss of Conv4, MLP or a "
                f"module with a named criterion, got {type(operator).__name__}: Nystrom needs products alone"
            )
        factors: KroneckerFactors = factors_of(samples=self.samples, seed=self.seed)
        if factors.diagonal.shape != like.shape:
            found = list(factors.diagonal.shape)
            raise ValueError(f"operator must have rows like those of b, {list(like.shape)}, got factors of {found}")
        return _made(_decomposed(factors, compute_dtype(like.dtype)), shift, shape_of(like), factors.products)


class _Layer(NamedTuple):
    """A block by its eigendecompositions, A = Q_A diag(a) Q_Aᵀ and G = Q_G diag(g) Q_Gᵀ."""

    columns: Tensor  # [I, O]
    inputs: Tensor  # Q_A [B, I, I]
    outputs: Tensor  # Q_G [B, O, O]
    values: Tensor  # a gᵀ [B, I, O]


class _Known(NamedTuple):
    layers: tuple[_Layer, ...]
    diagonal: Tensor
    fallback: Tensor  # [B] bool


def _decomposed(factors: KroneckerFactors, dtype: torch.dtype) -> _Known:
    finite = factors.diagonal.isfinite().all(1)
    for block in factors.blocks:
        finite = finite & block.inputs.isfinite().all((1, 2)) & block.outputs.isfinite().all((1, 2))

    def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(torch.where(finite.view(-1, 1, 1), matrix, 0).to(dtype))
        return values.clamp(min=0), vectors

    layers = []
    for block in factors.blocks:
        (a, q_a), (g, q_g) = eigen(block.inputs), eigen(block.outputs)
        layers.append(_Layer(block.columns, q_a, q_g, a.unsqueeze(2) * g.unsqueeze(1)))
    diagonal = torch.where(finite.unsqueeze(1), factors.diagonal, 0).to(dtype)
    return _Known(tuple(layers), diagonal, ~finite)


@dataclass(frozen=True, eq=False)
class _MadeKFAC(MadePreconditioner):
    known: _Known
    like: Tensor
    inverse: Tensor  # [B, N] of the parameters outside the layers
    inverses: tuple[Tensor, ...]  # [B, I, O] of each layer, in its eigenbases

    def __call__(self, r: Tensor, rows: slice = ALL) -> Tensor:
        if r.dim() == 3:  # K right-hand sides of the same rows
            return torch.stack([self(column, rows) for column in r.unbind(2)], 2)
        wide = r.to(self.inverse.dtype)
        result = self.inverse[rows] * wide
        for layer, inverse in zip(self.known.layers, self.inverses, strict=True):
            q_a, q_g = layer.inputs[rows], layer.outputs[rows]
            turned = q_a.mT @ wide[:, layer.columns] @ q_g  # [k, I, O]
            result[:, layer.columns] = q_a @ (inverse[rows] * turned) @ q_g.mT
        return result.to(r.dtype)

    def for_shift(self, shift: Coefficient) -> MadePreconditioner:
        return _made(self.known, shift, self.like, 0)


def _made(known: _Known, shift: Coefficient, like: Tensor, spent: int) -> MadePreconditioner:
    mu = shift_rows(shift, like)  # [1 or B, 1 or N]
    flagged = known.fallback.view(-1, 1, 1)

    def inverse(values: Tensor, mu: Tensor) -> Tensor:
        """1 / (values + μ) [B, I, O]; where nothing is known or left, 1 / μ, and 1 where that is not positive."""
        largest = values.amax((1, 2), keepdim=True)
        entries = torch.maximum(values + mu, torch.finfo(values.dtype).eps * largest)
        safe = torch.where(mu > 0, mu, 1)
        return 1 / torch.where(flagged | (entries <= 0), safe, entries)

    inverses = []
    for layer in known.layers:
        of_layer = mu if mu.shape[1] == 1 else mu[:, layer.columns.flatten()].mean(1, keepdim=True)
        inverses.append(inverse(layer.values, of_layer.unsqueeze(2)))
    rest = inverse(known.diagonal.unsqueeze(2), mu.unsqueeze(2)).squeeze(2)
    return _MadeKFAC(spent, known.fallback, known, like, rest, tuple(inverses))
