"""Preconditioners that are made: exact where theory says so, positive definite, row by row, a function of the seed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from meta_tasks import F64, classification, regression, relative
from systems import dense, multiply
from torch import Tensor, nn

import imaml_ext
from imaml_ext import CG, IMAML, GradientDescent, NewtonCG, SolveStatus, cg
from imaml_ext.batch import TaskData
from imaml_ext.cli.train_options import training_options
from imaml_ext.errors import ConfigError
from imaml_ext.losses import TaskLoss
from imaml_ext.models import MLP, TaskModel, from_module
from imaml_ext.settings import changed, from_json, leaves, to_json
from imaml_ext.solvers import LinearSolver, multi_rhs
from imaml_ext.solvers.preconditioners import KFAC, Jacobi, KroneckerFactors, Nystrom, Preconditioner, Refreshed
from imaml_ext.train import TrainConfig, load_recipe

B, N = 4, 40
OF_PRODUCTS: list[Preconditioner] = [Jacobi(probes=3), Nystrom(rank=7)]


def matrix_of(function: Callable[[Tensor], Tensor], rows: int, size: int, dtype: torch.dtype = F64) -> Tensor:
    """The matrices [B, N, N] of a linear function of [B, N]."""
    return torch.stack([function(e.expand(rows, size).contiguous()) for e in torch.eye(size, dtype=dtype)], 2)


def low_rank(rank: int, rows: int = B, size: int = N) -> Tensor:
    """Symmetric [B, N, N] float64 with eigenvalues from 1 to 1,000, as many as the rank, and 0."""
    q = torch.linalg.qr(torch.randn(rows, size, rank, dtype=F64)).Q
    return (q * torch.logspace(0, 3, rank, dtype=F64)) @ q.mT


def shifts(form: str) -> Tensor | float:
    shape = {"[B]": (B,), "[N]": (N,), "[B, N]": (B, N)}.get(form)
    return 0.3 if shape is None else 0.2 + torch.rand(shape, dtype=F64)


def per_entry(shift: Tensor | float) -> Tensor:
    """A shift as [B, N]."""
    if isinstance(shift, float):
        return torch.full((B, N), shift, dtype=F64)
    return (shift.unsqueeze(1) if shift.shape == (B,) else shift).expand(B, N)


@pytest.mark.parametrize("form", ["number", "[B]", "[N]", "[B, N]"])
def test_jacobi_of_a_diagonal_matrix_is_its_inverse(form: str) -> None:
    d, b, shift = 10 ** (4 * torch.rand(B, N, dtype=F64)), torch.randn(B, N, dtype=F64), shifts(form)
    made = Jacobi(probes=2).make(lambda p: d * p, b, shift)
    torch.testing.assert_close(made.diagonal, 1 / (d + per_entry(shift)))
    torch.testing.assert_close(made(b), made.diagonal * b)
    solution = CG(max_iterations=3, rtol=1e-10, preconditioner=Jacobi(probes=2)).solve(lambda p: d * p, b, shift)
    solution.raise_if_failed()
    assert solution.iterations.tolist() == [1] * B
    assert solution.set_up.products == 2


def test_jacobi_estimates_the_diagonal_and_guards_its_entries() -> None:
    A, b = dense(B, N), torch.randn(B, N, dtype=F64)
    many = Jacobi(probes=4000).make(multiply(A), b)
    assert relative(1 / many.diagonal, A.diagonal(dim1=1, dim2=2)) < 0.05
    shifted = Jacobi(probes=1).make(multiply(A - 2 * torch.eye(N, dtype=F64)), b, shift=0.5)
    torch.testing.assert_close(shifted.diagonal, torch.full((B, N), 2.0, dtype=F64))  # nothing is above 0.05
    assert shifted.fallback.all()


@pytest.mark.parametrize("form", ["number", "[B]", "[N]", "[B, N]"])
def test_nystrom_of_a_low_rank_is_the_inverse(form: str) -> None:
    """rank ≥ r: M = (H + shift)⁻¹, hence at most 3 iterations; also for a shift that comes later."""
    H, b, shift = low_rank(5), torch.randn(B, N, dtype=F64), shifts(form)
    early = Nystrom(rank=8).make(multiply(H), b, shift=7.0)
    assert (early.products, early.for_shift(shift).products) == (8, 0)
    inverse = torch.linalg.inv(H + per_entry(shift).diag_embed())
    for made in (Nystrom(rank=8).make(multiply(H), b, shift), early.for_shift(shift)):
        assert relative(matrix_of(made, B, N), inverse) < 1e-8
        solution = cg(multiply(H), b, shift=shift, max_iterations=9, rtol=1e-9, preconditioner=made)
        assert (solution.status == SolveStatus.CONVERGED).all()
        assert (solution.iterations <= 3).all()


def test_nystrom_spends_a_fifth_of_the_products_where_the_spectrum_decays() -> None:
    """Condition number 10⁶, the set-up and the product that measures included."""
    q = torch.linalg.qr(torch.randn(1, 300, 300, dtype=F64)).Q
    H, b = (q * 0.8 ** torch.arange(300, dtype=F64)) @ q.mT, torch.randn(1, 300, dtype=F64)
    products = []
    for preconditioner in (None, Nystrom(rank=60)):
        calls = 0

        def counted(p: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return multiply(H)(p)

        solver = CG(max_iterations=3000, rtol=1e-6, check_every=1, preconditioner=preconditioner)
        solution = solver.solve(counted, b, 1e-6)
        solution.raise_if_failed()
        products.append(calls)
    assert products[1] == 60 + int(solution.iterations) + 1
    assert 5 * products[1] <= products[0]


def test_nystrom_is_the_formula_of_the_paper() -> None:
    """U (λ_r + μ) (Λ + μ)⁻¹ Uᵀ + (1 − U Uᵀ), up to a factor, where U Λ Uᵀ = Y (Ωᵀ Y)⁻¹ Yᵀ."""
    H, b, mu = dense(B, N), torch.randn(B, N, dtype=F64), 1e-2
    probes = []

    def watched(p: Tensor) -> Tensor:
        probes.append(p[0])
        return multiply(H)(p)

    M = matrix_of(Nystrom(rank=6).make(watched, b, mu), B, N)
    omega = torch.stack(probes, 1)
    Y = H @ omega
    values, vectors = torch.linalg.eigh(Y @ torch.linalg.solve(omega.mT @ Y, Y.mT))
    U, lam = vectors[:, :, -6:], values[:, -6:]
    inside = U * ((lam[:, :1] + mu) / (lam + mu)).unsqueeze(1)
    expected = inside @ U.mT + torch.eye(N, dtype=F64) - U @ U.mT
    assert relative((lam[:, :1] + mu).unsqueeze(2) * M, expected) < 1e-6


def test_nystrom_of_a_low_rank_is_the_inverse_to_rounding() -> None:
    """In float32 too, with rank to spare, and for b inside the range of H: M b needs no step of CG."""
    size, rank = 6007, 9
    Q = torch.linalg.qr(torch.randn(2, size, rank, dtype=F64)).Q
    factor = Q * torch.logspace(0.5, -0.7, rank, dtype=F64)  # eigenvalues from 10 to 0.04
    operator = lambda p: ((p.double().unsqueeze(1) @ factor) @ factor.mT).squeeze(1).float()  # noqa: E731
    b = torch.stack([(factor @ torch.randn(2, rank, 1, dtype=F64)).squeeze(2), torch.randn(2, size, dtype=F64)], 2)
    made = Nystrom(rank=2 * rank).make(operator, b[:, :, 0].float(), 0.1)
    x = made(b.float()).double()
    residual = (factor @ (factor.mT @ x) + 0.1 * x - b).norm(dim=1) / b.norm(dim=1)
    assert residual.max() < 3e-4  # roundings times the condition number, 100; at most 6e-5 in 440 draws
    found = cg(operator, b.float(), shift=0.1, x0=made(b.float()), preconditioner=made, rtol=4e-4, check_every=1)
    assert found.iterations.tolist() == [[0, 0]] * 2
    assert (found.status == SolveStatus.CONVERGED).all()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preconditioner", OF_PRODUCTS, ids=type)
def test_is_positive_definite_even_for_an_indefinite_matrix(preconditioner: Preconditioner, dtype: torch.dtype) -> None:
    S = torch.randn(B, N, N, dtype=F64)
    for H in (S + S.mT, S @ S.mT, 1e6 * low_rank(3), -(S @ S.mT)):
        for shift in (0.0, 1e-3, 5.0, 0.1 + torch.rand(B, N, dtype=F64)):
            given = shift.to(torch.float64 if dtype == F64 else torch.float32) if isinstance(shift, Tensor) else shift
            made = preconditioner.make(multiply(H.to(dtype)), torch.zeros(B, N, dtype=dtype), given)
            assert made(torch.ones(B, N, dtype=dtype)).dtype == dtype
            wide = F64 if dtype == F64 else torch.float32
            M = matrix_of(made, B, N, wide).double()
            assert relative(M, M.mT) < 1e-5
            values = torch.linalg.eigvalsh((M + M.mT) / 2)
            assert (values[:, 0] > 0).all(), (values[:, 0], shift)


@pytest.mark.parametrize("shift", [0.3, torch.full((B, N), 0.3, dtype=F64)], ids=["number", "vector"])
@pytest.mark.parametrize("preconditioner", OF_PRODUCTS, ids=type)
def test_what_is_made_can_be_differentiated(preconditioner: Preconditioner, shift: float | Tensor) -> None:
    made = preconditioner.make(multiply(dense(B, N)), torch.zeros(B, N, dtype=F64), shift)
    r, c = torch.randn(B, N, 2, dtype=F64, requires_grad=True), torch.randn(B, N, 2, dtype=F64)
    (gradient,) = torch.autograd.grad(made(r), r, c)
    torch.testing.assert_close(gradient, made(c))  # M is symmetric
    torch.testing.assert_close(torch.func.jvp(made, (r.detach(),), (c,))[1], gradient)
    torch.testing.assert_close(torch.func.vmap(made, 2, 2)(c), gradient)


def test_a_row_without_information_is_divided_by_its_shift() -> None:
    H = low_rank(5)
    H[1], H[2], H[3] = torch.nan, -H[2], 0
    b = torch.randn(B, N, dtype=F64)
    whole = Nystrom(rank=8).make(multiply(H), b, 0.5)
    assert whole.fallback.tolist() == [False, True, True, True]
    torch.testing.assert_close(whole(b)[1:], b[1:] / 0.5)
    solution = CG(max_iterations=9, rtol=1e-9, preconditioner=Nystrom(rank=8)).solve(multiply(H), b, 0.5)
    assert solution.set_up.fallback.tolist() == [False, True, True, True]
    assert [SolveStatus(s).name for s in solution.status.tolist()] == [
        "CONVERGED",
        "NON_FINITE",
        "NEGATIVE_CURVATURE",
        "CONVERGED",
    ]
    assert Jacobi().make(multiply(H), b, 0.5).fallback.tolist()[:2] == [False, True]
    shift = torch.full((B, N), 0.5, dtype=F64)
    shift[0, 2] = torch.nan
    for given in (shift, shift[:, 2]):  # a row alone without a number for its shift, and one whose eigenvalue overflows
        made = Nystrom(rank=8).make(multiply(H), b, given)
        assert made.fallback.tolist() == [True, True, True, True]
        torch.testing.assert_close(made(b)[1:], b[1:] / 0.5)
    wide = torch.full((2, 300, 300), 3e36)
    wide[1] /= 1e36
    for given in (1.0, torch.ones(300)):
        made = Nystrom(rank=3).make(multiply(wide), torch.zeros(2, 300), given)
        assert made.fallback.tolist() == [True, False]
        assert made(torch.ones(2, 300)).isfinite().all()
    assert Nystrom().make(multiply(H[:0]), b[:0], 0.5)(b[:0]).shape == (0, N)
    without = Nystrom().make(lambda p: 0 * p, b)  # nor a shift
    torch.testing.assert_close(without(b), b)


@pytest.mark.parametrize("preconditioner", OF_PRODUCTS, ids=type)
def test_rows_are_alone_and_the_seed_decides(preconditioner: Preconditioner) -> None:
    H, b = dense(B, N), torch.randn(B, N, dtype=F64)
    state = torch.get_rng_state()
    made = preconditioner.make(multiply(H), b, 0.1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(int(torch.randint(99, ())))
    assert torch.equal(preconditioner.make(multiply(H), b, 0.1)(b), made(b))
    other = type(preconditioner)(preconditioner.__dict__[next(iter(vars(preconditioner)))], seed=1)
    assert not torch.equal(other.make(multiply(H), b, 0.1)(b), made(b))
    for row in range(B):
        here = slice(row, row + 1)
        torch.testing.assert_close(made(b[here], here), made(b)[here], rtol=1e-12, atol=1e-12)
        alone = preconditioner.make(multiply(H[here]), b[here], 0.1)
        torch.testing.assert_close(alone(b[here]), made(b)[here], rtol=1e-9, atol=1e-9)
    H[2] = torch.nan
    torch.testing.assert_close(preconditioner.make(multiply(H), b, 0.1)(b)[:2], made(b)[:2], rtol=1e-9, atol=1e-9)


def test_products_share_a_call_where_the_operator_can() -> None:
    H, b = low_rank(5), torch.randn(B, N, dtype=F64)
    calls = []

    @multi_rhs
    def together(p: Tensor) -> Tensor:
        calls.append(p.shape)
        return H @ p if p.dim() == 3 else multiply(H)(p)

    for preconditioner in (Nystrom(rank=8), Jacobi(probes=8)):
        calls.clear()
        made = preconditioner.make(together, b, 0.5)
        assert calls == [(B, N, 8)]
        torch.testing.assert_close(made(b), preconditioner.make(multiply(H), b, 0.5)(b))
        torch.testing.assert_close(made(b), preconditioner.make(H, b, 0.5)(b))


@pytest.mark.parametrize("preconditioner", [Jacobi(probes=5), Nystrom(rank=8)], ids=type)
def test_every_form_of_a_right_hand_side(preconditioner: Preconditioner) -> None:
    H, b = low_rank(5), torch.randn(B, N, 3, dtype=F64)
    solver = CG(max_iterations=300, rtol=1e-9, preconditioner=preconditioner)
    many = solver.solve(H, b, 0.5)
    many.raise_if_failed()
    assert many.set_up.fallback.shape == (B,)
    single = [solver.solve(multiply(H), b[:, :, k].contiguous(), 0.5).x for k in range(3)]
    torch.testing.assert_close(many.x, torch.stack(single, 2), rtol=1e-7, atol=1e-7)
    one = solver.solve(H[0], b[0, :, 0].contiguous(), 0.5)
    torch.testing.assert_close(one.x, single[0][0], rtol=1e-7, atol=1e-7)
    parts = {"w": b[:, :12, 0].reshape(B, 3, 4).contiguous(), "v": b[:, 12:, 0].contiguous()}

    def of_structure(p: dict[str, Tensor]) -> dict[str, Tensor]:
        product = multiply(H)(torch.cat([p["v"], p["w"].flatten(1)], 1).roll(12, 1))
        return {"w": product[:, :12].reshape(B, 3, 4), "v": product[:, 12:]}

    structured = solver.solve(of_structure, parts, 0.5)
    torch.testing.assert_close(structured.x["v"], single[0][:, 12:], rtol=1e-7, atol=1e-7)
    in_blocks = cg(lambda p, rows: multiply(H[rows])(p), b[:, :, 0].contiguous(), shift=0.5, max_iterations=300,
                   rtol=1e-9, rows_per_block=3, preconditioner=preconditioner.make(H, b[:, :, 0], 0.5))  # fmt: skip
    torch.testing.assert_close(in_blocks.x, single[0], rtol=1e-7, atol=1e-7)


def test_both_passes_of_a_differentiable_solve_tell_their_set_up() -> None:
    calls, told = 0, []

    def product(p: Tensor, H: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return multiply(H)(p)

    H, b = low_rank(3).requires_grad_(), torch.randn(B, N, 2, dtype=F64, requires_grad=True)
    solver = CG(max_iterations=30, preconditioner=Nystrom(rank=4))
    options = {"shift": 0.5, "linear_solver": solver, "on_solve": told.append}
    found = imaml_ext.solve(product, b[:, :, 0], parameters=(H,), **options)
    assert found.set_up.products == 4 == calls - 30
    assert torch.autograd.grad(found.x.sum(), H)[0].isfinite().all()
    assert told[0].set_up.products == 4 == calls - 30 - 34 - 1  # and one product is differentiated
    assert not told[0].set_up.fallback.any()
    assert imaml_ext.solve(H, b, **options).set_up.fallback.shape == (B, 2)
    assert imaml_ext.solve(H[0], b[0, :, 0], **options).set_up.fallback.shape == ()
    assert imaml_ext.solve(H, b, shift=0.5).set_up is None


@pytest.mark.parametrize("name", ["jacobi", "nystrom", "kfac", "refreshed"])
def test_one_that_was_made_for_other_rows(name: str) -> None:
    """Its own rows are taken in every form of b."""

    class Curvature:
        def __call__(self, p: Tensor) -> Tensor:
            return 2 * p

        def kronecker_factors(self, samples: int, seed: int) -> KroneckerFactors:
            return KroneckerFactors((), torch.full((4, 6), 2.0), 1)

    like = torch.ones(4, 6)
    made = Preconditioner.kind(name)().make(Curvature(), like, 1.0)
    for b in (like, like.unsqueeze(2).expand(4, 6, 3)):
        assert cg(lambda p: 2 * p, b, shift=1.0, preconditioner=made).status.eq(0).all()
    for shape in ((4, 5), (4, 7), (3, 6), (1, 6), (2, 9), (6,), (3, 6, 2), (4, 5, 2), (0, 6)):
        for block in (None, 2) if len(shape) == 2 else (None,):
            with pytest.raises(ValueError, match=r"^preconditioner must be .*, got (one made for )?\[4, 6\]$"):
                cg(lambda p, _=None: 2 * p, torch.ones(shape), shift=1.0, preconditioner=made, rows_per_block=block)


def test_a_solution_keeps_its_set_up_and_nothing_is_made_for_no_rows() -> None:
    H, b = low_rank(3), torch.randn(B, N, dtype=F64)
    file = io.BytesIO()
    torch.save(cg(H, b, shift=0.5, preconditioner=Nystrom(rank=4)), file)
    file.seek(0)
    set_up = torch.load(file, weights_only=True).set_up
    assert (set_up.products, set_up.fallback.tolist()) == (4, [False] * B)
    assert cg(lambda p: p, b, preconditioner=Jacobi()).set_up.products == 8
    assert cg(lambda p: p, b).set_up is None
    assert cg(lambda p: p, b[:0], preconditioner=Nystrom()).x.shape == (0, N)
    with pytest.raises(RuntimeError, match="cg must be called outside the transforms"):
        torch.vmap(lambda v: cg(lambda p: p, v, preconditioner=Nystrom()).x)(b.unsqueeze(0))


def test_the_differentiable_solve_takes_it() -> None:
    root, b = torch.randn(B, N, 3, dtype=F64), torch.randn(B, N, dtype=F64)

    def gradients(preconditioner: Preconditioner | None) -> tuple[Tensor, ...]:
        w, rhs = root.clone().requires_grad_(), b.clone().requires_grad_()
        solver = CG(max_iterations=200, rtol=1e-10, preconditioner=preconditioner)
        found = imaml_ext.solve(
            lambda p, w: multiply(w @ w.mT)(p), rhs, parameters=(w,), shift=0.5, linear_solver=solver
        )
        return torch.autograd.grad(found.x.square().sum(), (w, rhs))

    for found, expected in zip(gradients(Nystrom(rank=4)), gradients(None), strict=True):
        assert relative(found, expected) < 1e-7


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda b: Nystrom().make(lambda p: p[:, 1:], b), "must return|shape"),
        (lambda b: Nystrom().make(lambda p: p.float(), b), "torch.float64"),
        (lambda b: Jacobi().make(lambda p: p, b, torch.ones(3, dtype=F64)), "shift must be"),
        (lambda b: KFAC().make(lambda p: p, b), "operator must have kronecker_factors"),
        (lambda b: Nystrom(rank=0), "Nystrom.rank must be at least 1"),
    ],
)
def test_bad_input(call: Callable[[Tensor], object], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        call(torch.randn(B, N, dtype=F64))


# --- kept for several solves ----------------------------------------------------------------------------------------


def test_refreshed_pays_once_for_several_solves() -> None:
    H, b = low_rank(5), torch.randn(B, N, dtype=F64)
    calls = 0

    def counted(p: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return multiply(H)(p)

    kept = Refreshed(Nystrom(rank=8), every=3)
    solver = CG(max_iterations=3, rtol=0.0, preconditioner=kept)
    spent = [solver.solve(counted, b, 0.5 + step).set_up.products for step in range(7)]
    assert spent == [8, 0, 0, 8, 0, 0, 8]
    assert calls == 3 * 8 + 7 * 3
    narrow = solver.solve(lambda p: p, b[:2], 0.5)
    assert narrow.set_up.products == 8  # rows of another number
    assert kept == Refreshed(Nystrom(rank=8), every=3)
    for twin in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert twin == kept
        assert twin.make(multiply(H), b, 0.5).products == 8


# --- KFAC -----------------------------------------------------------------------------------------------------------


def layer(kind: str) -> tuple[TaskModel, Tensor, Tensor]:
    """One layer of 3 or 18 inputs and 4 outputs, an example per task, in which a convolution has a single position."""
    images = kind == "conv2d"
    model = {
        "mlp": lambda: MLP(3, (), 4),
        "linear": lambda: from_module(nn.Linear(3, 4).double()),
        "conv2d": lambda: from_module(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten()).double()),
    }[kind]()
    x = torch.randn(B, 1, *((2, 3, 3) if images else (3,)), dtype=F64)
    return model, x, torch.randn(B, model.num_parameters, dtype=F64)


@pytest.mark.parametrize("criterion", ["cross_entropy", "mse"])
@pytest.mark.parametrize("kind", ["mlp", "linear", "conv2d"])
def test_kfac_of_a_layer_and_one_example_is_exact(kind: str, criterion: str) -> None:
    model, x, phi = layer(kind)
    y = torch.randint(4, (B, 1)) if criterion == "cross_entropy" else torch.randn(B, 1, 4, dtype=F64)
    operator = TaskLoss(model, criterion).linearize(phi, TaskData(x, y), "gauss_newton")
    r, shift = torch.randn_like(phi), 0.1 + torch.rand(B, dtype=F64)
    G = matrix_of(operator, *phi.shape) + shift.view(B, 1, 1) * torch.eye(phi.shape[1], dtype=F64)
    made = KFAC().make(operator, r, 3.0).for_shift(shift)
    assert relative(made(r), torch.linalg.solve(G, r)) < 1e-9
    assert relative(made(torch.stack([r, 2 * r], 2))[:, :, 1], 2 * made(r)) < 1e-12


def test_kfac_of_a_linear_layer_and_whitened_inputs_is_exact() -> None:
    """Squared error, whose C is a multiple of the identity: A ⊗ G is the matrix for any inputs."""
    model = MLP(3, (), 2)
    x = torch.randn(B, 7, 3, dtype=F64)
    phi = torch.randn(B, model.num_parameters, dtype=F64)
    operator = TaskLoss(model, "mse").linearize(phi, TaskData(x, torch.randn(B, 7, 2, dtype=F64)), "gauss_newton")
    r = torch.randn_like(phi)
    G = matrix_of(operator, *phi.shape) + 0.2 * torch.eye(phi.shape[1], dtype=F64)
    assert relative(KFAC().make(operator, r, 0.2)(r), torch.linalg.solve(G, r)) < 1e-9


def kfac_problems() -> dict[str, tuple[TaskLoss, Tensor, TaskData]]:
    conv4, theta, episodes = classification(2)
    mlp, start, points = regression(2)
    module = from_module(
        nn.Sequential(
            nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.ReLU(),
            nn.Conv2d(3, 4, 3, groups=1), nn.Flatten(), nn.Linear(64, 3, bias=False),
        ).double(),
        batch_norm="task",
    )  # fmt: skip
    return {
        "Conv4": (conv4, theta, episodes.support),
        "MLP": (mlp, start, points.support),
        "module": (TaskLoss(module, "cross_entropy"), module.init(seed=0, dtype=F64), episodes.support),
    }


@pytest.mark.parametrize("name", ["Conv4", "MLP", "module"])
@pytest.mark.parametrize("samples", [0, 3])
def test_kfac_of_networks_is_positive_definite_and_changes_no_solution(name: str, samples: int) -> None:
    loss, theta, data = kfac_problems()[name]
    phi = (theta + 0.1 * torch.randn(2, len(theta), dtype=F64)).contiguous()
    operator = loss.linearize(phi, data, "gauss_newton")
    shift = 2.0
    for form in (shift, torch.full((2, len(theta)), shift, dtype=F64)):
        made = KFAC(samples=samples).make(operator, phi, form)
        M = matrix_of(made, *phi.shape)
        assert relative(M, M.mT) < 1e-10
        assert (torch.linalg.eigvalsh((M + M.mT) / 2)[:, 0] > 0).all()
    r = torch.randn_like(phi)
    options = {"shift": shift, "max_iterations": 400, "rtol": 1e-9, "check_every": 1}
    plain, helped = cg(operator, r, **options), cg(operator, r, preconditioner=made, **options)
    helped.raise_if_failed()
    assert relative(helped.x, plain.x) < 1e-6
    torch.testing.assert_close(made(r[:1], slice(0, 1)), made(r)[:1])


def test_kfac_saves_products_where_examples_are_many_and_scales_differ() -> None:
    model = MLP(6, (), 3)
    x = torch.randn(B, 80, 6, dtype=F64) * torch.logspace(-2, 1, 6, dtype=F64)
    phi = 0.1 * torch.randn(B, model.num_parameters, dtype=F64)
    data = TaskData(x, torch.randint(3, (B, 80)))
    operator = TaskLoss(model, "cross_entropy").linearize(phi, data, "gauss_newton")
    options = {"shift": 1e-6, "max_iterations": 200, "rtol": 1e-8, "check_every": 1}
    plain = cg(operator, phi, **options)
    helped = cg(operator, phi, preconditioner=KFAC(), **options)
    helped.raise_if_failed()
    # A third to a half of the products in 680 problems.
    assert (4 * (helped.iterations + helped.set_up.products) < 3 * plain.iterations).all()


def test_kfac_estimates_the_diagonal_of_the_gauss_newton_matrix() -> None:
    """The mean over seeds of the diagonal; a seed decides all of it, and no global random state changes."""
    loss, theta, data = kfac_problems()["module"]
    phi = theta.expand(2, -1).contiguous()
    operator = loss.linearize(phi, data, "gauss_newton")
    diagonal = matrix_of(operator, *phi.shape).diagonal(dim1=1, dim2=2)
    found: list[KroneckerFactors] = [operator.kronecker_factors(samples=0, seed=seed) for seed in range(60)]
    mean = torch.stack([factors.diagonal for factors in found]).mean(0)
    assert relative(mean, diagonal) < 0.2
    assert [tuple(block.columns.shape) for block in found[0].blocks] == [(10, 3), (28, 4), (64, 3)]
    state = torch.get_rng_state()
    again = operator.kronecker_factors(samples=0, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.diagonal, found[3].diagonal)


def test_kfac_refuses_what_has_no_layers() -> None:
    loss, theta, episodes = regression(2)
    by_function = imaml_ext.losses.as_loss(loss.__call__).linearize(theta.expand(2, -1).contiguous(), episodes.support)
    with pytest.raises(TypeError, match="operator must have kronecker_factors for KFAC"):
        KFAC().make(by_function, torch.zeros(2, len(theta), dtype=F64))


# --- as settings ----------------------------------------------------------------------------------------------------


def test_settings_are_written_and_read() -> None:
    for preconditioner in (None, Jacobi(probes=3), Refreshed(KFAC(samples=2), every=4)):
        solver = CG(preconditioner=preconditioner)
        assert from_json(LinearSolver, to_json(solver)) == solver
    old = to_json(CG(max_iterations=7))
    del old["preconditioner"]
    assert from_json(LinearSolver, old) == CG(max_iterations=7)
    assert dict(leaves(CG(preconditioner=Nystrom(rank=3))))["preconditioner.rank"] == 3
    config = TrainConfig(algorithm=IMAML(linear_solver=CG(preconditioner=Nystrom())))
    with pytest.raises(ConfigError, match=r"algorithm.linear_solver.preconditioner must be unset with run.capture"):
        changed(config, {"run.capture": True})


def test_command_line_chooses_sets_and_unsets() -> None:
    recipe = load_recipe("glyphs-5w1s").config
    kept = changed(recipe, {"algorithm.linear_solver.preconditioner": Refreshed(Jacobi(probes=5))})

    def given(config: TrainConfig, words: str) -> object:
        return training_options("glyphs-5w1s", config, words.split()).config.algorithm.linear_solver.preconditioner

    option = "--linear-solver.preconditioner"
    assert given(kept, "") == Refreshed(Jacobi(probes=5))
    assert given(recipe, f"{option} nystrom {option}.rank 3") == Nystrom(rank=3)
    assert given(kept, f"{option} none") is None
    assert given(kept, f"{option}.preconditioner kfac {option}.every 2") == Refreshed(KFAC(), every=2)


def test_imaml_uses_it_and_tells_its_products() -> None:
    loss, theta, episodes = regression(3)
    plain = CG(max_iterations=200, rtol=1e-10)
    inner = GradientDescent(steps=3, lr=0.05)
    exact = IMAML(loss, lam=1.0, inner=inner, linear_solver=plain, curvature="gauss_newton")
    expected = exact.meta_gradient(theta, episodes)
    assert "solve_set_up" not in expected.metrics
    for preconditioner, products in ((Nystrom(rank=6), 6), (KFAC(), 1), (Refreshed(Jacobi(probes=2)), 2)):
        solver = CG(max_iterations=200, rtol=1e-10, preconditioner=preconditioner)
        meta = IMAML(loss, lam=1.0, inner=inner, linear_solver=solver, curvature="gauss_newton").meta_gradient(
            theta, episodes
        )
        assert relative(meta.gradient, expected.gradient) < 1e-7
        assert meta.metrics["solve_set_up"] == products


def test_a_newton_step_of_one_iteration_asks_its_preconditioner() -> None:
    """M is the inverse of this Gauss-Newton matrix, so that the step ends at the minimum."""
    model = MLP(3, (), 2)
    loss, theta = TaskLoss(model, "mse"), torch.randn(model.num_parameters, dtype=F64)
    data = TaskData(torch.randn(B, 7, 3, dtype=F64), torch.randn(B, 7, 2, dtype=F64))
    solver = CG(max_iterations=1, rtol=0.0, preconditioner=KFAC())
    phi = NewtonCG(steps=1, linear_solver=solver, curvature="gauss_newton").solve(loss, theta, data, lam=0.1).phi
    gradient = loss.gradient(phi, data).gradient + 0.1 * (phi - theta)
    assert gradient.abs().max() < 1e-8
