"""Calls every kernel on awkward sizes and compares the device's answers with the CPU's.

Small on purpose: it is what benchmarks/gpu_check.sh runs under compute-sanitizer, where every access is checked.

    python benchmarks/every_kernel.py --device cuda
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from imaml_ext import cg, ops
from imaml_ext.models import MLP, Conv4, TaskModel

SIZES = ((1, 1), (2, 31), (3, 257), (7, 1025), (5, 4099), (1, 70001))  # [B, N]
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

    def solve(device: str, matrix: Tensor, b: Tensor, **options: object) -> list[Tensor]:
        matrix = matrix.to(device)
        result = cg(lambda p: matrix * p, b.to(device), max_iterations=4, shift=0.5, **options)  # type: ignore[arg-type]
        return [result.x, result.status.double()]

    yield "cg", lambda device: solve(device, diagonal, grad)
    yield "cg, warm start", lambda device: solve(device, diagonal, grad, x0=phi.to(device))
    yield "cg, diagonal preconditioner", lambda device: solve(device, diagonal, grad, preconditioner=inverse.to(device))
    yield (
        "cg, callable preconditioner",
        lambda device: solve(device, diagonal, grad, preconditioner=lambda r: r.clone()),
    )
    yield "cg, rows that break down", lambda device: solve(device, broken, right)


def networks(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[str], list[Tensor]]]]:
    """As `arguments`: every op of the networks, with labels and with targets."""
    registered = torch.ops.imaml_ext
    for name, (model, shape, tasks, images) in NETWORKS.items():
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    failures = cases = 0
    for dtype, tolerance in TOLERANCE.items():
        for shape in SIZES:
            for name, case in arguments(shape, dtype):
                cases += 1
                for got, want in zip(case(device), case("cpu"), strict=True):
                    got, want = got.cpu().double(), want.double()
                    if not torch.allclose(got, want, rtol=tolerance, atol=tolerance, equal_nan=True):
                        failures += 1
                        print(f"{name}, {dtype}, {list(shape)}: off by {(got - want).abs().nan_to_num().max():.3g}")
    for dtype, tolerance in NETWORK_TOLERANCE.items():
        for name, case in networks(dtype):
            cases += 1
            for place, (got, want) in enumerate(zip(case(device), case("cpu"), strict=True)):
                off = float((got.cpu().double() - want.double()).norm() / want.double().norm())
                if not off <= tolerance:
                    failures += 1
                    print(f"{name}, {dtype}, result {place}: off by {off:.3g} of its norm")
    print(f"{cases} calls on {device}, {failures} differ from the CPU")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
