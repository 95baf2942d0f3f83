"""Newton-CG against closed forms and the definition of its line search; its objective never increases."""

import pytest
import torch
from meta_tasks import F64, Data, Episodes, HostWatch, classification, regression, relative
from systems import multiply, solve_directly
from torch import Tensor

from imaml_ext import CG, IMAML, MAML, MLP, GradientDescent, NewtonCG, TaskLoss, prox_solve
from imaml_ext.inner import newton_cg
from imaml_ext.models import Conv4
from imaml_ext.ops import prox_gradient_, prox_penalty

B, N = 4, 9


def directions(iterations: int) -> CG:
    """So many iterations, however small the residual."""
    return CG(max_iterations=iterations, rtol=0.0)


def spd(smallest: float = 0.1) -> Tensor:
    """Random symmetric positive definite matrices [B, N, N]."""
    q = torch.linalg.qr(torch.randn(B, N, N, dtype=F64)).Q
    return (q * (smallest + 3 * torch.rand(B, 1, N, dtype=F64))) @ q.mT


def quadratic(params: Tensor, data: Data) -> Tensor:
    """½ (φ − y)ᵀ x (φ − y), x [B, N, N] symmetric, of any signature."""
    d = params - data.y
    return 0.5 * (d * multiply(data.x)(d)).sum(1)


@pytest.mark.parametrize("form", ["0", "number", "[N]", "[B, N]"])
def test_one_step_reaches_the_minimum_of_a_strongly_convex_quadratic(form: str) -> None:
    A, y, theta = spd(), torch.randn(B, N, dtype=F64), torch.randn(N, dtype=F64)
    lam = {"0": 0.0, "number": 0.7}.get(form)
    if lam is None:
        lam = 0.3 + torch.rand((N,) if form == "[N]" else (B, N), dtype=F64)
    result = newton_cg(
        quadratic, theta, Data(A, y), lam=lam, steps=1, linear_solver=CG(max_iterations=4 * N, rtol=1e-14), measure=True
    )
    shift = torch.as_tensor(lam, dtype=F64).expand(B, N)
    exact = solve_directly(A + shift.diag_embed(), multiply(A)(y) + shift * theta)
    assert float((result.phi - exact).abs().max()) < 1e-8
    assert result.step_sizes.tolist() == [[1.0] * B]
    assert result.steps.tolist() == [1] * B
    assert float(result.final_gradient_norm.max()) < 1e-8
    assert not result.negative_curvature.any()


def test_one_step_solves_linear_regression_with_either_matrix() -> None:
    loss, theta, episodes = regression(3, hidden=())
    minima = [
        NewtonCG(steps=1, linear_solver=CG(max_iterations=30, rtol=1e-14), curvature=curvature)
        .solve(loss, theta, episodes.support, lam=0.4, measure=True)
        .final_gradient_norm
        for curvature in ("hessian", "gauss_newton")
    ]
    for norm in minima:
        assert float(norm.max()) < 1e-8


def objective(loss: TaskLoss, phi: Tensor, theta: Tensor, data: Data, lam: Tensor | float) -> Tensor:
    return loss(phi, data) + prox_penalty(phi, theta, lam)


