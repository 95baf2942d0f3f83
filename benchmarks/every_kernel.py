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

SIZES = ((1, 1), (2, 31), (3, 257), (7, 1025), (5, 4099), (1, 70001))  # [B, N]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


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
        "a task": random(rows, 1).abs().to(wide),
        "a parameter": random(1, cols).abs().to(wide),
        "an element": random(rows, cols).abs().to(wide),
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
    print(f"{cases} calls on {device}, {failures} differ from the CPU")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
