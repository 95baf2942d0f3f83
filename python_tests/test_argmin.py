"""argmin: its derivatives against closed forms and finite differences, in every form; what it says of bad input."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from libraries import library
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from imaml_ext import CG, MLP, GradientDescent, NewtonCG, SolveError, SolveWarning, TaskLoss, argmin, prox_solve
from imaml_ext.batch import TaskData

F64 = torch.float64
EXACT = CG(max_iterations=400, rtol=1e-13, check_every=5)
TIGHT = NewtonCG(steps=12, linear_solver=CG(max_iterations=400, rtol=1e-10, check_every=5))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm().detach() / expected.norm().detach())


def along(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], step: float = 1e-4) -> tuple[float, float]:
    """The derivative of a number along a random direction in all tensors: by autograd, and by central differences of
    fourth order. In units of the gradient's norm, as what the tensors contribute may cancel.
    """
    directions = [torch.randn_like(w) for w in tensors]
    grads = torch.autograd.grad(function(*tensors), tensors)
    found = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True))
    with torch.no_grad():
        ends = [
            float(function(*(w + k * step * d for w, d in zip(tensors, directions, strict=True))))
            for k in (1, -1, 2, -2)
        ]
    expected = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / (12 * step)
    norm = float(torch.cat([g.flatten() for g in grads]).norm())
    return found / norm, expected / norm


def ridge(w: Tensor, weight: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Σ_s weight_s (x_sᵀw − y_s)² + Σ_j penalty_j w_j² of one problem [], or of B [B]."""
    residual = (x @ w.unsqueeze(-1)).squeeze(-1) - y
    return (weight * residual**2).sum(-1) + (penalty * w**2).sum(-1)


