"""The CUDA kernels, run by the CPU (`--native`, cpp_tests/cuda_on_cpu): bits whatever the order of the threads, and the
number of launches of a meta-step."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from meta_tasks import Data, Episodes
from torch import Tensor

from imaml_ext import CG, IMAML, GradientDescent, TaskLoss, cg, ops
from imaml_ext.models import Conv4, TaskModel
from imaml_ext.ops.network import NetworkLinearisation, network_descend_, network_gradient
from imaml_ext.solvers import lsqr, minres, multi_shift_cg


@pytest.fixture(autouse=True)
def library(pytestconfig: pytest.Config) -> ctypes.CDLL:
    path = pytestconfig.getoption("--native")
    if path is None:
        pytest.skip("about the CUDA kernels run by the CPU: --native")
    library = ctypes.CDLL(path)
    library.cuda_on_cpu_launches.restype = ctypes.c_uint64
    return library


# --- results: tensors, all of whose bits are looked at --------------------------------------------------------------


def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64).to(dtype)


def solved(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    diagonal, b = 1 + random(rows, cols).square().to(dtype), random(rows, cols, dtype=dtype)
    found = cg(lambda p: diagonal * p, b, max_iterations=4, shift=0.5, preconditioner=1 / (diagonal + 0.5))
    return [found.x, found.residual_norm]


def shifted(rows: int, cols: int) -> list[Tensor]:
    diagonal, b = 1 + random(rows, cols).square(), random(rows, cols)
    shifts = torch.tensor([0.3, 0.0, 2.0])
    return [multi_shift_cg(lambda p: diagonal * p, b, shifts, max_iterations=4).x]


def least_squares(cols: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    d, y = 1 + random(2, cols).square().to(dtype), random(2, cols + 9, dtype=dtype)
    found = lsqr(
        lambda p: torch.nn.functional.pad(d * p, (0, 9)), y, rmatvec=lambda q: d * q[:, :-9], n=cols, shift=0.5,
        max_iterations=4,
    )  # fmt: skip
    return [found.x, found.residual_norm, found.gradient_norm]


def least_residuals(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    diagonal, b = random(rows, cols, dtype=dtype), random(rows, cols, dtype=dtype)
    found = minres(lambda p: diagonal * p, b, max_iterations=4, shift=0.5, lanczos=True)
    assert found.lanczos is not None
    return [found.x, found.residual_norm, found.lanczos.diagonal]


def penalties() -> list[Tensor]:
    """In float64: float32 would round away in which order the doubles were added."""
    return [ops.prox_penalty(random(3, 40_000, dtype=torch.float64), random(40_000, dtype=torch.float64), 0.5)]


def network(batch: int = 2) -> tuple[TaskModel, Tensor, Tensor, Tensor]:
    model = Conv4(3, in_channels=3, image_size=17, filters=20)
    theta = model.init(seed=0) + 0.1 * random(batch, model.num_parameters)
    return model, theta, random(batch, 3, 3, 17, 17), torch.arange(3).expand(batch, 3)


def gradients() -> list[Tensor]:
    model, theta, x, y = network()
    assert model.network is not None
    return list(network_gradient(theta, x, y, model.network))


def products() -> list[Tensor]:
    model, theta, x, y = network()
    assert model.network is not None
    linearised = NetworkLinearisation(theta, x, y, model.network)
    p = random(*theta.shape)
    return [linearised.product(p), linearised.product(p, gauss_newton=True), linearised.curvature(p)]


def descents() -> list[Tensor]:
    model, theta, x, y = network()
    assert model.network is not None
    phi, lam, lr = theta.clone(), torch.ones(1, 1), torch.full((1, 1), 0.1)
    return [network_descend_(phi, theta, lam, lr, x, y, model.network, 2), phi]


RESULTS: dict[str, Callable[[], list[Tensor]]] = {
    "cg, a row of one block": lambda: solved(2, 1_001),
    "cg, a row of several blocks, packed": lambda: solved(1, 40_000),
    "cg, a row of several blocks": lambda: solved(1, 40_001),
    "cg, a row of several blocks, bfloat16": lambda: solved(1, 20_000, torch.bfloat16),
    "shifts that follow": lambda: [*shifted(2, 1_001), *shifted(1, 40_000)],
    "least squares, a row of one block": lambda: least_squares(1_001),
    "least squares, a row of several blocks": lambda: least_squares(40_001),
    "minres, a row of one block": lambda: least_residuals(2, 1_001),
    "minres, a row of several blocks": lambda: least_residuals(1, 40_001),
    "minres, a row of several blocks, float64": lambda: least_residuals(1, 40_000, torch.float64),
    "penalty": penalties,
    "gradient": gradients,
    "product": products,
    "descent": descents,
}


def bits(results: list[Tensor]) -> list[bytes]:
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in results]


@pytest.mark.parametrize("name", RESULTS)
def test_bits_do_not_depend_on_the_order_of_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in range(3):
        monkeypatch.setenv("CUDA_ON_CPU_SEED", str(seed))
        found.append(bits(RESULTS[name]()))
    assert found[0] == found[1] == found[2]


# --- launches -------------------------------------------------------------------------------------------------------


def test_a_launch_is_counted(library: ctypes.CDLL) -> None:
    library.cuda_on_cpu_launches()
    penalties()
    assert library.cuda_on_cpu_launches() == 1
    assert library.cuda_on_cpu_launches() == 0


# Of the package's kernels, without those of torch: 16 inner steps, 5 steps of CG, images of Omniglot's size.
LAUNCHES_OF_A_META_STEP = 355


def test_launches_of_a_meta_step(library: ctypes.CDLL) -> None:
    model = Conv4(5, filters=4)
    task = Data(random(1, 5, 1, 28, 28), torch.arange(5).expand(1, 5))
    algorithm = IMAML(
        TaskLoss(model, "cross_entropy"), inner=GradientDescent(steps=16), linear_solver=CG(max_iterations=5)
    )
    library.cuda_on_cpu_launches()
    algorithm.meta_gradient(model.init(seed=0), Episodes(task, task))
    assert 0 < library.cuda_on_cpu_launches() <= LAUNCHES_OF_A_META_STEP
