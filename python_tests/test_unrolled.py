"""MAML against finite differences, against torch through a hand-written loop, and against iMAML in the limit."""

import pytest
import torch
from meta_tasks import F64, Data, Episodes, classification, regression, relative
from torch import Tensor

from imaml_ext import FOMAML, IMAML, MAML, GradientDescent, NewtonCG, Reptile
from imaml_ext.losses import TaskLoss
from imaml_ext.solvers import LinearSolver

# Adam's ε is large: with a small one, its update jumps where a gradient changes sign, and no difference is fine enough.
SOLVERS = {
    "sgd": GradientDescent(steps=4, lr=0.1),
    "momentum": GradientDescent(steps=4, lr=0.05, optimizer="momentum", momentum=0.7),
    "nesterov": GradientDescent(steps=4, lr=0.05, optimizer="momentum", momentum=0.7, nesterov=True),
    "adam": GradientDescent(steps=4, lr=0.02, optimizer="adam", betas=(0.8, 0.9), eps=0.1),
    "after": GradientDescent(steps=4, lr=0.1, proximal="after"),
    "minibatches": GradientDescent(steps=4, lr=0.1, batch_size=2),
    "adam after": GradientDescent(steps=3, lr=0.02, optimizer="adam", eps=0.1, proximal="after"),
}


def mean_query_loss(algorithm: MAML, params: Tensor | dict[str, Tensor], episodes: Episodes) -> Tensor:
    """F(θ), by the fused inner steps."""
    return algorithm.loss(algorithm.adapt(params, episodes.support), episodes.query).mean()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("lam", [0.0, 0.8])
def test_the_gradient_equals_finite_differences(name: str, lam: float, checkpoint: bool) -> None:
    loss, theta, episodes = regression(3)
    algorithm = MAML(loss, inner=SOLVERS[name], lam=lam, checkpoint=checkpoint)
    gradient = algorithm.meta_gradient(theta, episodes).gradient
    h = 1e-5
    for _ in range(3):
        d = torch.randn_like(theta)
        ahead, behind = (mean_query_loss(algorithm, theta + s * h * d, episodes) for s in (1, -1))
        difference = float((ahead - behind) / (2 * h))
        assert abs(float(gradient @ d) - difference) < 1e-6 * float(gradient.norm() * d.norm())


def by_hand(loss: TaskLoss, theta: Tensor, episodes: Episodes, lam: Tensor | float, steps: int, lr: float) -> Tensor:
    """F(θ) of plain gradient descent, task by task, step by step, as anyone would write it down."""
    total = theta.new_zeros(())
    for task in range(len(episodes.support.x)):
        support, query = (Data(side.x[task : task + 1], side.y[task : task + 1]) for side in episodes)
        phi = theta
        for _ in range(steps):
            objective = loss(phi.unsqueeze(0), support)[0] + 0.5 * (lam * (phi - theta) ** 2).sum()
            (grad,) = torch.autograd.grad(objective, phi, create_graph=True)
            # φ_0 is θ itself: what of the gradient belongs to θ in the penalty is 0 there
            phi = phi - lr * grad
        total = total + loss(phi.unsqueeze(0), query)[0]
    return total / len(episodes.support.x)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("lam", [0.0, 1.5])
def test_the_gradient_equals_torch_through_a_loop_written_by_hand(kind: str, lam: float, checkpoint: bool) -> None:
    loss, theta, episodes = regression(3) if kind == "regression" else classification(2)
    leaf = theta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(by_hand(loss, leaf, episodes, lam, steps=3, lr=0.1), leaf)
    algorithm = MAML(loss, inner=GradientDescent(steps=3, lr=0.1), lam=lam, checkpoint=checkpoint)
    assert relative(algorithm.meta_gradient(theta, episodes).gradient, expected) < 1e-10


