"""What algorithms make of modules with several inputs, structured outputs and shared parameters."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from imaml_ext import CG, FOMAML, IMAML, MAML, GradientDescent, TaskLoss, from_module
from imaml_ext.batch import EpisodeBatch, TaskData

F64 = torch.float64
B, S = 3, 4


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


# ---- what modules take and return ------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    """Tokens and numbers in; a structure out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head, self.scale = nn.Embedding(11, 3), nn.Linear(5, 2), nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor, numbers: Tensor, mask: Tensor | None = None) -> OrderedDict[str, Any]:
        z = self.words(tokens)
        z = z.mean(1) if mask is None else (z * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        logits = self.head(torch.cat([z, numbers], 1)) * self.scale
        return OrderedDict(logits=logits, hidden=(z,))


class Named(NamedTuple):
    first: Tensor
    second: Tensor


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Named:
        y = self.l(x)
        return Named(y.tanh(), y.sum(-1))


def test_a_criterion_of_structured_outputs_trains() -> None:
    """IMAML on a tuple of outputs, equal to the loss that the module's output was picked for by a function."""
    x, y = randn(B, S, 2), randn(B, S, 3)
    episodes = EpisodeBatch(x, y, x + 1, y)
    both = TaskLoss(
        from_module(Pair().double()), lambda out, y: (out.first - y).square().mean((1, 2)) + out[1].square().mean(1)
    )
    theta = both.model.init(seed=0, dtype=F64)
    for name, output in ((0, 0), ("first", "first")):
        model = from_module(Pair().double(), output=output)
        torch.testing.assert_close(model(theta.expand(B, -1), x), both.model(theta.expand(B, -1), x)[0], msg=str(name))
    one = TaskLoss(
        from_module(Pair().double(), output=lambda out: torch.cat([out.first, out.second.unsqueeze(-1)], -1)),
        lambda out, y: (out[..., :3] - y).square().mean((1, 2)) + out[..., 3].square().mean(1),
    )
    options = {"lam": 1.0, "inner": GradientDescent(steps=5), "linear_solver": CG(30, rtol=1e-12)}
    found, expected = (IMAML(loss, **options).meta_gradient(theta, episodes).gradient for loss in (both, one))
    torch.testing.assert_close(found, expected)


# ---- parameters that tasks share -------------------------------------------------------------------------------------


def body_and_head() -> nn.Sequential:
    module = nn.Sequential(OrderedDict(body=nn.Linear(3, 4), act=nn.Tanh(), head=nn.Linear(4, 2)))
    module.body.bias.requires_grad_(False)
    return module.double()


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
@pytest.mark.parametrize("kind", [IMAML, MAML, FOMAML])
def test_meta_gradients_of_shared_parameters(kind: Any, tasks: str) -> None:
    """Of the body under an adapted head: along a direction, against finite differences of the outer objective."""
    loss = TaskLoss(from_module(body_and_head(), adapt=["head.*"], tasks=tasks), "mse")
    x, y = randn(B, 6, 3), randn(B, 6, 2)
    episodes = EpisodeBatch(x[:, :3], y[:, :3], x[:, 3:], y[:, 3:])
    steps = 60 if kind is IMAML else 3
    options = {"linear_solver": CG(60, rtol=1e-13)} if kind is IMAML else {}
    algorithm = kind(loss, lam=2.0, inner=GradientDescent(steps=steps, lr=0.2), **options)
    params = algorithm.initial(loss.model.init(seed=0, dtype=F64))
    assert set(params) == {"theta", "shared"}
    gradients = algorithm.meta_gradient(params, episodes).gradients
    moved, direction = (
        ("theta", "shared") if kind is not FOMAML else (),
        {n: torch.randn_like(v) for n, v in params.items()},
    )

    def outer(step: float) -> float:
        at = {n: v + step * direction[n] if n in moved else v for n, v in params.items()}
        return float(loss.sharing(at["shared"])(algorithm.adapt(at, episodes.support), episodes.query).mean())

    if kind is FOMAML:  # which takes φ for θ, and a partial derivative in what is shared
        phi = algorithm.adapt(params, episodes.support)
        shared = params["shared"].clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss.sharing(shared)(phi, episodes.query).mean(), shared)
        torch.testing.assert_close(gradients["shared"], expected)
        return
    found = sum(float((gradients[n] * direction[n]).sum()) for n in moved)
    assert found == pytest.approx((outer(1e-5) - outer(-1e-5)) / 2e-5, rel=1e-5, abs=1e-8)


def test_data_of_a_module_with_two_inputs_in_training() -> None:
    """MAML on tuples of inputs, in both ways of calling, with tokens that are integers."""
    tokens, numbers, y = torch.randint(11, (B, S, 6)), randn(B, S, 2), torch.randint(2, (B, S))
    data = TaskData((tokens, numbers), y)
    found = []
    for tasks in ("vmap", "loop"):
        loss = TaskLoss(from_module(TwoInputs().double(), output="logits", tasks=tasks), "cross_entropy")
        theta = torch.linspace(-1, 1, loss.model.num_parameters, dtype=F64)
        operator = loss.linearize(theta.expand(B, -1).contiguous(), data, "gauss_newton")
        p = torch.linspace(0, 1, B * len(theta), dtype=F64).view(B, -1)
        found.append((loss.gradient(theta.expand(B, -1), data).gradient, operator(p)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_large_modules_go_through_their_tasks_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the memory of one task's graph says, with the same gradient; all of them where they are small."""
    module = nn.Sequential(nn.Linear(3, 7), nn.GELU(), nn.Linear(7, 2)).double()
    x, y = randn(5, 6, 3), randn(5, 6, 2)
    episodes = EpisodeBatch(x[:, :3], y[:, :3], x[:, 3:], y[:, 3:])
    found, sizes = [], []
    plain = from_module(module)
    bytes_of_a_task = plain._saved(plain.init(seed=0, dtype=F64).unsqueeze(0), x[:1, :3])  # type: ignore[attr-defined]
    assert bytes_of_a_task >= 8 * 3 * 7  # GELU's inputs at least
    for limit in (2**29, 2 * bytes_of_a_task, 1):
        monkeypatch.setattr("imaml_ext.models.module._BYTES_AT_ONCE", limit)
        model = from_module(module)
        rows: list[int] = []
        monkeypatch.setattr(
            model, "_outputs", lambda p, x, m=model, r=rows: (r.append(len(p)), type(m)._outputs(m, p, x))[1]
        )
        theta = model.init(seed=0, dtype=F64)
        found.append(
            IMAML(TaskLoss(model, "mse"), inner=GradientDescent(steps=2)).meta_gradient(theta, episodes).gradient
        )
        sizes.append(max(rows))
    assert sizes[0] == 5
    assert sizes[2] == 1
    assert sizes[0] > sizes[1] > sizes[2]
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    assert from_module(module, tasks="vmap").tasks_at_once(theta.expand(5, -1), x) is None
