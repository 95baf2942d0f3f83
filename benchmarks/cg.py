"""Conjugate gradients alone: imaml_ext.cg against peers, on one set of systems, alternating in one process.

    python benchmarks/cg.py                      # 32 systems of the size of Conv4-64, 112,005; 5 iterations, float32
    python benchmarks/cg.py --device cuda --json result.json

Beside the times stands how many words per unknown each of our solves has to move through memory, the callback's
included, and how long that takes at the speed of a copy: what no formulation that moves them can beat. The same is
said of one step in the middle of a solve, without its callback: seven words.

The operator is diagonal, so that the callback costs as little as a callback can, and writes into a buffer of its own;
its time alone is printed too. Peers:

    in-place PyTorch    the recurrence in torch ops that allocate nothing, per row, with no statuses, masks or stopping;
                        written several ways, of which the fastest in the run counts
    linear_operator     linear_cg of the package of that name

Ours and the in-place loops solve the whole batch at once, and a few rows at a time, so that a block's vectors stay in
the cache; each with the block size of --blocks that was fastest for it in a few rounds beforehand. On a GPU the rows
are many for its sake, and there are no blocks unless --blocks names some.

Solutions are compared before anything is timed, one that is off is not timed, and the accuracy reached is printed
beside the time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Machine, alternate, judge, ratio, summary, write_result
from torch import Tensor

import imaml_ext

sys.path.append(str(Path(__file__).parents[1] / "python_tests"))
import reference  # the tests' oracle

OURS = "imaml_ext.cg"
Solve = Callable[[], Tensor]
Operator = Callable[[Tensor, slice], Tensor]


class InPlace:
    """The recurrence in in-place torch ops: every vector and every scalar a buffer made beforehand."""

    def __init__(self, b: Tensor, dot: str, rows: int) -> None:
        self.solution = torch.empty_like(b)
        self.r, self.p, self.product = (torch.empty_like(b[:rows]) for _ in range(3))
        self.rr, self.pAp, self.alpha, self.beta = (b.new_empty(rows, 1) for _ in range(4))
        self.dot = getattr(self, f"_dot_{dot}")

    def _dot_bmm(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        torch.bmm(a.unsqueeze(1), b.unsqueeze(2), out=out.unsqueeze(2))

    def _dot_vecdot(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        torch.linalg.vecdot(a, b, out=out.squeeze(1))

    def _dot_mul_sum(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        torch.sum(torch.mul(a, b, out=self.product[: len(a)]), 1, keepdim=True, out=out)

    def __call__(self, hvp: Operator, b: Tensor, shift: float, iterations: int) -> Tensor:
        for first in range(0, len(b), len(self.r)):
            rows = slice(first, min(first + len(self.r), len(b)))
            self._solve(lambda p, rows=rows: hvp(p, rows), b[rows], self.solution[rows], shift, iterations)
        return self.solution

    def _solve(self, hvp: Callable[[Tensor], Tensor], b: Tensor, x: Tensor, shift: float, iterations: int) -> None:
        vectors = (self.r, self.p, self.rr, self.pAp, self.alpha, self.beta)
        r, p, rr, pAp, alpha, beta = (vector[: len(b)] for vector in vectors)
        x.zero_(), r.copy_(b), p.copy_(b)
        self.dot(r, r, rr)
        for k in range(iterations):
            Ap = hvp(p).add_(p, alpha=shift)
            self.dot(p, Ap, pAp)
            torch.div(rr, pAp, out=alpha)
            x.addcmul_(alpha, p)
            r.addcmul_(alpha, Ap, value=-1)
            if k + 1 == iterations:
                break
            beta.copy_(rr)
            self.dot(r, r, rr)
            torch.div(rr, beta, out=beta)
            torch.addcmul(r, beta, p, out=p)


def linear_operator_peer() -> Callable | None:
    try:
        from linear_operator import settings
        from linear_operator.utils.linear_cg import linear_cg
    except ImportError as error:
        print(f"linear_operator is left out: {error} (pip install linear_operator)", file=sys.stderr)
        return None

    def solve(hvp: Operator, b: Tensor, shift: float, iterations: int) -> Tensor:
        def matmul(p: Tensor) -> Tensor:  # [B, N, 1]
            flat = p.squeeze(2)
            return hvp(flat, slice(None)).add_(flat, alpha=shift).unsqueeze(2)

        with settings.max_cg_iterations(iterations), settings.terminate_cg_by_size(False):
            return linear_cg(matmul, b.unsqueeze(2), tolerance=0.0, max_iter=iterations, max_tridiag_iter=0).squeeze(2)

    return solve


def words_moved(iterations: int, *, in_cache: bool) -> int:
    """Words per unknown that imaml_ext.cg and its callback read or write in memory.

    Args:
        in_cache: what one block of rows needs stays in the cache; else only a row of it does, from pass to pass.
    """
    if in_cache:
        return 3  # b and d in, x out
    callback = 3  # d and p in, H p out
    if iterations == 1:
        return 1 + callback + 3  # ‖b‖; b and H p in, x out
    first = 5  # b and H p in; x, r and p out
    middle = 7  # x, r, p and H p in; x, r and p out
    last = 5  # x, r, p and H p in; x out
    return 1 + iterations * callback + first + (iterations - 2) * middle + last


STEP_WORDS = 7  # of a step that is neither the first nor the last: x, r, p and H p in; x, r and p out


def step_times(
    hvp: Operator, b: Tensor, shift: float, iterations: int, *, rounds: int, device: torch.device
) -> list[float]:
    """Milliseconds of the steps of `rounds` solves that are neither first nor last, from callback to callback."""
    marks: list[Any] = []

    def mark() -> None:
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(time.perf_counter())

    def callback(p: Tensor) -> Tensor:
        mark()
        product = hvp(p, slice(None))
        mark()
        return product

    def solve() -> list[float]:
        marks.clear()
        if device.type == "cuda":
            torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host gets ahead of the device
        imaml_ext.cg(callback, b, shift=shift, max_iterations=iterations, rtol=0.0)
        # Step k is between the end of callback k and the beginning of callback k + 1.
        begins, ends = marks[3:-1:2], marks[4::2]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return [begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)]
        return [1e3 * (end - begin) for begin, end in zip(begins, ends, strict=True)]

    solve()
    return [value for _ in range(rounds) for value in solve()]


def fastest(solves: dict[int, Solve], device: torch.device) -> int:
    """The block size whose median over a few rounds is lowest."""
    times = alternate({str(size): solve for size, solve in solves.items()}, rounds=5, device=device)
    return int(min(times, key=lambda size: statistics.median(times[size])))


def contestants(
    hvp: Operator, b: Tensor, shift: float, iterations: int, blocks: list[int], device: torch.device
) -> dict[str, Solve]:
    """Every solver by its name, the blocked ones at their best size."""
    solvers: dict[str, Solve] = {}

    def ours(size: int | None) -> Tensor:
        operator = hvp if size else lambda p: hvp(p, slice(None))
        options = {"shift": shift, "max_iterations": iterations, "rtol": 0.0, "rows_per_block": size}
        return imaml_ext.cg(operator, b, **options).x

    def add(name: str, whole: Solve, blocked: dict[int, Solve]) -> None:
        solvers[name] = whole
        if blocked:
            size = fastest(blocked, device)
            solvers[f"{name}, {size} {'row' if size == 1 else 'rows'} at a time"] = blocked[size]

    add(OURS, lambda: ours(None), {size: lambda size=size: ours(size) for size in blocks})
    for dot in ("bmm", "vecdot", "mul_sum"):
        loops = {size: InPlace(b, dot, size) for size in [len(b), *blocks]}
        solves = {size: lambda f=f: f(hvp, b, shift, iterations) for size, f in loops.items()}
        add(f"in-place PyTorch ({dot})", solves.pop(len(b)), solves)
    peer = linear_operator_peer()
    if peer is not None:
        solvers["linear_operator"] = lambda: peer(hvp, b, shift, iterations)
    return solvers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--cols", type=int, default=112_005)
    parser.add_argument("--iterations", type=int, default=5, help="three or more")
    parser.add_argument("--blocks", type=int, nargs="*", help="rows at a time, to choose from (1 2 4 8)")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.iterations < 3:
        parser.error(f"--iterations must be 3 or more, got {options.iterations}")
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    shape = (options.rows, options.cols)
    d = (0.1 + 3 * torch.rand(shape, dtype=torch.float64)).to(device, dtype)
    b = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    shift, iterations = 2.0, options.iterations
    buffer = torch.empty_like(b)

    def hvp(p: Tensor, rows: slice) -> Tensor:
        return torch.mul(d[rows], p, out=buffer[: len(p)])

    candidates = options.blocks if options.blocks is not None else [] if device.type == "cuda" else [1, 2, 4, 8]
    blocks = [size for size in candidates if size < options.rows]
    solvers = contestants(hvp, b, shift, iterations, blocks, device)

    # The same solution first; the exact one says how good it is.
    exact = b.double() / (d.double() + shift)
    oracle = reference.cg(lambda p: d.double() * p, b.double(), shift=shift, max_iterations=iterations, rtol=0.0)
    errors = {}

    def distance(name: str, solve: Solve) -> float:
        x = solve().double()
        errors[name] = float(((x - exact).norm(dim=1) / exact.norm(dim=1)).max())
        return float(((x - oracle.x).norm(dim=1) / oracle.x.norm(dim=1)).max())

    _, wrong = judge({name: partial(distance, name, solve) for name, solve in solvers.items()}, 1e-4, ours=OURS)
    solvers = {name: solve for name, solve in solvers.items() if name not in wrong}

    machine = Machine(device)
    callback = {"callback alone": lambda: [hvp(b, slice(None)) for _ in range(iterations)]}
    copy = {Machine.COPY: machine.calls()[Machine.COPY]}
    times = alternate({**solvers, **callback, **copy}, rounds=options.rounds, device=device)
    copy_gbytes = machine.bytes / statistics.median(times.pop(Machine.COPY)) / 1e6
    alone = step_times(hvp, b, shift, iterations, rounds=options.rounds, device=device)

    def at_copy_speed(words: int, median_ms: float) -> dict[str, float]:
        """What moving so many words per unknown takes at least, and which part of the time that is."""
        least = words * b.numel() * b.element_size() / copy_gbytes / 1e6
        share = round(least / median_ms, 4)
        return {"words_moved_per_unknown": words, "ms_at_copy_speed": round(least, 4), "share_of_copy_rate": share}

    size = f"{options.rows} systems of {options.cols:,} unknowns"
    print(f"{size}, {iterations} iterations, {options.dtype}, {device}")
    print(f"{'':40} {'median ms':>10} {'min':>8} {'max':>8}  {'÷ ours':>7}  largest error")
    best_of_ours = min((name for name in solvers if name.startswith(OURS)), key=lambda name: ratio(times, name, OURS))
    rows = {}
    for name, values in times.items():
        row = rows[name] = {
            **summary(values),
            "ratio_to_ours": ratio(times, name, best_of_ours),
            "largest_relative_error": errors.get(name),
        }
        error = f"{errors[name]:.1e}" if name in errors else ""
        print(
            f"{name:40} {row['median_ms']:10.3f} {row['min_ms']:8.3f} {row['max_ms']:8.3f}  "
            f"{row['ratio_to_ours']:7.2f}  {error}"
        )
    best = min((row["ratio_to_ours"], name) for name, row in rows.items() if name.startswith("in-place"))
    print(f"the fastest in-place PyTorch takes {best[0]:.2f} times as long as {best_of_ours} ({best[1]})")
    bounds = {}
    for name in (name for name in solvers if name.startswith(OURS)):
        words = words_moved(iterations, in_cache=name != OURS)
        bound = bounds[name] = at_copy_speed(words, rows[name]["median_ms"])
        print(
            f"{name} and its callback move {words} words per unknown: {bound['ms_at_copy_speed']:.3f} ms at the "
            f"speed of a copy, {copy_gbytes:.1f} GB/s; they move at {bound['share_of_copy_rate']:.0%} of its rate"
        )
    step = summary(alone)
    step |= at_copy_speed(STEP_WORDS, step["median_ms"])
    print(
        f"a step of {OURS} alone moves {STEP_WORDS} words per unknown in {step['median_ms']:.4f} ms, "
        f"{step['share_of_copy_rate']:.0%} of the rate of a copy"
    )
    if options.json:
        write_result(
            options.json,
            script="cg",
            device=device,
            packages=["linear_operator"],
            systems={"rows": options.rows, "cols": options.cols, "iterations": iterations},
            dtype=options.dtype,
            copy_gb_per_s=round(copy_gbytes, 1),
            best_of_ours=best_of_ours,
            wrong=wrong,
            bounds=bounds,
            step=step,
            results=rows,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