@pytest.mark.parametrize("cg_steps", [1, 3])
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_steps_are_the_ones_defined(kind: str, curvature: str, cg_steps: int) -> None:
    """Every step of every task recomputed: the direction solves the system, t is the first acceptable one."""
    loss, theta, episodes = regression(3) if kind == "regression" else classification(3)
    data, lam, damping = episodes.support, 0.05, 0.02
    settings = {
        "linear_solver": directions(cg_steps),
        "curvature": curvature,
        "damping": damping,
        "armijo": 0.3,
        "shrink": 0.6,
    }
    run = NewtonCG(steps=4, backtracks=6, **settings).solve(loss, theta, data, lam=lam)
    phi = theta.expand(3, -1).clone()
    for step in range(4):
        here = objective(loss, phi, theta, data, lam)
        torch.testing.assert_close(run.objectives[step], here)
        torch.testing.assert_close(run.losses[step], loss(phi, data))
        operator = loss.linearize(phi, data, curvature)
        g = prox_gradient_(operator.gradient.clone(), phi, theta, lam)
        after = newton_cg(loss, theta, data, lam=lam, steps=step + 1, backtracks=6, **settings).phi
        for task in range(3):
            d = _conjugate_gradients(lambda p, H=operator: H(p) + (lam + damping) * p, -g, cg_steps)[task]
            slope = float(g[task] @ d)
            assert slope < 0
            for trial in range(7):
                t = 0.6**trial
                moved = phi.clone()
                moved[task] += t * d
                if objective(loss, moved, theta, data, lam)[task] <= here[task] + 0.3 * t * slope:
                    break
            else:
                t, moved = 0.0, phi
            assert float(run.step_sizes[step, task]) == pytest.approx(t)
            torch.testing.assert_close(after[task], moved[task], rtol=1e-8, atol=1e-10)
        phi = after
    torch.testing.assert_close(run.phi, phi)
    torch.testing.assert_close(run.objectives[4], objective(loss, phi, theta, data, lam))


def _conjugate_gradients(A: object, b: Tensor, iterations: int) -> Tensor:
    """The textbook's, with the rule of Nocedal and Wright's algorithm 7.1 for negative curvature, row by row."""
    x, r = torch.zeros_like(b), b.clone()
    p = r.clone()
    alive = torch.ones(len(b), dtype=torch.bool)
    for k in range(iterations):
        Ap = A(p)
        curvature = (p * Ap).sum(1)
        if k == 0:
            x = torch.where((curvature <= 0).unsqueeze(1), b, x)
        alive = alive & (curvature > 0)
        rr = (r * r).sum(1)
        alpha = torch.where(alive, rr / curvature, 0.0).unsqueeze(1)
        x, r = x + alpha * p, r - alpha * Ap
        p = r + ((r * r).sum(1) / rr).unsqueeze(1) * p
    return x


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("form", ["number", "[B]", "[N]"])
def test_one_cg_step_is_the_cauchy_point_without_a_product(form: str, engine: str) -> None:
    """d = −(‖g‖² / gᵀ(G + Λ + δI)g) g, where g is the gradient; and G is asked for along g alone, not multiplied."""
    model = MLP(3, (5,), 3, activation="tanh")
    loss = TaskLoss(model, "cross_entropy", engine=engine)
    theta = model.init(seed=1).double()
    data = Data(torch.randn(3, 6, 3, dtype=F64), torch.randint(3, (3, 6)))
    shape = {"number": (), "[B]": (3,), "[N]": (len(theta),)}[form]
    lam, damping = 0.1 + torch.rand(shape, dtype=F64), 0.02
    phi = theta.expand(3, -1).contiguous()
    operator = loss.linearize(phi, data, "gauss_newton")
    g = operator.gradient  # at φ = θ
    shift = lam.unsqueeze(1) if form == "[B]" else lam
    torch.testing.assert_close(operator.curvature(g), (g * operator(g)).sum(1), rtol=1e-12, atol=0.0)
    exact = g * g.square().sum(1, keepdim=True) / (g * (operator(g) + (shift + damping) * g)).sum(1, keepdim=True)

    settings = NewtonCG(steps=1, linear_solver=directions(1), curvature="gauss_newton", damping=damping)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(operator), "__call__", None)
        result = settings.solve(loss, theta, data, lam=lam)
    torch.testing.assert_close(result.phi, theta - result.step_sizes[0].unsqueeze(1) * exact, rtol=1e-10, atol=1e-12)
    assert (result.step_sizes > 0).all()


