"""curvlinops: "Inverses (natural gradient)" of its documentation (MIT)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from integration_examples import Meter, Run

PACKAGES = ("curvlinops-for-pytorch", "linear_operator")
EXAMPLE = (
    "Inverses (natural gradient), docs/examples/basic_usage/example_inverses.py, with its data and settings: the "
    "damped Gauss-Newton matrix of a perceptron of 88 weights, whose inverse multiplies the gradient, once by 5 steps "
    "and once by 10."
)
CHANGE = (
    "from curvlinops import CGInverseLinearOperator",
    "CGInverseLinearOperator = functools.partial(imaml_ext.integrations.curvlinops.CGInverseLinearOperator, "
    "linearize=True)",
)
REASON = (
    "The network is linearised once for each product with the inverse: it is evaluated on all data, and the products "
    "of conjugate gradients differentiate the graphs that are kept. curvlinops evaluates the network twice in every "
    "product, under two transforms of torch.func, and multiplies the zero vector first. The steps are the same. "
    "Without linearize the ratio is that of the products, 15 of 17."
)
# Of the two inverses that the example makes.
SETTINGS = ({"max_iter": 5, "max_tridiag_iter": 5}, {"max_iter": 10, "max_tridiag_iter": 10})


def damped_ggn() -> tuple[Any, torch.Tensor]:
    """The operator and the gradient [N] of the example."""
    from curvlinops import GGNLinearOperator
    from curvlinops.examples import IdentityLinearOperator

    torch.manual_seed(0)
    data = [(torch.rand(64, 7).double(), torch.rand(64, 3).double()) for _ in range(2)]
    layers = nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 3)
    model = nn.Sequential(*layers).double()
    params = list(model.parameters())
    ggn = GGNLinearOperator(model, nn.MSELoss(), params, data)
    gradient, _ = ggn.gradient_and_loss()
    damping = 1e-2 * IdentityLinearOperator([p.shape for p in params], ggn.device, torch.float64)
    return ggn + damping, nn.utils.parameters_to_vector(gradient).detach()


def example(ours: bool, *, settings: Sequence[dict[str, Any]] = SETTINGS) -> Run:
    import curvlinops

    from imaml_ext.integrations.curvlinops import CGInverseLinearOperator

    meter = Meter()
    A, gradient = damped_ggn()
    identity = A._B._A  # of the damping, whose products are never linearised: one in each product of A
    identity._matmat = meter.counted(identity._matmat, lambda X: X[0].shape[-1])
    kind = partial(CGInverseLinearOperator, linearize=True) if ours else curvlinops.CGInverseLinearOperator
    solve = meter.timed(lambda options: kind(A, eps=0, **options) @ gradient)
    return meter.run(torch.stack([solve(options) for options in settings]))
