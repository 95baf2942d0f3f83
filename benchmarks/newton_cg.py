"""The inner solver NewtonCG on Omniglot episodes: its objective never increases, and what it reaches for its cost.

    python benchmarks/newton_cg.py --data-root FOLDER --json docs/reproduction/results/hessian-free.json

5-way 1-shot, Conv4 with 64 filters; from a random θ, from one that was meta-trained for a few steps, and from the
published ones, which were trained together with either inner solver. Three parts:

    priced      the processor time of a gradient and of what a Newton step is made of
    compared    the mean objective L(φ) + ½ λ ‖φ − θ‖² after 16 gradient steps, for several learning rates, and after
                as many Newton steps of every task as its 16 gradients buy
    monotone    1,000 episodes, either matrix: the objective before and after every Newton step

Costs are counted in thirds of a gradient, which is three products a convolution: one in the loss, two on the way back.
A product with the Hessian is six, and one with the Gauss-Newton matrix counts as much though it is four; its way
forward, which is all that one iteration of conjugate gradients needs, is two. A Newton step is a gradient, its
products, and as many losses as the line search tries, at least 1.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imaml_ext import CG, GradientDescent, NewtonCG
from imaml_ext.files import atomic_write, json_bytes
from imaml_ext.inner import NewtonResult
from imaml_ext.ops import prox_penalty
from imaml_ext.pretrained import load_pretrained
from imaml_ext.reproduction.paper import paper_settings
from imaml_ext.settings import changed
from imaml_ext.train import Experiment, Outer, build
from imaml_ext.train.environment import environment
from imaml_ext.train.schedule import outer_optimizer

LAMS = (2.0, 0.5, 0.1)
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
PUBLIC_RATE = 0.1  # of the code that the paper's authors published
NEWTON = (  # curvature, CG steps of a direction, part of the promised decrease that a step must bring
    ("gauss_newton", 5, 1e-4),
    ("gauss_newton", 2, 1e-4),
    ("gauss_newton", 1, 1e-4),
    ("gauss_newton", 1, 0.1),
    ("hessian", 1, 1e-4),
)
PUBLISHED = ("omniglot-5w1s", "omniglot-5w1s-newton")
BUDGET = 16  # gradients
GRADIENT, PRODUCT, WAY_FORWARD, LOSS = 3, 6, 2, 1  # thirds of a gradient


def trained(experiment: Experiment, steps: int) -> Tensor:
    """θ after `steps` meta-steps at the recipe's constant learning rate."""
    config = experiment.config
    params = experiment.initial_params()
    theta = params["theta"]
    tasks = experiment.sampler("train", tasks=config.outer.meta_batch, seed=config.run.seed)
    optimizer = outer_optimizer(config.outer, params)
    for step in range(steps):
        theta.grad = experiment.algorithm.meta_gradient(params, tasks.sample(step)).gradient
        optimizer.step()
    return theta


def objective(experiment: Experiment, phi: Tensor, theta: Tensor, support: object, lam: float) -> Tensor:
    """L(φ) + ½ λ ‖φ − θ‖² of every task, [B]."""
    with torch.no_grad():
        return experiment.loss(phi, support) + prox_penalty(phi, theta, lam)


