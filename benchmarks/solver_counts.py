"""What the solvers need, in products with the matrix and in digits. Nothing is timed: counts are the same everywhere.

    python benchmarks/solver_counts.py --json benchmarks/results/solver_counts.json

A figure is a function below, and an entry of FIGURES. With names of figures, only these are measured; the others keep
what the result file has of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import full_precision, write_result
from newton_cg import trained
from torch import Tensor

from imaml_ext.settings import changed
from imaml_ext.solvers import cg, logdet, multi_shift_cg
from imaml_ext.train import build, load_recipe

Operator = Callable[[Tensor], Tensor]


class Counted:
    """An operator of one row; how often it was called, and how many vectors it has multiplied."""

    def __init__(self, operator: Operator) -> None:
        self.operator, self.calls, self.products = operator, 0, 0

    def __call__(self, p: Tensor) -> Tensor:
        return self._counted(self.operator, p)

    def of_columns(self, columns: int) -> Operator:
        """Many vectors in one call, as the curvature of a network has them."""
        wide = self.operator.of_columns(columns) if hasattr(self.operator, "of_columns") else self.operator
        return lambda p: self._counted(wide, p)

    def _counted(self, operator: Operator, p: Tensor) -> Tensor:
        self.calls += 1
        self.products += len(p)
        return operator(p)


def spd(size: int, condition: float, *, generator: torch.Generator) -> Tensor:
    """A symmetric matrix [N, N] float64 with eigenvalues from 1 / condition to 1, evenly spaced on a log scale."""
    q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
    a = (q * torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64)) @ q.mT
    return (a + a.mT) / 2


def conv4_hessian(*, ways: int, shots: int, meta_steps: int = 20) -> tuple[Operator, Tensor]:
    """The Gauss-Newton matrix of a Conv4 on a support set, float64, at θ after some meta-steps; and its gradient."""
    changes = {"model.filters": 16, "run.dtype": "float64", "tasks.ways": ways, "tasks.shots": shots}
    experiment = build(changed(load_recipe("glyphs-5w1s").config, changes))
    theta = trained(experiment, meta_steps).detach()
    support = experiment.sampler("train", tasks=1, seed=1).sample(0).support
    operator = experiment.loss.linearize(theta.unsqueeze(0), support, kind="gauss_newton")
    return operator, operator.gradient.detach()


def multi_shift() -> list[dict[str, Any]]:
    """16 shifts against the least of them alone, each residual measured: products per row at rtol 1e-6."""
    generator = torch.Generator().manual_seed(0)
    matrix = spd(2000, 1e4, generator=generator)
    problems: dict[str, tuple[Operator, Tensor, float]] = {
        "dense, κ = 10⁴": (lambda p: p @ matrix, torch.randn(1, 2000, dtype=torch.float64, generator=generator), 0.0),
    }
    for ways, shots, dampings in ((20, 5, (1e-3, 1e-2)), (5, 1, (1e-3,))):
        hessian, gradient = conv4_hessian(ways=ways, shots=shots)
        for shift in dampings:
            name = f"Conv4, Gauss-Newton, {ways}-way {shots}-shot, shift {shift:g}"
            problems[name] = (hessian, gradient, shift)
    rows = []
    for name, (operator, b, shift) in problems.items():
        shifts = torch.cat([torch.zeros(1), torch.logspace(-3, 1, 15)]).double()
        options: dict[str, Any] = {"shift": shift, "max_iterations": 10_000, "rtol": 1e-6, "check_every": 1}
        one, many = Counted(operator), Counted(operator)
        alone = cg(one, b, **options)
        found = multi_shift_cg(many, b, shifts, **options)
        each = []
        for sigma in shifts.tolist():
            counted = Counted(operator)
            cg(counted, b, **{**options, "shift": shift + sigma})
            each.append(counted.products)
        rows.append(
            {
                "problem": name,
                "unknowns": b.shape[1],
                "products_of_one": one.products,
                "products_of_16": many.products,
                "calls_of_16": many.calls,
                "ratio": round(many.products / one.products, 4),
                "products_of_16_alone": sum(each),
                "converged": bool(alone.status.eq(0).all() and found.status.eq(0).all()),
                "largest_relative_residual": float((found.residual_norm / b.norm(dim=1)).max()),
            }
        )
    return rows


def log_determinant() -> list[dict[str, Any]]:
    """The log-determinant of kernels of 2,000 points, noise 10⁻², by 128 probes of 100 products, against Cholesky."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2000, 2, dtype=torch.float64, generator=generator)
    distance = torch.cdist(points, points) / 0.2
    scaled = 3**0.5 * distance
    kernels = {
        "RBF": torch.exp(-0.5 * distance.square()),
        "Matérn 1/2": torch.exp(-distance),
        "Matérn 3/2": (1 + scaled) * torch.exp(-scaled),
    }
    rows = []
    for name, kernel in kernels.items():
        noisy = kernel + 1e-2 * torch.eye(2000, dtype=torch.float64)
        exact = 2 * torch.linalg.cholesky(noisy).diagonal().log().sum()
        found = logdet(
            lambda p, kernel=kernel: p @ kernel, points.new_empty(1, 2000), generator=generator, shift=1e-2,
            probes=128, steps=100,
        )  # fmt: skip
        rows.append(
            {
                "kernel": name,
                "exact": float(exact),
                "estimate": float(found.value),
                "relative_error": float((found.value - exact).abs() / exact.abs()),
                "relative_standard_error": float(found.standard_error / exact.abs()),
            }
        )
    return rows


FIGURES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "multi_shift": multi_shift,
    "log_determinant": log_determinant,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("figures", nargs="*", choices=[*FIGURES, []], help="all of them where none is named")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    full_precision()
    figures = json.loads(options.json.read_text())["figures"] if options.json and options.json.exists() else {}
    for name in options.figures or FIGURES:
        figures[name] = FIGURES[name]()
        for row in figures[name]:
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    if options.json:
        write_result(options.json, script="solver_counts", device=torch.device("cpu"), figures=figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
