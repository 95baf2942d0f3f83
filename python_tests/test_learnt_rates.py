"""Inner learning rates that are learnt: against finite differences and a loop written by hand; rates per tensor."""

import math
from collections.abc import Callable

import pytest
import torch
from meta_tasks import F64, Data, Episodes, classification, regression, relative
from torch import Tensor

from imaml_ext import FOMAML, IMAML, MAML, MLP, GradientDescent, NewtonCG, Reptile, TaskLoss
from imaml_ext.inner import gradient_descent

RULES = {
    "sgd": GradientDescent(steps=4, lr=0.1),
    "momentum": GradientDescent(steps=4, lr=0.05, optimizer="momentum", momentum=0.7),
    "adam": GradientDescent(steps=4, lr=0.02, optimizer="adam", betas=(0.8, 0.9), eps=0.1),
    "after": GradientDescent(steps=4, lr=0.1, proximal="after"),
    "minibatches": GradientDescent(steps=4, lr=0.1, batch_size=2),
}


def spread(loss: TaskLoss, rate_of: Callable[[str], float]) -> Tensor:
    """The rate of every parameter, [N], from that of its tensor."""
    each = [
        torch.full((size,), rate_of(name), dtype=F64)
        for name, size in zip(loss.layout.names, loss.layout.sizes, strict=True)
    ]
    return torch.cat(each)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sharing", ["global", "tensor", "parameter"])
def test_mamls_gradient_equals_finite_differences(sharing: str, rule: str, checkpoint: bool) -> None:
    loss, theta, episodes = regression(3)
    algorithm = MAML(loss, inner=RULES[rule], lam=0.4, checkpoint=checkpoint, learn={"lr": sharing, "lam": "tensor"})
    params = algorithm.initial(theta)
    params["log_lr"] += 0.3 * torch.randn_like(params["log_lr"])
    meta = algorithm.meta_gradient(params, episodes)
    h = 1e-5
    for name, value in params.items():
        d = torch.randn_like(value)
        ahead, behind = (
            loss(algorithm.adapt(params | {name: value + s * h * d}, episodes.support), episodes.query).mean()
            for s in (1, -1)
        )
        difference = float((ahead - behind) / (2 * h))
        gradient = meta.gradients[name]
        assert gradient.shape == value.shape
        assert abs(float(gradient @ d) - difference) < 1e-5 * float(gradient.norm() * d.norm()) + 1e-10


def test_per_parameter_is_meta_sgd_written_by_hand() -> None:
    """θ and α of φ = θ − α ∘ ∇L(θ), one step, by autograd through a loop over the tasks."""
    loss, theta, episodes = regression(3)
    algorithm = MAML(loss, inner=GradientDescent(steps=1, lr=0.1), learn={"lr": "parameter"})
    params = algorithm.initial(theta)
    leaf, alpha = theta.clone().requires_grad_(), params["log_lr"].exp().requires_grad_()
    total = torch.zeros((), dtype=F64)
    for task in range(3):
        support, query = (Data(side.x[task : task + 1], side.y[task : task + 1]) for side in episodes)
        (gradient,) = torch.autograd.grad(loss(leaf.unsqueeze(0), support).sum(), leaf, create_graph=True)
        total = total + loss((leaf - alpha * gradient).unsqueeze(0), query)[0] / 3
    by_theta, by_alpha = torch.autograd.grad(total, (leaf, alpha))
    meta = algorithm.meta_gradient(params, episodes)
    assert relative(meta.gradients["theta"], by_theta) < 1e-10
    assert relative(meta.gradients["log_lr"], alpha.detach() * by_alpha) < 1e-10


@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_first_order_takes_the_gradients_of_the_steps_for_constants(rule: str) -> None:
    loss, theta, episodes = classification(3)
    algorithm = FOMAML(loss, inner=RULES[rule], learn={"lr": "tensor"})
    params = algorithm.initial(theta)
    phi = algorithm.adapt(params, episodes.support)
    v = loss.gradient(phi, episodes.query).gradient
    travelled = phi - theta  # Σ of −η times a direction that does not depend on η
    expected = torch.stack([part.sum() for part in (v * travelled).mean(0).split(loss.layout.sizes)])
    found = algorithm.meta_gradient(params, episodes).gradients
    torch.testing.assert_close(found["log_lr"], expected)
    torch.testing.assert_close(found["theta"], v.mean(0))


def test_one_step_is_first_order_in_the_rate_anyway() -> None:
    loss, theta, episodes = regression(3)
    inner, learn = GradientDescent(steps=1, lr=0.2), {"lr": "parameter"}
    exact, first_order = (kind(loss, inner=inner, learn=learn) for kind in (MAML, FOMAML))
    params = exact.initial(theta)
    torch.testing.assert_close(
        first_order.meta_gradient(params, episodes).gradients["log_lr"],
        exact.meta_gradient(params, episodes).gradients["log_lr"],
    )


