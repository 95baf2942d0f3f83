"""The native ops: against their oracle, their derivatives, and what torch.compile needs to know of them."""

import math

import pytest
import reference
import torch
from systems import DEVICES, DTYPES
from torch import Tensor
from torch.library import opcheck

from imaml_ext import ops

SIZES = [(1, 1), (3, 31), (2, 4096), (5, 4099), (33, 16), (1, 9000)]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def _vectors(count: int, shape: tuple[int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(dtype=dtype, device=device) for _ in range(count)]


def _coefficients(rows: int, cols: int, device: str) -> list[Tensor | float]:
    shapes = [(rows, 1), (1, cols), (rows, cols), ()]
    return [0.37, *(torch.rand(shape, dtype=torch.float64, device=device) for shape in shapes)]


def _theta(shared: bool, phi: Tensor) -> Tensor:
    theta = torch.randn(phi.shape[1:] if shared else phi.shape, dtype=torch.float64, device=phi.device)
    return theta.to(phi.dtype)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_proximal_steps_agree_with_the_oracle(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    def close(ours: Tensor, oracle: Tensor) -> None:
        torch.testing.assert_close(ours, oracle, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

    for index, lam in enumerate(_coefficients(*shape, device)):
        for lr in (0.1, _coefficients(*shape, device)[1 + index % 4]):
            phi, grad, first, second = _vectors(4, shape, dtype, device)
            second = second.abs()
            theta = _theta(index % 2 == 0, phi)

            ours = phi.clone()
            assert ops.prox_sgd_step_(ours, grad, theta, lam, lr) is ours
            close(ours, reference.prox_sgd_step(phi, grad, theta, lam, lr))

            for nesterov in (False, True):
                ours, velocity = phi.clone(), first.clone()
                ops.prox_momentum_step_(ours, velocity, grad, theta, lam, lr, 0.9, nesterov)
                oracle, new_velocity = reference.prox_momentum_step(phi, first, grad, theta, lam, lr, 0.9, nesterov)
                close(velocity, new_velocity)
                close(ours, oracle)

            ours, m, s = phi.clone(), first.clone(), second.clone()
            ops.prox_adam_step_(ours, m, s, grad, theta, lam, lr, 0.9, 0.99, 1e-3, 3)
            oracle, new_m, new_s = reference.prox_adam_step(
                phi, first, second, grad, theta, lam, lr, 0.9, 0.99, 1e-3, 3
            )
            close(m, new_m)
            close(s, new_s)
            close(ours, oracle)

            ours = grad.clone()
            ops.prox_gradient_(ours, phi, theta, lam)
            close(ours, reference.prox_gradient(grad, phi, theta, lam))
            penalty = ops.prox_penalty(phi, theta, lam)
            assert penalty.dtype == ops.compute_dtype(dtype)
            # Sums are wide whatever the vectors' type: far closer than the vectors' own precision.
            torch.testing.assert_close(penalty, reference.prox_penalty(phi, theta, lam), rtol=3e-7, atol=0)


@pytest.mark.parametrize("cols", [60_000, 300_001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_penalty_of_long_rows(cols: int, dtype: torch.dtype, device: str) -> None:
    (phi,) = _vectors(1, (2, cols), dtype, device)
    phi[1, cols // 2] = math.inf
    theta = _theta(True, phi)
    penalty = ops.prox_penalty(phi, theta, 0.37)
    torch.testing.assert_close(penalty, reference.prox_penalty(phi, theta, 0.37), rtol=3e-7, atol=0)
    assert torch.equal(ops.prox_penalty(phi[:1], theta, 0.37), penalty[:1])


@pytest.mark.parametrize("cols", [40, 1000, 4104])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_the_bits_of_proximal_steps_do_not_depend_on_where_rows_begin(
    cols: int, dtype: torch.dtype, device: str
) -> None:
    vectors = _vectors(5, (2, cols), dtype, device)
    vectors[3].abs_()
    results = []
    for offset in (0, 1):
        moved = [torch.empty(2 * cols + offset, dtype=dtype, device=device)[offset:].view(2, cols) for _ in vectors]
        for to, vector in zip(moved, vectors, strict=True):
            to.copy_(vector)
        phi, grad, m, s, theta = moved
        ops.prox_gradient_(grad, phi, theta, 0.3)
        ops.prox_sgd_step_(phi, grad, theta, 0.3, 0.1)
        ops.prox_momentum_step_(phi, m, grad, theta, 0.3, 0.1, 0.9, True)
        ops.prox_adam_step_(phi, m, s, grad, theta, 0.3, 0.1, 0.9, 0.99, 1e-3, 3)
        results.append(torch.stack(moved))
    assert torch.equal(*results)


def test_steps_follow_torch_optim() -> None:
    """With λ = 0 the rules are torch.optim's."""
    torch.manual_seed(1)
    phi = torch.randn(3, 50, dtype=torch.float64)
    theta = torch.zeros(50, dtype=torch.float64)
    for name in ("sgd", "momentum", "nesterov", "adam"):
        parameter = phi.clone().requires_grad_()
        optimiser = {
            "sgd": lambda p: torch.optim.SGD([p], lr=0.1),
            "momentum": lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9),
            "nesterov": lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9, nesterov=True),
            "adam": lambda p: torch.optim.Adam([p], lr=0.1, betas=(0.8, 0.95), eps=1e-6),
        }[name](parameter)
        ours = phi.clone()
        first, second = torch.zeros_like(phi), torch.zeros_like(phi)
        for step in range(1, 6):
            grad = torch.randn_like(phi)
            parameter.grad = grad.clone()
            optimiser.step()
            if name == "sgd":
                ops.prox_sgd_step_(ours, grad, theta, 0.0, 0.1)
            elif name == "adam":
                ops.prox_adam_step_(ours, first, second, grad, theta, 0.0, 0.1, 0.8, 0.95, 1e-6, step)
            else:
                ops.prox_momentum_step_(ours, first, grad, theta, 0.0, 0.1, 0.9, name == "nesterov")
        torch.testing.assert_close(ours, parameter.detach(), rtol=1e-12, atol=1e-12)


def test_a_proximal_step_goes_down_the_gradient_of_the_penalised_loss() -> None:
    phi = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    theta = torch.randn(9, dtype=torch.float64)
    lam = torch.rand(4, 9, dtype=torch.float64)
    loss = phi.sin().sum(1)
    (grad,) = torch.autograd.grad(loss.sum(), phi, retain_graph=True)
    (total,) = torch.autograd.grad((loss + ops.prox_penalty(phi, theta, lam)).sum(), phi)
    moved = phi.detach().clone()
    ops.prox_sgd_step_(moved, grad, theta, lam, 0.01)
    torch.testing.assert_close(moved, phi.detach() - 0.01 * total)
    ours = grad.clone()
    torch.testing.assert_close(ops.prox_gradient_(ours, phi.detach(), theta, lam), total)


@pytest.mark.parametrize("kind", ["number", "task", "parameter", "element"])
@pytest.mark.parametrize("shared", [True, False])
def test_penalty_is_differentiable_twice(kind: str, shared: bool) -> None:
    phi = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    theta = torch.randn((5,) if shared else (3, 5), dtype=torch.float64, requires_grad=True)
    shape = {"number": (), "task": (3,), "parameter": (5,), "element": (3, 5)}[kind]
    lam = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.prox_penalty, (phi, theta, lam))
    assert torch.autograd.gradgradcheck(ops.prox_penalty, (phi, theta, lam))


def _cg_arguments(dtype: torch.dtype, device: str) -> dict[str, tuple]:
    rows, cols = 3, 10
    b, r, p, z, best = _vectors(5, (rows, cols), dtype, device)
    wide = ops.compute_dtype(dtype)
    shift = torch.rand(1, cols, dtype=wide, device=device)
    inverse = torch.rand(rows, 1, dtype=wide, device=device)
    tolerance = torch.full((1,), 1e-9, dtype=torch.float64, device=device)
    state = torch.rand(rows, 12, dtype=torch.float64, device=device)
    sigma, followed = (torch.rand(rows, 2, *more, dtype=torch.float64, device=device) for more in ((), (5,)))
    shifted = [vectors.unflatten(0, (rows, 2)) for vectors in _vectors(2, (2 * rows, cols), dtype, device)]
    status = torch.full((rows,), reference.ITERATING, dtype=torch.int32, device=device)
    iterations = torch.zeros_like(status)
    x = torch.zeros_like(b)
    left, again = torch.full((), 3, device=device), torch.zeros((), dtype=torch.bool, device=device)
    return {
        "cg_begin_": (b, None, shift, inverse, tolerance, tolerance, x, r, p, state, status, iterations, True),
        "cg_direction_": (z, None, x, r, p, state, status),
        "cg_step_": (2 * p, b, shift, inverse, x, r, p, best, state, status, iterations, True),
        "cg_shifts_step_": (r, state, sigma, *shifted, followed),
        "next_round_": (status, reference.ITERATING, left, again),
    }


def _lsqr_arguments(dtype: torch.dtype, device: str) -> dict[str, tuple]:
    rows, cols = 3, 10
    y, q, r = _vectors(3, (rows, cols + 3), dtype, device)
    t, x, p, best = _vectors(4, (rows, cols), dtype, device)
    shift = torch.rand(rows, 1, dtype=ops.compute_dtype(dtype), device=device)
    tolerance = torch.full((1,), 1e-9, dtype=torch.float64, device=device)
    state = torch.ones(rows, 21, dtype=torch.float64, device=device)
    status = torch.full((rows,), reference.ITERATING, dtype=torch.int32, device=device)
    return {
        "lsqr_begin_": (y, tolerance, tolerance, True, r, state, status, torch.zeros_like(status)),
        "lsqr_direction_": (t, shift, x, p, best, state, status, torch.zeros_like(status)),
        "lsqr_residual_": (q, y, r, state, status),
    }


def _minres_arguments(dtype: torch.dtype, device: str) -> dict[str, tuple]:
    rows, cols = 3, 10
    b, x, v, v_next, q, q_next, best = _vectors(7, (rows, cols), dtype, device)
    shift = torch.rand(1, cols, dtype=ops.compute_dtype(dtype), device=device)
    tolerance = torch.full((1,), 1e-9, dtype=torch.float64, device=device)
    state = torch.rand(rows, 17, dtype=torch.float64, device=device)
    state[:, -1] = 2.0
    status = torch.full((rows,), reference.ITERATING, dtype=torch.int32, device=device)
    iterations = torch.zeros_like(status)
    diagonal, off_diagonal = (torch.zeros(rows, m, dtype=torch.float64, device=device) for m in (4, 3))
    step = (2 * v, b, shift, x, v, v_next, q, q_next, best, state, status, iterations)
    return {
        "minres_begin_": (b, 2 * x, shift, tolerance, tolerance, x, v, best, state, status, iterations),
        "minres_step_": (*step, diagonal, off_diagonal, False, True),
    }


def _prox_arguments(dtype: torch.dtype, device: str) -> dict[str, tuple]:
    phi, grad, m, s = _vectors(4, (3, 10), dtype, device)
    theta = phi[:1].clone()
    lam = torch.rand(3, 1, dtype=ops.compute_dtype(dtype), device=device)
    lr = torch.rand(1, 10, dtype=ops.compute_dtype(dtype), device=device)
    return {
        "prox_gradient_": (grad, phi, theta, lam),
        "prox_penalty": (phi, theta, lam),
        "prox_sgd_step_": (phi, grad, theta, lam, lr),
        "prox_momentum_step_": (phi, m, grad, theta, lam, lr, 0.9, True),
        "prox_adam_step_": (phi, m, s.abs(), grad, theta, lam, lr, 0.9, 0.99, 1e-8, 2),
    }


_MAKERS = (_cg_arguments, _lsqr_arguments, _minres_arguments, _prox_arguments)


@pytest.mark.opcheck
@pytest.mark.parametrize("name", [name for make in _MAKERS for name in make(torch.float32, "cpu")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(name: str, dtype: torch.dtype, device: str) -> None:
    arguments = {key: value for make in _MAKERS for key, value in make(dtype, device).items()}[name]
    opcheck(getattr(torch.ops.imaml_ext, name).default, arguments)


@pytest.mark.opcheck
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_a_solve_that_begins_and_ends_with_b(device: str) -> None:
    arguments = _cg_arguments(torch.float32, device)
    b, _, shift, _, tolerance, _, x, r, p, state, status, iterations, _ = arguments["cg_begin_"]
    op, z = torch.ops.imaml_ext, arguments["cg_direction_"][0]
    opcheck(
        op.cg_begin_.default,
        (b, None, shift, None, tolerance, tolerance, None, None, None, state, status, iterations),
    )
    for first, last in ((True, False), (False, True), (True, True)):
        status.fill_(reference.ITERATING)
        opcheck(op.cg_step_.default, (2 * b, b, shift, None, x, r, p, z, state, status, iterations, True, first, last))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_the_first_and_the_last_step_differ_only_in_the_memory_they_touch(dtype: torch.dtype, device: str) -> None:
    rows, cols = 9, 4111
    d = 0.5 + torch.rand(rows, cols, dtype=torch.float64)
    (b,) = _vectors(1, (rows, cols), dtype, device)
    d[1] = -1.0  # negative curvature
    d[2, 7] = math.nan
    d[3] = 0.75  # the residual vanishes: the row verifies
    b[4, 5] = math.inf
    b[5] = 0.0
    d[6] = 1e-3  # α p overflows float16
    b[6] *= 100 if dtype == torch.float16 else 1
    d = d.to(device=device, dtype=dtype)
    shift = torch.zeros(1, 1, dtype=ops.compute_dtype(dtype), device=device)
    shift[0, 0] = 0.25 if dtype != torch.float16 else 0.0
    tolerance = torch.full((1,), 1e-2, dtype=torch.float64, device=device)
    op = torch.ops.imaml_ext

    def tables() -> tuple[Tensor, Tensor, Tensor]:
        count = torch.empty(rows, dtype=torch.int32, device=device)
        return torch.empty(rows, 12, dtype=torch.float64, device=device), count, count.clone()

    def same(ours: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
        torch.testing.assert_close(ours, other, rtol=0, atol=0, equal_nan=True)

    # With the vectors written out, the step as any other.
    x, r, p, best = (torch.full_like(b, math.nan) for _ in range(4))
    written = tables()
    op.cg_begin_(b, None, shift, None, tolerance, tolerance, x, r, p, *written)
    assert x.count_nonzero() == 0
    unwritten = tables()
    op.cg_begin_(b, None, shift, None, tolerance, tolerance, None, None, None, *unwritten)
    same(unwritten, written)
    begun = tuple(t.clone() for t in unwritten)
    before = b.clone()
    op.cg_step_(d * b, b, shift, None, x, r, p, best, *written)
    state, status, iterations = written

    for first, last in ((True, False), (True, True), (False, True)):
        start = torch.zeros_like(b) if not first else torch.full_like(b, math.nan)
        other_x, other_r, other_p = start, *(torch.full_like(b, math.nan) if first else b.clone() for _ in range(2))
        other_r[4], other_p[4] = 0, 0
        kept_r, kept_p = other_r.clone(), other_p.clone()
        ours = tuple(t.clone() for t in begun)
        op.cg_step_(d * b, b, shift, None, other_x, other_r, other_p, best, *ours, True, first, last)
        torch.testing.assert_close(other_x, x, rtol=0, atol=0)
        same((ours[0][:, 1:11], *ours[1:]), (state[:, 1:11], status, iterations))  # all but rᵀz and β
        if last:
            same((other_r, other_p), (kept_r, kept_p))
        else:
            at_work = status >= reference.ITERATING
            assert {0, 7, 8} <= set(at_work.nonzero().flatten().tolist())
            same((ours[0], other_r[at_work], other_p[at_work]), (state, r[at_work], p[at_work]))
            assert (other_p[~at_work] == 0).all()  # the operator is given something finite
        same((b,), (before,))


@pytest.mark.parametrize("rows", [0, 1, 31, 1024, 1025, 5003])
@pytest.mark.parametrize("device", DEVICES)
def test_another_round_needs_a_row_at_work_and_a_round_that_is_left(rows: int, device: str) -> None:
    again = torch.zeros((), dtype=torch.bool, device=device)
    for at in {0, rows // 2, rows - 1} if rows else {None}:
        status = torch.randint(0, reference.ITERATING, (rows,), dtype=torch.int32).to(device)
        for value in (reference.ITERATING - 1, reference.ITERATING, reference.ITERATING + 1):
            if at is not None:
                status[at] = value
            for rounds in (1, 2):
                left = torch.full((), rounds, device=device)
                for looks in range(1, 4):
                    torch.ops.imaml_ext.next_round_(status, reference.ITERATING, left, again)
                    assert left.item() == rounds - looks
                    assert again.item() == (at is not None and value >= reference.ITERATING and looks <= rounds)


@pytest.mark.opcheck
def test_opcheck_of_the_differentiable_op() -> None:
    arguments = [t.requires_grad_() for t in _prox_arguments(torch.float64, "cpu")["prox_penalty"]]
    opcheck(torch.ops.imaml_ext.prox_penalty.default, tuple(arguments))


def test_every_op_is_tested_here() -> None:
    tested = {name for make in _MAKERS for name in make(torch.float32, "cpu")}
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.removeprefix("imaml_ext::").split(".")[0] for name in names if name.startswith("imaml_ext::")}
    elsewhere = ("network_", "layer_", "task_", "winograd_")  # in test_network.py and test_task_functions.py
    assert {name for name in registered if not name.startswith(elsewhere)} == tested


def test_ops_compile() -> None:
    def inner_step(phi: Tensor, grad: Tensor, theta: Tensor) -> Tensor:
        phi = phi * 1.0
        ops.prox_sgd_step_(phi, grad, theta, 0.5, 0.1)
        return ops.prox_penalty(phi, theta, 0.5) + phi.sum(1)

    phi, grad = _vectors(2, (3, 20), torch.float32, "cpu")
    theta = torch.zeros(20)
    compiled = torch.compile(inner_step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(phi, grad, theta), inner_step(phi, grad, theta))


PHI = torch.ones(2, 3)
THETA = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.prox_sgd_step_(PHI[0], PHI, THETA, 1.0, 0.1), ValueError, r"phi must have shape \[B, N\]"),
        (lambda: ops.prox_sgd_step_(PHI.int(), PHI, THETA, 1.0, 0.1), TypeError, "phi must be float32, .* got int32"),
        (lambda: ops.prox_sgd_step_(PHI, PHI.double(), THETA, 1.0, 0.1), TypeError, "grad must have the dtype of phi"),
        (lambda: ops.prox_sgd_step_(PHI, PHI[:1], THETA, 1.0, 0.1), ValueError, "grad must have the shape of phi"),
        (lambda: ops.prox_sgd_step_(PHI, PHI, THETA[:2], 1.0, 0.1), ValueError, r"theta must have shape \[1 or 2, 3\]"),
        (lambda: ops.prox_sgd_step_(PHI, PHI, THETA.double(), 1.0, 0.1), TypeError, "theta must have the dtype of phi"),
        (lambda: ops.prox_sgd_step_(PHI, PHI, 1.0, 1.0, 0.1), TypeError, "theta must be a tensor, got float"),
        (lambda: ops.prox_sgd_step_(PHI, PHI, THETA, torch.ones(4), 0.1), ValueError, r"lam must be .* got \[4\]"),
        (lambda: ops.prox_sgd_step_(PHI, PHI, THETA, 1.0, None), TypeError, "lr must be a number or a tensor"),
        (lambda: ops.prox_sgd_step_(PHI.t(), PHI, THETA, 1.0, 0.1), ValueError, "phi must be contiguous"),
        (lambda: ops.prox_sgd_step_(PHI, PHI.to("meta"), THETA, 1.0, 0.1), ValueError, "grad must be on the device of"),
        (
            lambda: ops.prox_momentum_step_(PHI, PHI[0], PHI, THETA, 1.0, 0.1, 0.9),
            ValueError,
            "velocity must have the shape of phi",
        ),
        (
            lambda: ops.prox_adam_step_(PHI, PHI, PHI[:1], PHI, THETA, 1.0, 0.1, 0.9, 0.99, 1e-8, 1),
            ValueError,
            "exp_avg_sq must have the shape of phi",
        ),
        (
            lambda: ops.prox_adam_step_(PHI, PHI, PHI, PHI, THETA, 1.0, 0.1, 0.9, 0.99, 1e-8, 0),
            ValueError,
            "step counts from 1, got 0",
        ),
        (lambda: ops.prox_penalty(PHI, THETA, "x"), TypeError, "lam must be a number or a tensor, got str"),
        (lambda: ops.prox_gradient_(PHI[:1], PHI, THETA, 1.0), ValueError, "grad must have the shape of phi"),
    ],
)
def test_bad_arguments(call, error: type[Exception], message: str) -> None:
    before = PHI.clone()
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(PHI, before)
