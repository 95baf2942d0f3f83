"""Hyper-cleaning: wrong labels are found by a weight per training example, learnt on a few clean ones.

Half of the training labels are drawn at random. The inner problem is a linear classifier on the weighted examples,

    φ*(w) = argmin_φ  mean_i σ(w_i) CE(x_i, y_i; φ) + ½ r ‖φ‖²

and the outer problem is the w that give the clean images the least loss. A small weight calls a label wrong, and the
area under the ROC curve (AUC) says how well. All draws of the noise are one batch. The reference is `CG` of hypertorch
(github.com/prolearner/hypertorch), where it is installed. The other rows have no outer problem.
Source: Franceschi, Donini, Frasconi and Pontil, Forward and reverse gradient-based hyperparameter optimization (2017).
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from common import Rows, linear, show
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy

import imaml_ext
from imaml_ext.data import load_glyphs

R = 1e-2
Split = tuple[Tensor, Tensor]  # images [n, D], labels [n]


def load(classes: int, generator: torch.Generator) -> list[Split]:
    """Training, clean and test images, 12, 4 and 4 of each class of built-in glyphs."""
    drawings = torch.from_numpy(load_glyphs()[:classes])[:, torch.randperm(20, generator=generator)]
    x = avg_pool2d(drawings.float() / 255, 4).flatten(2)  # [C, 20, 49]
    x = x - x.flatten(0, 1).mean(0)
    x = 4 * x / x.norm(dim=2).mean()
    y = torch.arange(classes).unsqueeze(1).expand(classes, 20)
    return [(x[:, part].flatten(0, 1), y[:, part].flatten()) for part in (slice(12), slice(12, 16), slice(16, 20))]


def losses(phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """[B, n], of labels [n] or [B, n]."""
    return cross_entropy(linear(phi, x).mT, y.expand(len(phi), -1), reduction="none")


def train_loss(phi: Tensor, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (w.sigmoid() * losses(phi, x, y)).mean(1) + 0.5 * R * phi.square().sum(1)


def by_argmin(phi: Tensor, w: Tensor, x: Tensor, y: Tensor, validation: Split) -> tuple[Tensor, Tensor]:
    """φ* of all draws [B, N], and the gradient of their validation losses in w [B, n]."""
    phi = imaml_ext.argmin(train_loss, phi, (w, x, y))
    return phi.detach(), torch.autograd.grad(losses(phi, *validation).mean(1).sum(), w)[0]


def by_hypertorch(phi: Tensor, w: Tensor, x: Tensor, y: Tensor, validation: Split) -> tuple[Tensor, Tensor]:
    """The same, one draw after the other, by 300 gradient steps and CG on the fixed-point map of such a step."""
    import hypergrad

    def of_one(phi: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        step = hypergrad.GradientDescent(lambda params, hparams: train_loss(params[0], hparams[0], x, y).sum(), 1.0)
        for _ in range(300):
            (phi,) = step([phi.detach().requires_grad_()], [w], create_graph=False)
        (gradient,) = hypergrad.CG([phi], [w], 100, step, lambda p, h: losses(p[0], *validation).mean(), set_grad=False)
        return phi.detach(), gradient

    found = [of_one(phi[b : b + 1], w[b : b + 1], y[b : b + 1]) for b in range(len(w))]
    return torch.cat([phi for phi, _ in found]), torch.cat([gradient for _, gradient in found])


def main(classes: int = 60, draws: int = 8, outer_steps: int = 20, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    (x, truth), validation, test = load(classes, generator)
    drawn = torch.randint(classes, (draws, len(truth)), generator=generator)
    y = torch.where(torch.rand(drawn.shape, generator=generator) < 0.5, drawn, truth)  # [B, n]
    start, even = torch.zeros(draws, classes * (x.shape[1] + 1)), torch.zeros(y.shape)

    def row(score: Tensor, phi: Tensor) -> dict[str, float]:
        aucs = [(s[r].unsqueeze(1) > s[~r]).float().mean() for s, r in zip(score, y == truth, strict=True)]
        accuracy = (linear(phi, test[0]).argmax(2) == test[1]).float().mean()
        return {"AUC": float(torch.stack(aucs).mean()), "test accuracy": float(accuracy)}

    rows: Rows = {}
    theirs = {"weights by hypertorch's CG": by_hypertorch} if find_spec("hypergrad") else {}
    for name, method in ({"weights by argmin": by_argmin} | theirs).items():
        w, phi = even.clone().requires_grad_(), start
        optimizer = torch.optim.SGD([w], lr=100.0, momentum=0.9)
        for _ in range(outer_steps):
            phi, w.grad = method(phi, w, x, y, validation)
            optimizer.step()
        rows[name] = row(w.detach(), imaml_ext.argmin(train_loss, phi, (w.detach(), x, y)))
    phi = imaml_ext.argmin(train_loss, start, (even, x, y))
    rows["no weights, by the loss"] = row(-losses(phi, x, y), phi)
    phi = imaml_ext.argmin(train_loss, start, (torch.zeros(draws, len(validation[1])), *validation))
    rows["clean images alone, by the loss"] = row(-losses(phi, x, y), phi)
    return rows


if __name__ == "__main__":
    show(main())
