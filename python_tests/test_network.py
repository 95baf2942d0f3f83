"""The native networks: values and derivatives against autograd, rows against themselves alone, errors."""

import math
import os
import subprocess
import sys

import pytest
import torch
from meta_tasks import F64, Data, Episodes, classification
from torch import Tensor
from torch.library import opcheck

from imaml_ext import IMAML, TaskLoss, cg, ops
from imaml_ext.models import MLP, Conv4, TaskModel, from_module
from imaml_ext.ops.network import NetworkLinearisation

CURVATURES = ("hessian", "gauss_newton")

# name: model, shape of an example
MODELS: dict[str, tuple[TaskModel, tuple[int, ...]]] = {
    "conv4": (Conv4(5, filters=16), (1, 28, 28)),
    "conv4-padded-channels": (Conv4(3, in_channels=3, image_size=17, filters=20), (3, 17, 17)),
    "conv4-many-input-channels": (Conv4(2, in_channels=9, image_size=12, filters=7), (9, 12, 12)),
    "conv4-one-pixel-left-early": (Conv4(2, image_size=3, filters=5), (1, 3, 3)),
    "conv4-max-odd": (Conv4(4, in_channels=2, image_size=37, filters=5, pooling="max"), (2, 37, 37)),
    "conv4-max-even": (Conv4(3, in_channels=3, image_size=32, filters=33, pooling="max"), (3, 32, 32)),
    "conv4-cifar": (Conv4(5, in_channels=3, image_size=32, filters=32, pooling="max"), (3, 32, 32)),
    "mlp-tanh": (MLP(1, (40, 40), 1, activation="tanh"), (1,)),
    "mlp-relu": (MLP(12, (20,), 3), (3, 4)),
    "mlp-linear": (MLP(17, (), 2), (17,)),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def draw(
    name: str, tasks: int, examples: int, dtype: torch.dtype = F64, device: str = "cpu"
) -> tuple[TaskModel, str, Tensor, Data]:
    """Fresh random parameters [B, N] and data."""
    model, shape = MODELS[name]
    params = model.init(seed=0, dtype=dtype) + 0.1 * torch.randn(tasks, model.num_parameters, dtype=dtype)
    x = torch.rand(tasks, examples, *shape, dtype=dtype)
    if isinstance(model, Conv4):
        y, criterion = torch.randint(model.ways, (tasks, examples)), "cross_entropy"
    else:
        assert isinstance(model, MLP)
        y, criterion = torch.randn(tasks, examples, model.widths[-1], dtype=dtype), "mse"
    return model, criterion, params.to(device), Data(x.to(device), y.to(device))


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).detach().norm() / expected.detach().norm())


def tolerances(model: TaskModel, dtype: torch.dtype) -> tuple[float, float]:
    """Of values, and of derivatives.

    Where an activation lies within rounding of the kink of its ReLU, or of the next pixel that max-pooling sees,
    correct float32 derivatives are percents apart; in some tasks of many activations one does. Batch normalisation over
    the few pixels of one example multiplies the rounding of derivatives by a hundred, seldom by a thousand.
    """
    if dtype == F64:
        return 1e-12, 1e-10
    smooth = isinstance(model, MLP) and (model.activation == "tanh" or len(model.widths) == 2)
    return 1e-4, 1e-4 if smooth else 0.2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("tasks", "examples"), [(1, 1), (2, 5)])
@pytest.mark.parametrize("name", MODELS)
def test_equals_autograd(name: str, tasks: int, examples: int, dtype: torch.dtype, device: str) -> None:
    model, criterion, params, data = draw(name, tasks, examples, dtype, device)
    native, reference = (TaskLoss(model, criterion, engine=engine) for engine in ("native", "torch"))
    of_values, of_derivatives = tolerances(model, dtype)
    wide = Data(data.x.double(), data.y.double() if data.y.is_floating_point() else data.y)
    direction = torch.randn_like(params)

    found, expected = native.gradient(params, data), reference.gradient(params.double(), wide)
    assert torch.equal(native.outputs(params, data.x), found.outputs)
    assert relative(found.losses, expected.losses) <= of_values
    assert relative(found.outputs, expected.outputs) <= of_values
    assert relative(found.gradient, expected.gradient) <= of_derivatives
    for kind in CURVATURES:
        mine, theirs = native.linearize(params, data, kind), reference.linearize(params.double(), wide, kind)
        assert torch.equal(mine.losses, found.losses)
        assert torch.equal(mine.gradient, found.gradient)
        assert relative(mine(direction), theirs(direction.double())) <= of_derivatives
    along, product = mine.curvature(direction), mine(direction)  # pᵀGp, [B], and Gp
    assert along.dtype == F64
    # Next to |p| |Gp|: pᵀGp itself is next to nothing where the outputs of two ways move alike along p.
    scale = (direction.double().norm(dim=1) * product.double().norm(dim=1)).norm()
    assert (along - theirs.curvature(direction.double())).norm() <= of_derivatives * scale
    assert (along - (direction.double() * product).sum(1)).norm() <= (1e-12 if dtype == F64 else 1e-4) * scale


