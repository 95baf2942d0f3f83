"""Conjugate gradients alone: imaml_ext.cg against peers, on one set of systems, alternating in one process.

    python benchmarks/cg.py                      # 32 systems of 112,000 unknowns, 5 iterations, float32
    python benchmarks/cg.py --device cuda --json result.json

Beside the times stands how many words an unknown our solve has to move through memory, the callback's included, and
how long that takes at the speed of a copy over as much memory as the solve uses: what no formulation that moves them
can beat.

The operator is diagonal, so that the callback costs as little as a callback can, and writes into a buffer of its own;
its time alone is printed too. Peers:

    in-place PyTorch    the recurrence in torch ops that allocate nothing, per row, with no statuses, masks or stopping;
                        written several ways, of which the fastest in the run counts
    linear_operator     linear_cg of the package of that name

Solutions are compared before anything is timed, and the accuracy reached is printed beside the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from measure import timed
from torch import Tensor

import imaml_ext.reference
from imaml_ext.training.environment import environment


class InPlace:
    """The recurrence in in-place torch ops: every vector and every scalar a buffer made beforehand."""

    def __init__(self, b: Tensor, dot: str) -> None:
        self.x, self.r, self.p, self.product = (torch.empty_like(b) for _ in range(4))
        self.rr, self.pAp, self.alpha, self.beta = (b.new_empty(b.shape[0], 1) for _ in range(4))
        self.dot = getattr(self, f"_dot_{dot}")

    def _dot_bmm(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        torch.bmm(a.unsqueeze(1), b.unsqueeze(2), out=out.unsqueeze(2))

    def _dot_vecdot(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        torch.linalg.vecdot(a, b, out=out.squeeze(1))

    def _dot_mul_sum(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        torch.sum(torch.mul(a, b, out=self.product), 1, keepdim=True, out=out)

    def __call__(self, hvp: Callable[[Tensor], Tensor], b: Tensor, shift: float, iterations: int) -> Tensor:
        x, r, p, rr, pAp = self.x.zero_(), self.r.copy_(b), self.p.copy_(b), self.rr, self.pAp
        self.dot(r, r, rr)
        for k in range(iterations):
            Ap = hvp(p).add_(p, alpha=shift)
            self.dot(p, Ap, pAp)
            torch.div(rr, pAp, out=self.alpha)
            x.addcmul_(self.alpha, p)
            r.addcmul_(self.alpha, Ap, value=-1)
            if k + 1 == iterations:
                break
            self.beta.copy_(rr)
            self.dot(r, r, rr)
            torch.div(rr, self.beta, out=self.beta)
            torch.addcmul(r, self.beta, p, out=p)
        return x


def linear_operator_peer() -> Callable | None:
    try:
        from linear_operator import settings
        from linear_operator.utils.linear_cg import linear_cg
    except ImportError as error:
        print(f"linear_operator is left out: {error} (pip install linear_operator)", file=sys.stderr)
        return None

    def solve(hvp: Callable[[Tensor], Tensor], b: Tensor, shift: float, iterations: int) -> Tensor:
        def matmul(p: Tensor) -> Tensor:  # [B, N, 1]
            flat = p.squeeze(2)
            return hvp(flat).add_(flat, alpha=shift).unsqueeze(2)

        with settings.max_cg_iterations(iterations), settings.terminate_cg_by_size(False):
            return linear_cg(matmul, b.unsqueeze(2), tolerance=0.0, max_iter=iterations, max_tridiag_iter=0).squeeze(2)

    return solve


def words_moved(iterations: int) -> int:
    """Words an unknown that imaml_ext.cg and its callback read or write in memory, rows staying in the cache."""
    callback = 3  # d and p in, H p out
    if iterations == 1:
        return 1 + callback + 3  # ‖b‖; b and H p in, x out
    first = 5  # b and H p in; x, r and p out
    middle = 7  # x, r, p and H p in; x, r and p out
    last = 5  # x, r, p and H p in; x out
    return 1 + iterations * callback + first + (iterations - 2) * middle + last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--cols", type=int, default=112_000)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    shape = (options.rows, options.cols)
    d = (0.1 + 3 * torch.rand(shape, dtype=torch.float64)).to(device, dtype)
    b = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    shift = 2.0
    buffer = torch.empty_like(b)

    def hvp(p: Tensor) -> Tensor:
        return torch.mul(d, p, out=buffer)

    solvers: dict[str, Callable[[], Tensor]] = {
        "imaml_ext.cg": lambda: imaml_ext.cg(hvp, b, shift=shift, max_iterations=options.iterations, rtol=0.0).x
    }
    for dot in ("bmm", "vecdot", "mul_sum"):
        in_place = InPlace(b, dot)
        solvers[f"in-place PyTorch ({dot})"] = lambda f=in_place: f(hvp, b, shift, options.iterations)
    peer = linear_operator_peer()
    if peer is not None:
        solvers["linear_operator"] = lambda: peer(hvp, b, shift, options.iterations)

    # The same solution first; the exact one says how good it is.
    exact = b.double() / (d.double() + shift)
    oracle = imaml_ext.reference.cg(lambda p: d.double() * p, b.double(), shift=shift, rtol=0.0)
    errors = {}
    for name, solve in solvers.items():
        x = solve().double()
        errors[name] = float(((x - exact).norm(dim=1) / exact.norm(dim=1)).max())
        if options.iterations == 5:
            apart = float(((x - oracle.x).norm(dim=1) / oracle.x.norm(dim=1)).max())
            assert apart < 1e-4, f"{name} is {apart:.1e} away from the float64 iterate"

    # Six vectors are in use: d, b, H p, r, p, x.
    source, target = b.new_ones(3, *shape), b.new_zeros(3, *shape)

    for solve in solvers.values():  # warm up
        timed(solve, device)
    times: dict[str, list[float]] = {name: [] for name in [*solvers, "callback alone", "copy"]}
    for _ in range(options.rounds):
        for name, solve in solvers.items():
            times[name].append(timed(solve, device))
        times["callback alone"].append(timed(lambda: [hvp(b) for _ in range(options.iterations)], device))
        times["copy"].append(timed(lambda: target.copy_(source), device))

    copies = times.pop("copy")
    ours = times["imaml_ext.cg"]
    size = f"{options.rows} systems of {options.cols:,} unknowns"
    print(f"{size}, {options.iterations} iterations, {options.dtype}, {device}")
    print(f"{'':28} {'median ms':>10} {'min':>8} {'max':>8}  {'÷ ours':>7}  largest error")
    rows = {}
    for name, values in times.items():
        median = statistics.median(values)
        ratio = statistics.median(v / o for v, o in zip(values, ours, strict=True))
        rows[name] = {
            "median_ms": median,
            "min_ms": min(values),
            "max_ms": max(values),
            "ratio_to_ours": ratio,
            "largest_relative_error": errors.get(name),
        }
        error = f"{errors[name]:.1e}" if name in errors else ""
        print(f"{name:28} {median:10.2f} {min(values):8.2f} {max(values):8.2f}  {ratio:7.2f}  {error}")
    best = min((row["ratio_to_ours"], name) for name, row in rows.items() if name.startswith("in-place"))
    print(f"the fastest in-place PyTorch takes {best[0]:.2f} times as long ({best[1]})")
    words = words_moved(options.iterations)
    bound_ms = words / 6 * statistics.median(copies)  # a copy moves two words for each of three unknowns
    bandwidth = 6 * b.numel() * b.element_size() / statistics.median(copies) / 1e6
    share = statistics.median(words / 6 * c / o for c, o in zip(copies, ours, strict=True))
    print(
        f"imaml_ext.cg and its callback move {words} words an unknown: {bound_ms:.2f} ms at the speed of a copy, "
        f"{bandwidth:.1f} GB/s, {100 * share:.0f} % of the time taken"
    )
    if "linear_operator" in rows:
        print(f"linear_operator takes {rows['linear_operator']['ratio_to_ours']:.2f} times as long")
    if options.json:
        versions = {}
        for package in ("linear_operator",):
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                versions[package] = None
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": "python benchmarks/cg.py " + " ".join(sys.argv[1:]),
            "stamp": {**environment(device), **versions},
            "systems": {"rows": options.rows, "cols": options.cols, "iterations": options.iterations},
            "dtype": options.dtype,
            "words_moved_per_unknown": words,
            "copy_gb_per_s": bandwidth,
            "ms_at_copy_speed": bound_ms,
            "results": rows,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
