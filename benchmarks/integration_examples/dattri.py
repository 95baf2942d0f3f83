"""dattri: the example of its README (MIT), logistic regression attributed by `IFAttributorCG`."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from imaml_ext.integrations.dattri import installed
from integration_examples import Meter, Run

PACKAGES = ("dattri",)
EXAMPLE = (
    "README.md, Apply data attribution methods on PyTorch models: IFAttributorCG(regularization=1e-2) on a logistic "
    "regression, with 1,000 training and 100 test points. Drawn points of 64 features in place of MNIST; "
    "max_iter=40 and tol=1e-4 in place of max_iter=10 and the default tol."
)
CHANGE = (
    "with torch.no_grad():",
    "with torch.no_grad(), imaml_ext.integrations.dattri.installed():",
)
REASON = (
    "dattri takes a tol and ignores it: it makes all of max_iter steps, and many more than the 40 here give NaN. Ours "
    "ends at tol. With the max_iter=10 of the README both make the same steps and the same products of all test points "
    "at once, and take the same time."
)


def example(ours: bool, *, train: int = 1000, test: int = 100, features: int = 64, **options: Any) -> Run:
    from dattri.algorithm import IFAttributorCG
    from dattri.func import hessian
    from dattri.task import AttributionTask

    meter = Meter()
    torch.manual_seed(0)
    x, model = torch.randn(train + test, features), nn.Linear(features, 10)
    y = (x @ torch.randn(features, 10)).argmax(1)

    def loss(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, params, data[0]), data[1])

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        loss(dict(model.named_parameters()), (x[:train], y[:train])).backward()
        optimizer.step()
    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = IFAttributorCG(task=task, **({"max_iter": 40, "tol": 1e-4, "regularization": 1e-2} | options))
    loaders = [
        DataLoader(TensorDataset(x[rows], y[rows]), batch_size=train) for rows in (slice(train), slice(train, None))
    ]
    attributor.cache(loaders[0])
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if ours:
            stack.enter_context(installed())
        solver, product = hessian.ihvp_cg, hessian.hvp_at_x

        def ihvp_cg(*arguments: Any, **options: Any) -> Any:
            return meter.timed(solver(*arguments, **options))

        def hvp_at_x(*arguments: Any, **options: Any) -> Any:
            return meter.counted(product(*arguments, **options), lambda v: test)

        stack.enter_context(patch.multiple(hessian, ihvp_cg=ihvp_cg, hvp_at_x=hvp_at_x))
        return meter.run(attributor.attribute(*loaders))
