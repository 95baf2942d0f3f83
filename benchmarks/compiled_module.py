"""Whether torch.compile helps an nn.Module: gradients and Hessian products of many tasks, eager and compiled.

    python benchmarks/compiled_module.py --json benchmarks/results/compiled_module.json

A network of four convolutions as an `nn.Module`, a row of parameters for every task through `torch.func`. Gradients: by
`TaskLoss`, by `TaskLoss(…, compiled=True)`. Products with the Hessian: by the graph of the gradient, built once and
differentiated anew for every vector, as imaml_ext does it; and as the derivative of the gradient along the vector
(forward over reverse), all of it computed for every vector, which is what torch.compile can compile: it does not
compile a second differentiation of a graph. Results are compared before anything is timed; compiling is not timed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import alternate, check_equal, distances, ratio, summary, write_result
from peers import conv4_module
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from imaml_ext import TaskLoss, from_module


@dataclass
class Data:
    x: Tensor  # [B, S, 1, 28, 28]
    y: Tensor  # [B, S]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--filters", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    module = conv4_module(5, options.filters)
    model = from_module(module)
    loss = TaskLoss(model, "cross_entropy")
    data = Data(
        torch.rand(options.tasks, 5, 1, 28, 28, device=device),
        torch.arange(5, device=device).expand(options.tasks, 5).contiguous(),
    )
    params = model.init(seed=0, device=device).expand(options.tasks, -1).contiguous()
    p = torch.randn_like(params)

    def of_a_task(row: Tensor, x: Tensor, y: Tensor) -> Tensor:
        named = {name: value[0] for name, value in model.layout.views(row.unsqueeze(0)).items()}
        return torch.nn.functional.cross_entropy(functional_call(module, named, (x,)), y)

    def product_of_a_task(row: Tensor, direction: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return jvp(lambda q: grad(of_a_task)(q, x, y), (row,), (direction,))[1]

    product = vmap(product_of_a_task)
    compiled_product = torch.compile(product)
    compiled_loss = TaskLoss(model, "cross_entropy", compiled=True)
    operator = loss.linearize(params, data, "hessian")
    contestants = {
        "gradient": {
            "imaml_ext": lambda: loss.gradient(params, data).gradient,
            "imaml_ext, compiled": lambda: compiled_loss.gradient(params, data).gradient,
        },
        "product": {
            "imaml_ext, linearised once": lambda: operator(p),
            "forward over reverse": lambda: product(params, p, data.x, data.y),
            "forward over reverse, compiled": lambda: compiled_product(params, p, data.x, data.y),
        },
    }
    results = {}
    for what, calls in contestants.items():
        first = next(iter(calls))
        found = {name: call() for name, call in calls.items()}
        check_equal(distances(found, found[first]), 1e-3, f"{what}s")
        times = alternate(calls, rounds=options.rounds, device=device)
        results[what] = {name: {**summary(t), "ratio_to_ours": ratio(times, name, first)} for name, t in times.items()}
        for name, row in results[what].items():
            print(f"{what}, {name}: {row['median_ms']:.1f} ms, {row['ratio_to_ours']:.2f} of ours")
    if options.json:
        sizes = {"tasks": options.tasks, "filters": options.filters}
        write_result(options.json, script="compiled_module", device=device, **sizes, results=results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
