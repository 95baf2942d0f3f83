"""Betty: examples/learning_to_reweight/main.py of its repository (Apache-2.0), data cleaning by a meta-weight net."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaml_ext.data import load_dataset
from imaml_ext.integrations import betty as ours_for_betty
from imaml_ext.solvers import CG
from integration_examples import Meter, Run

PACKAGES = ("betty-ml",)
EXAMPLE = (
    "Data cleaning by a meta-weight net, examples/learning_to_reweight/main.py: the hypergradients of 2 meta-steps. "
    "Reduced to a linear classifier of 100 built-in drawings of 10 classes, 40 of them with a wrong label, in float64. "
    "The weight decay is part of the inner loss, 0.05, so that the inner problem has one minimiser."
)
CHANGE = (
    'Config(type="neumann", neumann_iterations=2500, neumann_alpha=0.1)',
    "Config(type=imaml_ext.integrations.betty.install(solver=CG(max_iterations=300, rtol=1e-8, check_every=1)))",
)
REASON = (
    "Betty's Neumann series needs products in proportion to the condition number, CG in proportion to its root, and CG "
    "ends at its tolerance. Betty's own CG is not compared: in the releases up to 0.2.1 each direction is made of the "
    "residual before the step, so that the iteration does not converge."
)
WEIGHT_DECAY = 0.05


class WeightNet(nn.Module):
    """The example's MLP: the weight of a training image from its loss."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.first_hidden_layer = nn.Linear(1, hidden_size)
        self.output_layer = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.output_layer(F.relu(self.first_hidden_layer(x))))


def problems(config: Any, ways: int, shots: int, hidden: int) -> tuple[Any, Any]:
    """The outer and the inner problem of the example."""
    from betty.configs import Config
    from betty.problems import ImplicitProblem

    sampler = load_dataset("glyphs").sampler("train", ways=ways, shots=shots, queries=shots, meta_batch=1, seed=1)
    batch = sampler.sample(0)
    x, meta_x = (images[0].double().flatten(1) for images in (batch.support_x, batch.query_x))
    y, meta_y = batch.support_y[0].clone(), batch.query_y[0]
    y[::5], y[2::5] = (y[::5] + 1) % ways, (y[2::5] + 2) % ways

    class Outer(ImplicitProblem):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
            inputs, labels = batch
            return {"loss": F.cross_entropy(self.inner(inputs), labels)}

        def configure_train_data_loader(self) -> list[tuple[Tensor, Tensor]]:
            return [(meta_x, meta_y)]

        def configure_module(self) -> nn.Module:
            torch.manual_seed(1)
            return WeightNet(hidden).double()

        def configure_optimizer(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.module.parameters(), lr=1e-2)

    class Inner(ImplicitProblem):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            inputs, labels = batch
            losses = F.cross_entropy(self.forward(inputs), labels, reduction="none").reshape(-1, 1)
            weight = self.outer(losses.detach())
            decay = sum(p.square().sum() for p in self.module.parameters())
            return torch.mean(weight * losses) + 0.5 * WEIGHT_DECAY * decay

        def configure_train_data_loader(self) -> list[tuple[Tensor, Tensor]]:
            return [(x, y)]

        def configure_module(self) -> nn.Module:
            torch.manual_seed(2)
            return nn.Linear(x.shape[1], ways).double()

        def configure_optimizer(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.module.parameters(), lr=0.1, momentum=0.9)

    outer = Outer(name="outer", config=Config(retain_graph=True), device="cpu")
    return outer, Inner(name="inner", config=config, device="cpu")


def example(ours: bool, *, ways: int = 10, shots: int = 10, hidden: int = 100, meta_steps: int = 2) -> Run:
    from betty import hypergradient
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine

    if ours:
        name = ours_for_betty.install(solver=CG(max_iterations=300, rtol=1e-8, check_every=1))
        config = Config(type=name, unroll_steps=20)
    else:
        config = Config(type="neumann", neumann_iterations=2500, neumann_alpha=0.1, unroll_steps=20)
    outer, inner = problems(config, ways, shots, hidden)
    meter, found = Meter(), []
    method = meter.timed(hypergradient.jvp_fn_mapping[config.type])

    def observed(vector: Any, curr: Any, prev: Any) -> Any:
        """The hypergradient, each of whose calls of autograd but two is a product: the gradient, and the last."""
        with mock.patch("torch.autograd.grad", meter.counted(torch.autograd.grad)):
            result = method(vector, curr, prev)
        meter.products -= 2
        found.append(torch.cat([part.flatten() for part in result]))
        return result

    with mock.patch.dict(hypergradient.jvp_fn_mapping, {config.type: observed}):
        Engine(
            config=EngineConfig(train_iters=20 * meta_steps, valid_step=10**9),
            problems=[outer, inner],
            dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
        ).run()
    return meter.run(torch.stack(found))