@pytest.mark.parametrize("name", SOLVERS)
def test_checkpointed_equals_not_checkpointed(name: str) -> None:
    loss, theta, episodes = classification(2)
    learn = {"lam": "parameter"}
    algorithms = [MAML(loss, inner=SOLVERS[name], lam=0.7, checkpoint=flag, learn=learn) for flag in (False, True)]
    plain, checkpointed = (each.meta_gradient(each.initial(theta), episodes) for each in algorithms)
    for name_of, gradient in plain.gradients.items():
        assert relative(checkpointed.gradients[name_of], gradient) < 1e-11
    assert checkpointed.metrics.keys() == plain.metrics.keys()
    for metric, value in plain.metrics.items():
        torch.testing.assert_close(checkpointed.metrics[metric], value)


@pytest.mark.parametrize("solver", ["cg", "fixed_point"])
def test_imaml_equals_maml_in_the_limit_of_many_steps(solver: str) -> None:
    loss, theta, episodes = regression(3)
    # λ is above what negative curvature there is at any θ here: the descent reaches the minimum to rounding.
    common = {"lam": 6.0, "inner": GradientDescent(steps=300, lr=0.05), "learn": {"lam": "parameter"}}
    unrolled = MAML(loss, checkpoint=True, **common)
    params = unrolled.initial(theta)
    maml = unrolled.meta_gradient(params, episodes)
    # As many fixed-point steps at the step size of the descent are the back-propagation through as many steps.
    exactly = LinearSolver.kind(solver)(max_iterations=300 if solver != "cg" else 60, rtol=1e-13)
    imaml = IMAML(loss, linear_solver=exactly, **common).meta_gradient(params, episodes)
    assert relative(imaml.gradient, maml.gradient) < 1e-8
    assert relative(imaml.gradients["log_lam"], maml.gradients["log_lam"]) < 1e-8
    few = MAML(loss, inner=GradientDescent(steps=2, lr=0.1), lam=6.0).meta_gradient(theta, episodes)
    assert relative(imaml.gradient, few.gradient) > 1e-3


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "after"])
@pytest.mark.parametrize("sharing", ["global", "tensor", "parameter"])
def test_the_gradient_in_lam_equals_finite_differences(name: str, sharing: str, checkpoint: bool) -> None:
    loss, theta, episodes = regression(3)
    algorithm = MAML(loss, inner=SOLVERS[name], lam=0.6, checkpoint=checkpoint, learn={"lam": sharing})
    params = algorithm.initial(theta)
    params["log_lam"] += 0.3 * torch.randn_like(params["log_lam"])
    meta = algorithm.meta_gradient(params, episodes)
    assert meta.gradients["log_lam"].shape == params["log_lam"].shape
    h, d = 1e-5, torch.randn_like(params["log_lam"])
    ahead, behind = (
        mean_query_loss(algorithm, params | {"log_lam": params["log_lam"] + sign * h * d}, episodes) for sign in (1, -1)
    )
    difference = float((ahead - behind) / (2 * h))
    slope = float(meta.gradients["log_lam"] @ d)
    assert abs(slope - difference) < 1e-5 * max(abs(difference), 1e-3 * float(meta.gradient.norm()))


def test_adam_through_parameters_that_nothing_depends_on() -> None:
    """A gradient of exactly 0, where √ has no derivative, must not become a NaN."""
    loss, theta, episodes = regression(2, hidden=())
    silent = Data(episodes.support.x * torch.tensor([1.0, 0.0, 1.0], dtype=F64), episodes.support.y)
    for checkpoint in (False, True):
        algorithm = MAML(loss, inner=GradientDescent(steps=3, lr=0.1, optimizer="adam"), checkpoint=checkpoint)
        assert algorithm.meta_gradient(theta, Episodes(silent, episodes.query)).gradient.isfinite().all()


def test_no_step_is_the_query_gradient() -> None:
    loss, theta, episodes = regression(2)
    leaf = theta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf.expand(2, -1), episodes.query).mean(), leaf)
    for checkpoint in (False, True):
        algorithm = MAML(loss, inner=GradientDescent(steps=0), checkpoint=checkpoint)
        assert relative(algorithm.meta_gradient(theta, episodes).gradient, expected) < 1e-12


