"""Products of matrices in a chosen precision, whose derivatives are such products again.

A product of less than float32 rounds its operands and accumulates in float32, as tensor cores do. All else, norms,
activations, criteria and solvers, stays in float32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["float32", "tf32", "bfloat16"]


def product(a: Tensor, b: Tensor, precision: str = "float32") -> Tensor:
    """Multiplies a [B, M, K] and b [B, K, N], which must be float32 (else TypeError) where the precision is less.

    "float32" is the type of the operands, whichever it is; "tf32" keeps 10 bits of their fraction, "bfloat16" 7. On a
    GPU tensor cores multiply; on the CPU operands are rounded (to nearest, ties to even) and multiplied in float32,
    which shows what the precision does and is no faster.
    """
    if precision == "float32":
        return torch.bmm(a, b)
    if a.dtype != torch.float32:
        raise TypeError(f"params must be float32 with precision={precision!r}, got {a.dtype}")
    return _Product.apply(a, b, precision)


class _Product(torch.autograd.Function):
    """Has the derivatives ā = c̄ bᵀ and b̄ = aᵀ c̄ of the same precision."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, precision: str) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.precision = precision
        return _multiply(a, b, precision)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b = ctx.saved_tensors
        needs_a, needs_b, _ = ctx.needs_input_grad
        by_a = product(grad, b.mT, ctx.precision) if needs_a else None
        return by_a, product(a.mT, grad, ctx.precision) if needs_b else None, None


def _multiply(a: Tensor, b: Tensor, precision: str) -> Tensor:
    if not a.is_cuda:
        return torch.bmm(rounded(a, precision), rounded(b, precision))
    if precision == "bfloat16":
        return torch.bmm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        return torch.bmm(a, b)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def rounded(x: Tensor, precision: str) -> Tensor:
    """Rounds float32 x to the fraction that a precision has; infinities and NaN stay."""
    if precision == "float32":
        return x
    if precision == "bfloat16":
        return x.bfloat16().float()
    bits = x.contiguous().view(torch.int32)
    dropped = 13  # of 23 bits
    half = (1 << (dropped - 1)) - 1
    nearest = (bits + half + ((bits >> dropped) & 1)) & -(1 << dropped)
    return torch.where(x.isfinite(), nearest.view(torch.float32), x)
