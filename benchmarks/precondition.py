"""Products with the matrix that preconditioned conjugate gradients spend, set-up included; nothing is timed.

    python benchmarks/precondition.py --data-root FOLDER --json benchmarks/results/precondition.json

Two parts:

    decaying    matrices of condition number 10⁶ with spectra that decay, float64, to a relative residual of 10⁻⁶
    conv4       the implicit systems of iMAML on Omniglot: Conv4 with published weights θ, φ after the recipe's inner
                steps, Gauss-Newton matrix and Hessian, several λ and damping δ, float64, to a relative residual of
                10⁻⁵. "kept" makes the preconditioner for every tenth task, and uses it for the nine that follow.

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
from imaml_ext.reproduction.paper import paper_settings
from imaml_ext.settings import changed
from imaml_ext.solvers.preconditioners import KFAC, Jacobi, Nystrom, Preconditioner, Refreshed
from imaml_ext.train import Experiment, build

CONDITION, DECAYING_RTOL = 1e6, 1e-6
SPECTRA = {"0.8^i": (0.8, 60), "0.9^i": (0.9, 100), "i^-2": (None, 60)}  # ratio of two eigenvalues, rank
# (weights, column of the table, tasks) and the curvature, λ and δ of their systems
CONV4 = {
    ("omniglot-5w1s", "5w1s", 10): (
        ("gauss_newton", 2.0, 0.0),
        ("gauss_newton", 0.5, 0.0),
        ("gauss_newton", 0.1, 0.0),
        ("gauss_newton", 0.01, 0.0),
        ("hessian", 2.0, 0.0),
        ("hessian", 2.0, 22.0),
        ("hessian", 0.1, 0.0),
        ("hessian", 0.1, 22.0),
    ),
    ("omniglot-20w1s", "20w1s", 4): (("gauss_newton", 2.0, 0.0), ("gauss_newton", 0.1, 0.0)),
}
RTOL, MOST = 1e-5, 300
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
        "mean_total": round(statistics.mean(totals), 1),
        "mean_solve": round(statistics.mean(solve for solve, *_ in rows), 1),
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


def conv4(experiment: Experiment, theta: Tensor, kind: str, lam: float, damping: float, tasks: int) -> dict[str, Any]:
    """What each preconditioner spends on the systems H + λ + δ of the tasks."""
    choices: dict[str, Preconditioner | None] = {
        "plain": None,
        "Jacobi(probes=8)": Jacobi(),
        "Nystrom(rank=5)": Nystrom(rank=5),
        "Nystrom(rank=20)": Nystrom(rank=20),
        "KFAC()": KFAC(),
        "Nystrom(rank=20), kept": Refreshed(Nystrom(rank=20), every=EVERY),
        "KFAC(), kept": Refreshed(KFAC(), every=EVERY),
    }
    problems = systems(experiment, theta, lam, kind, tasks)
    rows = {
        name: summary([solved(operator, v, lam + damping, choice, rtol=RTOL, most=MOST) for operator, v in problems])
        for name, choice in choices.items()
    }
    print(
        f"{kind}, λ = {lam}, δ = {damping}: "
        + ", ".join(f"{k} {v['mean_total']} {v['ended']}" for k, v in rows.items())
    )
    return {"curvature": kind, "lam": lam, "damping": damping, "tasks": tasks, "results": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, help="of Omniglot; without it, decaying spectra alone")
    parser.add_argument("--size", type=int, default=400, help="unknowns of a matrix with a decaying spectrum")
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    body: dict[str, Any] = {"decaying": decaying(size=options.size, rows=options.rows)}
    for (weights, column, tasks), cases in CONV4.items() if options.data_root is not None else ():
        config = changed(paper_settings(column), {"data.root": options.data_root, "run.dtype": "float64"})
        experiment = build(config)
        theta = load_pretrained(weights).weights.params["theta"].to(experiment.dtype)
        inner = config.algorithm.inner
        found = [conv4(experiment, theta, *case, tasks) for case in cases]
        body.setdefault("conv4", []).append(
            {"weights": weights, "inner_steps": inner.steps, "inner_lr": inner.lr, "rtol": RTOL, "systems": found}
        )
    if options.json:
        write_result(options.json, script="precondition", device=torch.device("cpu"), **body)
    return int(min(row["part_of_plain"] for row in body["decaying"]) > 0.2)


if __name__ == "__main__":
    raise SystemExit(main())