# --- first-order MAML and Reptile -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("lam", [0.0, 0.8])
def test_first_order_algorithms_equal_their_definitions(name: str, lam: float) -> None:
    loss, theta, episodes = classification(3)
    phi = SOLVERS[name].solve(loss, theta, episodes.support, lam=lam).phi
    leaf = phi.clone().requires_grad_()
    losses = loss(leaf, episodes.query)
    (v,) = torch.autograd.grad(losses.sum(), leaf)
    fomaml = FOMAML(loss, inner=SOLVERS[name], lam=lam).meta_gradient(theta, episodes)
    reptile = Reptile(loss, inner=SOLVERS[name], lam=lam).meta_gradient(theta, episodes)
    torch.testing.assert_close(fomaml.gradient, v.mean(0))
    torch.testing.assert_close(reptile.gradient, (theta - phi).mean(0))
    for meta in (fomaml, reptile):
        torch.testing.assert_close(meta.metrics["query_loss"], losses.mean().detach())
        torch.testing.assert_close(
            meta.metrics["support_loss_before"],
            loss(theta.expand(3, -1), SOLVERS[name].batches(episodes.support)[0]).mean(),
        )
        assert 0 <= float(meta.metrics["query_accuracy"]) <= 1


def test_an_outer_sgd_step_of_reptile_goes_towards_the_tasks() -> None:
    loss, theta, episodes = regression(3)
    algorithm = Reptile(loss, inner=SOLVERS["sgd"])
    phi = algorithm.adapt(theta, episodes.support)
    expected = theta + 0.3 * (phi - theta).mean(0)
    theta.grad = algorithm.meta_gradient(theta, episodes).gradient
    torch.optim.SGD([theta], lr=0.3).step()
    torch.testing.assert_close(theta, expected)


# --- what breaks down -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["support", "query"])
@pytest.mark.parametrize("make", [MAML, FOMAML, Reptile])
def test_a_task_of_nan_does_not_count(make: type, side: str) -> None:
    loss, theta, episodes = regression(3)
    algorithm = make(loss, inner=SOLVERS["sgd"])
    x = getattr(episodes, side).x
    x[1, 2] = float("nan")
    others = Episodes(*(Data(part.x[[0, 2]], part.y[[0, 2]]) for part in episodes))
    meta = algorithm.meta_gradient(theta, episodes)
    if make is Reptile and side == "query":  # which does not enter its gradient
        assert float(meta.metrics["skipped"]) == 0
        return
    torch.testing.assert_close(meta.gradient, algorithm.meta_gradient(theta, others).gradient)
    assert float(meta.metrics["non_finite"]) == pytest.approx(1 / 3)
    x[:] = float("nan")
    assert algorithm.meta_gradient(theta, episodes).gradient.isnan().all()


def test_errors_name_the_argument() -> None:
    loss, theta, episodes = regression(2)
    for error, words, call in (
        (TypeError, "inner must be GradientDescent, .*got NewtonCG", lambda: MAML(loss, inner=NewtonCG())),
        (ValueError, "inner must be without a tolerance", lambda: MAML(loss, inner=GradientDescent(tolerance=1.0))),
        (ValueError, "lam must be at least 0", lambda: MAML(loss, lam=-1.0)),
        (ValueError, "FOMAML cannot learn lam: .*one to one", lambda: FOMAML(loss, learn={"lam": "global"})),
        (ValueError, "Reptile cannot learn lam: it has no", lambda: Reptile(loss, learn={"lam": "global"})),
        (ValueError, r"theta must have shape \[N\]", lambda: MAML(loss).meta_gradient(theta[None], episodes)),
        (TypeError, "theta must be a tensor", lambda: Reptile(loss).meta_gradient(None, episodes)),
        (ValueError, "lam must be positive where it is", lambda: MAML(loss, learn={"lam": "global"}).initial(theta)),
        (ValueError, "learn.'lam'. must be one of 'global',", lambda: IMAML(loss, learn={"lam": "task"})),
        (ValueError, "learn must name some of lam", lambda: IMAML(loss, learn={"momentum": "global"})),
        (ValueError, "proximal must be one of", lambda: GradientDescent(proximal="step")),
        (ValueError, "tolerance must be None with prox", lambda: GradientDescent(proximal="after", tolerance=1.0)),
    ):
        with pytest.raises(error, match=words):
            call()