@pytest.mark.parametrize("cg_steps", [1, 3])
def test_a_task_has_the_same_bits_alone_and_in_a_batch(cg_steps: int) -> None:
    loss, theta, episodes = classification(5)
    settings = NewtonCG(steps=3, linear_solver=directions(cg_steps), curvature="gauss_newton")
    together = settings.solve(loss, theta, episodes.support, lam=0.1)
    for task in range(5):
        row = slice(task, task + 1)
        alone = settings.solve(loss, theta, Data(episodes.support.x[row], episodes.support.y[row]), lam=0.1)
        assert torch.equal(alone.phi, together.phi[row])
        assert torch.equal(alone.objectives, together.objectives[:, row])


def test_at_the_minimum_one_cg_step_stays() -> None:
    """g = 0, so that g / gᵀGg is 0 / 0; and no curvature is negative."""
    loss = TaskLoss(MLP(2, (), 1), "mse")
    data = Data(torch.randn(2, 4, 2, dtype=F64), torch.zeros(2, 4, 1, dtype=F64))
    theta = torch.zeros(3, dtype=F64)
    result = NewtonCG(steps=2, linear_solver=directions(1), curvature="gauss_newton").solve(loss, theta, data, lam=1.0)
    assert torch.equal(result.phi, torch.zeros(2, 3, dtype=F64))
    assert result.steps.tolist() == [0, 0]
    assert not result.negative_curvature.any()


def test_negative_curvature() -> None:
    """At once: steepest descent. Later: the iterate before. And never upwards, though there is no minimum."""
    A = torch.diag_embed(torch.ones(2, N, dtype=F64))
    A[0] *= -4.0
    A[1, 0, 0] = -2.0  # one direction of nine
    data = Data(A, torch.randn(2, N, dtype=F64))
    theta = torch.randn(N, dtype=F64)
    result = newton_cg(quadratic, theta, data, lam=1.0, steps=3, linear_solver=directions(6))
    assert result.negative_curvature.all()
    assert (result.objectives.diff(dim=0) < 0).all()
    g = multiply(A)(theta - data.y)  # at φ = θ
    first = newton_cg(quadratic, theta, data, lam=1.0, steps=1, linear_solver=directions(6))
    torch.testing.assert_close(first.phi[0], theta - g[0] * first.step_sizes[0, 0])
    Ag = g[1] * (A[1].diagonal() + 1)
    step = -g[1] if g[1] @ Ag <= 0 else -g[1] * (g[1] @ g[1]) / (g[1] @ Ag)
    torch.testing.assert_close(first.phi[1], theta + step * first.step_sizes[0, 1])
    # with λ = 0 too, where b / shift is no direction
    free = newton_cg(quadratic, theta, data, lam=0.0, steps=1, linear_solver=directions(6))
    assert (free.objectives[1] < free.objectives[0]).all()


@pytest.mark.parametrize(("curvature", "cg_steps"), [("hessian", 5), ("gauss_newton", 5), ("gauss_newton", 1)])
@pytest.mark.parametrize("lam", [2.0, 0.1])
def test_the_objective_never_increases_on_conv4(curvature: str, cg_steps: int, lam: float) -> None:
    model = Conv4(5, filters=8)
    loss = TaskLoss(model, "cross_entropy")
    theta = model.init(seed=int(torch.randint(1000, ())))
    data = Data(torch.rand(24, 5, 1, 28, 28), torch.arange(5).repeat(24, 1))
    result = NewtonCG(steps=4, linear_solver=directions(cg_steps), curvature=curvature).solve(
        loss, theta, data, lam=lam
    )
    assert (result.objectives.diff(dim=0) <= 0).all()
    assert (result.objectives[-1] < result.objectives[0]).all()
    with torch.no_grad():
        torch.testing.assert_close(result.objectives[-1], objective(loss, result.phi, theta, data, lam))


