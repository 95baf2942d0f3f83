"""The same meta-step by everyone who offers one: this package, the peers, and plain PyTorch.

All compute one thing, from the same θ and the same episodes (`Algorithm`): adapt, query gradient, conjugate gradients
on (H + (λ + δ) I) u = v for a fixed number of iterations from zero, mean over the tasks of λu, one Adam step. The step
size of Adam is 0, so that θ stays where it is while all of the work is done.

Each implementation is written the way its authors' example writes it, less what the others do not do: accuracies and
losses before and after adaptation are left out, tolerances are 0. Known differences in scale are divided out:

    imaml_dev     A = (1 + c) I + H / (λ + 10), its λ + 10 a default that its script keeps. c is chosen so that A is our
                  matrix / (λ + 10); with its own λ = 2, c = 1 that is δ = 22, the default here.
    hypertorch    the fixed-point map is a gradient step of length 1 on L + ½ (λ + δ) ‖φ − θ‖²; gives (λ + δ) u
    TorchOpt      optimality of the same objective; gives (λ + δ) u. `solve_cg`, where its example has the normal
                  equations, at twice the products.
    replayed      ours, captured as a CUDA graph
    JAX           the whole step jitted, tasks by vmap, H linearised once
    grouped       all tasks through `conv2d(groups=tasks)`, the gradient's graph built once

The network is the same for all (`conv4_module`), as an nn.Module for those that take one.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from imaml_ext import IMAML, TaskLoss, from_module
from imaml_ext.data import EpisodeBatch
from imaml_ext.inner import GradientDescent
from imaml_ext.models import Conv4, TaskModel
from imaml_ext.solvers import CG


@dataclass(frozen=True)
class Algorithm:
    """What is computed.

    proximal: "after", `inner_steps` gradient steps on L and then one step φ ← φ − lr λ (φ − θ), which is what the
    public code of the paper does; or "gradient", the steps on L + ½ λ ‖φ − θ‖².
    lr: the default of the public code. What a step costs does not depend on its size.
    """

    proximal: str
    inner_steps: int
    cg_steps: int
    lr: float = 0.01
    lam: float = 2.0
    damping: float = 22.0

    @property
    def shift(self) -> float:
        return self.lam + self.damping


@dataclass(frozen=True)
class Problem:
    """Where: the network with its θ, and the episodes."""

    algorithm: Algorithm
    network: nn.Module
    episodes: EpisodeBatch

    @property
    def device(self) -> torch.device:
        return self.episodes.support_x.device

    def module(self) -> nn.Module:
        return copy.deepcopy(self.network)

    def tasks(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Support x, y, query x, y of every task."""
        e = self.episodes
        return list(zip(e.support_x, e.support_y, e.query_x, e.query_y, strict=True))

    def rows(self, index: Tensor) -> Problem:
        """The problem of some of the tasks."""
        e = self.episodes
        picked = (t[index.to(t.device)] for t in (e.support_x, e.support_y, e.query_x, e.query_y))
        return Problem(self.algorithm, self.network, EpisodeBatch(*picked))

    def double(self) -> Problem:
        return Problem(self.algorithm, self.module().double(), self.episodes.to(dtype=torch.float64))


@dataclass(frozen=True)
class Implementation:
    """`step()` is one meta-step; `gradient(step())` the mean of λu [N] that it gave, in the order of the module."""

    name: str
    step: Callable[[], Any]
    gradient: Callable[[Any], Tensor]


class _SpatialMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def conv4_module(ways: int, filters: int) -> nn.Module:
    """`imaml_ext.models.Conv4` (strided) as an nn.Module, with the same names of parameters."""
    layers: list[tuple[str, nn.Module]] = []
    for layer in range(1, 5):
        channels = 1 if layer == 1 else filters
        layers += [
            (f"conv{layer}", nn.Conv2d(channels, filters, 3, stride=2, padding=1, bias=False)),
            (f"norm{layer}", nn.BatchNorm2d(filters, track_running_stats=False)),
            (f"relu{layer}", nn.ReLU()),
        ]
    return nn.Sequential(OrderedDict([*layers, ("mean", _SpatialMean()), ("linear", nn.Linear(filters, ways))]))


