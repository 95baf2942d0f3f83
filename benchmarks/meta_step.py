"""One meta-step (adaptation, query gradient, conjugate gradients, outer update) against everyone who offers one.

    python benchmarks/meta_step.py                        # 5-way 1-shot, 1 query per class, 32 tasks; ours alone
    python benchmarks/meta_step.py 5w1s-1q 20w1s --imaml-dev FOLDER --hypertorch FOLDER --jax --json result.json
    python benchmarks/meta_step.py 5w1s-1q --tasks 8 --hvp
    python benchmarks/meta_step.py all --device cuda

Conv4 with 64 filters and stride 2 on 28×28 images, float32; the workloads are in WORKLOADS, and options change them.
Loading data is left out. What each implementation does is in peers.py: all compute the same meta-gradient. That is
checked first, against float64: one that fails or is off is recorded with what it did, and not timed. The others take
turns, and every figure is a median over the rounds of one run. TorchOpt is measured where it is installed,
`grouped conv2d` always. The exit code is 1 where one of ours failed.

The arithmetic of a meta-step is counted as the multiplications and additions of convolutions and linear layers alone,
as few as they can be: F for a forward pass; 3F for a gradient, less the input gradient of the first layer; 6F for a
product with H, of which the first layer needs 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import measure
import peers
import torch
from measure import Machine, alternate
from peers import Algorithm, Implementation, Problem

from imaml_ext import TaskLoss
from imaml_ext.data import load_dataset
from imaml_ext.models import Conv4

TOLERANCE = 1e-4  # relative, float32 against float64
OURS = "imaml_ext"


@dataclass(frozen=True)
class Workload:
    ways: int = 5
    shots: int = 1
    queries: int = 1  # per class
    tasks: int = 32
    inner_steps: int = 16
    cg_steps: int = 5
    filters: int = 64

    def forward_flop(self, images: int) -> tuple[int, int]:
        """Of one task: all layers, and the first of them."""
        first, total, size = 0, 0, 28
        for layer in range(4):
            size = (size + 1) // 2
            flop = 2 * images * size * size * 9 * (self.filters if layer else 1) * self.filters
            total += flop
            first = first or flop
        return total + 2 * images * self.filters * self.ways, first

    def gradient_flop(self, images: int) -> int:
        total, first = self.forward_flop(images)
        return 3 * total - first

    def product_flop(self, images: int) -> int:
        total, first = self.forward_flop(images)
        return 6 * (total - first) + 2 * first

    def flop(self) -> int:
        """Of the meta-step. H is linearised by one more gradient on the support set."""
        support, query = self.ways * self.shots, self.ways * self.queries
        gradients = (self.inner_steps + 1) * self.gradient_flop(support) + self.gradient_flop(query)
        return self.tasks * (gradients + self.cg_steps * self.product_flop(support))


WORKLOADS = {
    "5w1s-1q": Workload(),
    "5w1s-15q": Workload(queries=15),
    "20w1s": Workload(ways=20, inner_steps=25),
    "5w1s-1task": Workload(tasks=1),
    "5w1s-8tasks": Workload(tasks=8),
}


def make_problem(
    workload: Workload, algorithm: Algorithm, *, data: str, device: torch.device, seed: int = 0
) -> Problem:
    """The network as it is initialised, and the tasks of a meta-step."""
    sampler = load_dataset(data).sampler(
        "train",
        ways=workload.ways,
        shots=workload.shots,
        queries=workload.queries,
        meta_batch=workload.tasks,
        seed=seed,
        device=device,
    )
    network = peers.conv4_network(workload.ways, workload.filters, seed=0, device=device)
    return Problem(algorithm, network, sampler.sample(0))


Makers = dict[str, Callable[[Problem], Implementation]]


def makers(options: argparse.Namespace) -> tuple[Makers, dict[str, str]]:
    """The implementations that can be measured, ours first; and why the others cannot."""
    found: Makers = {
        OURS: peers.imaml_ext,
        f"{OURS}, nn.Module": peers.imaml_ext_module,
        "grouped conv2d": peers.grouped,
    }
    left_out = {}
    if torch.device(options.device).type == "cuda":
        found[f"{OURS}, replayed"] = peers.imaml_ext_replayed
    else:
        left_out[f"{OURS}, replayed"] = "a CUDA graph, without a GPU"
    for name, path in (("imaml_dev", options.imaml_dev), ("hypertorch", options.hypertorch)):
        if path is None:
            left_out[name] = f"no --{name.replace('_', '-')} FOLDER"
        else:
            found[name] = partial(getattr(peers, name), path=path)
    try:
        import torchopt  # noqa: F401

        found["TorchOpt"] = peers.torchopt
    except ImportError as error:
        left_out["TorchOpt"] = str(error)
    if not options.jax:
        left_out["JAX"] = "no --jax"
    elif (backend := peers.jax_backend()) != {"cuda": "gpu"}.get(torch.device(options.device).type, "cpu"):
        left_out["JAX"] = f"it runs on the {backend}, the others on {options.device}"
    else:
        found["JAX"] = peers.jax
    if options.only:
        unknown = set(options.only) - set(found)
        if unknown:
            raise SystemExit(f"--only must name some of {', '.join(found)}; got {', '.join(sorted(unknown))}")
        found = {name: make for name, make in found.items() if name == OURS or name in options.only}
    return found, left_out


def check(problem: Problem, pool: Problem, found: Makers) -> tuple[dict[str, float], dict[str, str]]:
    """How far every implementation's meta-gradient is from that in float64, and what is wrong with those that are off.

    Raises MismatchError where ours is further than TOLERANCE.
    """
    few, truth = peers.check_problem(problem, pool)

    def distance(make: Callable[[Problem], Implementation]) -> float:
        implementation = make(few)
        return measure.distances({"": implementation.gradient(implementation.step())}, truth)[""]

    return measure.judge({name: partial(distance, make) for name, make in found.items()}, TOLERANCE, ours=OURS)


def compare(
    workload: Workload, problem: Problem, found: Makers, apart: dict[str, float], *, rounds: int
) -> dict[str, Any]:
    """Times and prints one workload."""
    device = problem.device
    steps = {name: make(problem).step for name, make in found.items()}
    machine = Machine(device)
    times = alternate({**steps, **machine.calls()}, rounds=rounds, device=device)
    rates, flop = machine.rates(times), workload.flop()
    print(
        f"{flop / 1e9:.1f} GFLOP per meta-step; torch.mm reaches {rates['sgemm_gflops']:,.0f} GFLOP/s, "
        f"a copy {rates['copy_gbytes']:.0f} GB/s\n"
        f"{'':24} {'median ms':>10} {'min':>9} {'max':>9} {'÷ ours':>7} {'of sgemm':>9} {'off by':>8} {'peak MiB':>9}"
    )
    results = {}
    for name, step in steps.items():
        row = measure.summary(times[name])
        row["ratio_to_ours"] = round(measure.ratio(times, name, OURS), 3)
        row["share_of_sgemm"] = round(machine.share_of_sgemm(times, name, flop), 4)
        row["distance_from_float64"] = float(f"{apart[name]:.2g}")
        row["peak_bytes"] = measure.peak_memory(step, device)
        results[name] = row
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        print(
            f"{name:24} {row['median_ms']:10.3f} {row['min_ms']:9.3f} {row['max_ms']:9.3f} {row['ratio_to_ours']:7.2f} "
            f"{row['share_of_sgemm']:9.0%} {row['distance_from_float64']:8.1e} {peak:>9}"
        )
    return {"flop": flop, "machine": rates, "results": results}


def measure_product(workload: Workload, problem: Problem, *, rounds: int) -> dict[str, Any]:
    """A product with H, once linearised, and the linearisation, over a gradient on the support set; prints them."""
    device, episodes = problem.device, problem.episodes
    model = Conv4(workload.ways, filters=workload.filters)
    loss = TaskLoss(model, "cross_entropy")
    phi = model.init(seed=0, device=device).expand(workload.tasks, -1).contiguous()
    p = torch.randn_like(phi)
    operator = loss.linearize(phi, episodes.support, "hessian")

    def gradient() -> Any:
        params = phi.detach().requires_grad_()
        return torch.autograd.grad(loss(params, episodes.support).sum(), params)

    calls = {
        "gradient": gradient,
        "linearisation": lambda: loss.linearize(phi, episodes.support, "hessian"),
        "product": lambda: operator(p),
    }
    times = alternate(calls, rounds=rounds, device=device)
    results = {
        name: {**measure.summary(times[name]), "ratio_to_gradient": round(measure.ratio(times, name, "gradient"), 3)}
        for name in calls
    }
    for name, row in results.items():
        spread = f"{row['median_ms']:10.3f} {row['min_ms']:9.3f} {row['max_ms']:9.3f}"
        print(f"{name:24} {spread} {row['ratio_to_gradient']:7.2f} gradients")
    return results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this and scaling.py have in common."""
    parser.add_argument("--data", default="glyphs", help="glyphs (built in), or omniglot in $IMAML_DATA_ROOT")
    parser.add_argument(
        "--proximal",
        type=lambda word: {"pullback": "after"}.get(word, word),  # the word of version 0.1
        choices=["after", "gradient"],
        default="after",
        help="as in peers.py",
    )
    parser.add_argument("--damping", type=float, default=Algorithm.damping, help="δ of (H + (λ + δ) I) u = v; λ = 2")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=f"workloads: all, {', '.join(WORKLOADS)}", allow_abbrev=False
    )
    parser.add_argument("workloads", nargs="*", default=["5w1s-1q"], metavar="WORKLOAD")
    add_arguments(parser)
    for field in fields(Workload):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help="instead of the workload's")
    parser.add_argument("--imaml-dev", type=Path, metavar="FOLDER", help="source of github.com/aravindr93/imaml_dev")
    parser.add_argument("--hypertorch", type=Path, metavar="FOLDER", help="source of github.com/prolearner/hypertorch")
    parser.add_argument("--jax", action="store_true", help="measure JAX too, which takes a while to compile")
    parser.add_argument("--only", action="append", metavar="NAME", help="this implementation beside ours; repeatable")
    parser.add_argument("--hvp", action="store_true", help="also the cost of a product with H in gradients")
    options = parser.parse_args()
    names = list(WORKLOADS) if options.workloads == ["all"] else options.workloads
    for name in names:
        if name not in WORKLOADS:
            parser.error(f"workloads must be some of all, {', '.join(WORKLOADS)}; got {name!r}")
    changed = {f.name: getattr(options, f.name) for f in fields(Workload) if getattr(options, f.name) is not None}

    device = torch.device(options.device)
    measure.full_precision()
    found, left_out = makers(options)
    for name, why in left_out.items():
        print(f"{name} is left out: {why}", file=sys.stderr)
    runs, failed = [], False
    for name in names:
        workload = replace(WORKLOADS[name], **changed)
        algorithm = Algorithm(options.proximal, workload.inner_steps, workload.cg_steps, damping=options.damping)
        problem = make_problem(workload, algorithm, data=options.data, device=device, seed=options.seed)
        title = ", ".join(f"{key} {value}" for key, value in asdict(workload).items())
        print(f"\n{name}: {title}, {options.proximal}, {options.data}, {device}")
        pool = make_problem(replace(workload, tasks=12), algorithm, data=options.data, device=device, seed=options.seed)
        apart, wrong = check(problem, pool, found)
        failed = failed or any(other.startswith(OURS) for other in wrong)
        right = {other: make for other, make in found.items() if other not in wrong}
        run = {"wrong": wrong, **compare(workload, problem, right, apart, rounds=options.rounds)}
        if options.hvp:
            run["product"] = measure_product(workload, problem, rounds=options.rounds)
        runs.append(
            {"name": name, "workload": asdict(workload), "algorithm": asdict(algorithm), "data": options.data, **run}
        )
        if options.json:
            measure.write_result(
                options.json,
                script="meta_step",
                device=device,
                packages=("torchopt", "jax"),
                left_out=left_out,
                runs=runs,
            )
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
