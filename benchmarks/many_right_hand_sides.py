"""K right-hand sides on one curvature matrix of a Conv4, against K solves of one each; CPU time, side by side.

    python benchmarks/many_right_hand_sides.py --data-root FOLDER --json benchmarks/results/many_right_hand_sides.json

The matrix is that of one Omniglot task (5 ways, 1 shot) at the φ that the paper's inner solver reaches from published
weights. The right-hand sides are its query gradient and random vectors. All ways solve to the same tolerance, and each
residual is measured again afterwards, by the same products, and reported.

    one by one      K calls of cg with b [1, N]
    together        one call with b [1, N, K]: products of several vectors in one pass of the native engine
    with Nystrom    the same, with a preconditioner of rank r made first, and x0 = M b; the set-up is timed too

"products" are those with one vector, per right-hand side: of the set-up, of every step, and those that measure.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import full_precision, write_result
from torch import Tensor

from imaml_ext import CG, Solution, cg
from imaml_ext.losses import CurvatureOperator
from imaml_ext.ops.network import NetworkLinearisation
from imaml_ext.pretrained import load_pretrained
from imaml_ext.reproduction.paper import paper_settings
from imaml_ext.settings import changed
from imaml_ext.solvers.preconditioners import Nystrom
from imaml_ext.train import build

WEIGHTS = "omniglot-5w1s"
# The Gauss-Newton matrix of 5 examples and 5 classes has rank 20, and Nyström takes two more for precision.
CASES = (("gauss_newton", 2.0, 22), ("gauss_newton", 0.5, 22), ("gauss_newton", 0.1, 22), ("hessian", 2.0, 64))
RTOL, LIMIT = 1e-5, 200


def one_by_one(operator: CurvatureOperator, b: Tensor, lam: float, rank: int) -> list[Solution]:
    solver = CG(LIMIT, rtol=RTOL, check_every=1)
    return [solver.solve(operator, b[:, :, k].contiguous(), lam) for k in range(b.shape[2])]


def together(operator: CurvatureOperator, b: Tensor, lam: float, rank: int) -> list[Solution]:
    return [CG(LIMIT, rtol=RTOL, check_every=1).solve(operator, b, lam)]


def with_nystrom(operator: CurvatureOperator, b: Tensor, lam: float, rank: int) -> list[Solution]:
    made = Nystrom(rank).make(operator, b[:, :, 0], lam)
    options: dict[str, Any] = {"max_iterations": LIMIT, "rtol": RTOL, "check_every": 1}
    return [cg(operator, b, shift=lam, x0=made(b), preconditioner=made, **options)]


WAYS: dict[str, Callable[..., list[Solution]]] = {
    "one by one": one_by_one,
    "together": together,
    "with Nystrom": with_nystrom,
}


def counted(run: Callable[[], list[Solution]]) -> tuple[list[Solution], int]:
    """What it returns, and how many vectors the network's engine has multiplied for it."""
    vectors, product = 0, NetworkLinearisation.product

    def counting(self: NetworkLinearisation, p: Tensor, *arguments: Any, **options: Any) -> Tensor:
        nonlocal vectors
        vectors += len(p)
        return product(self, p, *arguments, **options)

    with mock.patch.object(NetworkLinearisation, "product", counting):
        return run(), vectors


def measured(operator: CurvatureOperator, b: Tensor, kind: str, lam: float, rank: int, rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    found = {name: counted(lambda way=way: way(operator, b, lam, rank)) for name, way in WAYS.items()}
    for _ in range(rounds):
        for name, way in WAYS.items():
            begin = time.process_time()
            way(operator, b, lam, rank)
            times[name].append(1e3 * (time.process_time() - begin))
    row: dict[str, Any] = {"kind": kind, "lam": lam, "rank": rank, "columns": b.shape[2], "ways": {}}
    for name, (solutions, vectors) in found.items():
        x = torch.cat([s.x if s.x.dim() == 3 else s.x.unsqueeze(2) for s in solutions], 2)
        residual = cg(operator, b, shift=lam, x0=x, max_iterations=0).residual_norm / b.double().norm(dim=1)
        steps = torch.cat([s.iterations.flatten() for s in solutions]).double()
        row["ways"][name] = {
            "cpu_ms": round(statistics.median(times[name]), 1),
            "fraction": round(
                statistics.median(a / c for a, c in zip(times[name], times["one by one"], strict=True)), 4
            ),
            "products": round(vectors / b.shape[2], 2),
            "iterations_mean": round(float(steps.mean()), 2),
            "iterations_max": int(steps.max()),
            "converged": int(sum(int((s.status == 0).sum()) for s in solutions)),
            "worst_residual": float(residual.max()),
        }
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])  # several wait for each other
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    full_precision()
    learner = load_pretrained(WEIGHTS)
    config = changed(paper_settings("5w1s"), {"data.root": options.data_root, "run.device": "cpu"})
    episodes = build(config).sampler("test", tasks=1, seed=0).sample(0)
    algorithm, theta = learner._algorithm, learner._theta
    phi = algorithm.inner.solve(algorithm._loss, theta, episodes.support, lam=2.0).phi
    torch.manual_seed(0)
    b = torch.randn(1, options.columns, phi.shape[1]).mT  # [1, N, K], each right-hand side contiguous
    b[:, :, 0] = algorithm._loss.gradient(phi, episodes.query)[2]
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for kind, lam, rank in CASES:
            operator = algorithm._loss.linearize(phi, episodes.support, kind)
            rows.append({"threads": threads} | measured(operator, b, kind, lam, rank, options.rounds))
            for name, way in rows[-1]["ways"].items():
                print(f"{threads} threads, {kind:13} λ {lam:<4} {name:13}", way, flush=True)
    if options.json:
        write_result(options.json, script="many_right_hand_sides", device=torch.device("cpu"), rtol=RTOL, rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