def conv4_network(ways: int, filters: int, *, seed: int, device: torch.device) -> nn.Module:
    """`conv4_module` with the initial parameters of `Conv4`."""
    model, network = Conv4(ways, filters=filters), conv4_module(ways, filters)
    values = model.layout.views(model.init(seed=seed))
    network.load_state_dict({name: _swap_convention(value) for name, value in values.items()})
    return network.to(device)


def _swap_convention(value: Tensor) -> Tensor:
    """[3, 3, in, out] and [in, out] of `Conv4` to [out, in, 3, 3] and [out, in] of the nn.Module."""
    return value.permute(3, 2, 0, 1) if value.dim() == 4 else value.T if value.dim() == 2 else value


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


# --- this package -----------------------------------------------------------------------------------------------------


def imaml(algorithm: Algorithm, loss: TaskLoss) -> IMAML:
    return IMAML(
        loss,
        lam=algorithm.lam,
        inner=GradientDescent(algorithm.inner_steps, algorithm.lr, proximal=algorithm.proximal),
        linear_solver=CG(max_iterations=algorithm.cg_steps, rtol=0.0),
        damping=algorithm.damping,
        curvature="hessian",
    )


def _ours(
    name: str, problem: Problem, model: TaskModel, theta: Tensor, gradient: Callable, *, capturable: bool = False
) -> Implementation:
    algorithm = imaml(problem.algorithm, TaskLoss(model, "cross_entropy"))
    optimizer = torch.optim.Adam([theta], lr=0.0, capturable=capturable)

    def step() -> Tensor:
        theta.grad = algorithm.meta_gradient(theta, problem.episodes).gradient
        optimizer.step()
        return theta.grad

    return Implementation(name, step, gradient)


def imaml_ext(problem: Problem, *, capturable: bool = False) -> Implementation:
    linear = problem.network.linear
    model = Conv4(linear.out_features, filters=linear.in_features)
    ours = {name: p.detach() for name, p in problem.network.named_parameters()}
    back = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
    theta = model.layout.flatten({name: p.permute(back[p.dim()]) for name, p in ours.items()})

    def gradient(flat: Tensor) -> Tensor:
        views = model.layout.views(flat)
        return _flat([_swap_convention(views[name]) for name in ours])

    return _ours("imaml_ext", problem, model, theta, gradient, capturable=capturable)


