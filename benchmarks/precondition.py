"""Products with the matrix that preconditioned conjugate gradients spend, set-up included; nothing is timed.

    python benchmarks/precondition.py --data-root FOLDER --json benchmarks/results/precondition.json

Three parts:

    decaying    matrices of condition number 10⁶ with spectra that decay, float64, to a relative residual of 10⁻⁶
    conv4       the implicit systems of iMAML on Omniglot: Conv4 with published weights θ, φ after the recipe's inner
                steps, Gauss-Newton matrix and Hessian, several λ, float64, to a relative residual of 10⁻⁵


Every row is solved alone, with a look after each product, so that a count is what this row needs. A count has the
products of the solve, that which measures the residual included, and those of the set-up. KFAC sets up by passes
through the network, which are counted by their price in products (`KroneckerFactors`). "ended" says how many rows ended
with which status: a count is worth comparing only where rows have CONVERGED.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from measure import write_result
from torch import Tensor

from imaml_ext import SolveStatus, cg
from imaml_ext.losses import CurvatureOperator
from imaml_ext.pretrained import load_pretrained
from imaml_ext.settings import changed
from imaml_ext.solvers.preconditioners import KFAC, Jacobi, Nystrom, Preconditioner, Refreshed
from imaml_ext.train import Experiment, build, load_recipe

CONDITION, DECAYING_RTOL = 1e6, 1e-6
SPECTRA = {"0.8^i": (0.8, 60), "0.9^i": (0.9, 100), "i^-2": (None, 60)}  # ratio of two eigenvalues, rank
WEIGHTS, RECIPE = "omniglot-5w1s-gd", "omniglot-5w1s"
LAMS = (2.0, 0.5, 0.1, 0.01)
RTOL = 1e-5
EVERY = 10


class Counted:
    """An operator that counts its calls, and hands KFAC what it needs."""

    def __init__(self, operator: Any) -> None:
        self._operator, self.calls = operator, 0
        self.kronecker_factors = getattr(operator, "kronecker_factors", None)

    def __call__(self, p: Tensor) -> Tensor:
        self.calls += 1
        return self._operator(p)


def solved(
    operator: Any, b: Tensor, shift: float, preconditioner: Preconditioner | None, *, rtol: float, most: int
) -> tuple[int, int, str]:
    """Products of a solve of b [1, N], of its set-up, and the status."""
    counted = Counted(operator)
    made = None if preconditioner is None else preconditioner.make(counted, b, shift)
    set_up_calls, set_up = counted.calls, 0 if made is None else made.products
    solution = cg(counted, b, shift=shift, max_iterations=most, rtol=rtol, check_every=1, preconditioner=made)
    return counted.calls - set_up_calls, set_up, SolveStatus(int(solution.status)).name


def summary(rows: list[tuple[int, int, str]]) -> dict[str, Any]:
    totals = [solve + set_up for solve, set_up, _ in rows]
    return {
        "median_total": statistics.median(totals),
        "median_set_up": statistics.median(set_up for _, set_up, _ in rows),
        "mean_total": round(statistics.mean(totals), 1),
        "ended": dict(Counter(status for *_, status in rows)),
    }


def decaying(*, size: int, rows: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for name, (ratio, rank) in SPECTRA.items():
        i = torch.arange(1, size + 1, dtype=torch.float64)
        eigenvalues = i**-2 if ratio is None else ratio ** (i - 1)
        shift = 1 / CONDITION
        results: dict[str, list[tuple[int, int, str]]] = {"plain": [], f"Nystrom(rank={rank})": []}
        for _ in range(rows):
            q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
            b = torch.randn(1, size, dtype=torch.float64, generator=generator)
            H = (q * eigenvalues) @ q.T
            for label, preconditioner in zip(results, (None, Nystrom(rank=rank)), strict=True):
                results[label].append(
                    solved(lambda p, H=H: p @ H, b, shift, preconditioner, rtol=DECAYING_RTOL, most=20 * size)
                )
        plain, helped = (summary(each) for each in results.values())
        part = round(helped["median_total"] / plain["median_total"], 3)
        found.append({"eigenvalues": name, "size": size, "shift": shift, "plain": plain, "nystrom": helped,
                      "rank": rank, "part_of_plain": part})  # fmt: skip
        print(f"{name}: plain {plain['median_total']}, Nyström of rank {rank} {helped['median_total']} ({part})")
    return found


def systems(experiment: Experiment, theta: Tensor, lam: float, kind: str, tasks: int) -> list[tuple[Any, Tensor]]:
    """H at φ and v = ∇Q(φ) [1, N] of every task."""
    batch = experiment.sampler("test", tasks=tasks, seed=1).sample(0)
    found = []
    for task in range(tasks):
        one = type(batch)(*(tensor[task : task + 1] for tensor in batch.tensors()))
        phi = experiment.config.algorithm.inner.solve(experiment.loss, theta, one.support, lam=lam).phi
        operator: CurvatureOperator = experiment.loss.linearize(phi, one.support, kind)
        found.append((operator, experiment.loss.gradient(phi, one.query).gradient))
    return found


def conv4(experiment: Experiment, theta: Tensor, *, tasks: int, most: int) -> list[dict[str, Any]]:
    choices: dict[str, Preconditioner | None] = {
        "plain": None,
        "Jacobi(probes=8)": Jacobi(),
        "Nystrom(rank=5)": Nystrom(rank=5),
        "Nystrom(rank=20)": Nystrom(rank=20),
        "KFAC()": KFAC(),
    }
    found = []
    for kind in ("gauss_newton", "hessian"):
        for lam in LAMS:
            problems = systems(experiment, theta, lam, kind, tasks)
            rows: dict[str, Any] = {}
            for name, choice in choices.items():
                each = [solved(operator, v, lam, choice, rtol=RTOL, most=most) for operator, v in problems]
                rows[name] = summary(each)
            for name in ("Nystrom(rank=20)", "KFAC()"):
                kept = Refreshed(choices[name], every=EVERY)
                each = [solved(operator, v, lam, kept, rtol=RTOL, most=most) for operator, v in problems]
                rows[f"{name}, kept for {EVERY}"] = summary(each)
            found.append({"curvature": kind, "lam": lam, "tasks": tasks, "results": rows})
            print(f"{kind}, λ = {lam}: " + ", ".join(f"{k} {v['mean_total']} {v['ended']}" for k, v in rows.items()),
                  flush=True)  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, help="of Omniglot; without it, decaying spectra alone")
    parser.add_argument("--size", type=int, default=400, help="unknowns of a matrix with a decaying spectrum")
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--most", type=int, default=200, help="products that a solve of Conv4 may spend")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    body: dict[str, Any] = {"decaying": decaying(size=options.size, rows=options.rows)}
    if options.data_root is not None:
        config = changed(load_recipe(RECIPE).config, {"data.root": options.data_root, "run.dtype": "float64"})
        experiment = build(config)
        theta = load_pretrained(WEIGHTS).weights.params["theta"].to(experiment.dtype)
        inner = {"steps": config.algorithm.inner.steps, "lr": config.algorithm.inner.lr}
        runs = conv4(experiment, theta, tasks=options.tasks, most=options.most)
        body |= {"weights": WEIGHTS, "inner": inner, "rtol": RTOL, "conv4": runs}
    if options.json:
        write_result(options.json, script="precondition", device=torch.device("cpu"), **body)
    return int(min(row["part_of_plain"] for row in body["decaying"]) > 0.2)


if __name__ == "__main__":
    raise SystemExit(main())
