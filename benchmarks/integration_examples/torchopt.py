"""TorchOpt: examples/iMAML/imaml_omniglot.py of its repository (Apache-2.0), its InnerNet and its meta-gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaml_ext.data import load_dataset
from imaml_ext.integrations.torchopt import solve_symmetric
from integration_examples import Meter, Run

PACKAGES = ("torchopt",)
EXAMPLE = (
    "iMAML on few-shot characters, examples/iMAML/imaml_omniglot.py: one meta-gradient of 5-way 5-shot tasks. Reduced "
    "to 2 tasks, 8 filters and built-in drawings, in float64. The solve, of 5 iterations in the example, runs until "
    "the relative residual is 1e-8. 20 inner steps of 0.02 and a regularisation of 20 stand for 5 steps of 0.1 and 2, "
    "so that tens of iterations reach it."
)
CHANGE = (
    "linear_solve=torchopt.linear_solve.solve_normal_cg(maxiter=200, rtol=1e-8, atol=0)",
    "linear_solve=imaml_ext.integrations.torchopt.solve_symmetric(maxiter=60, rtol=1e-8)",
)
REASON = (
    "The example solves the normal equations AᵀA x = Aᵀb: an iteration multiplies twice, records the first product to "
    "transpose it, and there are more iterations, as the condition number is squared. A is symmetric: CG works on A "
    "itself, and MINRES where CG meets negative curvature."
)


def network(filters: int, ways: int) -> nn.Module:
    def layer(channels: int) -> list[nn.Module]:
        return [
            nn.Conv2d(channels, filters, 3),
            nn.BatchNorm2d(filters, momentum=1.0, affine=True, track_running_stats=False),
            nn.ReLU(inplace=False),
            nn.MaxPool2d(2, 2),
        ]

    layers = [*layer(1), *layer(filters), *layer(filters), nn.Flatten(), nn.Linear(filters, ways)]
    return nn.Sequential(*layers).double()


def inner_net(linear_solve: Any) -> type:
    import torchopt
    from torchopt.diff.implicit import ImplicitMetaGradientModule

    class InnerNet(ImplicitMetaGradientModule, linear_solve=linear_solve):
        def __init__(self, meta_net: nn.Module, n_inner_iter: int, reg_param: float) -> None:
            super().__init__()
            self.meta_net = meta_net
            self.net = torchopt.module_clone(meta_net, by="deepcopy", detach_buffers=True)
            self.n_inner_iter = n_inner_iter
            self.reg_param = reg_param
            self.reset_parameters()

        def reset_parameters(self) -> None:
            with torch.no_grad():
                for p1, p2 in zip(self.parameters(), self.meta_parameters(), strict=True):
                    p1.data.copy_(p2.data)
                    p1.detach_().requires_grad_()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def objective(self, x: Tensor, y: Tensor) -> Tensor:
            loss = F.cross_entropy(self(x), y)
            for p1, p2 in zip(self.parameters(), self.meta_parameters(), strict=True):
                loss = loss + 0.5 * self.reg_param * torch.sum(torch.square(p1 - p2))
            return loss

        def solve(self, x: Tensor, y: Tensor) -> Any:
            params = tuple(self.parameters())
            inner_optim = torchopt.SGD(params, lr=2e-2)
            with torch.enable_grad():
                for _ in range(self.n_inner_iter):
                    loss = self.objective(x, y)
                    inner_optim.zero_grad()
                    loss.backward(inputs=params)
                    inner_optim.step()
            return self

    return InnerNet


def example(ours: bool, *, filters: int = 8, tasks: int = 2, ways: int = 5, shots: int = 5) -> Run:
    from torchopt.linear_solve import solve_normal_cg

    if ours:
        linear_solve, products = solve_symmetric(maxiter=60, rtol=1e-8), 1
    else:
        linear_solve, products = solve_normal_cg(maxiter=200, rtol=1e-8, atol=0), 2  # it transposes each of its calls
    meter = Meter()
    solve = meter.timed(lambda matvec, b: linear_solve(meter.counted(matvec, lambda p: products), b))

    torch.manual_seed(1)
    net = network(filters, ways)
    batch = (
        load_dataset("glyphs")
        .sampler("train", ways=ways, shots=shots, queries=shots, meta_batch=tasks, seed=1)
        .sample(0)
    )
    InnerNet = inner_net(solve)
    losses = []
    for i in range(tasks):
        inner = InnerNet(net, n_inner_iter=20, reg_param=20.0)
        adapted = inner.solve(batch.support_x[i].double(), batch.support_y[i])
        losses.append(F.cross_entropy(adapted(batch.query_x[i].double()), batch.query_y[i]))
    torch.stack(losses).mean().backward()
    return meter.run(torch.cat([p.grad.flatten() for p in net.parameters()]))
