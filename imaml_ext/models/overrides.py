"""Functions of torch that are computed in another way while a module runs for its tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from imaml_ext.models.recurrent import RECURRENT
from imaml_ext.models.task_functions import HANDLERS as FAST


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`F.embedding`: no gradient flows into the row `padding_idx`, which vmap's own rule gives one.

    With `max_norm` the rows are scaled where they are read; torch scales the weight itself, in place. As there, the
    scale is a constant for the gradient. The gradient is dense whatever `sparse` says, as that of a flat row is.
    """
    if scale_grad_by_freq:
        raise ValueError("embedding must have scale_grad_by_freq=False: such a gradient is none of any function")
    rows = F.embedding(input, weight)
    if max_norm is not None:
        with torch.no_grad():
            norms = torch.linalg.vector_norm(rows, norm_type, -1, keepdim=True)
            change = torch.where(norms > max_norm, rows * (max_norm / (norms + 1e-7)) - rows, torch.zeros_like(rows))
        rows = rows + change
    if padding_idx is not None:
        padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
        rows = torch.where(padding, rows.detach(), rows)
    return rows


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """`F.embedding_bag` by operations that vmap knows and that have second derivatives.

    Args:
        input: [bags, size], or [n] with `offsets`, where bags of any size begin.
    """
    rows = embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq)  # [bags, size, D]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    real = torch.ones_like(input, dtype=torch.bool) if padding_idx is None else input != padding_idx % weight.shape[0]
    if offsets is not None and mode == "max":
        place = torch.arange(input.shape[0], device=input.device)
        ends = torch.cat([offsets[1:], offsets.new_full((1,), input.shape[0])])
        rows = rows.unsqueeze(0)
        real = real & (place >= offsets.unsqueeze(1)) & (place < ends.unsqueeze(1))  # [bags, n]
    if mode == "max":
        largest = rows.masked_fill(~real.unsqueeze(-1), -torch.inf).amax(1)
        total = torch.where(real.any(1, keepdim=True), largest, torch.zeros_like(largest))
    elif offsets is None:
        total, number = rows.masked_fill(~real.unsqueeze(-1), 0).sum(1), real.sum(1)
    else:
        begun = offsets.new_zeros(input.shape[0] + 1).index_add(0, offsets, torch.ones_like(offsets))
        bag = begun.cumsum(0)[:-1] - 1  # of every row: the last one that begins at it or before
        total = rows.new_zeros(len(offsets), rows.shape[-1]).index_add(0, bag, rows.masked_fill(~real.unsqueeze(-1), 0))
        number = offsets.new_zeros(len(offsets)).index_add(0, bag, real.to(offsets.dtype))
    if mode == "mean":
        total = total / number.clamp(min=1).unsqueeze(-1)
    return total[:-1] if offsets is not None and include_last_offset else total


def rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    """`F.rrelu`, which in evaluation is a leaky ReLU; vmap knows that one only."""
    return F.rrelu(input, lower, upper, True) if training else F.leaky_relu(input, (lower + upper) / 2)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.hardsigmoid`, whose derivative torch cannot differentiate."""
    return F.relu6(input + 3) / 6


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.bilinear` as batched products: y_o = x1ᵀ W_o x2 + b_o."""
    y = (torch.matmul(input1.unsqueeze(-2).unsqueeze(-2), weight).squeeze(-2) * input2.unsqueeze(-2)).sum(-1)
    return y if bias is None else y + bias


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """The weight of both kinds of `weight_norm`, g v / ‖v‖ with a norm per index of `dim`, or one of all at −1.

    torch's own has no batching rule, and a second derivative in v that finite differences contradict (torch 2.14).
    """
    others = None if dim == -1 else [axis for axis in range(v.dim()) if axis != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=others is not None))


SEMANTIC: dict[Callable[..., Any], Callable[..., Any]] = {
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    F.bilinear: bilinear,
    F.hardsigmoid: hardsigmoid,
    F.rrelu: rrelu,
    torch._weight_norm: weight_norm,
    **RECURRENT,
}
HANDLERS = {**SEMANTIC, **FAST}  # by function of torch, with the same arguments


class TaskFunctions(TorchFunctionMode):
    """Has `HANDLERS` compute the functions that they are for.

    That a mode is active also keeps the layers of attention from their fused forms, which have no second derivative.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return HANDLERS.get(func, func)(*args, **(kwargs or {}))