def ridge_solution(weight: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
    matrix = x.mT @ (weight.unsqueeze(-1) * x) + torch.diag_embed(penalty.expand(*x.shape[:-2], x.shape[-1]))
    return torch.linalg.solve(matrix, (x.mT @ (weight * y).unsqueeze(-1)).squeeze(-1))


# ---- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per problem"])
@pytest.mark.parametrize("problems", [None, 1, 33], ids=str)
def test_ridge_regression(problems: int | None, shared: bool) -> None:
    """A weight per example, a penalty per feature, and the data themselves; also the second derivative."""
    lead = () if problems is None else (problems,)
    of_args = () if shared else lead
    weight, penalty = torch.rand(*of_args, 12, dtype=F64) + 0.1, torch.rand(*of_args, 5, dtype=F64) + 0.1
    tensors = tuple(t.requires_grad_() for t in (weight, penalty, randn(*lead, 12, 5), randn(*lead, 12)))
    phi = argmin(ridge, torch.zeros(*lead, 5, dtype=F64), tensors, inner=TIGHT, linear_solver=EXACT)
    expected = ridge_solution(*tensors)
    assert phi.shape == (*lead, 5)
    assert relative(phi, expected) < 1e-9
    v = randn(*lead, 5)
    found = torch.autograd.grad((v * phi**2).sum(), tensors, create_graph=True)
    exact = torch.autograd.grad((v * expected**2).sum(), tensors, create_graph=True)
    for value, reference in zip(found, exact, strict=True):
        assert relative(value, reference) < 1e-8
    directions = [torch.randn_like(w) for w in tensors]
    twice = (sum((g * d).sum() for g, d in zip(grads, directions, strict=True)) for grads in (found, exact))
    again, reference = (torch.autograd.grad(value, tensors) for value in twice)
    for value, exactly in zip(again, reference, strict=True):
        assert relative(value, exactly) < 1e-7


def logistic(w: Tensor, weight: Tensor, log_penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
    logits = (x @ w.unsqueeze(-1)).squeeze(-1)
    losses = F.binary_cross_entropy_with_logits(logits, y.expand_as(logits), reduction="none")
    return (weight.sigmoid() * losses).mean(-1) + (log_penalty.exp() * w**2).sum(-1)


@pytest.mark.parametrize("problems", [None, 1, 33], ids=str)
def test_logistic_regression_by_finite_differences(problems: int | None) -> None:
    lead = () if problems is None else (problems,)
    x, y = randn(*lead, 20, 4), (torch.rand(*lead, 20) < 0.5).to(F64)
    tensors = randn(*lead, 20).requires_grad_(), (0.3 * randn(4) - 2).requires_grad_(), x.requires_grad_()
    v = randn(*lead, 4)

    def outer(weight: Tensor, log_penalty: Tensor, x: Tensor) -> Tensor:
        init = torch.zeros(*lead, 4, dtype=F64)
        phi = argmin(logistic, init, (weight, log_penalty, x, y), inner=TIGHT, linear_solver=EXACT)
        return (v * phi + phi**2).sum()

    found, expected = along(outer, tensors)
    assert abs(found - expected) < 1e-8  # 2e-12 is usual


def test_the_last_layer_of_a_deep_net() -> None:
    """The body is shared by 33 problems, whose heads are solved for in structures; in closed form."""
    tasks, shots, width = 33, 6, 7
    body = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, width), nn.Tanh()).double()
    theta = {name: p.detach().requires_grad_() for name, p in body.named_parameters()}
    x, y = randn(tasks, shots, 3), randn(tasks, shots, 2)

    def features(theta: dict[str, Tensor]) -> Tensor:
        return functional_call(body, theta, (x,))

    def loss(head: dict[str, Any], theta: dict[str, Tensor]) -> Tensor:
        out = features(theta) @ head["weight"] + head["rest"][0].unsqueeze(1)
        square = head["weight"].square().sum((1, 2)) + head["rest"][0].square().sum(1)
        return (out - y).square().sum((1, 2)) + 0.3 * square

    def solution(theta: dict[str, Tensor]) -> Tensor:
        z = torch.cat([features(theta), torch.ones(tasks, shots, 1, dtype=F64)], 2)
        return torch.linalg.solve(z.mT @ z + 0.3 * torch.eye(width + 1, dtype=F64), z.mT @ y)

    init = {"weight": torch.zeros(tasks, width, 2, dtype=F64), "rest": [torch.zeros(tasks, 2, dtype=F64)]}
    head = argmin(loss, init, (theta,), inner=TIGHT, linear_solver=EXACT)
    expected = solution(theta)
    v = randn(tasks, width + 1, 2)
    found = torch.cat([head["weight"], head["rest"][0].unsqueeze(1)], 1)
    assert relative(found, expected) < 1e-9
    grads = torch.autograd.grad((v * found).sum(), list(theta.values()))
    for value, reference in zip(grads, torch.autograd.grad((v * expected).sum(), list(theta.values())), strict=True):
        assert relative(value, reference) < 1e-8


