"""Influence: how the loss of a test image changes as a training image gets more weight, for all of them at once.

A small CNN φ is trained on weighted images to a minimum of L(φ, w) = mean_i w_i CE_i(φ) + ½ r ‖φ‖². The influence of
image i on a test loss Q is the derivative of Q(φ*(w)) in its weight, at w = 1:

    I_i = −∇Qᵀ H⁻¹ ∇CE_i / n,        H = ∇²_φ L.

`argmin` finds them for all i by one linear solve in float32 per test image, and never forms H. The reference forms H in
float64, and solves by its factors. The last row has I in the place of H⁻¹, which takes no solve.
Source: Koh and Liang, Understanding black-box predictions via influence functions (2017).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Rows, show
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn.functional import avg_pool2d, cross_entropy

import imaml_ext
from imaml_ext.data import load_glyphs

R = 1e-3
Params = dict[str, Tensor]


def network(classes: int, filters: int) -> nn.Module:
    """For images [S, 1, 14, 14]; of smooth functions, so that it has a Hessian."""
    first = [nn.Conv2d(1, filters, 3, stride=2), nn.Tanh()]  # [S, filters, 6, 6]
    second = [nn.Conv2d(filters, filters, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]  # [S, 4 filters]
    return nn.Sequential(*first, *second, nn.Linear(4 * filters, classes))


def lbfgs(objective: Callable[[Params], Tensor], start: Params) -> Params:
    """The inner solver: L-BFGS of torch."""
    phi = {name: part.clone().requires_grad_() for name, part in start.items()}
    optimizer = torch.optim.LBFGS(phi.values(), max_iter=2000, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(phi)
        value.backward()
        return value

    optimizer.step(closure)
    return phi


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's, of each row of [K, n]."""
    ranks = torch.stack([a, b]).argsort(2).argsort(2).double()
    a, b = ranks - ranks.mean(2, keepdim=True)
    return torch.cosine_similarity(a, b, dim=1)


def main(classes: int = 10, filters: int = 12, test_images: int = 20, seed: int = 0) -> Rows:
    torch.manual_seed(seed)
    drawings = torch.from_numpy(load_glyphs()[:classes]).transpose(0, 1)[torch.randperm(20)]  # [20, C, 28, 28]
    images = avg_pool2d(drawings.float() / 255, 2).flatten(0, 1).unsqueeze(1)  # [20 C, 1, 14, 14]
    split = [len(images) - test_images, test_images]
    (x, test_x), (y, test_y) = images.split(split), torch.arange(classes).repeat(20).split(split)
    module = network(classes, filters)

    def losses(phi: Params, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(module, phi, (x,)), y, reduction="none")  # [S]

    def train_loss(phi: Params, w: Tensor, x: Tensor) -> Tensor:
        return (w * losses(phi, x, y)).mean() + 0.5 * R * sum(part.square().sum() for part in phi.values())

    w = torch.ones(len(x), requires_grad=True)
    phi = imaml_ext.argmin(train_loss, dict(module.named_parameters()), (w, x), inner=lbfgs)
    ours = torch.stack([torch.autograd.grad(q, w, retain_graph=True)[0] for q in losses(phi, test_x, test_y)])  # [K, n]

    shapes = {name: part.shape for name, part in phi.items()}
    flat = torch.cat([part.detach().flatten() for part in phi.values()]).double()
    module, w, x, test_x = module.double(), w.detach().double(), x.double(), test_x.double()  # the reference

    def named(flat: Tensor) -> Params:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def objective(flat: Tensor) -> Tensor:
        return train_loss(named(flat), w, x)

    H = jacrev(grad(objective), chunk_size=64)(flat)  # [N, N]
    of_train = jacrev(lambda flat: losses(named(flat), x, y))(flat)
    of_test = jacrev(lambda flat: losses(named(flat), test_x, test_y))(flat)
    exact = -of_test @ torch.linalg.solve(H, of_train.T) / len(x)
    rows: Rows = {}
    for name, found in (("by argmin", ours.double()), ("without the inverse", -of_test @ of_train.T / len(x))):
        ranks, apart = rank_correlation(found, exact), (found - exact).norm() / exact.norm()
        rows[name] = {"mean correlation": float(ranks.mean()), "least": float(ranks.min()), "off by": float(apart)}
    return rows


if __name__ == "__main__":
    show(main())
