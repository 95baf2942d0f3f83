"""How many launches a network op is on CUDA, counted where the CPU runs them (`--native`, cpp_tests/cuda_on_cpu)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from imaml_ext.models import Conv4

WAYS = 5
# Conv4-64 on Omniglot, 5-way 1-shot: four blocks of 980, 245, 80 and 20 rows, and a head.
INNER_STEP = 15
GRADIENT = 16  # with the input's rearrangement
LINEARISE = 16
PRODUCT = 15
CURVATURE = 9
OUTPUTS = 9
# A meta-step: 16 inner steps, the query's gradient, a linearisation at φ and 5 products. Around
# them are about 60 of CG and of torch.
META_STEP = 450
OTHERS = 60


@pytest.fixture
def launches(pytestconfig: pytest.Config) -> Callable[[Callable[[], object]], int]:
    path = pytestconfig.getoption("--native")
    if path is None:
        pytest.skip("about the CUDA kernels run by the CPU: --native")
    count = ctypes.CDLL(path).cuda_on_cpu_launches  # those since the last call
    count.restype = ctypes.c_uint64

    def launches(work: Callable[[], object]) -> int:
        count()
        work()
        return count()

    return launches


def test_launches_of_every_op(launches: Callable[[Callable[[], object]], int]) -> None:
    model = Conv4(WAYS, filters=16)  # launches depend on the rows, not on the channels
    ops, network = torch.ops.imaml_ext, list(model.network or ())
    theta = model.init(seed=0).unsqueeze(0)
    x, y, one = torch.rand(1, WAYS, 1, 28, 28), torch.arange(WAYS).unsqueeze(0), torch.ones(1, 1)

    def descend(steps: int) -> Callable[[], Tensor]:
        phi = theta.clone()
        return lambda: ops.network_descend_(phi, theta, one, 0.01 * one, x, y, network, steps)

    two, three, four = (launches(descend(steps)) for steps in (2, 3, 4))
    step = (four - two) // 2
    assert step <= INNER_STEP
    assert three <= two + step + 1  # an odd number of steps: the first one's is a launch of its own
    tape = ops.network_linearise(theta, x, y, network)[3]
    gradient = launches(lambda: ops.network_gradient(theta, x, y, network))
    linearise = launches(lambda: ops.network_linearise(theta, x, y, network))
    products = [
        launches(lambda: ops.network_product(theta, tape, y, theta, network, gauss_newton))  # noqa: B023
        for gauss_newton in (False, True)
    ]
    assert gradient <= GRADIENT
    assert linearise <= LINEARISE
    assert max(products) <= PRODUCT
    assert launches(lambda: ops.network_curvature(theta, tape, y, theta, network)) <= CURVATURE
    assert launches(lambda: ops.network_outputs(theta, x, network)) <= OUTPUTS
    assert two - 2 * step + 16 * step + gradient + linearise + 5 * products[0] + OTHERS <= META_STEP


def test_launches_do_not_depend_on_the_number_of_tasks(launches: Callable[[Callable[[], object]], int]) -> None:
    model = Conv4(WAYS, filters=4)
    network = list(model.network or ())

    def gradient(tasks: int) -> Callable[[], object]:
        params = model.init(seed=0).expand(tasks, -1).contiguous()
        x, y = torch.rand(tasks, WAYS, 1, 28, 28), torch.arange(WAYS).expand(tasks, -1).contiguous()
        return lambda: torch.ops.imaml_ext.network_gradient(params, x, y, network)

    assert launches(gradient(1)) == launches(gradient(3)) > 0