def imaml_ext_replayed(problem: Problem) -> Implementation:
    """The same step captured once as a CUDA graph, as training does with `run.capture`."""
    ours = imaml_ext(problem, capturable=True)
    stream, graph = torch.cuda.Stream(problem.device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(problem.device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            ours.step()
    torch.cuda.current_stream(problem.device).wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        result = ours.step()

    def step() -> Tensor:
        graph.replay()
        return result

    return Implementation("imaml_ext, replayed", step, ours.gradient)


def imaml_ext_module(problem: Problem) -> Implementation:
    """The nn.Module, which this package knows nothing of, through `from_module`."""
    model = from_module(problem.network)
    theta = model.init(seed=0, dtype=problem.episodes.support_x.dtype, device=problem.device)
    return _ours("imaml_ext, nn.Module", problem, model, theta, lambda flat: flat)


# --- plain PyTorch ----------------------------------------------------------------------------------------------------


def grouped(problem: Problem) -> Implementation:
    """Every task a group of one convolution: what batching over tasks gives without any kernel of one's own."""
    theta = [p.detach().clone() for p in problem.network.parameters()]
    optimizer = torch.optim.Adam(theta, lr=0.0)
    solve = grouped_solver(problem)

    def step() -> Tensor:
        meta_gradient = problem.algorithm.lam * solve(theta).mean(0)
        for p, g in zip(theta, meta_gradient.split([p.numel() for p in theta]), strict=True):
            p.grad = g.view_as(p)
        optimizer.step()
        return meta_gradient

    return Implementation("grouped conv2d", step, lambda flat: flat)


def grouped_solver(problem: Problem) -> Callable[[Sequence[Tensor]], Tensor]:
    """θ, as the module's parameters, to u [B, N]."""
    algorithm, episodes = problem.algorithm, problem.episodes
    tasks = episodes.num_tasks
    names = [name for name, _ in problem.network.named_parameters()]

    def images(x: Tensor) -> Tensor:  # [B, S, 1, H, W] -> [S, B, H, W]
        return x.squeeze(2).transpose(0, 1).contiguous()

    def convolve(x: Tensor, weight: Tensor) -> Tensor:  # [S, B C, H, W], [B, C', C, 3, 3] -> [S, B C', H', W']
        if x.dtype == torch.float32:
            return F.conv2d(x, weight.flatten(0, 1), stride=2, padding=1, groups=tasks)
        images, size = x.shape[0], (x.shape[-1] + 1) // 2  # the same in products, for which float64 has fast kernels
        patches = F.unfold(x, 3, padding=1, stride=2).view(images, tasks, -1, size * size).permute(1, 2, 0, 3)
        y = torch.bmm(weight.flatten(2), patches.flatten(2)).view(tasks, -1, images, size, size)
        return y.permute(2, 0, 1, 3, 4).reshape(images, -1, size, size)

    def losses(parameters: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:  # [B]
        p = dict(zip(names, parameters, strict=True))  # [B, *shape]
        for layer in range(1, 5):
            x = convolve(x, p[f"conv{layer}.weight"])
            scale, offset = p[f"norm{layer}.weight"].flatten(), p[f"norm{layer}.bias"].flatten()
            x = F.relu(F.batch_norm(x, None, None, scale, offset, training=True))
        features = x.mean((2, 3)).view(x.shape[0], tasks, -1).transpose(0, 1)  # [B, S, filters]
        logits = torch.baddbmm(p["linear.bias"].unsqueeze(1), features, p["linear.weight"].transpose(1, 2))
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)

    def gradient(phi: Sequence[Tensor], x: Tensor, y: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(losses(phi, x, y).sum(), phi, create_graph=create_graph)

    def rows(tensors: Sequence[Tensor]) -> Tensor:  # [B, N]
        return torch.cat([tensor.reshape(tasks, -1) for tensor in tensors], 1)

    support_x, query_x = images(episodes.support_x), images(episodes.query_x)

    def solve(theta: Sequence[Tensor]) -> Tensor:
        phi = [p.expand(tasks, *p.shape).clone().requires_grad_() for p in theta]
        for _ in range(algorithm.inner_steps):
            g = gradient(phi, support_x, episodes.support_y)
            with torch.no_grad():
                for p, center, slope in zip(phi, theta, g, strict=True):
                    if algorithm.proximal == "gradient":
                        slope = torch.add(slope, p - center, alpha=algorithm.lam)
                    p.sub_(slope, alpha=algorithm.lr)
        if algorithm.proximal == "after":
            with torch.no_grad():
                for p, center in zip(phi, theta, strict=True):
                    p.sub_(p - center, alpha=algorithm.lr * algorithm.lam)
        v = rows(gradient(phi, query_x, episodes.query_y))
        linearised = gradient(phi, support_x, episodes.support_y, create_graph=True)
        shapes, sizes = [p.shape for p in phi], [p[0].numel() for p in phi]

        def matrix(p: Tensor) -> Tensor:  # H p + (λ + δ) p
            pieces = [piece.view(shape) for piece, shape in zip(p.split(sizes, 1), shapes, strict=True)]
            Hp = rows(torch.autograd.grad(linearised, phi, pieces, retain_graph=True))
            return Hp.add_(p, alpha=algorithm.shift)

        u, r, p = torch.zeros_like(v), v.clone(), v.clone()
        rr = torch.linalg.vecdot(r, r).unsqueeze(1)
        for _ in range(algorithm.cg_steps):
            Ap = matrix(p)
            alpha = rr / torch.linalg.vecdot(p, Ap).unsqueeze(1)
            u.addcmul_(alpha, p)
            r.addcmul_(alpha, Ap, value=-1)
            rr, before = torch.linalg.vecdot(r, r).unsqueeze(1), rr
            p = torch.addcmul(r, rr / before, p)
        return u

    return solve


# --- the check --------------------------------------------------------------------------------------------------------


def check_problem(problem: Problem, pool: Problem, *, distinct: int = 2) -> tuple[Problem, Tensor]:
    """The same problem on few distinct tasks, each many times, and its meta-gradient [N] in float64.

    Where an activation comes within rounding of the kink of its ReLU, rounding decides on which side it falls; with one
    image a class that moves a task's u by percents, in any implementation, for about one task in twenty. So those of
    the pool's tasks are taken whose u, in float64, changes least when θ does by parts in a hundred thousand, far more
    than float32 rounds.
    """
    exact = pool.double()
    solve, theta = grouped_solver(exact), [p.detach() for p in exact.network.parameters()]
    u = solve(theta)
    moved = torch.zeros_like(u[:, 0])
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        noise = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in theta]
        other = solve([p * (1 + 1e-5 * n) for p, n in zip(theta, noise, strict=True)])
        moved = torch.maximum(moved, (other - u).norm(dim=1) / u.norm(dim=1))
    chosen = moved.argsort()[:distinct]
    index = chosen[torch.arange(problem.episodes.num_tasks, device=chosen.device) % chosen.numel()]
    return pool.rows(index), problem.algorithm.lam * u[index].mean(0)


# --- peers ------------------------------------------------------------------------------------------------------------


def imaml_dev(problem: Problem, path: Path) -> Implementation:
    """The code published with the paper: github.com/aravindr93/imaml_dev at `path`."""
    with _importing_from(path):
        from implicit_maml import utils
        from implicit_maml.learner_model import Learner
    algorithm = problem.algorithm
    meta_learner, learner = (
        Learner(
            problem.module(),
            loss_function=nn.CrossEntropyLoss(),
            inner_lr=algorithm.lr,
            outer_lr=0.0,
            GPU=problem.device.type == "cuda",
        )
        for _ in range(2)
    )
    lam = torch.tensor(algorithm.lam, device=problem.device)
    lam_damping = 10.0  # the default of Learner.matrix_evaluator
    cg_damping = algorithm.shift / (algorithm.lam + lam_damping) - 1
    tasks = [dict(zip(("x_train", "y_train", "x_val", "y_val"), task, strict=True)) for task in problem.tasks()]

    def step() -> Tensor:
        theta = meta_learner.get_params()
        meta_gradient = torch.zeros_like(theta)
        for task in tasks:
            learner.set_params(theta.clone())
            if algorithm.proximal == "gradient":
                learner.learn_task(task, algorithm.inner_steps, add_regularization=True, w_0=theta, lam=lam)
            else:
                learner.learn_task(task, algorithm.inner_steps)
                learner.inner_opt.zero_grad()
                learner.regularization_loss(theta, lam).backward()
                learner.inner_opt.step()
            query_loss = learner.get_loss(task["x_val"], task["y_val"])
            v = _flat(torch.autograd.grad(query_loss, learner.model.parameters()))
            matrix = learner.matrix_evaluator(task, lam, cg_damping)
            meta_gradient += utils.cg_solve(matrix, v, algorithm.cg_steps, residual_tol=0.0) / len(tasks)
        meta_learner.outer_step_with_grad(meta_gradient, flat_grad=True)
        return meta_gradient

    scale = algorithm.lam / (algorithm.lam + lam_damping)
    return Implementation("imaml_dev", step, lambda flat: scale * flat)


def hypertorch(problem: Problem, path: Path) -> Implementation:
    """github.com/prolearner/hypertorch at `path`; the network made a function by torch.func instead of `higher`."""
    with _importing_from(path):
        import hypergrad
    algorithm = problem.algorithm
    module = problem.module()
    names = [name for name, _ in module.named_parameters()]
    theta = list(module.parameters())
    optimizer = torch.optim.Adam(theta, lr=0.0)
    tasks = problem.tasks()

    def loss(parameters: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(module, dict(zip(names, parameters, strict=True)), (x,)), y)

    def distance(parameters: Sequence[Tensor], center: Sequence[Tensor]) -> Tensor:
        return sum(((p - c) ** 2).sum() for p, c in zip(parameters, center, strict=True))

    def step() -> Tensor:
        optimizer.zero_grad()
        for support_x, support_y, query_x, query_y in tasks:

            def support_loss(
                params: Any, hparams: Any, weight: float, x: Tensor = support_x, y: Tensor = support_y
            ) -> Any:
                return loss(params, x, y) + 0.5 * weight * distance(params, hparams)

            def inner_loss(
                params: Any, hparams: Any, f: Callable = support_loss, x: Any = support_x, y: Any = support_y
            ):
                return f(params, hparams, algorithm.lam) if algorithm.proximal == "gradient" else loss(params, x, y)

            def query_loss(params: Any, hparams: Any, x: Tensor = query_x, y: Tensor = query_y) -> Tensor:
                return loss(params, x, y) / len(tasks)

            inner = hypergrad.GradientDescent(inner_loss, step_size=algorithm.lr)
            phi = [p.detach().clone().requires_grad_() for p in theta]
            for _ in range(algorithm.inner_steps):
                phi = inner(phi, theta, create_graph=False)
            if algorithm.proximal == "after":
                phi = [p - algorithm.lr * algorithm.lam * (p - c) for p, c in zip(phi, theta, strict=True)]
            implicit = hypergrad.GradientDescent(
                lambda params, hparams, f=support_loss: f(params, hparams, algorithm.shift), step_size=1.0
            )
            hypergrad.CG(phi, theta, algorithm.cg_steps, implicit, query_loss, tol=0.0)
        optimizer.step()
        return _flat([p.grad for p in theta])

    return Implementation("hypertorch", step, lambda flat: algorithm.lam / algorithm.shift * flat)


def torchopt(problem: Problem) -> Implementation:
    """TorchOpt's ImplicitMetaGradientModule with its conjugate gradients."""
    import torchopt

    algorithm = problem.algorithm
    solver = torchopt.linear_solve.solve_cg(maxiter=algorithm.cg_steps, rtol=0.0, atol=0.0)

    class Task(torchopt.nn.ImplicitMetaGradientModule, linear_solve=solver):
        def __init__(self, meta_network: nn.Module) -> None:
            super().__init__()
            self.meta_network = meta_network
            self.network = torchopt.module_clone(meta_network, by="deepcopy", detach_buffers=True)
            with torch.no_grad():
                for p, center in zip(self.parameters(), self.meta_parameters(), strict=True):
                    p.data.copy_(center.data)
                    p.detach_().requires_grad_()

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)

        def distance(self) -> Tensor:
            return sum(((p - c) ** 2).sum() for p, c in zip(self.parameters(), self.meta_parameters(), strict=True))

        def objective(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self(x), y) + 0.5 * algorithm.shift * self.distance()

        def solve(self, x: Tensor, y: Tensor) -> Task:
            parameters = tuple(self.parameters())
            optimizer = torch.optim.SGD(parameters, lr=algorithm.lr)
            with torch.enable_grad():
                for _ in range(algorithm.inner_steps):
                    loss = F.cross_entropy(self(x), y)
                    if algorithm.proximal == "gradient":
                        loss = loss + 0.5 * algorithm.lam * self.distance()
                    optimizer.zero_grad()
                    loss.backward(inputs=parameters)
                    optimizer.step()
            if algorithm.proximal == "after":
                with torch.no_grad():
                    for p, center in zip(parameters, self.meta_parameters(), strict=True):
                        p.sub_(p - center, alpha=algorithm.lr * algorithm.lam)
            return self

    meta_network = problem.module()
    optimizer = torch.optim.Adam(meta_network.parameters(), lr=0.0)
    tasks = problem.tasks()

    def step() -> Tensor:
        optimizer.zero_grad()
        for support_x, support_y, query_x, query_y in tasks:
            adapted = Task(meta_network).solve(support_x, support_y)
            (F.cross_entropy(adapted(query_x), query_y) / len(tasks)).backward()
        optimizer.step()
        return _flat([p.grad for p in meta_network.parameters()])

    return Implementation("TorchOpt", step, lambda flat: algorithm.lam / algorithm.shift * flat)


def jax_backend() -> str:
    """Where JAX runs: "cpu" or "gpu"."""
    import jax

    return jax.default_backend()


def jax(problem: Problem) -> Implementation:
    """What a user who knows JAX would write: one jitted step, tasks by vmap, NHWC, H by `jax.linearize`."""
    import jax
    import jax.numpy as jnp
    from jax.flatten_util import ravel_pytree

    jax.config.update("jax_default_matmul_precision", "highest")  # float32 on GPUs too, as everyone else here
    algorithm, e = problem.algorithm, problem.episodes
    parameters = {
        name: jnp.asarray(p.detach().permute(2, 3, 1, 0).cpu().numpy() if p.dim() == 4 else p.detach().cpu().numpy())
        for name, p in problem.network.named_parameters()
    }  # convolutions [3, 3, in, out]
    theta, unravel = ravel_pytree(parameters)
    batch = tuple(
        jnp.asarray(x.permute(0, 1, 3, 4, 2).cpu().numpy() if x.dim() == 5 else x.cpu().numpy())
        for x in (e.support_x, e.support_y, e.query_x, e.query_y)
    )

    def loss(flat: Any, x: Any, y: Any) -> Any:
        p = unravel(flat)
        for layer in range(1, 5):
            x = jax.lax.conv_general_dilated(
                x, p[f"conv{layer}.weight"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            x = (x - mean) * jax.lax.rsqrt(var + 1e-5) * p[f"norm{layer}.weight"] + p[f"norm{layer}.bias"]
            x = jax.nn.relu(x)
        logits = x.mean((1, 2)) @ p["linear.weight"].T + p["linear.bias"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    def task(theta: Any, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        def support_gradient(phi: Any) -> Any:
            return jax.grad(loss)(phi, support_x, support_y)

        pull = algorithm.lam if algorithm.proximal == "gradient" else 0.0

        def descend(_: int, phi: Any) -> Any:
            return phi - algorithm.lr * (support_gradient(phi) + pull * (phi - theta))

        phi = jax.lax.fori_loop(0, algorithm.inner_steps, descend, theta)
        if algorithm.proximal == "after":
            phi = phi - algorithm.lr * algorithm.lam * (phi - theta)
        v = jax.grad(loss)(phi, query_x, query_y)
        _, hvp = jax.linearize(support_gradient, phi)

        def iterate(_: int, state: Any) -> Any:
            u, r, p, rr = state
            Ap = hvp(p) + algorithm.shift * p
            alpha = rr / (p @ Ap)
            u, r = u + alpha * p, r - alpha * Ap
            rr, before = r @ r, rr
            return u, r, r + rr / before * p, rr

        u, *_ = jax.lax.fori_loop(0, algorithm.cg_steps, iterate, (jnp.zeros_like(v), v, v, v @ v))
        return algorithm.lam * u

    def adam(theta: Any, g: Any, state: Any, lr: float = 0.0) -> Any:
        count, m, s = state
        count, m, s = count + 1, 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
        m_hat, s_hat = m / (1 - 0.9**count), s / (1 - 0.999**count)
        return theta - lr * m_hat / (jnp.sqrt(s_hat) + 1e-8), (count, m, s)

    @jax.jit
    def meta_step(theta: Any, state: Any, batch: Any) -> Any:
        g = jax.vmap(task, in_axes=(None, 0, 0, 0, 0))(theta, *batch).mean(0)
        return g, *adam(theta, g, state)

    variables = {"theta": theta, "state": (0, jnp.zeros_like(theta), jnp.zeros_like(theta))}

    def step() -> Any:
        g, variables["theta"], variables["state"] = jax.block_until_ready(
            meta_step(variables["theta"], variables["state"], batch)
        )
        return g

    def gradient(flat: Any) -> Tensor:
        import numpy

        tree = {name: torch.from_numpy(numpy.array(value)) for name, value in unravel(flat).items()}
        ordered = [tree[name] for name, _ in problem.network.named_parameters()]
        return _flat([t.permute(3, 2, 0, 1) if t.dim() == 4 else t for t in ordered]).to(problem.device)

    return Implementation("JAX", step, gradient)


class _importing_from:  # noqa: N801
    """Finds modules in `path` first, for as long as the block lasts."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise FileNotFoundError(f"the path of a peer must be a folder with its source, got {path}")
        self.path = str(path.resolve())

    def __enter__(self) -> None:
        sys.path.insert(0, self.path)

    def __exit__(self, *_: object) -> None:
        sys.path.remove(self.path)