def described(params: Tensor, x: Tensor, network: list[int]) -> Tensor:
    """Outputs [S, K] of one task, for params [N] and x [S, C, H, W], as csrc/network/network.h has it."""
    used = 0

    def take(*shape: int) -> Tensor:
        nonlocal used
        part = params[used : used + math.prod(shape)].view(shape)
        used += math.prod(shape)
        return part

    for at in range(3, len(network), 6):
        kernel, stride, channels, norm, activation, pool = network[at : at + 6]
        depth, size = x.shape[1], x.shape[2:]
        taps = (3, 3) if kernel == 3 else size
        weight = take(*taps, depth, channels).permute(3, 2, 0, 1)
        x = torch.nn.functional.conv2d(x, weight, stride=stride if kernel == 3 else 1, padding=1 if kernel == 3 else 0)
        if norm == 1:
            gamma, beta = take(channels), take(channels)
            x = torch.nn.functional.batch_norm(x, None, None, gamma, beta, training=True)
        else:
            x = x + take(channels)[:, None, None]
        x = (lambda z: z, torch.relu, torch.tanh)[activation](x)
        if pool:
            x = torch.nn.functional.max_pool2d(x, 2) if pool == 1 else x.mean((2, 3), keepdim=True)
    assert used == params.numel()
    return x[:, :, 0, 0]


