"""An nn.Module for many tasks: torch's vmap, a loop over tasks, and the handlers of imaml_ext, side by side.

    python benchmarks/modules.py --json benchmarks/results/modules.json

One meta-gradient of 8 tasks, 5-way 1-shot, on one thread in float32; CPU time, and the peak of memory in a process of
its own. Everybody has the same parameters and data, and takes turns in an order that rotates.

Conv4 (64 filters, 28 × 28, strided): `IMAML` with 5 inner steps and 5 CG products, by the native network and by the
same network as an nn.Module. ResNet-12 (64-160-320-640 and a quarter of that, 84 × 84): one inner step, the query
gradient and one product with the Hessian.

"from_module" is what a user of imaml_ext writes, "from_module, one by one" the same with `tasks_per_chunk=1`. "loop" is
the loop over tasks that one would write without it (`torch.func.functional_call` and autograd), "vmap" torch's vmap
under `IMAML` (of Conv4 alone: a ResNet's takes 9 GiB). With "handlers" some functions of torch are computed by
`imaml_ext.models.task_functions`. Results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import check_equal, distances, write_result
from peers import conv4_network
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from imaml_ext import IMAML, TaskLoss, from_module
from imaml_ext.data import EpisodeBatch
from imaml_ext.inner import GradientDescent
from imaml_ext.models import Conv4, ParameterLayout
from imaml_ext.models.task_functions import HANDLERS
from imaml_ext.solvers import CG

TASKS, WAYS = 8, 5
STEPS, PRODUCTS, RATE, LAM, DAMPING = 5, 5, 0.01, 2.0, 22.0  # lambda and damping as in peers.py


class Handlers(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return HANDLERS.get(func, func)(*args, **(kwargs or {}))


class _Block(nn.Module):
    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        sizes = (channels, filters, filters)
        self.convolutions = nn.ModuleList(nn.Conv2d(size, filters, 3, padding=1, bias=False) for size in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(filters, track_running_stats=False) for _ in range(4))
        self.shortcut = nn.Conv2d(channels, filters, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for convolution, norm in zip(self.convolutions, self.norms, strict=False):
            y = norm(convolution(y if y is x else F.leaky_relu(y, 0.1)))
        return F.max_pool2d(F.leaky_relu(y + self.norms[3](self.shortcut(x)), 0.1), 2)


class ResNet12(nn.Module):
    """As in Lee et al., Meta-learning with differentiable convex optimization (2019), without DropBlock."""

    def __init__(self, ways: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Block(c, f) for c, f in zip((3, *widths), widths, strict=False)))
        self.linear = nn.Linear(widths[-1], ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(x).mean((2, 3)))


class Problem:
    """A network with its parameters θ [N], and the episodes."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.small = name == "conv4"
        if self.small:
            self.module, image = conv4_network(WAYS, 64, seed=0, device=torch.device("cpu")), (1, 28, 28)
        else:
            width = 4 if name.endswith("quarter") else 1
            self.module, image = ResNet12(WAYS, [w // width for w in (64, 160, 320, 640)]), (3, 84, 84)
        named = {key: p.detach() for key, p in self.module.named_parameters()}
        self.layout = ParameterLayout.of({key: p.shape for key, p in named.items()})
        self.theta = self.layout.flatten(named)
        labels = torch.arange(WAYS).expand(TASKS, WAYS).contiguous()
        support, query = torch.rand(2, TASKS, WAYS, *image)
        self.episodes = EpisodeBatch(support, labels, query, labels)

    def losses(self, params: Tensor, data: Any) -> Tensor:
        """[B] of all tasks at once."""

        def of_a_task(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(self.module, parameters, (x,)), y)

        return vmap(of_a_task)(self.layout.views(params), data.x, data.y)

    def at_once(self, *, handlers: bool) -> Tensor:
        """The meta-gradient [N] by imaml_ext, whose loss calls the module under vmap."""

        def losses(params: Tensor, data: Any) -> Tensor:
            with Handlers() if handlers else contextlib.nullcontext():
                return self.losses(params, data)

        return self.algorithm(losses).meta_gradient(self.theta, self.episodes).gradient

    def algorithm(self, loss: Any) -> IMAML:
        steps, products = (STEPS, PRODUCTS) if self.small else (1, 1)
        return IMAML(
            loss,
            lam=LAM,
            damping=DAMPING,
            inner=GradientDescent(steps, RATE),
            linear_solver=CG(max_iterations=products, rtol=0.0),
            curvature="hessian",
        )

    def native(self) -> Tensor:
        """The same by `Conv4`, whose weights lie the other way round."""
        model = Conv4(WAYS, filters=64)
        views = {key: _turned(value, back=True) for key, value in self.layout.views(self.theta).items()}
        theta = model.layout.flatten(views)
        found = self.algorithm(TaskLoss(model, "cross_entropy")).meta_gradient(theta, self.episodes).gradient
        return self.layout.flatten({key: _turned(value) for key, value in model.layout.views(found).items()})

    def loop(self, *, handlers: bool) -> Tensor:
        """The same for one task after another, with autograd alone."""
        steps, products = (STEPS, PRODUCTS) if self.small else (1, 1)
        sizes, total = [p.numel() for p in self.module.parameters()], torch.zeros_like(self.theta)
        e = self.episodes
        for task in zip(e.support_x, e.support_y, e.query_x, e.query_y, strict=True):
            x, y, query_x, query_y = task

            def gradient(phi: Tensor, x: Tensor, y: Tensor, create_graph: bool = False) -> tuple[Any, Any]:
                leaves = [piece.clone().requires_grad_() for piece in phi.split(sizes)]
                named = dict(zip(self.layout.names, leaves, strict=True))
                shaped = {k: p.view(s) for (k, p), s in zip(named.items(), self.layout.shapes, strict=True)}
                with Handlers() if handlers else contextlib.nullcontext():
                    loss = F.cross_entropy(functional_call(self.module, shaped, (x,)), y)
                return leaves, torch.autograd.grad(loss, leaves, create_graph=create_graph)

            phi = self.theta.clone()
            for _ in range(steps):
                phi -= RATE * (torch.cat(gradient(phi, x, y)[1]) + LAM * (phi - self.theta))
            v = torch.cat(gradient(phi, query_x, query_y)[1])
            leaves, linearised = gradient(phi, x, y, create_graph=True)
            u, r, p = torch.zeros_like(v), v.clone(), v.clone()
            for _ in range(products):
                Hp = torch.autograd.grad(linearised, leaves, p.split(sizes), retain_graph=True)
                Ap = torch.cat(Hp) + (LAM + DAMPING) * p
                alpha = r.dot(r) / p.dot(Ap)
                u, before = u + alpha * p, r
                r = r - alpha * Ap
                p = r + r.dot(r) / before.dot(before) * p
            total += LAM * u / TASKS
        return total

    @cached_property
    def loss(self) -> TaskLoss:
        return TaskLoss(from_module(self.module), "cross_entropy")

    def by_from_module(self, chunk: int | None) -> Tensor:
        algorithm = replace(self.algorithm(self.loss), tasks_per_chunk=chunk)
        return algorithm.meta_gradient(self.theta, self.episodes).gradient

    def contestants(self) -> dict[str, Callable[[], Tensor]]:
        calls: dict[str, Callable[[], Tensor]] = {"native": self.native} if self.small else {}
        calls["from_module"] = lambda: self.by_from_module(None)
        calls["from_module, one by one"] = lambda: self.by_from_module(1)
        for handlers in (True, False):
            what = ", handlers" if handlers else ""
            if self.small:
                calls[f"vmap{what}"] = lambda handlers=handlers: self.at_once(handlers=handlers)
            calls[f"loop{what}"] = lambda handlers=handlers: self.loop(handlers=handlers)
        return calls


def _turned(value: Tensor, *, back: bool = False) -> Tensor:
    """[3, 3, in, out] and [in, out] of `Conv4` to [out, in, 3, 3] and [out, in] of a module, or back."""
    if value.dim() == 4:
        return value.permute(2, 3, 1, 0) if back else value.permute(3, 2, 0, 1)
    return value.T if value.dim() == 2 else value


def seconds(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def peak_mib(network: str, name: str) -> int:
    """MiB that a process of its own holds at most during the call, beyond what it held before."""
    command = [sys.executable, __file__, "--network", network, "--memory-of", name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _kib(what: str) -> int:
    """Of this process, as Linux has it; getrusage would count what the parent held."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def measure(network: str, rounds: int) -> dict[str, Any]:
    calls = Problem(network).contestants()
    found = {name: call() for name, call in calls.items()}
    apart = distances(found, found["loop"])
    check_equal(apart, 5e-2, f"meta-gradients of {network}")  # float32 next to the kinks of ReLUs
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        order = list(calls)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            times[name].append(seconds(calls[name]))
    rows = {}
    for name, values in times.items():
        to_loop = statistics.median(a / b for a, b in zip(values, times["loop"], strict=True))
        rows[name] = {
            "median_s": round(statistics.median(values), 4),
            "min_s": round(min(values), 4),
            "max_s": round(max(values), 4),
            "rounds": rounds,
            "ratio_to_loop": round(to_loop, 3),
            "peak_mib": peak_mib(network, name),
            "distance": apart[name],
        }
        if "native" in times:
            ratios = (a / b for a, b in zip(values, times["native"], strict=True))
            rows[name]["ratio_to_native"] = round(statistics.median(ratios), 3)
        print(network, name, rows[name], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    networks = ["conv4", "resnet12-quarter", "resnet12"]
    parser.add_argument("--network", nargs="*", default=networks, choices=networks)
    parser.add_argument("--rounds", type=int, default=9, help="of conv4; a third of that, and a ninth, of the ResNets")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        call = Problem(options.network[0]).contestants()[options.memory_of]
        before = _kib("VmRSS")
        call()
        print((_kib("VmHWM") - before) // 1024)
        return 0
    parts = {"conv4": 1, "resnet12-quarter": 3, "resnet12": 9}
    results = {network: measure(network, -(-options.rounds // parts[network])) for network in options.network}
    if options.json:
        sizes = {"tasks": TASKS, "ways": WAYS, "conv4_steps": STEPS, "conv4_products": PRODUCTS}
        write_result(options.json, script="modules", device=torch.device("cpu"), **sizes, results=results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
