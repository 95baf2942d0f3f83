"""The Hessian-free inner solver on Omniglot episodes: its objective never increases, and what it reaches for its cost.

    python benchmarks/hessian_free.py --data-root FOLDER --json docs/results/hessian-free.json

5-way 1-shot, Conv4 with 64 filters, from a random θ and from one that was meta-trained for a few steps. Two parts:

    monotone    1,000 episodes, either matrix: L(φ) + ½ λ ‖φ − θ‖² before and after every Newton step
    compared    the mean objective after 16 gradient steps, for several learning rates, and after Newton steps that cost
                at most as much

Costs are counted in gradients: a gradient 1, a product with the Hessian or the Gauss-Newton matrix 2, a loss ⅓. A
Newton step is a gradient, its products, and as many losses as the line search tries, at least 1.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from imaml_ext import GradientDescent, HessianFree
from imaml_ext.ops import prox_penalty
from imaml_ext.training import PRESETS, build
from imaml_ext.training.config import TrainConfig
from imaml_ext.training.environment import environment
from imaml_ext.training.experiment import Experiment
from imaml_ext.training.run_directory import atomic_write, to_json_text
from imaml_ext.training.schedule import outer_optimizer

LAMS = (2.0, 0.5, 0.1)
RATES = (0.02, 0.05, 0.1, 0.2, 0.4)
NEWTON = ((1, 5), (2, 3), (3, 2), (4, 1))  # Newton steps × CG steps, at most 16 gradients together
BUDGET = 16


def trained(experiment: Experiment, steps: int) -> Tensor:
    """θ after `steps` meta-steps at the preset's constant learning rate."""
    config = experiment.config
    theta = experiment.initial_theta()
    tasks = experiment.sampler("train", tasks=config.outer.meta_batch, seed=config.run.seed)
    optimizer = outer_optimizer(config.outer, theta)
    for step in range(steps):
        theta.grad = experiment.algorithm.meta_gradient(theta, tasks.sample(step)).gradient
        optimizer.step()
    return theta


def objective(experiment: Experiment, phi: Tensor, theta: Tensor, support: object, lam: float) -> Tensor:
    """L(φ) + ½ λ ‖φ − θ‖² of every task, [B]."""
    with torch.no_grad():
        return experiment.loss(phi, support) + prox_penalty(phi, theta, lam)


def monotone(experiment: Experiment, theta: Tensor, *, episodes: int, steps: int, batch: int = 50) -> list[dict]:
    """Every Newton step of every episode, with 5 CG steps at the λ of the preset; the end is evaluated once more."""
    lam = experiment.config.inner.lam
    rows = []
    for curvature in ("hessian", "gauss_newton"):
        solver = HessianFree(steps=steps, cg_steps=5, curvature=curvature)
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
                "cg_steps": solver.cg_steps,
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


def cost(step_sizes: Tensor, cg_steps: int, shrink: float) -> float:
    """Gradient equivalents of Newton steps [steps, B], in the mean over the tasks."""
    tried = 1 + torch.log(step_sizes.clamp(min=shrink**10)) / torch.log(torch.tensor(shrink))
    return len(step_sizes) * (1 + 2 * cg_steps) + float(tried.round().mean(1).sum()) / 3


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
        for curvature in ("gauss_newton", "hessian"):
            for steps, cg_steps in NEWTON:
                solver = HessianFree(steps=steps, cg_steps=cg_steps, curvature=curvature)
                result = solver.solve(experiment.loss, theta, support, lam=lam)
                newton.append(
                    {
                        "curvature": curvature,
                        "newton_steps": steps,
                        "cg_steps": cg_steps,
                        "cost": round(cost(result.step_sizes, cg_steps, solver.shrink), 2),
                        "objective": mean(result.phi),
                    }
                )
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
        print(f"  {rows[-1]}", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--meta-steps", type=int, default=50, help="of training, for the second θ")
    parser.add_argument("--episodes", type=int, default=1000, help="whose objective is followed")
    parser.add_argument("--newton-steps", type=int, default=2, help="of these")
    parser.add_argument("--compared", type=int, default=40, help="episodes of the comparison")
    parser.add_argument("--part", choices=["both", "compared", "monotone"], default="both")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    preset: TrainConfig = PRESETS["omniglot-5w1s-1000"].config
    experiment = build(replace(preset, data=replace(preset.data, root=options.data_root)))
    starts = {"initial": experiment.initial_theta(), f"{options.meta_steps} meta-steps": None}
    results = {}
    for name, theta in starts.items():
        print(f"θ: {name}", file=sys.stderr, flush=True)
        theta = trained(experiment, options.meta_steps) if theta is None else theta
        if options.part != "monotone":
            results[name] = compared(experiment, theta, episodes=options.compared)
    assert theta is not None  # the last one, trained
    increases = []
    if options.part != "compared":
        increases = monotone(experiment, theta, episodes=options.episodes, steps=options.newton_steps)
    stamp = {
        "command": shlex.join(["python", "benchmarks/hessian_free.py", *sys.argv[1:]]),
        "cost": "gradient 1, product with H or G 2, loss 1/3",
        "compared_at": results,
        "monotone_at_the_trained_theta": increases,
        "environment": environment(experiment.device),
    }
    if options.json is not None:
        atomic_write(options.json, to_json_text(stamp))
    else:
        print(json.dumps(stamp, indent=2))
    return int(any(row["steps_that_increased"] for row in increases))


if __name__ == "__main__":
    sys.exit(main())
