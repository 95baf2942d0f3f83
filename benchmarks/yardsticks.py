"""What a batch of matrix products of layer 2's size costs otherwise: by torch.bmm, and by Triton on tensor cores.

    python benchmarks/yardsticks.py --device cuda --json result.json
    python benchmarks/yardsticks.py --tasks 2 --rounds 2        # torch.bmm alone, on the CPU

[32, 245, 576] × [32, 576, 64]: 32 tasks, 5 images of 7 × 7 pixels, 9 taps of 64 channels, 64 channels out. In float32
by torch.bmm; in TF32 by torch.bmm, three digits fewer; and by Triton's `tl.dot(input_precision="tf32x3")`, three TF32
products for one, which is to be about as precise as float32. Errors are relative to float64. A call is `--repeat`
products, so that launching is hidden; the operands fit a GPU's L2 cache, as activations do that were just written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import measure
import torch
from torch import Tensor

ROWS, INNER, COLS = 245, 576, 64
BLOCK_ROWS, BLOCK_INNER = 64, 32


@contextmanager
def tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def triton_product(precision: str) -> Callable[[Tensor, Tensor, Tensor], None]:
    """out ← a b of [B, M, K] and [B, K, N], a block of 64 rows and all columns per program.

    N and the blocks must be powers of two; M may be odd, and K is a multiple of its block.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(
        a, b, out, M, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
    ):
        task = tl.program_id(1)
        rows = tl.program_id(0) * BM + tl.arange(0, BM)
        inner = tl.arange(0, BK)
        cols = tl.arange(0, N)
        a += task * M * K
        b += task * K * N
        total = tl.zeros((BM, N), dtype=tl.float32)
        for k in range(0, K, BK):
            left = tl.load(a + rows[:, None] * K + (k + inner)[None, :], mask=rows[:, None] < M, other=0.0)
            right = tl.load(b + (k + inner)[:, None] * N + cols[None, :])
            total = tl.dot(left, right, total, input_precision=PRECISION)
        tl.store(out + task * M * N + rows[:, None] * N + cols[None, :], total, mask=rows[:, None] < M)

    def product(a: Tensor, b: Tensor, out: Tensor) -> None:
        tasks, rows, inner = a.shape
        grid = (triton.cdiv(rows, BLOCK_ROWS), tasks)
        kernel[grid](a, b, out, rows, inner, b.shape[2], BLOCK_ROWS, BLOCK_INNER, precision, num_warps=4)

    return product


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=20, help="products per call")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    device = torch.device(options.device)
    measure.full_precision()
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(options.tasks, *shape, generator=generator).to(device) for shape in ((ROWS, INNER), (INNER, COLS))
    )
    out = torch.empty(options.tasks, ROWS, COLS, device=device)

    def bmm() -> None:
        torch.bmm(a, b, out=out)

    def bmm_tf32() -> None:
        with tf32():
            torch.bmm(a, b, out=out)

    products: dict[str, Callable[[], None]] = {"torch.bmm, float32": bmm}
    left_out = {}
    if device.type == "cuda":
        products["torch.bmm, TF32"] = bmm_tf32
        for precision in ("tf32x3", "ieee"):
            name = f"Triton, {precision}"
            try:
                product = triton_product(precision)
                product(a, b, out)
                torch.cuda.synchronize(device)
                products[name] = lambda product=product: product(a, b, out)
            except Exception as error:  # of its compiler, of whatever kind
                left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        left_out |= {"torch.bmm, TF32": "without a GPU", "Triton": "without a GPU"}

    truth, errors = torch.bmm(a.double(), b.double()), {}
    for name, product in products.items():
        out.fill_(float("nan"))
        product()
        errors.update(measure.distances({name: out}, truth))

    def repeated(product: Callable[[], None]) -> Callable[[], None]:
        return lambda: [product() for _ in range(options.repeat)] and None

    times = measure.alternate(
        {name: repeated(product) for name, product in products.items()}, rounds=options.rounds, device=device
    )
    flop = 2 * options.tasks * ROWS * INNER * COLS
    print(f"[{options.tasks}, {ROWS}, {INNER}] × [{options.tasks}, {INNER}, {COLS}], {flop / 1e9:.3f} GFLOP, {device}")
    print(f"{'':22} {'median us':>10} {'min':>9} {'max':>9} {'TFLOP/s':>9}  error")
    rows = {}
    for name, values in times.items():
        row = rows[name] = measure.summary([value / options.repeat for value in values])
        row["tflops"] = round(flop / row["median_ms"] / 1e9, 3) if row["median_ms"] else None
        row["relative_error"] = float(f"{errors[name]:.2g}")
        spread = " ".join(f"{1e3 * row[f'{which}_ms']:9.1f}" for which in ("median", "min", "max"))
        print(f"{name:22}  {spread} {row['tflops'] or 0:9.2f}  {row['relative_error']:.1e}")
    for name, why in left_out.items():
        print(f"{name} is left out: {why}")
    if options.json:
        measure.write_result(
            options.json,
            script="yardsticks",
            device=device,
            packages=["triton"],
            product={"tasks": options.tasks, "rows": ROWS, "inner": INNER, "cols": COLS, "flop": flop},
            left_out=left_out,
            results=rows,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
