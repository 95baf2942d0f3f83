"""GPyTorch: "Batch GP Regression" of its documentation (MIT), trained and asked for predictions."""

from __future__ import annotations

import contextlib
import math
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from imaml_ext.integrations.linear_operator import installed
from integration_examples import Meter, Run

PACKAGES = ("gpytorch", "linear_operator")
EXAMPLE = (
    "Batch GP Regression, examples/08_Advanced_Usage/Simple_Batch_Mode_GP_Regression.ipynb: four functions of 100 "
    "noisy points, Matérn kernels, 50 steps of Adam, 51 predictions for each. In float64, by conjugate gradients "
    "(max_cholesky_size(0)) in at most 100 steps to a relative residual of 1e-5, about the least that "
    "linear_operator's own solver can reach."
)
CHANGE = ("with contextlib.nullcontext():", "with imaml_ext.integrations.linear_operator.installed():")
REASON = (
    "linear_operator multiplies the zero vector first, and takes at least 20 steps where it estimates a "
    "log-determinant too; ours takes those that the residuals need, and one product that measures them. Between two "
    "products there is one fused operation in place of about twenty of torch, which cost as much as a product of this "
    "size."
)


def model_of(x: Tensor, y: Tensor, likelihood: Any, batch: torch.Size) -> Any:
    import gpytorch

    class ExactGPModel(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ConstantMean(batch_shape=batch)
            self.covar_module = gpytorch.kernels.ScaleKernel(
                gpytorch.kernels.MaternKernel(batch_shape=batch), batch_shape=batch
            )

        def forward(self, x: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    return ExactGPModel().double()


def train(points: int, steps: int) -> Tensor:
    """The example: losses, hyperparameters, means and variances, in one vector."""
    import gpytorch

    torch.manual_seed(0)
    x = torch.linspace(0, 1, points, dtype=torch.float64).view(1, -1, 1).repeat(4, 1, 1)
    t, noise = x[0, :, 0], 0.5 * torch.rand(4, points, dtype=torch.float64)
    y = noise + torch.stack([f(w * math.pi * t) for f in (torch.sin, torch.cos) for w in (2, 1)])
    batch = torch.Size([4])
    likelihood = gpytorch.likelihoods.GaussianLikelihood(batch_shape=batch).double()
    model = model_of(x, y, likelihood, batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -mll(model(x), y).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    model.eval()
    likelihood.eval()
    with torch.no_grad():
        test_x = torch.linspace(0, 1, 51, dtype=torch.float64).view(1, -1, 1).repeat(4, 1, 1)
        predicted = likelihood(model(test_x))
    parts = [torch.stack(losses), *model.parameters(), predicted.mean, predicted.variance]
    return torch.cat([part.detach().flatten() for part in parts])


def example(ours: bool, *, points: int = 100, steps: int = 50, tolerance: float = 1e-5) -> Run:
    from gpytorch import settings
    from linear_operator import utils

    meter = Meter()
    with contextlib.ExitStack() as stack:
        for setting in (settings.cg_tolerance, settings.eval_cg_tolerance):
            stack.enter_context(setting(tolerance))
        for setting, size in ((settings.max_cholesky_size, 0), (settings.max_cg_iterations, points)):
            stack.enter_context(setting(size))
        stack.enter_context(installed() if ours else contextlib.nullcontext())
        solver = utils.linear_cg

        def solve(matmul: Any, rhs: Tensor, **options: Any) -> Any:
            return solver(meter.counted(matmul, lambda v: v.shape[-1]), rhs, **options)

        stack.enter_context(patch.object(utils, "linear_cg", meter.timed(solve)))
        return meter.run(train(points, steps))