def parameters_of(network: list[int]) -> int:
    channels, height, width = network[:3]
    number = 0
    for at in range(3, len(network), 6):
        kernel, stride, out, norm, _, pool = network[at : at + 6]
        number += (9 if kernel == 3 else height * width) * channels * out + out * (1 + norm)
        channels = out
        height, width = ((size - 1) // stride + 1 if kernel == 3 else 1 for size in (height, width))
        if pool:
            height, width = (size // 2 if pool == 1 else 1 for size in (height, width))
    return number


# name: input, layers as kernel, stride, channels, norm, activation, pool
DESCRIPTIONS = {
    "strides that leave pixels out": [9, 11, 8, 3, 3, 6, 1, 1, 0, 3, 4, 20, 0, 2, 0, 0, 1, 3, 0, 0, 0],
    "patches of a stride, biases": [2, 9, 7, 3, 2, 17, 0, 1, 1, 3, 1, 4, 0, 2, 2, 0, 1, 7, 0, 0, 0],
    "linear over pixels, then convolved": [3, 5, 4, 0, 1, 33, 1, 1, 0, 3, 2, 18, 1, 1, 0, 0, 1, 2, 0, 0, 0],
    "many rows": [10, 26, 25, 3, 1, 40, 1, 1, 1, 3, 1, 9, 1, 0, 1, 3, 1, 5, 1, 1, 2, 0, 1, 4, 0, 2, 0],
    "a stride beyond the image": [9, 2, 3, 3, 1, 2, 0, 1, 0, 3, 2**16, 3, 0, 0, 0],
    "many channels": [12, 6, 6, 3, 1, 70, 1, 1, 0, 3, 2, 65, 1, 1, 0, 0, 1, 37, 0, 1, 0, 0, 1, 3, 0, 0, 0],
}


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "targets"])
@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_networks_beyond_the_models(name: str, labels: bool, device: str) -> None:
    network = DESCRIPTIONS[name]
    tasks, images, classes = 2, 4, network[-4]
    params = 0.3 * torch.randn(tasks, parameters_of(network), dtype=F64, device=device)
    x = torch.rand(tasks, images, *network[:3], dtype=F64, device=device)
    y = torch.randn(tasks, images, classes, dtype=F64, device=device)
    if labels:
        y = y.argmax(-1)
    criterion = torch.nn.functional.cross_entropy if labels else torch.nn.functional.mse_loss
    p = torch.randn_like(params)
    registered = torch.ops.imaml_ext
    losses, outputs, gradient, tape = registered.network_linearise(params, x, y, network)
    again = registered.network_gradient(params, x, y, network)
    assert all(map(torch.equal, again, (losses, outputs, gradient)))
    products = [registered.network_product(params, tape, y, p, network, gauss_newton) for gauss_newton in (False, True)]
    for task in range(tasks):
        for gauss_newton in (False, True):  # many directions share what one task has stored
            stored = (params[task : task + 1], tape[task : task + 1], y[task : task + 1])
            wide = registered.network_product(*stored, torch.cat([p, p.flip(0), 2 * p]), network, gauss_newton)
            own, other = products[gauss_newton][task], wide[1 - task]
            assert all(torch.equal(row, own) for row in (wide[task], wide[3 - task], wide[4 + task] / 2))
            assert torch.equal(other, registered.network_product(*stored, p[1 - task, None], network, gauss_newton)[0])
            assert registered.network_product(*stored, p[:0], network, gauss_newton).shape == (0, p.shape[1])
        leaf = params[task].clone().requires_grad_()
        here = described(leaf, x[task], network)
        loss = criterion(here, y[task])
        (expected,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (hessian,) = torch.autograd.grad(expected, leaf, p[task], retain_graph=True)
        assert relative(outputs[task], here) <= 1e-12
        assert relative(losses[task], loss) <= 1e-12
        assert relative(gradient[task], expected) <= 1e-11
        assert relative(products[0][task], hessian) <= 1e-11
        along = torch.func.jvp(lambda q: described(q, x[task], network), (params[task],), (p[task],))[1]  # noqa: B023
        free = here.detach().requires_grad_()
        (bar,) = torch.autograd.grad(criterion(free, y[task]), free, create_graph=True)
        (bar,) = torch.autograd.grad(bar, free, along)  # C J p, C being symmetric
        (gauss_newton,) = torch.autograd.grad(here, leaf, bar)
        assert relative(products[1][task], gauss_newton) <= 1e-11


def test_photographs_of_84_pixels(device: str) -> None:
    """84 → 42 → 21 → 10 → 5: max-pooling leaves the last row and column of 21 out."""
    model = Conv4(5, in_channels=3, image_size=84, filters=32, pooling="max")
    assert model.layout.shapes[model.layout.names.index("linear.weight")] == (32 * 5 * 5, 5)
    params = model.init(seed=0, dtype=F64).unsqueeze(0).to(device)
    data = Data(torch.rand(1, 5, 3, 84, 84, dtype=F64).to(device), torch.arange(5, device=device).unsqueeze(0))
    native, reference = (TaskLoss(model, "cross_entropy", engine=engine) for engine in ("native", "torch"))
    direction = torch.randn_like(params)
    for found, expected in zip(native.gradient(params, data), reference.gradient(params, data), strict=True):
        assert relative(found, expected) <= 1e-12
    for kind in CURVATURES:
        assert relative(*(loss.linearize(params, data, kind)(direction) for loss in (native, reference))) <= 1e-12


def graph(loss: TaskLoss, params: Tensor, data: Data, weights: Tensor, direction: Tensor) -> list[Tensor]:
    """Values, weighted gradient and its derivative in params and weights, all through autograd."""
    params, weights = params.clone().requires_grad_(), weights.clone().requires_grad_()
    losses = loss(params, data)
    (gradient,) = torch.autograd.grad(losses, params, weights, create_graph=True)
    by_params, by_weights = torch.autograd.grad(gradient, (params, weights), direction, retain_graph=True)
    (again,) = torch.autograd.grad(gradient, params, direction)
    assert torch.equal(again, by_params)
    return [losses, gradient, by_params, by_weights]


@pytest.mark.parametrize("name", ["conv4", "mlp-tanh"])
def test_autograd_finds_both_derivatives(name: str, device: str) -> None:
    model, criterion, params, data = draw(name, 2, 6, F64, device)
    weights, direction = torch.randn(2, dtype=F64, device=device), torch.randn_like(params)
    found, expected = (
        graph(TaskLoss(model, criterion, engine=engine), params, data, weights, direction)
        for engine in ("native", "torch")
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert relative(mine, theirs) <= 1e-12


def test_derivatives_by_finite_differences() -> None:
    model = MLP(3, (4,), 2, activation="tanh")
    loss = TaskLoss(model, "mse", engine="native")
    data = Data(torch.randn(2, 3, 3, dtype=F64), torch.randn(2, 3, 2, dtype=F64))
    params = torch.randn(2, model.num_parameters, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: loss(p, data), (params,))
    assert torch.autograd.gradgradcheck(lambda p: loss(p, data), (params,))


def test_third_derivatives_are_refused() -> None:
    model, criterion, params, data = draw("mlp-tanh", 1, 4)
    params.requires_grad_()
    (gradient,) = torch.autograd.grad(TaskLoss(model, criterion)(params, data).sum(), params, create_graph=True)
    (product,) = torch.autograd.grad(gradient.sum(), params, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiates twice"):
        product.sum().backward()


@pytest.mark.parametrize("name", ["conv4-padded-channels", "conv4-max-odd", "mlp-relu"])
def test_a_task_alone_and_any_number_of_threads_give_the_same_bits(name: str, device: str) -> None:
    model, criterion, params, data = draw(name, 5, 4, torch.float32, device)
    loss = TaskLoss(model, criterion, engine="native")
    direction = torch.randn_like(params)

    def everything(rows: slice) -> list[Tensor]:
        some = Data(data.x[rows], data.y[rows])
        products = [loss.linearize(params[rows], some, kind)(direction[rows]) for kind in CURVATURES]
        return [*loss.gradient(params[rows], some), *products]

    together = everything(slice(None))
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 8):  # tasks side by side, and the work inside the tasks that remain split
            torch.set_num_threads(number)
            assert all(map(torch.equal, everything(slice(None)), together)), number
    finally:
        torch.set_num_threads(threads)
    for task in range(5):
        alone = everything(slice(task, task + 1))
        assert all(torch.equal(mine, batch[task : task + 1]) for mine, batch in zip(alone, together, strict=True)), task


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", ["conv4", "mlp-tanh"])
def test_descent_gives_the_bits_of_its_steps(name: str, steps: int, device: str) -> None:
    model, criterion, theta, data = draw(name, 3, 5, torch.float32, device)
    loss = TaskLoss(model, criterion, engine="native")
    lam, lr = torch.rand(3, 1, device=device), 0.1 * torch.rand(1, model.num_parameters, device=device)
    phi, expected = theta.clone(), theta.clone()
    losses = loss.descend_(phi, theta, data, lam=lam, lr=lr, steps=steps)
    assert losses is not None
    for step in range(steps):
        here, _, gradient = loss.gradient(expected, data)
        assert torch.equal(losses[step], here)
        ops.prox_sgd_step_(expected, gradient, theta, lam, lr)
    assert torch.equal(phi, expected)
    assert TaskLoss(model, criterion, engine="torch").descend_(phi, theta, data, lam=lam, lr=lr, steps=steps) is None
    assert torch.equal(phi, expected)


@pytest.mark.cpu_kernels
def test_models_alone_bring_the_ops_with_them() -> None:
    script = (
        "import torch; from imaml_ext import MLP, TaskLoss; from imaml_ext.batch import TaskData\n"
        "data = TaskData(torch.rand(1, 3, 2), torch.rand(1, 3, 1)); model = MLP(2, (3,), 1)\n"
        "TaskLoss(model, 'mse').gradient(model.init(seed=0).unsqueeze(0), data)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_two_linearisations_at_a_time_keep_apart(device: str) -> None:
    model, criterion, params, data = draw("conv4", 2, 5, F64, device)
    loss, p = TaskLoss(model, criterion, engine="native"), torch.randn_like(params)
    first = loss.linearize(params, data)
    expected = first(p)
    second = loss.linearize(params + 1, data)
    assert torch.equal(first(p), expected)
    assert not torch.equal(second(p), expected)
    del first, second
    assert torch.equal(loss.linearize(params, data)(p), expected)


def test_a_broken_task_leaves_its_neighbours_alone(device: str) -> None:
    model, criterion, params, data = draw("conv4", 3, 5, torch.float32, device)
    loss = TaskLoss(model, criterion, engine="native")
    whole = loss.gradient(params, data)
    broken = params.clone()
    broken[1, 100] = float("nan")
    found = loss.gradient(broken, data)
    assert found.losses[1].isnan()
    for mine, before in zip(found, whole, strict=True):
        assert torch.equal(mine[[0, 2]], before[[0, 2]])


def test_imaml_with_either_engine(device: str) -> None:
    model, _, _, support = draw("conv4", 4, 5, F64, device)
    query = Data(torch.rand_like(support.x), torch.randint(5, (4, 5), device=device))
    theta = model.init(seed=1, dtype=F64).to(device)
    for curvature in ("hessian", "gauss_newton"):
        found, expected = (
            IMAML(TaskLoss(model, "cross_entropy", engine=engine), curvature=curvature, damping=5.0).meta_gradient(
                theta, Episodes(support, query)
            )
            for engine in ("native", "torch")
        )
        assert relative(found.gradient, expected.gradient) <= 1e-9
        assert found.metrics.keys() == expected.metrics.keys()


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str) -> None:
    from imaml_ext.ops import cpu_capability

    order = ["default", "avx2", "avx512"]
    if order.index(capability) > order.index(cpu_capability()):
        pytest.skip(f"this processor has {cpu_capability()} at most")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_network as t, torch\n"
        "for name in t.MODELS:\n"
        "    t.test_equals_autograd(name, 2, 3, torch.float64, 'cpu')\n"
        "    t.test_equals_autograd(name, 2, 3, torch.float32, 'cpu')\n"
    )
    environment = {**os.environ, "IMAML_EXT_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", script, os.path.dirname(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.opcheck
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["conv4", "conv4-max-odd", "mlp-tanh"])
def test_opcheck(name: str, dtype: torch.dtype, device: str) -> None:
    model, _, params, data = draw(name, 2, 3, dtype, device)
    registered, network = torch.ops.imaml_ext, list(model.network or ())
    tape = registered.network_linearise(params, data.x, data.y, network)[3]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(registered.network_outputs.default, (params, data.x, network), test_utils=tests)
    opcheck(registered.network_gradient.default, (params, data.x, data.y, network), test_utils=tests)
    scalar = torch.ones(1, 1, dtype=dtype, device=device)
    opcheck(
        registered.network_descend_.default,
        (params.clone(), params, scalar, scalar, data.x, data.y, network, 2),
        test_utils=tests,
    )
    opcheck(registered.network_product.default, (params, tape, data.y, params, network, False), test_utils=tests)
    opcheck(registered.network_curvature.default, (params, tape, data.y, params, network), test_utils=tests)
    opcheck(
        registered.network_linearise.default,
        (params, data.x, data.y, network),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_without_tasks(device: str) -> None:
    model = MLP(2, (3,), 2)
    data = Data(torch.rand(0, 4, 2, device=device), torch.randint(2, (0, 4), device=device))
    params = torch.rand(0, model.num_parameters, device=device)
    loss = TaskLoss(model, "cross_entropy", engine="native")
    assert [list(part.shape) for part in loss.gradient(params, data)] == [[0], [0, 4, 2], [0, model.num_parameters]]
    assert model.network is not None
    linearised = NetworkLinearisation(params, data.x, data.y, model.network)
    assert linearised.product(params).shape == linearised.product(params, gauss_newton=True).shape == params.shape
    one = torch.ones(1, 1, device=device)
    losses = loss.descend_(params, params.clone(), data, lam=one, lr=one, steps=3)
    assert losses is not None
    assert losses.shape == (3, 0)


@pytest.mark.cuda
def test_a_label_beyond_the_classes_spoils_its_task_alone() -> None:
    model, criterion, params, data = draw("conv4", 3, 5, torch.float32, "cuda")
    loss = TaskLoss(model, criterion, engine="native")
    whole = loss.gradient(params, data)
    y = data.y.clone()
    y[1, 2] = 5
    found = loss.gradient(params, Data(data.x, y))
    assert found.losses[1].isnan()
    assert found.gradient[1].isnan().any()
    for mine, before in zip(found, whole, strict=True):
        assert torch.equal(mine[[0, 2]], before[[0, 2]])


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["conv4-max-odd", "mlp-tanh"])
def test_every_op_can_be_captured(name: str) -> None:
    model, criterion, theta, data = draw(name, 3, 5, torch.float32, "cuda")
    loss = TaskLoss(model, criterion, engine="native")
    lam, lr = torch.rand(3, 1, device="cuda"), torch.rand(1, 1, device="cuda")
    p = torch.randn_like(theta)

    def everything() -> list[Tensor]:
        phi = theta.clone()
        losses = loss.descend_(phi, theta, data, lam=lam, lr=lr, steps=2)
        assert losses is not None
        products = [loss.linearize(phi, data, kind)(p) for kind in CURVATURES]
        return [phi, losses, *loss.gradient(phi, data), *products, loss.outputs(phi, data.x)]

    expected = everything()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = everything()
    graph.replay()
    assert all(map(torch.equal, found, expected))


def test_errors() -> None:
    model, criterion, params, data = draw("conv4", 2, 5, torch.float32)
    loss = TaskLoss(model, criterion, engine="native")
    with pytest.raises(IndexError, match=r"y must hold labels in \[0, 5\), got 7"):
        loss.gradient(params, Data(data.x, torch.full((2, 5), 7)))
    with pytest.raises(TypeError, match="targets must be int64"):
        loss.gradient(params, Data(data.x, data.y.int()))
    with pytest.raises(ValueError, match=r"targets must have shape \[2, 5\], got \[2, 4\]"):
        loss.gradient(params, Data(data.x, data.y[:, :4]))
    with pytest.raises(ValueError, match="inputs must have shape"):
        loss.gradient(params, Data(data.x[..., :-1], data.y))
    with pytest.raises(ValueError, match="params must be float32 or float64, on the CPU or"):
        loss.gradient(params.bfloat16(), data)
    with pytest.raises(ValueError, match="engine must be 'auto' or 'torch' for a"):
        TaskLoss(from_module(torch.nn.Linear(2, 2)), "mse", engine="native")
    with pytest.raises(ValueError, match="engine must be one of"):
        TaskLoss(model, criterion, engine="fast")

    network = list(model.network or ())
    op = torch.ops.imaml_ext.network_outputs
    with pytest.raises(ValueError, match="network must hold 3 numbers and 6 a layer, got 4"):
        op(params, data.x, [1, 28, 28, 3])
    with pytest.raises(ValueError, match="network must describe each layer"):
        op(params, data.x, [*network[:-1], 7])
    with pytest.raises(ValueError, match="params must be contiguous of shape"):
        op(params[:, 1:], data.x, network)
    with pytest.raises(ValueError, match="network must leave a pixel"):
        op(params, data.x, [1, 1, 1, 3, 1, 4, 1, 1, 1])
    with pytest.raises(ValueError, match="network must have no tanh"):
        op(params, data.x, [1, 8, 8, 3, 1, 4, 1, 2, 0])
    with pytest.raises(ValueError, match="network must end with one pixel per image, got 56"):
        op(params, data.x, [1, 8, 7, 3, 1, 4, 1, 1, 0])
    tape = torch.ops.imaml_ext.network_linearise(params, data.x, data.y, network)[3]
    with pytest.raises(ValueError, match="tape must"):
        torch.ops.imaml_ext.network_product(params, tape[:, 1:].contiguous(), data.y, params, network, False)
    with pytest.raises(ValueError, match="p must have the shape of params"):
        torch.ops.imaml_ext.network_product(params, tape, data.y, params.repeat(2, 1), network, False)
    one, descend = torch.ones(1, 1), torch.ops.imaml_ext.network_descend_
    for theta in (params, params[1:]):
        with pytest.raises(ValueError, match="theta must have memory of its own, got some of that of phi"):
            descend(params, theta, one, one, data.x, data.y, network, 1)
    both = torch.stack([params, params])  # of one storage, and no two numbers in one place
    descend(both[0], both[1], one, 0.1 * one, data.x, data.y, network, 1)
    assert torch.equal(both[1], params)


def test_products_and_solves_of_some_tasks_alone(device: str) -> None:
    """A product with rows of the batch, and a solve in blocks of them, have the bits of all rows together."""
    loss, theta, episodes = classification(7)
    phi = theta.expand(7, -1).contiguous().to(device)
    p = torch.randn_like(phi)
    support = Data(*(side.to(device) for side in episodes.support))
    for operator in (loss.linearize(phi, support, kind) for kind in CURVATURES):
        whole = operator(p)
        for rows in (slice(0, 2), slice(3, 7), slice(6, 7)):
            assert torch.equal(operator(p[rows], rows), whole[rows])
        assert operator.rows_per_block is None if device == "cuda" else operator.rows_per_block >= 1
        with pytest.raises(ValueError, match="shape of phi"):
            operator(p, slice(0, 2))
        solved = cg(operator, p, shift=50.0, max_iterations=4)
        for k in (1, 3, 7, 20):
            blocks = cg(operator, p, shift=50.0, max_iterations=4, rows_per_block=k)
            assert torch.equal(blocks.x, solved.x)
            assert torch.equal(blocks.iterations, solved.iterations)