def test_a_task_that_cannot_step_stays() -> None:
    """At the minimum; and where every step that is tried is too long."""
    A, y = torch.eye(N, dtype=F64).repeat(2, 1, 1), torch.zeros(2, N, dtype=F64)
    y[1] = 1.0
    arrived = newton_cg(quadratic, torch.zeros(N, dtype=F64), Data(A, y), lam=1.0, steps=2, linear_solver=directions(3))
    assert torch.equal(arrived.phi[0], torch.zeros(N, dtype=F64))
    assert arrived.steps.tolist()[0] == 0
    torch.testing.assert_close(arrived.phi[1], 0.5 * y[1])

    def cliff(params: Tensor, data: Data) -> Tensor:
        """Falls at θ, towards a wall close by."""
        return -params.sum(1) + 1e9 * torch.relu(params.sum(1) - 1e-6)

    result = newton_cg(
        cliff,
        torch.zeros(N, dtype=F64),
        y[:1],
        lam=0.01,
        steps=2,
        linear_solver=directions(2),
        backtracks=3,
        num_tasks=1,
    )
    assert torch.equal(result.phi, torch.zeros(1, N, dtype=F64))
    assert result.steps.tolist() == [0]
    assert result.objectives.tolist() == [[0.0]] * 3
    assert float(result.metrics["newton_stayed"]) == 1