def monotone(experiment: Experiment, theta: Tensor, *, episodes: int, batch: int = 50) -> list[dict]:
    """Every Newton step of every episode at the λ of the recipe; the end is evaluated once more."""
    lam = experiment.config.algorithm.lam
    rows = []
    for curvature, steps, cg_steps in (("hessian", 2, 5), ("gauss_newton", 2, 5), ("gauss_newton", 8, 1)):
        solver = newton_cg(curvature, cg_steps, steps=steps)
        tasks = experiment.sampler("train", tasks=batch, seed=1)
        changes, sizes, negative, apart = [], [], [], 0.0
        for index in range(-(-episodes // batch)):
            support = tasks.sample(index).support
            result = solver.solve(experiment.loss, theta, support, lam=lam)
            end = objective(experiment, result.phi, theta, support, lam)
            apart = max(apart, float((end - result.objectives[-1]).abs().max()))
            changes.append(result.objectives.diff(dim=0))  # [steps, B]
            sizes.append(result.step_sizes)
            negative.append(result.negative_curvature)
        change, size = torch.cat(changes, 1), torch.cat(sizes, 1)
        rows.append(
            {
                "lam": lam,
                "curvature": curvature,
                "episodes": change.shape[1],
                "newton_steps": steps,
                "cg_steps": cg_steps,
                "steps_that_increased": int((change > 0).sum()),
                "largest_change": float(change.max()),
                "mean_change": float(change.mean()),
                "mean_step_size": float(size.mean()),
                "steps_not_taken": int((size == 0).sum()),
                "steps_of_negative_curvature": int(torch.cat(negative, 1).sum()),
                "largest_difference_when_evaluated_again": apart,
            }
        )
        print(f"  {rows[-1]}", file=sys.stderr, flush=True)
    return rows


def newton_cg(curvature: str, cg_steps: int, **settings: Any) -> NewtonCG:
    return NewtonCG(linear_solver=CG(max_iterations=cg_steps, rtol=0.0), curvature=curvature, **settings)


def of_a_solve(solver: NewtonCG) -> int:
    """The products of a direction, in thirds of a gradient."""
    cg_steps = solver.linear_solver.max_iterations
    alone = solver.curvature == "gauss_newton" and cg_steps == 1
    return WAY_FORWARD if alone else PRODUCT * cg_steps


def within_budget(solver: NewtonCG, result: NewtonResult) -> dict[str, float]:
    """The mean objective after as many steps of every task as its budget buys, and what they have cost in the mean."""
    backtracked = (result.step_sizes.log() / math.log(solver.shrink)).round().clamp(max=solver.backtracks)
    of_a_step = GRADIENT + of_a_solve(solver) + LOSS * (1 + backtracked)  # [steps, B]; a step not taken tries them all
    cost = of_a_step.cumsum(0)
    fits = cost <= GRADIENT * BUDGET
    taken = fits.sum(0)  # [B]
    return {
        "newton_steps": float(taken.double().mean()),
        "cost": float((of_a_step * fits).sum(0).mean()) / GRADIENT,
        "objective": float(result.objectives.gather(0, taken.unsqueeze(0)).mean()),
    }


def compared(experiment: Experiment, theta: Tensor, *, episodes: int) -> list[dict]:
    tasks = experiment.sampler("train", tasks=episodes, seed=2)
    support = tasks.sample(0).support
    rows = []
    for lam in LAMS:

        def mean(phi: Tensor, lam: float = lam) -> float:
            return float(objective(experiment, phi, theta, support, lam).mean())

        descent = {
            lr: mean(GradientDescent(steps=BUDGET, lr=lr).solve(experiment.loss, theta, support, lam=lam).phi)
            for lr in RATES
        }
        newton = []
        for curvature, cg_steps, armijo in NEWTON:
            solver = newton_cg(curvature, cg_steps, armijo=armijo)
            most = GRADIENT * BUDGET // (GRADIENT + of_a_solve(solver) + LOSS)
            result = replace(solver, steps=most).solve(experiment.loss, theta, support, lam=lam)
            settings = {"curvature": curvature, "cg_steps": cg_steps, "armijo": armijo}
            newton.append({**settings, **within_budget(solver, result)})
        rows.append(
            {
                "lam": lam,
                "episodes": episodes,
                "objective_at_theta": mean(theta.expand(episodes, -1).contiguous()),
                "gradient_steps": BUDGET,
                "gradient_descent_by_lr": descent,
                "newton": newton,
            }
        )
        best = min(descent, key=descent.__getitem__)
        least = min(newton, key=lambda row: row["objective"])
        print(
            f"  λ = {lam}: gradient descent {descent[PUBLIC_RATE]:.4f} at rate {PUBLIC_RATE}, {descent[best]:.4f} at "
            f"{best}; Newton-CG {least['objective']:.4f} with {least}",
            file=sys.stderr,
            flush=True,
        )
    return rows


def priced(experiment: Experiment, theta: Tensor, *, tasks: int = 16, repetitions: int = 15) -> dict[str, float]:
    """Processor time in gradients, medians of rounds that do everything in turn."""
    support = experiment.sampler("train", tasks=tasks, seed=3).sample(0).support
    phi = theta.detach().expand(tasks, -1).contiguous()
    loss, p = experiment.loss, torch.randn_like(phi)
    hessian, gauss_newton = (loss.linearize(phi, support, kind) for kind in ("hessian", "gauss_newton"))
    newton = newton_cg("gauss_newton", 1, steps=8)
    parts: dict[str, Callable[[], object]] = {
        "gradient": lambda: loss.gradient(phi, support),
        "gradient_and_what_products_need": lambda: loss.linearize(phi, support, "gauss_newton"),
        "loss": lambda: objective(experiment, phi, theta, support, 0.1),
        "product_with_hessian": lambda: hessian(p),
        "product_with_gauss_newton": lambda: gauss_newton(p),
        "its_way_forward": lambda: gauss_newton.curvature(p),
        "16_gradient_steps": lambda: GradientDescent(steps=16).solve(loss, theta, support, lam=0.1),
        "8_newton_steps_of_1_cg_step": lambda: newton.solve(loss, theta, support, lam=0.1),
    }
    spent: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repetitions):
        for name, part in parts.items():
            begin = time.process_time()
            part()
            spent[name].append(time.process_time() - begin)
    medians = {name: statistics.median(times) for name, times in spent.items()}
    prices = {name: round(median / medians["gradient"], 2) for name, median in medians.items()}
    print(f"  {prices}", file=sys.stderr, flush=True)
    return prices


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--meta-steps", type=int, default=50, help="of training, for the second θ")
    parser.add_argument("--episodes", type=int, default=1000, help="whose objective is followed")
    parser.add_argument("--compared", type=int, default=40, help="episodes of the comparison")
    parser.add_argument("--part", choices=["all", "priced", "compared", "monotone"], default="all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    changes = {
        "data.root": options.data_root,
        "tasks.queries": 10,
        "algorithm.lam": 0.1,
        "algorithm.inner.lr": 0.4,
        "outer": Outer(steps=1000, meta_batch=8, lr=3e-3, schedule="cosine"),
    }
    experiment = build(changed(paper_settings("5w1s"), changes))
    after = f"{options.meta_steps} meta-steps"
    starts = {"initial": experiment.initial_params()["theta"], after: trained(experiment, options.meta_steps)}
    starts |= {name: load_pretrained(name).weights.params["theta"] for name in PUBLISHED}

    def asked(part: str) -> bool:
        return options.part in (part, "all")

    prices = priced(experiment, starts[after]) if asked("priced") else {}
    results = {}
    for name, theta in starts.items() if asked("compared") else ():
        print(f"θ: {name}", file=sys.stderr, flush=True)
        results[name] = compared(experiment, theta, episodes=options.compared)
    increases = monotone(experiment, starts[after], episodes=options.episodes) if asked("monotone") else []
    stamp = {
        "command": shlex.join(["python", "benchmarks/newton_cg.py", *sys.argv[1:]]),
        "cost": "gradient 1, product with H or G 2, its way forward 2/3, loss 1/3",
        "processor_time_in_gradients": prices,
        "compared_at": results,
        "monotone_at_the_trained_theta": increases,
        "environment": environment(experiment.device),
    }
    if options.json is not None:
        atomic_write(options.json, json_bytes(stamp))
    else:
        print(json.dumps(stamp, indent=2))
    return int(any(row["steps_that_increased"] for row in increases))


if __name__ == "__main__":
    sys.exit(main())
