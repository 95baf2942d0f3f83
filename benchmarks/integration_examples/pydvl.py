"""pyDVL: its notebook "Influence functions for data mislabeling" (LGPL), with the part on conjugate gradients."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from integration_examples import Meter, Run

PACKAGES = ("pyDVL",)
EXAMPLE = (
    "Influence functions for data mislabeling, notebooks/influence_synthetic.ipynb: the influence of 100 training "
    "points of two Gaussian classes, ten of them with the wrong label, on test points, through a logistic regression. "
    "Of 20 features in place of 2, and with 20 test points in place of 2,000: where there are more points than "
    "parameters, pyDVL's solver gives zeros for the rest. Tolerances of 1e-7, as in pyDVL's documentation of CG, and a "
    "regularisation of 0.01."
)
CHANGE = (
    "from pydvl.influence.torch import CgInfluence",
    "from imaml_ext.integrations.pydvl import CgInfluence",
)
REASON = (
    "pyDVL solves for one test point after the other, where ours solves for all 20 together, and a product of all "
    "costs hardly more here than that of one. pyDVL also squares its tolerances, and so takes more steps than are "
    "asked for."
)


def example(ours: bool, *, points: int = 20, features: int = 20) -> Run:
    from pydvl.influence import torch as library

    from imaml_ext.integrations.pydvl import CgInfluence

    meter = Meter()
    torch.manual_seed(24)
    y = torch.randint(0, 2, (100 + points, 1)).double()
    x = y + 0.2 * torch.randn(100 + points, features, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(features, 1), nn.Sigmoid()).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.05)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy(model(x[:100]), y[:100]).backward()
        optimizer.step()
    train_x, train_y, test_x, test_y = x[:100], y[:100].clone(), x[100:], y[100:]
    train_y[:10] = 1 - train_y[:10]
    data = DataLoader(TensorDataset(train_x, train_y), batch_size=256)
    kind = CgInfluence if ours else library.CgInfluence
    influence_model = kind(model, nn.functional.binary_cross_entropy, regularization=0.01, rtol=1e-7, atol=1e-7)
    influence_model = influence_model.fit(data)
    (block,) = influence_model.block_mapper.composable_block_dict.values()
    A = block.op.operator
    A.apply = meter.counted(A.apply, lambda v: len(v) if v.ndim == 2 else 1)
    block.op.apply = meter.timed(block.op.apply)
    return meter.run(influence_model.influences(test_x, test_y, train_x, train_y))