@pytest.mark.parametrize("lam_form", ["number", "per problem", "structure"])
def test_the_proximal_term(lam_form: str) -> None:
    """Its centre and λ, one problem at a time in closed form, with a start of its own."""
    tasks = 3
    x, y = randn(tasks, 6, 4), randn(tasks, 6)
    center = {"w": randn(tasks, 4).requires_grad_()}
    lam = {"number": torch.rand((), dtype=F64), "per problem": torch.rand(tasks, dtype=F64)}.get(lam_form)
    lam = {"w": torch.rand(4, dtype=F64).add(0.2)} if lam is None else lam.add(0.2)
    leaf = (lam["w"] if isinstance(lam, dict) else lam).requires_grad_()
    x.requires_grad_()

    def loss(phi: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return ((x @ phi["w"].unsqueeze(-1)).squeeze(-1) - y).square().sum(1) / 2

    options = {"inner": TIGHT, "linear_solver": EXACT, "center": center, "lam": lam}
    phi = argmin(loss, {"w": randn(tasks, 4)}, (x, y), **options)["w"]
    each = leaf.expand(tasks, 4) if lam_form == "structure" else leaf.expand(tasks).unsqueeze(1).expand(tasks, 4)
    right = (x.mT @ y.unsqueeze(-1)).squeeze(-1) + each * center["w"]
    expected = torch.linalg.solve(x.mT @ x + torch.diag_embed(each), right)
    assert relative(phi, expected) < 1e-9
    v = randn(tasks, 4)
    wanted = (center["w"], leaf, x)
    for value, reference in zip(
        torch.autograd.grad((v * phi).sum(), wanted), torch.autograd.grad((v * expected).sum(), wanted), strict=True
    ):
        assert relative(value, reference) < 1e-8


# ---- losses of models, and prox_solve --------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_the_data_of_a_task_loss(engine: str) -> None:
    """Inputs and targets of the support set of an MLP, by finite differences; prox_solve has them too."""
    loss = TaskLoss(MLP(3, (5,), 2, activation="tanh"), "mse", engine=engine)
    theta = loss.model.init(seed=1, dtype=F64).requires_grad_()
    x, y, v = randn(2, 6, 3).requires_grad_(), 0.3 * randn(2, 6, 2), randn(2, loss.model.num_parameters)
    y.requires_grad_()  # small, so that λ outweighs the negative curvature of the fit

    def outer(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
        options = {"inner": TIGHT, "linear_solver": EXACT}
        return (v * prox_solve(loss, theta, 4.0, TaskData(x, y), **options)).sum()

    found, expected = along(outer, (x, y, theta))
    assert abs(found - expected) < 1e-8  # 2e-12 is usual
    center = theta.detach().expand(2, -1)
    phi = argmin(loss, theta, (TaskData(x, y),), center=center, lam=4.0, inner=TIGHT, linear_solver=EXACT)
    grads = (torch.autograd.grad((v * phi).sum(), x)[0], torch.autograd.grad(outer(x, y, theta), x)[0])
    assert relative(*grads) < 1e-8


def test_what_a_loss_closes_over_is_refused() -> None:
    """Not silently left without a gradient: weights of examples, a parameter of a module, a non-leaf."""
    x, y, weight = randn(4, 8, 3), randn(4, 8), torch.rand(8, dtype=F64, requires_grad=True)
    theta, module = randn(3).requires_grad_(), nn.Linear(3, 1).double()

    def hyper_cleaning(phi: Tensor, data: TaskData) -> Tensor:
        return ridge(phi, weight.sigmoid(), torch.ones(3, dtype=F64), data.x, data.y)

    def of_a_module(phi: Tensor, data: TaskData) -> Tensor:
        return ridge(phi, torch.ones(8, dtype=F64), module.weight[0].exp(), data.x, data.y)

    for function in (hyper_cleaning, of_a_module):
        with pytest.raises(ValueError, match=r"loss must not reach tensors .* not among the arguments of prox_solve"):
            prox_solve(function, theta, 1.0, TaskData(x, y))
        with pytest.raises(ValueError, match=r"loss must not reach tensors .* not among the arguments of argmin"):
            argmin(function, torch.zeros(4, 3, dtype=F64), (TaskData(x, y),))
        with torch.no_grad():
            argmin(function, torch.zeros(4, 3, dtype=F64), (TaskData(x, y),))
    shared = weight.clone()  # not a leaf, and given
    phi = argmin(lambda w, s: ridge(w, s, torch.ones(3, dtype=F64), x, y), torch.zeros(4, 3, dtype=F64), (shared,))
    phi.sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().min() > 0


def test_a_criterion_that_reaches_others_is_refused() -> None:
    weight = torch.ones(2, dtype=F64, requires_grad=True)
    loss = TaskLoss(MLP(3, (4,), 2), lambda outputs, y: (weight * outputs - y).square().mean((1, 2)))
    data = TaskData(randn(2, 5, 3), randn(2, 5, 2))
    theta = loss.model.init(seed=0, dtype=F64)
    with pytest.raises(ValueError, match="among the arguments of argmin"):
        argmin(loss, theta, (data,), center=theta, lam=1.0)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_targets_have_their_gradient_in_a_loss(engine: str) -> None:
    loss = TaskLoss(MLP(3, (4,), 2), "mse", engine=engine)
    x, y = randn(2, 5, 3), randn(2, 5, 2).requires_grad_()
    params = loss.model.init(seed=0, dtype=F64).expand(2, -1).clone().requires_grad_()
    found = torch.autograd.grad(loss(params, TaskData(x, y)).sum(), (params, y))
    outputs = loss.model(params, x)
    torch.testing.assert_close(found[1], 2 * (y - outputs).detach() / 10)
    torch.testing.assert_close(found[0], torch.autograd.grad((outputs - y).square().sum() / 10, params)[0])


def test_data_that_change_are_refused() -> None:
    """In place: by the loss itself, and by the caller before the backward pass, which would give another gradient."""
    x, y, weight = randn(8, 3), randn(8), torch.rand(8, dtype=F64, requires_grad=True)

    def loss(phi: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return ridge(phi, weight, torch.ones(3, dtype=F64), x, y)

    phi = argmin(loss, torch.zeros(3, dtype=F64), (weight, x))
    x.mul_(2)
    with pytest.raises(RuntimeError, match="tensors that argmin was given have been changed in place"):
        phi.sum().backward()

    def writes(phi: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return loss(phi, weight, x.sub_(x.mean(0)))

    with pytest.raises(ValueError, match="loss must not write into its arguments"):
        argmin(writes, torch.zeros(3, dtype=F64), (weight, x))


def test_an_inner_problem_left_unsolved_is_told() -> None:
    """Rosenbrock's valley from far away, by the library's own solver; and what `on_unfinished` makes of it."""
    s = torch.ones((), dtype=F64, requires_grad=True)

    def valley(phi: Tensor, s: Tensor) -> Tensor:
        return 1e7 * (phi[1] - s * phi[0] ** 2) ** 2 + (1 - phi[0]) ** 2

    init = torch.tensor([-12.0, 144.0], dtype=F64)
    with pytest.warns(SolveWarning, match="argmin has not found a minimum: after its own solver's last step"):
        argmin(valley, init, (s,))
    with pytest.raises(SolveError, match="argmin has not found a minimum"):
        argmin(valley, init, (s,), on_unfinished="raise")
    argmin(valley, init, (s,), on_unfinished="ignore")


# ---- solvers of the user's own ---------------------------------------------------------------------------------------


def _with_a_torch_optimiser(objective: Callable[[Any], Tensor], init: dict[str, Tensor]) -> dict[str, Tensor]:
    phi = {name: value.clone().requires_grad_() for name, value in init.items()}
    optimiser = torch.optim.Adam(phi.values(), lr=0.05)
    for step in range(400):
        optimiser.param_groups[0]["lr"] = 0.1 * 0.96**step
        optimiser.zero_grad()
        objective(phi).backward()
        optimiser.step()
    return phi


def _with_lbfgs(objective: Callable[[Any], Tensor], init: dict[str, Tensor]) -> dict[str, Tensor]:
    phi = {name: value.clone().requires_grad_() for name, value in init.items()}
    optimiser = torch.optim.LBFGS(phi.values(), max_iter=300, tolerance_grad=1e-12, tolerance_change=0, history_size=20)

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = objective(phi)
        value.backward()
        return value

    optimiser.step(closure)
    return phi


def _with_scipy(objective: Callable[[Any], Tensor], init: dict[str, Tensor]) -> dict[str, Tensor]:
    optimize = pytest.importorskip("scipy.optimize")
    shapes = {name: value.shape for name, value in init.items()}

    def of_flat(flat: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.from_numpy(flat).requires_grad_()
        pieces = leaf.split([shape.numel() for shape in shapes.values()])
        value = objective({n: p.reshape(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)})
        value.backward()
        return float(value), leaf.grad.numpy()

    start = torch.cat([value.flatten() for value in init.values()]).numpy()
    flat = torch.from_numpy(optimize.minimize(of_flat, start, jac=True, method="BFGS", options={"gtol": 1e-9}).x)
    pieces = flat.split([shape.numel() for shape in shapes.values()])
    return {n: p.reshape(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)}


@pytest.mark.parametrize("inner", [None, _with_a_torch_optimiser, _with_lbfgs, _with_scipy])
def test_inner_solvers_of_ones_own_on_a_module(inner: Any) -> None:
    """The parameters of an nn.Module as they are named, by several optimisers: one gradient, that of the exact φ."""
    module = nn.Sequential(nn.Linear(3, 2), nn.Flatten()).double()
    x, y, log_lam = randn(15, 3), torch.randint(2, (15,)), torch.full((), -2.0, dtype=F64, requires_grad=True)

    def fit(phi: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(module, phi, (x,)), y)

    def loss(phi: dict[str, Tensor], log_lam: Tensor) -> Tensor:
        return fit(phi) + log_lam.exp() * sum(value.square().sum() for value in phi.values())

    init = {name: p.detach() for name, p in module.named_parameters()}
    phi = argmin(loss, init, (log_lam,), inner=inner, linear_solver=EXACT)
    assert list(phi) == list(init)
    (gradient,) = torch.autograd.grad(fit(phi), log_lam)

    def named(flat: Tensor) -> dict[str, Tensor]:
        pieces = flat.split([value.numel() for value in init.values()])
        return {name: piece.reshape(init[name].shape) for name, piece in zip(init, pieces, strict=True)}

    flat = torch.cat([value.detach().flatten() for value in phi.values()])
    hessian = torch.autograd.functional.hessian(lambda flat: loss(named(flat), log_lam.detach()), flat)
    v = torch.autograd.functional.jacobian(lambda flat: fit(named(flat)), flat)
    expected = -torch.linalg.solve(hessian, v) @ (2 * log_lam.detach().exp() * flat)  # −vᵀ H⁻¹ ∂∇L/∂ log λ
    assert relative(gradient, expected) < 1e-6


@pytest.mark.parametrize("inner", [TIGHT, _with_lbfgs])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_solutions_without_a_graph(mode: Any, inner: Any) -> None:
    """Derivatives of the inner problem are taken whatever the caller has switched off, also of inference tensors."""
    with mode():
        x, y, ones = randn(9, 3), randn(9), torch.ones(9, dtype=F64)

        def loss(phi: dict[str, Tensor], *args: Tensor) -> Tensor:
            return ridge(phi["w"], *args)

        args = ones, torch.ones(3, dtype=F64), x, y
        phi = argmin(loss, {"w": torch.zeros(3, dtype=F64)}, args, inner=inner)["w"]
        assert not phi.requires_grad
        assert relative(phi, ridge_solution(ones, torch.ones(3, dtype=F64), x, y)) < 1e-7


def test_on_solve_tells_how_near_the_minimum_is() -> None:
    x, y = randn(2, 9, 3), randn(2, 9)
    weight = torch.ones(9, dtype=F64, requires_grad=True)
    loss = lambda phi, weight: ridge(phi, weight, torch.ones(3, dtype=F64), x, y)  # noqa: E731
    reports: list[Any] = []
    for inner in (GradientDescent(steps=0), TIGHT):
        init = torch.zeros(2, 3, dtype=F64)
        argmin(loss, init, (weight,), inner=inner, on_solve=reports.append).sum().backward()
    norm = (2 * x.mT @ y.unsqueeze(-1)).squeeze(-1).norm(dim=1)  # the gradient at 0
    torch.testing.assert_close(reports[0].inner_gradient_norm, norm)
    assert (reports[1].inner_gradient_norm < 1e-9).all()
    assert (reports[1].relative_residual < 1e-8).all()


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_flat() -> None:
    """No φ, gradient or graph outlives its outer step; and none is kept per inner step or per hyperparameter."""
    x, y = randn(3, 10, 4), randn(3, 10)
    weight = torch.zeros(10, dtype=F64, requires_grad=True)
    optimiser = torch.optim.SGD([weight], lr=0.1)
    seen: list[weakref.ref[Tensor]] = []

    def loss(phi: Tensor, weight: Tensor) -> Tensor:
        seen.append(weakref.ref(phi))
        return ridge(phi, weight.sigmoid(), torch.ones(4, dtype=F64), x, y)

    def alive(outer: int, inner: int) -> int:
        seen.clear()
        for _ in range(outer):
            phi = argmin(loss, torch.zeros(3, 4, dtype=F64), (weight,), inner=GradientDescent(steps=inner, lr=0.01))
            optimiser.zero_grad()
            phi.square().sum().backward()
            optimiser.step()
        del phi
        gc.collect()
        return sum(reference() is not None for reference in seen)

    assert alive(500, 1) == 0
    gc.disable()  # by reference counts alone
    try:
        assert alive(5, 40) == 0
    finally:
        gc.enable()

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def kept(steps: int, copies: int) -> int:
        """Numbers that autograd keeps for the backward pass, beside the hyperparameters themselves."""
        weights = [torch.zeros(10, dtype=F64, requires_grad=True) for _ in range(copies)]
        own = {w.data_ptr() for w in weights}
        packed: list[weakref.ref[Kept]] = []

        def pack(tensor: Tensor) -> Kept:
            packed.append(weakref.ref(box := Kept(tensor)))
            return box

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            phi = argmin(
                lambda phi, ws: ridge(phi, sum(ws).sigmoid(), torch.ones(4, dtype=F64), x, y),
                torch.zeros(3, 4, dtype=F64),
                (weights,),
                inner=GradientDescent(steps=steps, lr=0.01),
            )
        boxes = [box for reference in packed if (box := reference()) is not None]
        assert phi.requires_grad
        return sum(box.tensor.numel() for box in boxes if box.tensor.data_ptr() not in own)

    assert kept(2, 1) == kept(60, 1) > 0
    assert kept(2, 1) == kept(2, 50)


# ---- beside other libraries ------------------------------------------------------------------------------------------


def test_equals_hypertorch() -> None:
    """Its logistic regression with a penalty per feature: the gradient of its `CG` at one φ."""
    hypergradients = library("hypergrad.hypergradients")
    x, y, x_val, y_val = randn(40, 6), randn(40).sign(), randn(30, 6), randn(30).sign()

    def train(w: Tensor, log_l2: Tensor) -> Tensor:
        return F.softplus(-y * (x @ w)).mean() + 0.5 * (log_l2.exp() * w**2).mean()

    def val(w: Tensor) -> Tensor:
        return F.softplus(-y_val * (x_val @ w)).mean()

    log_l2 = randn(6).requires_grad_()
    phi = argmin(train, torch.zeros(6, dtype=F64), (log_l2,), inner=TIGHT, linear_solver=EXACT)
    (found,) = torch.autograd.grad(val(phi), log_l2)

    def step(params: list[Tensor], hparams: list[Tensor]) -> list[Tensor]:
        (gradient,) = torch.autograd.grad(train(params[0], hparams[0]), params, create_graph=True)
        return [params[0] - 0.5 * gradient]

    params = [phi.detach().requires_grad_()]
    # A tolerance that its CG meets would make it return the iterate before the one that met it.
    expected = hypergradients.CG(params, [log_l2], 9, step, lambda p, h: val(p[0]), tol=0.0, set_grad=False)
    assert relative(found, expected[0]) < 1e-8


def test_equals_the_custom_root_of_torchopt() -> None:
    """Its ridge regression, with a penalty and data that are differentiated."""
    torchopt = library("torchopt")
    x, y, l2 = randn(20, 5).requires_grad_(), randn(20), torch.tensor(0.7, dtype=F64, requires_grad=True)

    def objective(params: Tensor, l2: Tensor, x: Tensor) -> Tensor:
        return 0.5 * (x @ params - y).square().mean() + 0.5 * l2 * params.square().sum()

    @torchopt.diff.implicit.custom_root(
        lambda params, l2, x: torch.func.grad(objective)(params, l2, x),
        argnums=1,
        solve=torchopt.linear_solve.solve_cg(maxiter=100, atol=1e-14),
    )
    def solver(params: Tensor, l2: Tensor, x: Tensor) -> Tensor:
        return torch.linalg.solve(x.mT @ x + len(y) * l2 * torch.eye(5, dtype=F64), x.mT @ y)

    phi = argmin(objective, torch.zeros(5, dtype=F64), (l2, x), inner=TIGHT, linear_solver=EXACT)
    reference = solver(torch.zeros(5, dtype=F64), l2, x)
    v = randn(5)
    assert relative(phi, reference) < 1e-8
    (found,), (expected,) = (torch.autograd.grad((v * value).sum(), l2) for value in (phi, reference))
    assert relative(found, expected) < 1e-8


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors_name_the_argument() -> None:
    weight, init = torch.ones(3, dtype=F64, requires_grad=True), torch.zeros(2, 3, dtype=F64)

    def loss(phi: Tensor, weight: Tensor) -> Tensor:
        return (weight * phi**2).sum(-1)

    def call(loss: Any = loss, init: Any = init, args: Any = (weight,), **options: Any) -> Any:
        return argmin(loss, init, args, **options)

    one = torch.zeros(3, dtype=F64)
    for error, words, wrong in (
        (TypeError, "loss must be a function or a Loss, got int", {"loss": 1}),
        (TypeError, "loss must return a tensor, got float", {"loss": lambda phi, w: 1.0}),
        (ValueError, r"loss must return a number \[\], or one per problem \[B\], got \[2, 3\]", {"loss": torch.mul}),
        (TypeError, "args must be a tuple of what loss takes after phi, got Tensor", {"args": weight}),
        (TypeError, "init must be a tensor or a nested structure of tensors, got NoneType", {"init": None}),
        (TypeError, "init must be float32, float64.*got torch.int64", {"init": torch.zeros(2, 3, dtype=torch.int64)}),
        (TypeError, "theta must be float32 or float64", {"init": torch.zeros(2, 3, dtype=torch.bfloat16)}),
        (ValueError, r"one row per problem, \[3, …\]", {"loss": lambda phi, w: (w * phi**2).sum(0)}),
        (ValueError, "center and lam must be given together", {"lam": 1.0}),
        (ValueError, "center must have the shape of init", {"lam": 1.0, "center": one[:2]}),
        (ValueError, "lam must be at least 0", {"lam": -1.0, "center": init}),
        (TypeError, "inner must be an inner solver or a function, got int", {"inner": 1}),
        (ValueError, "what inner returns must have the shape of init", {"inner": lambda objective, init: one}),
        (TypeError, "what inner returns must be a tensor where init is", {"inner": lambda objective, init: None}),
        (ValueError, "on_breakdown must be", {"on_breakdown": "stop"}),
        (ValueError, "on_breakdown must not be 'gradient' without lam and damping", {"on_breakdown": "gradient"}),
        (TypeError, "loss must be a TaskLoss with curvature='gauss_newton'", {"curvature": "gauss_newton"}),
    ):
        with pytest.raises(error, match=words):
            call(**wrong)
    phi = call(lambda phi, weight: -loss(phi, weight), inner=GradientDescent(steps=0))
    with pytest.raises(SolveError, match="NEGATIVE_CURVATURE"):
        phi.sum().backward()
    scales = torch.logspace(0, 4, 3, dtype=F64)
    phi = call(lambda phi, weight: loss(phi - 1, weight * scales), linear_solver=CG(max_iterations=1))
    with pytest.warns(SolveWarning, match="linear systems of argmin end unfinished"):
        (phi * randn(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="argmin must be called outside the transforms"):
        torch.func.grad(lambda w: argmin(loss, init, (w,)).sum())(weight.detach())
