"""The cases: what each asks, and fresh random systems for it from a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from .system import Must, System

Parts = Callable[[Generator], Sequence[System]]
F32, F64 = torch.float32, torch.float64
N = 32  # unknowns, unless a case says otherwise


@dataclass(frozen=True)
class Case:
    """Attributes: asks: the criterion, for the page. parts: the systems, all of which have to be right."""

    name: str
    asks: str
    parts: Parts


CASES: dict[str, Case] = {}


def case(asks: str) -> Callable[[Parts], Parts]:
    def register(parts: Parts) -> Parts:
        CASES[parts.__name__] = Case(parts.__name__, asks, parts)
        return parts

    return register


# --- random systems -----------------------------------------------------------------------------------------------


def normal(g: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=F64)


def with_eigenvalues(g: Generator, eigenvalues: Tensor) -> Tensor:
    """[B, N, N] symmetric, with these eigenvalues [B, N] and random eigenvectors."""
    Q = torch.linalg.qr(normal(g, *eigenvalues.shape, eigenvalues.shape[1])).Q
    A = Q * eigenvalues.unsqueeze(1) @ Q.mT
    return (A + A.mT) / 2


def spread(*condition: float, n: int = N) -> Tensor:
    """[len(condition), n]: eigenvalues from 1 to the condition number, evenly spaced in their logarithm."""
    return torch.stack([torch.logspace(0, torch.tensor(c).log10().item(), n, dtype=F64) for c in condition])


def definite(g: Generator, *condition: float, n: int = N) -> Tensor:
    return with_eigenvalues(g, spread(*condition, n=n))


def reference_iterations(system: System) -> int:
    """Steps of textbook CG (Hestenes and Stiefel 1952) in float64 until the residual by recurrence meets rtol."""
    most = 0
    for row, rtol in enumerate(system.tolerances()):
        b = system.b[row].double()
        M = system.preconditioner[row] if system.preconditioner is not None else torch.eye(len(b), dtype=F64)
        r, p, steps = b.clone(), M @ b, 0
        rz = r @ p
        while r.norm() > rtol * b.norm():
            Ap = system.A[row] @ p
            r = r - rz / (p @ Ap) * Ap
            z = M @ r
            rz, previous = r @ z, rz
            p = z + rz / previous * p
            steps += 1
        most = max(most, steps)
    return most


def limited(system: System) -> System:
    """With the number of products that the cases about cost allow: 1.25 times the reference's, and 3."""
    return replace(system, most_products=5 * reference_iterations(system) // 4 + 3)


SOLVE, NOT_LIE, REPORT = Must.SOLVE, Must.NOT_LIE, Must.REPORT


# --- what every solver should do ----------------------------------------------------------------------------------


@case("A = I, where the residual is exactly 0 after one step: x is right.")
def identity(g: Generator) -> Sequence[System]:
    return [System(torch.eye(17, dtype=F64).repeat(4, 1, 1), normal(g, 4, 17), (SOLVE,) * 4, rtol=1e-10)]


@case("A row b = 0 between two others: its x is exactly 0, and the others are right.")
def zero_b(g: Generator) -> Sequence[System]:
    b = normal(g, 3, N)
    b[1] = 0
    return [System(definite(g, 10, 100, 50), b, (SOLVE,) * 3)]


@case("One unknown per row; as a tensor without dimensions too, where the interface takes one.")
def scalar(g: Generator) -> Sequence[System]:
    A, b = 1 + 9 * torch.rand(3, 1, 1, generator=g, dtype=F64), normal(g, 3, 1)
    system = System(A, b, (SOLVE,) * 3, max_iterations=10)
    return [system, replace(system, zero_dim=True, optional=True)]


@case("Condition numbers 1, 10, 10³ and 10⁵ in one batch: every row is within its tolerance.")
def mixed_conditioning(g: Generator) -> Sequence[System]:
    return [System(definite(g, 1, 10, 1e3, 1e5), normal(g, 4, N), (SOLVE,) * 4, slack=1, max_iterations=2000)]


@case("15 easy rows and a hard one, ‖b‖ from 10⁻⁶ to 10⁶: every row is within its tolerance.")
def tolerance_per_row(g: Generator) -> Sequence[System]:
    b = normal(g, 16, N) * torch.logspace(6, -6, 16, dtype=F64).unsqueeze(1)
    return [System(definite(g, *[2.0] * 15, 1e4), b, (SOLVE,) * 16, rtol=1e-4, slack=1, max_iterations=1000)]


@case("A tolerance for each row, 1e-2, 1e-4, 1e-8 and 1e-11: every row is within its own.")
def own_tolerances(g: Generator) -> Sequence[System]:
    rtol = torch.tensor([1e-2, 1e-4, 1e-8, 1e-11], dtype=F64)
    return [System(definite(g, 100, 100, 100, 100), normal(g, 4, N), (SOLVE,) * 4, rtol=rtol, slack=1)]


@case("A NaN in one matrix and one in another row's b: these rows are reported or NaN, and the others right.")
def nan_row(g: Generator) -> Sequence[System]:
    A, b = definite(g, 10, 100, 50, 100), normal(g, 4, N)
    A[1, 3, 5] = A[1, 5, 3] = torch.nan
    b[3, 7] = torch.nan
    return [System(A, b, (SOLVE, REPORT, SOLVE, REPORT))]


@case("A row with eigenvalues of both signs: right or reported, and the others right.")
def indefinite_row(g: Generator) -> Sequence[System]:
    eigenvalues = spread(10, 100, 50)
    eigenvalues[1, ::2] *= -1
    return [System(with_eigenvalues(g, eigenvalues), normal(g, 3, N), (SOLVE, NOT_LIE, SOLVE))]


def _singular(g: Generator) -> tuple[Tensor, Tensor]:
    eigenvalues = spread(10, 50, 50)
    eigenvalues[1, :3] = 0
    return with_eigenvalues(g, eigenvalues), normal(g, 3, N)


@case("A singular row whose b is in the range of A: it is right, and so are the others.")
def singular_consistent(g: Generator) -> Sequence[System]:
    A, b = _singular(g)
    b[1] = A[1] @ b[1]
    return [System(A, b, (SOLVE,) * 3)]


@case("A singular row whose b is not in the range of A: it is reported, and the others are right.")
def singular_inconsistent(g: Generator) -> Sequence[System]:
    A, b = _singular(g)
    return [System(A, b, (SOLVE, REPORT, SOLVE))]


@case("κ = 10⁸ in float32, where residuals by recurrence drift: within the tolerance, or reported.")
def drift(g: Generator) -> Sequence[System]:
    A, b = definite(g, 1e8, 1e8, 1e8, n=64), normal(g, 3, 64)
    return [System(A, b.to(F32), (NOT_LIE,) * 3, rtol=1e-5, slack=1, max_iterations=3000)]


@case("x0 solves the system exactly: it comes back with the same bits after at most one product.")
def exact_warm_start(g: Generator) -> Sequence[System]:
    whole = torch.randint(-3, 4, (3, N, N), generator=g).double()  # products of whole numbers are exact
    A, x0 = whole @ whole.mT + N * torch.eye(N, dtype=F64), torch.randint(-9, 10, (3, N), generator=g).double()
    b = torch.einsum("bij,bj->bi", A, x0)
    return [System(A, b, (SOLVE,) * 3, x0=x0, expected_x=x0, most_products=1)]


@case("x0 is 10⁸ times as large as b: every row is right all the same.")
def far_warm_start(g: Generator) -> Sequence[System]:
    A, b = definite(g, 10, 100, 100), normal(g, 3, N)
    return [System(A, b, (SOLVE,) * 3, rtol=1e-9, x0=1e8 * normal(g, 3, N))]


def _scaled(g: Generator, scale: float, dtype: torch.dtype) -> Sequence[System]:
    rtol = 1e-8 if dtype == F64 else 1e-5
    return [System(definite(g, 10, 100, 50), (scale * normal(g, 3, N)).to(dtype), (SOLVE,) * 3, rtol=rtol)]


@case("b of size 10⁻¹⁵⁰ in float64: every row is right.")
def tiny_float64(g: Generator) -> Sequence[System]:
    return _scaled(g, 1e-150, F64)


@case("b of size 10¹⁵⁰ in float64: every row is right.")
def huge_float64(g: Generator) -> Sequence[System]:
    return _scaled(g, 1e150, F64)


@case("b of size 10⁻³⁰ in float32: every row is right.")
def tiny_float32(g: Generator) -> Sequence[System]:
    return _scaled(g, 1e-30, F32)


@case("Two easy rows beside easy ones, then beside hard ones that go on: their x has the same bits both times.")
def frozen(g: Generator) -> Sequence[System]:
    easy, hard, b = definite(g, 4, 9, 2, 5), definite(g, 1e4, 1e4), normal(g, 4, N)
    first = System(easy, b, (SOLVE,) * 4, max_iterations=1000)
    return [replace(first, twin=replace(first, A=torch.cat([easy[:2], hard])), shared=(0, 1))]


@case("Diagonals from 1 to 10⁶ and a Jacobi preconditioner: right, with at most 1.25 n + 3 products, as in `products`.")
def preconditioner(g: Generator) -> Sequence[System]:
    return [limited(_preconditioned(g))]


def _preconditioned(g: Generator) -> System:
    scale = torch.logspace(0, 3, N, dtype=F64)
    A = scale.unsqueeze(1) * definite(g, 4, 9, 20) * scale
    return System(A, normal(g, 3, N), (SOLVE,) * 3, preconditioner=A.diagonal(dim1=1, dim2=2).reciprocal().diag_embed())


@case(
    "A preconditioner that is indefinite in one row and negative in another: these are right or reported, and the "
    "other is right."
)
def indefinite_preconditioner(g: Generator) -> Sequence[System]:
    system = _preconditioned(g)
    M = system.A.diagonal(dim1=1, dim2=2).reciprocal().diag_embed()
    M[1] *= (torch.arange(N) % 2 * 2 - 1).double()
    M[2] *= -1
    return [replace(system, preconditioner=M, must=(SOLVE, NOT_LIE, NOT_LIE))]


@case("b transposed, expanded and strided: the right answers, and b is as it was.")
def not_contiguous(g: Generator) -> Sequence[System]:
    A = definite(g, 10, 100, 50)
    layouts = (normal(g, N, 3).T, normal(g, N).expand(3, N), normal(g, 3, 2 * N)[:, ::2])
    return [System(A, b, (SOLVE,) * 3) for b in layouts]


@case("Five right-hand sides for each matrix, of sizes from 10⁻⁴ to 10⁴: every one is right.")
def right_hand_sides(g: Generator) -> Sequence[System]:
    b = normal(g, 3, N, 5) * torch.logspace(-4, 4, 5, dtype=F64)
    return [System(definite(g, 10, 100, 50), b, (SOLVE,) * 3)]


@case("κ = 100: right, with at most 1.25 n + 3 products per row, where textbook CG takes n steps.")
def products(g: Generator) -> Sequence[System]:
    return [limited(System(definite(g, 100, 100, 100, n=100), normal(g, 3, 100), (SOLVE,) * 3))]


@case("Five iterations where dozens are needed: what came back is reported.")
def budget_spent(g: Generator) -> Sequence[System]:
    return [System(definite(g, 100, 100, n=100), normal(g, 2, 100), (NOT_LIE,) * 2, max_iterations=5)]
