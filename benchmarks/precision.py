"""What the precision of the layers' products does to a meta-gradient: float32, TF32 and bfloat16 against float64.

    python benchmarks/precision.py --json benchmarks/results/precision.json

iMAML with the settings of the recipe `glyphs-5w1s` (Gauss-Newton matrix) and with the Hessian, from random parameters
and from parameters that were meta-trained for a few steps. Relative distances from a float64 calculation: of the
support gradient at θ, before any inner step; of the meta-gradient of one task, both in the median over `--tasks` of
them; and of the mean of these meta-gradients. Products are rounded as tensor cores round their operands, so that a CPU
shows it too; nothing is timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import torch
from measure import full_precision, write_result
from newton_cg import trained
from torch import Tensor

from imaml_ext.data import EpisodeBatch
from imaml_ext.models.products import Precision
from imaml_ext.settings import changed
from imaml_ext.train import Experiment, TrainConfig, build, load_recipe


def gradients(experiment: Experiment, theta: Tensor, batch: EpisodeBatch) -> tuple[Tensor, Tensor]:
    """The support gradient at θ and the meta-gradient of every task alone, [B, N] float64."""
    theta = theta.to(experiment.dtype)
    support, meta = [], []
    for task in range(batch.num_tasks):
        here = slice(task, task + 1)
        one = EpisodeBatch(
            batch.support_x[here].to(experiment.dtype),
            batch.support_y[here],
            batch.query_x[here].to(experiment.dtype),
            batch.query_y[here],
        )
        support.append(experiment.loss.gradient(theta.unsqueeze(0), one.support).gradient[0].double())
        meta.append(experiment.algorithm.meta_gradient(theta, one).gradient.double())
    return torch.stack(support), torch.stack(meta)


def distance(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖ of [N], or of [B, N] the median over the rows."""
    return float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).median())


def measured(config: TrainConfig, theta: Tensor, batch: EpisodeBatch) -> dict[str, dict[str, float]]:
    exact_support, exact = gradients(build(changed(config, {"run.dtype": "float64"})), theta, batch)
    rows = {}
    for precision in get_args(Precision):
        experiment = build(changed(config, {"model.precision": precision}))
        support, found = gradients(experiment, theta, batch)
        rows[precision] = {
            "support_gradient": distance(support, exact_support),
            "meta_gradient": distance(found, exact),
            "mean_meta_gradient": distance(found.mean(0), exact.mean(0)),
        }
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=32)
    parser.add_argument("--meta-steps", type=int, default=100, help="of training, for the second θ")
    parser.add_argument("--filters", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    full_precision()
    recipe = load_recipe("glyphs-5w1s").config
    config = changed(recipe, {"model.filters": options.filters, "run.device": options.device})
    starts = {"random θ": 0, f"θ after {options.meta_steps} meta-steps": options.meta_steps}
    batch = build(config).sampler("train", tasks=options.tasks, seed=1).sample(0)
    results = []
    for name, steps in starts.items():
        theta = trained(build(config), steps)
        for curvature in ("gauss_newton", "hessian"):
            rows = measured(changed(config, {"algorithm.curvature": curvature}), theta, batch)
            results.append({"theta": name, "curvature": curvature, "results": rows})
            for precision, row in rows.items():
                print(f"{name}, {curvature}, {precision}: " + ", ".join(f"{k} {v:.1e}" for k, v in row.items()))
    if options.json:
        write_result(
            options.json,
            script="precision",
            device=torch.device(options.device),
            tasks=options.tasks,
            filters=options.filters,
            inner_steps=config.algorithm.inner.steps,
            cg_steps=config.algorithm.linear_solver.max_iterations,
            runs=results,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
