"""Kronecker factors of a network's Gauss-Newton matrix, from one linearisation of its outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from imaml_ext.batch import Data
from imaml_ext.models.task_model import TaskModel
from imaml_ext.ops.recording import recordable, recording
from imaml_ext.solvers.preconditioners.kfac import KroneckerBlock, KroneckerFactors

# Passes through the network's products, in sixths of a product with the Hessian.
_FORWARD, _BACKWARD, _PRODUCT = 1, 2, 6


def kronecker_factors(
    model: TaskModel,
    criterion: str,
    params: Tensor,
    data: Data,
    ways: int | None = None,
    *,
    samples: int,
    seed: int,
) -> KroneckerFactors:
    """Returns A ≈ E[a aᵀ] and G ≈ E[g gᵀ] of every layer and task at params [B, N], and the diagonal elsewhere.

    a are the rows that enter a layer and g the derivatives in what leaves it. The Gauss-Newton matrix is Σ_k v_k v_kᵀ,
    v_k = Jᵀ w_k, for the roots Σ_k w_k w_kᵀ = C of the criterion's Hessian in the outputs. A random sign for each
    example keeps examples apart that a batch norm joins, in expectation.

    Args:
        criterion: "cross_entropy" or "mse". ways: how many of the outputs it judges; None: all. samples: how many w to
            draw; 0 takes all of them, one per output.

    Source: Martens and Grosse (2015); for the positions of convolutions, Grosse and Martens (2016).
    """
    columns = {name: where.to(params.device) for name, where in model.weighted_layers().items()}
    with recording():
        leaf, x = recordable(params).detach().requires_grad_(), recordable(data.x)
        _, entered = model.tapped(leaf.detach(), x, {})
        added = {
            name: leaf.new_zeros(*a.shape[:2], columns[name].shape[1]).requires_grad_() for name, a in entered.items()
        }
        outputs = model.tapped(leaf, x, added)[0][..., :ways]
    roots = _roots(outputs.detach().reshape(*outputs.shape[:2], -1), criterion)  # [B, S, O, M]
    examples, count = roots.shape[1], samples or roots.shape[3]
    generator = torch.Generator().manual_seed(seed)
    size = (count, examples, roots.shape[3]) if samples else (count, examples)
    signs = torch.randint(0, 2, size, generator=generator).mul_(2).sub_(1).to(roots)

    gradients = {name: g.new_zeros(len(g), g.shape[2], g.shape[2]) for name, g in added.items()}  # Σ g gᵀ
    diagonal = torch.zeros_like(params)
    for k in range(count):
        if samples:
            w = (roots * signs[k].unsqueeze(1)).sum(3) / samples**0.5
        else:
            w = roots[..., k] * signs[k].unsqueeze(1)
        again = k + 1 < count
        v, *g = torch.autograd.grad(
            outputs, [leaf, *added.values()], w.view_as(outputs), again, allow_unused=True, materialize_grads=True
        )
        diagonal += v.square()
        for name, each in zip(added, g, strict=True):
            gradients[name] += each.mT @ each
    blocks = []
    for name, a in entered.items():
        if columns[name].shape[0] > a.shape[2]:
            a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2)
        positions = a.shape[1] / examples
        blocks.append(KroneckerBlock(columns[name], a.mT @ a / examples, gradients[name] / positions))
    products = -(-(2 * _FORWARD + count * _BACKWARD) // _PRODUCT)
    return KroneckerFactors(tuple(blocks), diagonal, products)


def _roots(outputs: Tensor, criterion: str) -> Tensor:
    """Columns w with Σ w wᵀ = the criterion's Hessian in each example's outputs: [B, S, O] -> [B, S, O, M]."""
    examples, width = outputs.shape[1:]
    identity = torch.eye(width, dtype=outputs.dtype, device=outputs.device)
    if criterion == "mse":  # 2 / (S O) in every output
        return identity.mul((2 / (examples * width)) ** 0.5).expand(*outputs.shape, width)
    p = outputs.softmax(-1)  # (diag(p) − p pᵀ) / S = Σ_k p_k (e_k − p)(e_k − p)ᵀ / S
    return (identity - p.unsqueeze(3)) * (p / examples).sqrt().unsqueeze(2)
