"""Calls every kernel on awkward sizes and compares the device's answers with the CPU's.

    python benchmarks/every_kernel.py --device cuda
    python benchmarks/every_kernel.py --device cuda --dtypes float32 --sizes 2x4096 1x300000 --networks 'MLP, tanh'
    python benchmarks/every_kernel.py --device cuda --only 'cg, warm start, float32, 2x4096'

Small enough for compute-sanitizer, where every access is checked. Every type meets every size and every kind of
coefficient: the CPU's side of it all is about five seconds. A case is named before it is called, so that one that never
ends is known too, and again where it fails, in the words that `--only` takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from imaml_ext import cg, ops
from imaml_ext.models import MLP, Conv4, TaskModel
from imaml_ext.solvers import lsqr, minres, multi_shift_cg

# [B, N]. Odd rows are read element by element, the others in packs of 16 bytes; with N grows the team of blocks that
# has a row, until the row no longer fits the team's shared memory. 112,005 is Conv4-64; the last two are long even for
# a whole cluster.
SIZES = (
    *((1, 1), (2, 31), (3, 257), (7, 1025), (2, 4096), (5, 4099), (3, 20000), (2, 40000), (1, 70001)),
    *((2, 112000), (1, 112005), (1, 300000), (1, 600000)),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}

# name: model, shape of an example, tasks, examples of a task
NETWORKS: dict[str, tuple[TaskModel, tuple[int, ...], int, int]] = {
    "Conv4, 1 task, odd images": (Conv4(5, image_size=13, filters=5), (1, 13, 13), 1, 3),
    "Conv4, 3 tasks, 7 ways": (Conv4(7, image_size=28, filters=64), (1, 28, 28), 3, 7),
    "Conv4, max-pooling": (
        Conv4(5, in_channels=3, image_size=37, filters=32, pooling="max"),
        (3, 37, 37),
        3,
        5,
    ),
    "Conv4, no patches": (Conv4(2, in_channels=9, image_size=12, filters=33), (9, 12, 12), 2, 1),
    "MLP, tanh": (MLP(1, (40, 40), 2, activation="tanh"), (1,), 3, 10),
    "MLP, wide": (MLP(700, (130,), 3), (7, 100), 2, 33),
}
NETWORK_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-3}  # of a tensor's norm


def arguments(shape: tuple[int, int], dtype: torch.dtype) -> Iterator[tuple[str, Callable[[str], list[Tensor]]]]:
    """Cases by name; each is a function from a device to tensors that are to agree between devices."""
    rows, cols = shape
    generator = torch.Generator().manual_seed(rows * cols)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    phi, grad, velocity, theta = (random(rows, cols).to(dtype) for _ in range(4))
    square = random(rows, cols).square().to(dtype)
    wide = ops.compute_dtype(dtype)
    coefficients = {
        "number": 0.5,
        "per task": random(rows, 1).abs().to(wide),
        "per parameter": random(1, cols).abs().to(wide),
        "per element": random(rows, cols).abs().to(wide),
    }
    for kind, lam in coefficients.items():

        def on(device: str, *tensors: Tensor) -> list[Tensor]:
            return [tensor.to(device, copy=True) for tensor in tensors]

        def lam_on(device: str, lam: float | Tensor = lam) -> float | Tensor:
            return lam.to(device) if isinstance(lam, Tensor) else lam

        def sgd(device: str, lam_on: Callable = lam_on) -> list[Tensor]:
            p, g, t = on(device, phi, grad, theta[0])
            return [ops.prox_sgd_step_(p, g, t, lam_on(device), 0.1)]

        def momentum(device: str, lam_on: Callable = lam_on) -> list[Tensor]:
            p, v, g, t = on(device, phi, velocity, grad, theta)
            return [ops.prox_momentum_step_(p, v, g, t, lam_on(device), 0.1, 0.9, nesterov=True), v]

        def adam(device: str, lam_on: Callable = lam_on) -> list[Tensor]:
            p, m, v, g, t = on(device, phi, velocity, square, grad, theta)
            return [ops.prox_adam_step_(p, m, v, g, t, lam_on(device), 0.1, 0.9, 0.999, 1e-8, 3), m, v]

        def gradient(device: str, lam_on: Callable = lam_on) -> list[Tensor]:
            g, p, t = on(device, grad, phi, theta[0])
            return [ops.prox_gradient_(g, p, t, lam_on(device))]

        def penalty(device: str, lam_on: Callable = lam_on) -> list[Tensor]:
            p, t = on(device, phi, theta[0])
            return [ops.prox_penalty(p, t, lam_on(device)) / cols]

        yield f"prox_sgd_step_, lam {kind}", sgd
        yield f"prox_momentum_step_, lam {kind}", momentum
        yield f"prox_adam_step_, lam {kind}", adam
        yield f"prox_gradient_, lam {kind}", gradient
        yield f"prox_penalty, lam {kind}", penalty

    diagonal = (1 + random(rows, cols).square()).to(dtype)
    broken = diagonal.clone()
    broken[0] = -1  # negative curvature in the first row
    right = grad.clone()
    right[-1] = float("nan") if rows > 1 else right[-1]
    inverse = 1 / (diagonal + 0.5)

    def solve(device: str, matrix: Tensor, b: Tensor, *, by: Callable = cg, **options: object) -> list[Tensor]:
        matrix = matrix.to(device)
        result = by(lambda p: matrix * p, b.to(device), max_iterations=4, shift=0.5, **options)
        return [result.x, result.status.double()]

    yield "cg", lambda device: solve(device, diagonal, grad)
    yield "cg, warm start", lambda device: solve(device, diagonal, grad, x0=phi.to(device))
    yield "cg, diagonal preconditioner", lambda device: solve(device, diagonal, grad, preconditioner=inverse.to(device))
    yield (
        "cg, callable preconditioner",
        lambda device: solve(device, diagonal, grad, preconditioner=lambda r: r.clone()),
    )
    yield "cg, rows that break down", lambda device: solve(device, broken, right)
    yield "minres", lambda device: solve(device, diagonal - 3, grad, by=minres)
    yield "minres, warm start", lambda device: solve(device, diagonal, grad, by=minres, x0=phi.to(device))
    yield "minres, rows that break down", lambda device: solve(device, broken, right, by=minres)

    def path(device: str) -> list[Tensor]:
        matrix, shifts = diagonal.to(device), torch.tensor([0.5, 0.0, 2.0], device=device)
        result = multi_shift_cg(lambda p: matrix * p, grad.to(device), shifts, max_iterations=4)
        return [result.x.flatten(0, 1), result.status.double()]

    yield "cg, shifts that follow", path

    def least_squares(device: str, matrix: Tensor, b: Tensor, **options: object) -> list[Tensor]:
        """Of a matrix that has one row more than b, which is zero."""
        matrix, y = matrix.to(device), torch.nn.functional.pad(b.to(device), (0, 1), value=0.5)
        result = lsqr(
            lambda p: torch.nn.functional.pad(matrix * p, (0, 1)),
            y,
            rmatvec=lambda q: matrix * q[:, :-1],
            n=cols,
            max_iterations=4,
            **options,
        )
        return [result.x, result.status.double()]

    yield "lsqr", lambda device: least_squares(device, diagonal, grad)
    yield (
        "lsqr, warm start with damping",
        lambda device: least_squares(device, diagonal, grad, shift=0.5, x0=phi.to(device)),
    )
    yield "lsqr, rows that break down", lambda device: least_squares(device, broken, right)


def networks(dtype: torch.dtype, names: Collection[str]) -> Iterator[tuple[str, Callable[[str], list[Tensor]]]]:
    """As `arguments`: every op of the networks of these names, with labels and with targets."""
    registered = torch.ops.imaml_ext
    for name in names:
        model, shape, tasks, images = NETWORKS[name]
        assert model.network is not None
        network, classes = list(model.network), model.network[-4]
        generator = torch.Generator().manual_seed(tasks * images)

        def random(*size: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        theta = (model.init(seed=0).double() + 0.1 * random(tasks, model.num_parameters)).to(dtype)
        x, direction = random(tasks, images, *shape).to(dtype), random(tasks, model.num_parameters).to(dtype)
        lam, lr = random(tasks, 1).abs().to(dtype), 0.01 * random(1, model.num_parameters).abs().to(dtype)
        targets = random(tasks, images, classes)
        for kind, y in (("labels", targets.argmax(-1)), ("targets", targets.to(dtype))):

            def case(
                device: str,
                network: list[int] = network,
                tensors: tuple[Tensor, ...] = (theta, x, y, direction, lam, lr),
            ) -> list[Tensor]:
                theta, x, y, direction, lam, lr = (tensor.to(device) for tensor in tensors)
                *results, tape = registered.network_linearise(theta, x, y, network)
                results += registered.network_gradient(theta, x, y, network)
                results.append(registered.network_outputs(theta, x, network))
                for gauss_newton in (False, True):
                    results.append(registered.network_product(theta, tape, y, direction, network, gauss_newton))
                phi = theta.clone()
                results.append(registered.network_descend_(phi, theta, lam, lr, x, y, network, 2))
                return [*results, phi]

            yield f"networks, {name}, {kind}", case


def vector_differences(got: list[Tensor], want: list[Tensor], tolerance: float) -> Iterator[str]:
    for mine, theirs in zip(got, want, strict=True):
        mine, theirs = mine.cpu().double(), theirs.double()
        if not torch.allclose(mine, theirs, rtol=tolerance, atol=tolerance, equal_nan=True):
            yield f"off by {(mine - theirs).abs().nan_to_num().max():.3g}"


def network_differences(got: list[Tensor], want: list[Tensor], tolerance: float) -> Iterator[str]:
    for place, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        off = float((mine.cpu().double() - theirs.double()).norm() / theirs.double().norm())
        if not off <= tolerance:
            yield f"result {place} off by {off:.3g} of its norm"


def cases(dtypes: Collection[str], sizes: Collection[tuple[int, int]], names: Collection[str]) -> Iterator[tuple]:
    """Name, call, comparison and tolerance of every case."""
    for dtype, tolerance in TOLERANCE.items():
        word = str(dtype).removeprefix("torch.")
        if word not in dtypes:
            continue
        for rows, cols in sizes:
            for name, call in arguments((rows, cols), dtype):
                yield f"{name}, {word}, {rows}x{cols}", call, vector_differences, tolerance
        if dtype in NETWORK_TOLERANCE:
            for name, call in networks(dtype, names):
                yield f"{name}, {word}", call, network_differences, NETWORK_TOLERANCE[dtype]


def size(word: str) -> tuple[int, int]:
    rows, _, cols = word.partition("x")
    return int(rows), int(cols)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    words = [str(dtype).removeprefix("torch.") for dtype in TOLERANCE]
    parser.add_argument("--dtypes", nargs="*", choices=words, default=words)
    parser.add_argument("--sizes", nargs="*", type=size, default=SIZES, metavar="ROWSxCOLS", help="of the vectors")
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--only", action="append", metavar="NAME", help="this case alone, as a failure names it")
    options = parser.parse_args()
    calls = failures = 0
    for name, call, differences, tolerance in cases(options.dtypes, options.sizes, options.networks):
        if options.only and name not in options.only:
            continue
        calls += 1
        print(f"case: {name}", flush=True)
        try:
            off = list(differences(call(options.device), call("cpu"), tolerance))
        except RuntimeError as error:  # after an error of the device every later call fails
            print(f"FAILED: {name}\n  {error}\nThe cases after this one were not called.")
            return 1
        if off:
            failures += 1
            print(f"FAILED: {name}\n  " + "\n  ".join(off), flush=True)
    print(f"{calls} calls on {options.device}, {failures} differ from the CPU")
    return 1 if failures or not calls else 0


if __name__ == "__main__":
    raise SystemExit(main())