def test_a_task_of_nan_stays_and_leaves_the_others_bit_identical() -> None:
    loss, theta, episodes = classification(3)
    settings = NewtonCG(steps=2, curvature="gauss_newton")
    clean = settings.solve(loss, theta, episodes.support, lam=1.0)
    x = episodes.support.x.clone()
    x[1, 0] = float("nan")
    broken = Data(x, episodes.support.y)
    dirty = settings.solve(loss, theta, broken, lam=1.0)
    assert torch.equal(dirty.phi[1], theta)
    assert torch.equal(dirty.phi[[0, 2]], clean.phi[[0, 2]])
    meta = IMAML(loss, lam=1.0, inner=settings).meta_gradient(theta, Episodes(broken, episodes.query))
    assert float(meta.metrics["non_finite"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("curvature", "cg_steps"), [("hessian", 5), ("gauss_newton", 5), ("gauss_newton", 1)])
def test_nothing_waits_for_the_device_unless_asked_and_the_bits_are_the_same(curvature: str, cg_steps: int) -> None:
    loss, theta, episodes = classification(3)
    runs = {}
    for early in (False, True):
        with HostWatch() as watch:
            solver = NewtonCG(steps=3, linear_solver=directions(cg_steps), curvature=curvature, stop_early=early)
            runs[early] = solver.solve(loss, theta, episodes.support, lam=0.1)
        assert bool(watch.seen) == early
    assert torch.equal(runs[True].phi, runs[False].phi)
    assert torch.equal(runs[True].objectives, runs[False].objectives)
    assert torch.equal(runs[True].step_sizes, runs[False].step_sizes)


def logistic(params: Tensor, data: Data) -> Tensor:
    """Mean negative log-likelihood of labels y [B, S] for inputs x [B, S, N]."""
    z = torch.einsum("bsn,bn->bs", data.x, params)
    return (torch.nn.functional.softplus(z) - data.y * z).mean(1)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("stop_early", [True, False])
def test_the_rounding_of_the_objective_does_not_keep_newton_from_the_minimum(offset: float, stop_early: bool) -> None:
    """In float32 F resolves a gradient of 1e-4 at best, and of 1e-3 with a constant added; gradients resolve more."""

    def shifted(params: Tensor, data: Data) -> Tensor:
        return logistic(params, data) + offset

    x = torch.randn(B, 50, 6)
    data = Data(x, (torch.rand(B, 50) < torch.sigmoid(x.sum(2))).float())
    theta, lam = torch.zeros(6), 0.1
    descent = GradientDescent(steps=1500, lr=2.0).solve(logistic, theta, data, lam=lam, measure=True)
    settings = NewtonCG(steps=10, linear_solver=CG(max_iterations=20, rtol=1e-6), stop_early=stop_early)
    newton = settings.solve(shifted, theta, data, lam=lam, measure=True)
    assert float(descent.final_gradient_norm.max()) < 1e-7
    assert float(newton.final_gradient_norm.max()) < max(1e-7, 4 * float(descent.final_gradient_norm.max()))
    torch.testing.assert_close(newton.phi, descent.phi, rtol=1e-5, atol=1e-6)
    assert (newton.objectives.diff(dim=0) <= 0).all()


def test_a_step_that_rounding_hides_is_judged_by_its_slopes() -> None:
    """A whole step to the other side of the minimum, and beyond: refused where the gradient there says that F rises."""
    curvature = torch.full((2, 1), 2.0)
    data = Data(curvature, torch.tensor([[1e-5], [1e-5]]))

    def loss(params: Tensor, data: Data) -> Tensor:
        return 100.0 + 0.5 * (data.x * (params - data.y).square()).sum(1)

    class Overshoot(CG):
        """Directions of 1.5 and of 2.5 times the way to the minimum."""

        def solve(self, operator: object, b: Tensor, shift: object = 0.0) -> object:
            found = super().solve(operator, b, shift)
            object.__setattr__(found, "x", found.x * torch.tensor([[1.5], [2.5]]))
            return found

    solver = NewtonCG(steps=1, linear_solver=Overshoot(max_iterations=2, rtol=0.0), backtracks=0)
    result = solver.solve(loss, torch.zeros(1), data, lam=0.0)
    assert result.step_sizes.tolist() == [[1.0, 0.0]]
    torch.testing.assert_close(result.phi, torch.tensor([[1.5e-5], [0.0]]))


def test_the_implicit_gradient_after_newton_is_that_after_many_gradient_steps() -> None:
    """Any inner solver will do: near the minimum, which λ makes the only one, φ and the meta-gradient are the same."""
    loss, theta, episodes = regression(3)
    solvers = (NewtonCG(steps=15, linear_solver=CG(max_iterations=60, rtol=1e-12)), GradientDescent(steps=600, lr=0.05))
    algorithms = [
        IMAML(loss, lam=10.0, inner=inner, linear_solver=CG(max_iterations=60, rtol=1e-12), learn={"lam": "tensor"})
        for inner in solvers
    ]
    newton, descent = (each.meta_gradient(each.initial(theta), episodes) for each in algorithms)
    assert relative(newton.gradient, descent.gradient) < 1e-5
    assert relative(newton.gradients["log_lam"], descent.gradients["log_lam"]) < 1e-5
    leaf = theta.clone().requires_grad_()
    phi = prox_solve(
        loss, leaf, 10.0, episodes.support, inner=solvers[0], linear_solver=CG(max_iterations=60, rtol=1e-12)
    )
    loss(phi, episodes.query).mean().backward()
    assert relative(leaf.grad, newton.gradient) < 1e-5


def test_errors_name_the_argument() -> None:
    loss, theta, episodes = regression(2)

    def function(params: Tensor, data: Data) -> Tensor:
        return loss(params, data)

    for error, words, call in (
        (ValueError, "steps must be at least 0", lambda: NewtonCG(steps=-1)),
        (ValueError, "max_iterations must be at least 1", lambda: NewtonCG(linear_solver=CG(max_iterations=0))),
        (ValueError, "curvature must be one of", lambda: NewtonCG(curvature="fisher")),
        (ValueError, "damping must be at least 0", lambda: NewtonCG(damping=-1.0)),
        (ValueError, "backtracks must be at least 0", lambda: NewtonCG(backtracks=-1)),
        (ValueError, "shrink must be above 0 and below 1, got 1.0", lambda: NewtonCG(shrink=1.0)),
        (ValueError, "armijo must be above 0 and below 1, got 0.0", lambda: NewtonCG(armijo=0.0)),
        (TypeError, "stop_early must be true or false", lambda: NewtonCG(stop_early=1)),
        (TypeError, "inner must be GradientDescent, .*got NewtonCG", lambda: MAML(loss, inner=NewtonCG())),
        (
            TypeError,
            "loss must be a TaskLoss with curvature=",
            lambda: NewtonCG(curvature="gauss_newton").solve(function, theta, episodes.support, lam=1.0),
        ),
        (ValueError, "lam must be at least 0", lambda: NewtonCG().solve(loss, theta, episodes.support, lam=-1.0)),
    ):
        with pytest.raises(error, match=words):
            call()


def _known_family(tasks: int, *, points: int, prior: float, noise: float) -> tuple[Data, Data]:
    """Tasks φ ~ N(0, prior² I) of a linear model with a bias, seen at noisy points; queries without noise."""
    phi = prior * torch.randn(tasks, 4, 1, dtype=F64)
    query_x = torch.cat([torch.eye(3, dtype=F64), -torch.eye(3, dtype=F64)]).expand(tasks, -1, -1)
    sides = []
    for x, scale in ((torch.randn(tasks, points, 3, dtype=F64), noise), (query_x, 0.0)):
        y = torch.cat([x, torch.ones_like(x[..., :1])], 2) @ phi
        sides.append(Data(x, y + scale * torch.randn_like(y)))
    return sides[0], sides[1]


@pytest.mark.parametrize("start", [pytest.param(0.05, marks=pytest.mark.long), 10.0])
def test_a_learnable_lambda_recovers_the_best_one(start: float) -> None:
    """Gaussian prior and noise: the best regulariser of (1/S) ‖Xφ − y‖² is that of the posterior mean, 2σ²/(S τ²)."""
    prior, noise, points = 0.8, 0.9, 6
    best = 2 * noise**2 / (points * prior**2)
    loss = TaskLoss(MLP(3, (), 1), "mse")
    exactly = CG(max_iterations=6, rtol=1e-12)
    inner = NewtonCG(steps=1, linear_solver=directions(6))
    algorithm = IMAML(loss, lam=start, inner=inner, linear_solver=exactly, learn={"lam": "global"})
    params = algorithm.initial(torch.zeros(4, dtype=F64))
    log_lam = params["log_lam"]
    optimizer = torch.optim.Adam([log_lam], lr=0.2)
    found = []
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 0.2 if step < 40 else 0.02
        support, query = _known_family(4000, points=points, prior=prior, noise=noise)
        log_lam.grad = algorithm.meta_gradient(params, Episodes(support, query)).gradients["log_lam"]
        optimizer.step()
        if step >= 70:
            found.append(float(log_lam))
    assert torch.tensor(found).mean().exp().item() == pytest.approx(best, rel=0.05)


def test_steps_end_where_the_gradient_has_fallen_far_enough() -> None:
    """A row at its minimum stays, bit for bit, while others go on; when all have arrived nothing more is computed."""
    x, scale = torch.randn(3, 4, dtype=F64), torch.tensor([1.0, 0.0, 1e4], dtype=F64)
    calls = []

    def loss(params: Tensor, data: None) -> Tensor:
        calls.append(1)
        return (scale.unsqueeze(1) * (params - x) ** 4).sum(1) + ((params - x) ** 2).sum(1)

    theta, options = torch.zeros(3, 4, dtype=F64), {"linear_solver": CG(20, rtol=1e-6)}
    solver = NewtonCG(steps=60, relative_tolerance=1e-9, **options)
    far = solver.solve(loss, theta, None, lam=0.0, measure=True)
    assert len(calls) < 40
    first = (4 * scale.unsqueeze(1) * x**3 + 2 * x).norm(dim=1)
    assert (far.final_gradient_norm <= 1e-9 * first).all()
    assert (far.steps < 20).all()
    assert far.steps[1] == 1  # of a quadratic
    assert torch.equal(far.objectives[30:], far.objectives[-1].expand(31, -1))
    assert not far.step_sizes[int(far.steps.max()) :].any()
    whole = NewtonCG(steps=60, **options).solve(loss, theta, None, lam=0.0)
    torch.testing.assert_close(far.phi, whole.phi, rtol=1e-3, atol=1e-3)
