"""A penalty per parameter for ridge and logistic regression, learnt by implicit gradients from cross-validation.

A data set is fitted once without each of its folds, with one λ_j per coefficient:

    φ_k(λ) = argmin_φ  mean over the rest of ℓ(x_i·φ, y_i) + ½ Σ_j λ_j φ_j²,      min over λ: mean_k ℓ on fold k

All folds of all data sets are one batch, and the folds of a data set share its λ. A quarter of the features matter. The
reference is the best of 31 penalties that all coefficients share, by the same cross-validation. `fits` counts those of
one data set until its λ is known. With that λ the data set is fitted as a whole, and tested on 1,000 new examples.

Source: Bengio, Gradient-based optimization of hyperparameters (2000).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from common import Rows, show
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

import imaml_ext

Pointwise = Callable[..., Tensor]  # outputs and targets [B, n] -> losses [B, n]
Data = Sequence[Tensor]  # x [B, n, D], y [B, n]


def draw(pointwise: Pointwise, sets: int, n: int, features: int, seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    truth, x = (torch.randn(sets, size, features, generator=generator) for size in (1, n))
    truth[:, :, features // 4 :] = 0
    outputs, noise = (x * truth).sum(2), torch.randn(sets, n, generator=generator)
    return x, outputs + 2 * noise if pointwise is mse_loss else (outputs + noise > 0).float()


class CrossValidation:
    """The folds [F P, …] of P data sets: what each leaves to train on, and what it leaves out."""

    def __init__(self, pointwise: Pointwise, data: Data, folds: int) -> None:
        self.pointwise, self.folds = pointwise, folds
        steps = 2 if pointwise is mse_loss else 6  # of Newton's method, which needs one for a quadratic
        self.inner = imaml_ext.NewtonCG(steps, linear_solver=imaml_ext.CG(60, rtol=1e-4, check_every=5))
        out = torch.arange(data[0].shape[1]) % folds == torch.arange(folds).unsqueeze(1)  # [F, n]
        self.train, self.left_out = ([torch.cat([t[:, rows] for rows in m]) for t in data] for m in (~out, out))

    def losses(self, phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """[B], of coefficients [B, D]."""
        return self.pointwise(torch.einsum("bnd,bd->bn", x, phi), y, reduction="none").mean(1)

    def fit(self, data: Data, lam: Tensor, start: Tensor) -> Tensor:
        return imaml_ext.argmin(
            self.losses, start, tuple(data), center=torch.zeros_like(start), lam=lam, inner=self.inner
        )

    def score(self, lam: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of what was left out [P] for λ [P, D], and the fits [F P, D]."""
        phi = self.fit(self.train, lam.repeat(self.folds, 1), start)
        return self.losses(phi, *self.left_out).unflatten(0, (self.folds, -1)).mean(0), phi.detach()


def compare(pointwise: Pointwise, sets: int, examples: int, features: int, steps: int, seed: int) -> Rows:
    x, y = draw(pointwise, sets, examples + 1000, features, seed)
    data, test = (x[:, :examples], y[:, :examples]), (x[:, examples:], y[:, examples:])
    cv = CrossValidation(pointwise, data, folds=5)
    start = torch.zeros(cv.folds * sets, features)

    grid = torch.logspace(-4, 2, 31)
    scores = torch.stack([cv.score(lam.expand(sets, features), start)[0] for lam in grid])  # [31, P]
    shared = grid[scores.argmin(0)].unsqueeze(1).expand(sets, features)

    log_lam, phi = torch.full((sets, features), -2.0, requires_grad=True), start
    optimizer = torch.optim.Adam([log_lam], lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        score, phi = cv.score(log_lam.exp(), phi)
        score.sum().backward()
        optimizer.step()

    def row(lam: Tensor, tried: int) -> dict[str, float]:
        validation, tested = cv.score(lam, start)[0].mean(), cv.losses(cv.fit(data, lam, start[:sets]), *test).mean()
        return {"validation loss": float(validation), "test loss": float(tested), "fits": tried * cv.folds}

    return {"λ per parameter": row(log_lam.detach().exp(), steps), "one λ by grid search": row(shared, len(grid))}


def main(sets: int = 10, examples: int = 200, features: int = 40, steps: int = 20, seed: int = 0) -> Rows:
    kinds: dict[str, Pointwise] = {"ridge": mse_loss, "logistic": binary_cross_entropy_with_logits}
    found = {kind: compare(each, sets, examples, features, steps, seed) for kind, each in kinds.items()}
    return {f"{kind}, {how}": row for kind, rows in found.items() for how, row in rows.items()}


if __name__ == "__main__":
    show(main())
