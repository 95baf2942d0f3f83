"""curvlinops: "Inverses (natural gradient)" of its documentation (MIT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from integration_examples import Meter, Run

PACKAGES = ("curvlinops-for-pytorch", "linear_operator")
EXAMPLE = (
    "Inverses (natural gradient), docs/examples/basic_usage/example_inverses.py: the damped Gauss-Newton matrix of a "
    "perceptron of 88 weights, whose inverse multiplies the gradient; five such products. The example chooses the "
    "number of steps by hand, 5 and 10; here both are asked for a relative residual of 1e-7."
)
CHANGE = (
    "from curvlinops import CGInverseLinearOperator",
    "from imaml_ext.integrations.curvlinops import CGInverseLinearOperator",
)
REASON = (
    "curvlinops multiplies the zero vector first, and takes at least 11 steps; ours takes those that the residual "
    "needs, and one product that measures it. A product takes far longer here than what lies between two, so that "
    "the time follows the number of products: with the 5 steps of the example it is 5 against 6."
)


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


def example(ours: bool, *, times: int = 5, **options: Any) -> Run:
    import curvlinops

    from imaml_ext.integrations.curvlinops import CGInverseLinearOperator

    meter = Meter()
    A, gradient = damped_ggn()
    kind = CGInverseLinearOperator if ours else curvlinops.CGInverseLinearOperator
    inverse = kind(A, **({"eps": 0, "tolerance": 1e-7} | options))
    A._matmat = meter.counted(A._matmat, lambda X: X[0].shape[-1])
    solve = meter.timed(inverse.__matmul__)
    return meter.run(torch.stack([solve(gradient) for _ in range(times)]))