def test_learning_starts_at_the_rates_that_are_set() -> None:
    loss, theta, _ = regression(2)
    inner = GradientDescent(lr=0.3, lr_of={"1.*": 0.05})
    rates = spread(loss, lambda name: 0.05 if name.startswith("1.") else 0.3)
    per_tensor = MAML(loss, inner=inner, learn={"lr": "tensor"}).initial(theta)["log_lr"].exp()
    torch.testing.assert_close(per_tensor.repeat_interleave(torch.tensor(loss.layout.sizes)), rates)
    per_parameter = MAML(loss, inner=inner, learn={"lr": "parameter"}).initial(theta)["log_lr"].exp()
    torch.testing.assert_close(per_parameter, rates)
    plain = MAML(loss, inner=GradientDescent(lr=0.3), learn={"lr": "global"}).initial(theta)
    assert plain["log_lr"].tolist() == [math.log(0.3)]
    values = MAML(loss, learn={"lr": "tensor"}).learnt_metrics({"log_lr": torch.tensor([0.5, 2.0]).log()})
    assert {name: round(float(value), 6) for name, value in values.items()} == {"lr": 1.25, "lr_min": 0.5, "lr_max": 2}


def test_a_rate_that_is_too_small_is_learnt_to_grow() -> None:
    """Linear regression: from a rate of 0.001, 60 outer steps on the rate alone come near the best one."""
    loss = TaskLoss(MLP(3, (), 1), "mse")
    algorithm = MAML(loss, inner=GradientDescent(steps=1, lr=0.001), learn={"lr": "global"})
    params = algorithm.initial(torch.zeros(4, dtype=F64))
    optimizer = torch.optim.Adam([params["log_lr"]], lr=0.2)

    def tasks() -> Episodes:
        weights = torch.randn(64, 3, 1, dtype=F64)
        return Episodes(*(Data(x, x @ weights) for x in (torch.randn(64, 40, 3, dtype=F64) for _ in range(2))))

    for _ in range(60):
        params["log_lr"].grad = algorithm.meta_gradient(params, tasks()).gradients["log_lr"]
        optimizer.step()
    fresh = tasks()
    grid = torch.logspace(-3, 0, 40, dtype=F64)
    losses = []
    for rate in grid:
        phi = algorithm.adapt(params | {"log_lr": rate.log().view(1)}, fresh.support)
        losses.append(loss(phi, fresh.query).mean())
    best = float(grid[int(torch.stack(losses).argmin())])
    assert float(params["log_lr"].exp()) == pytest.approx(best, rel=0.3)


def test_rates_per_tensor_adapt_the_last_layer_alone() -> None:
    """ANIL (Raghu et al. 2020): zero but for the last layer; and as a loop with a rate for every parameter."""
    loss, theta, episodes = classification(3)
    inner = GradientDescent(steps=3, lr=0.0, lr_of={"linear.*": 0.4})
    phi = inner.solve(loss, theta, episodes.support, lam=0.0).phi
    views, start = loss.layout.views(phi), loss.layout.views(theta)
    for name in loss.layout.names:
        assert torch.equal(views[name], start[name].expand_as(views[name])) == (not name.startswith("linear."))
    rates = spread(loss, lambda name: 0.4 if name.startswith("linear.") else 0.0).unsqueeze(0)
    expected = gradient_descent(loss, theta, episodes.support, lam=0.0, steps=3, lr=rates).phi
    assert torch.equal(phi, expected)
    first, last = GradientDescent(lr_of={"*": 0.1, "linear.*": 0.2}), GradientDescent(lr=0.1, lr_of={"linear.*": 0.2})
    assert torch.equal(first.rate(loss, phi), last.rate(loss, phi))  # a later pattern goes before an earlier one
    for algorithm in (MAML(loss, inner=inner), FOMAML(loss, inner=inner), Reptile(loss, inner=inner)):
        gradient = loss.layout.views(algorithm.meta_gradient(theta, episodes).gradient)
        assert (gradient["conv1.weight"].abs().max() == 0) == isinstance(algorithm, Reptile)


def test_errors_say_why() -> None:
    loss, theta, episodes = regression(2)

    def function(params: Tensor, data: Data) -> Tensor:
        return loss(params, data)

    def begin(algorithm: MAML | FOMAML) -> object:
        return algorithm.initial(theta)

    def descend(lr_of: dict[str, float], loss: object = loss) -> object:
        return GradientDescent(lr_of=lr_of).solve(loss, theta, episodes.support, lam=0.0)

    everywhere = {"lr": "global"}
    for words, call in (
        ("IMAML cannot learn lr: the implicit gradient does not depend on how", lambda: IMAML(learn=everywhere)),
        ("Reptile cannot learn lr: it has no derivative", lambda: Reptile(learn={"lr": "tensor"})),
        ("lr cannot be learnt with NewtonCG", lambda: begin(FOMAML(loss, inner=NewtonCG(), learn=everywhere))),
        (
            "lr must be positive where it is learnt, got 0",
            lambda: begin(MAML(loss, inner=GradientDescent(lr=0.0), learn=everywhere)),
        ),
        ("learn must be 'global' or 'parameter'", lambda: begin(MAML(function, learn={"lr": "tensor"}))),
        ("log_lr is missing", lambda: MAML(loss, learn=everywhere).meta_gradient(theta, episodes)),
        (r"lr_of must name parameters .*got 'head.\*'", lambda: descend({"head.*": 0.1})),
        ("lr_of must be empty for a function", lambda: descend({"*": 0.1}, function)),
        ("lr_of.* must be at least 0, got -1.0", lambda: GradientDescent(lr_of={"*": -1.0})),
    ):
        with pytest.raises(ValueError, match=words):
            call()
