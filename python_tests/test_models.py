"""Task models against plain modules looped over tasks; layouts, initial values, losses, errors."""

import copy
import dataclasses
import hashlib
import json
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imaml_ext.errors import ConfigError, ConfigTypeError
from imaml_ext.losses import TaskLoss
from imaml_ext.models import MLP, Conv4, ParameterLayout, TaskModel, from_module
from imaml_ext.settings import changed, from_json, to_json


class Data(NamedTuple):
    x: Tensor
    y: Tensor


def rows_of(model: TaskModel, tasks: int, *, spread: float = 0.1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Distinct parameters for every task, [B, N]."""
    generator = torch.Generator().manual_seed(7)
    theta = model.init(seed=3, dtype=dtype)
    noise = torch.randn(tasks, theta.numel(), generator=generator, dtype=torch.float64).to(dtype)
    return theta + spread * noise


def images(tasks: int, count: int, channels: int, size: int) -> Tensor:
    return torch.rand(
        tasks, count, channels, size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )


class PlainConv4(nn.Module):
    """The network as a few-shot paper's reader would write it: channels first, one task."""

    def __init__(self, model: Conv4) -> None:
        super().__init__()
        channels, size, _ = model.image_shape
        self.stride = 2 if model.pooling == "stride" else 1
        layers: list[nn.Module] = []
        for layer in range(4):
            layers.append(
                nn.Conv2d(channels if layer == 0 else model.filters, model.filters, 3, self.stride, 1, bias=False)
            )
            layers.append(nn.BatchNorm2d(model.filters, track_running_stats=False))
            layers.append(nn.ReLU())
            if model.pooling == "max":
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.linear = nn.LazyLinear(model.ways)
        self.double()
        with torch.no_grad():
            self(torch.zeros(2, channels, size, size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.linear(x.mean((2, 3)) if self.stride == 2 else x.permute(0, 2, 3, 1).flatten(1))

    def load(self, parameters: dict[str, Tensor]) -> None:
        """Takes over one task's parameters, by the documented layout."""
        convolutions = [m for m in self.body if isinstance(m, nn.Conv2d)]
        norms = [m for m in self.body if isinstance(m, nn.BatchNorm2d)]
        for layer in range(4):
            convolutions[layer].weight.data = parameters[f"conv{layer + 1}.weight"].permute(3, 2, 0, 1).contiguous()
            norms[layer].weight.data = parameters[f"norm{layer + 1}.weight"].contiguous()
            norms[layer].bias.data = parameters[f"norm{layer + 1}.bias"].contiguous()
        self.linear.weight.data = parameters["linear.weight"].t().contiguous()
        self.linear.bias.data = parameters["linear.bias"].contiguous()

    def flat(self, values: list[Tensor]) -> Tensor:
        """One tensor a parameter (in the order of `ordered`), as a row of the task model."""
        pieces = [v.permute(2, 3, 1, 0) if v.dim() == 4 else v.t() if v.dim() == 2 else v for v in values]
        return torch.cat([piece.reshape(-1) for piece in pieces])

    def ordered(self) -> list[Tensor]:
        found: list[Tensor] = []
        for module in self.body:
            found.extend(module.parameters())
        return [*found, self.linear.weight, self.linear.bias]


@pytest.mark.parametrize(
    ("pooling", "size", "channels", "ways"),
    [("stride", 28, 1, 5), ("stride", 13, 3, 2), ("max", 16, 1, 3), ("max", 37, 2, 4)],
)
def test_conv4_equals_a_plain_module_looped_over_tasks(pooling: str, size: int, channels: int, ways: int) -> None:
    model = Conv4(ways, in_channels=channels, image_size=size, filters=5, pooling=pooling)
    tasks = 3
    params = rows_of(model, tasks).requires_grad_()
    x = images(tasks, 2 * ways, channels, size)
    y = torch.arange(ways).repeat(tasks, 2)
    direction = torch.randn(params.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    outputs = model(params, x)
    losses = TaskLoss(model, "cross_entropy").criterion(outputs, y)
    (gradient,) = torch.autograd.grad(losses.sum(), params, create_graph=True)
    (product,) = torch.autograd.grad(gradient, params, direction)

    for task in range(tasks):
        plain = PlainConv4(model)
        plain.load(model.layout.views(params[task].detach()))
        expected = plain(x[task])
        torch.testing.assert_close(outputs[task], expected, rtol=1e-10, atol=1e-10)
        leaves = plain.ordered()
        loss = F.cross_entropy(expected, y[task])
        torch.testing.assert_close(losses[task], loss, rtol=1e-10, atol=1e-10)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        torch.testing.assert_close(gradient[task], plain.flat(list(first)), rtol=1e-8, atol=1e-10)
        twin = PlainConv4(model)
        twin.load(model.layout.views(direction[task]))
        along = sum((g * d).sum() for g, d in zip(first, twin.ordered(), strict=True))
        second = torch.autograd.grad(along, leaves)
        torch.testing.assert_close(product[task], plain.flat(list(second)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("pooling", ["stride", "max"])
def test_conv4_derivatives_by_finite_differences(pooling: str) -> None:
    model = Conv4(2, image_size=17, filters=3, pooling=pooling)
    params = rows_of(model, 2)
    x = images(2, 4, 1, 17)
    chosen = torch.randperm(model.num_parameters, generator=torch.Generator().manual_seed(0))[:25]

    def outputs(change: Tensor) -> Tensor:
        return model(params.index_add(1, chosen, change), x)

    change = torch.zeros(2, 25, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(outputs, (change,), fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, (change,), fast_mode=True)


def test_conv4_input_gradient() -> None:
    """The inputs may require a gradient too (adversarial or learned inputs)."""
    model = Conv4(2, image_size=9, filters=3)
    params = rows_of(model, 2)
    x = images(2, 4, 1, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda inputs: model(params, inputs), (x,), fast_mode=True)


def test_conv4_has_the_parameters_of_the_literature() -> None:
    model = Conv4(5)
    assert model.num_parameters == 9 * 64 + 3 * 9 * 64 * 64 + 4 * 2 * 64 + 64 * 5 + 5
    assert model(model.init(seed=0).expand(2, -1), torch.rand(2, 5, 1, 28, 28)).shape == (2, 5, 5)
    large = Conv4(5, in_channels=3, image_size=84, filters=32, pooling="max")
    assert large.layout.shapes[large.layout.names.index("linear.weight")] == (32 * 5 * 5, 5)


@pytest.mark.parametrize(("pooling", "size"), [("stride", 21), ("max", 33)])
def test_conv4_features_are_scaled(pooling: str, size: int) -> None:
    """Without a bias the logits are linear in the features; nothing but the features changes."""
    model = Conv4(4, image_size=size, filters=5, pooling=pooling)
    theta = rows_of(model, 1)[0]
    views = model.layout.views(theta)
    views["linear.bias"].zero_()
    x = images(1, 6, 1, size)
    before, kept = model(theta[None], x), theta.clone()
    assert model.scale_features_(theta, 1.7) is theta
    torch.testing.assert_close(model(theta[None], x), 1.7 * before, rtol=1e-12, atol=1e-13)
    changed = {name for name, value in views.items() if not torch.equal(value, model.layout.views(kept)[name])}
    assert changed == {"norm4.weight", "norm4.bias"}


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("hidden", [(), (7,), (6, 4)])
def test_mlp_equals_linear_layers_looped_over_tasks(activation: str, hidden: tuple[int, ...]) -> None:
    model = MLP(3, hidden, 2, activation=activation)
    params = rows_of(model, 4)
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs = model(params, x)
    function = torch.relu if activation == "relu" else torch.tanh
    for task in range(4):
        p = model.layout.views(params[task])
        h = x[task]
        for layer in range(len(hidden) + 1):
            h = F.linear(function(h) if layer else h, p[f"{layer}.weight"].t(), p[f"{layer}.bias"])
        torch.testing.assert_close(outputs[task], h, rtol=1e-12, atol=1e-12)


def test_mlp_flattens_examples() -> None:
    model = MLP(6, (4,), 1)
    params = rows_of(model, 2)
    x = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    assert torch.equal(model(params, x), model(params, x.flatten(2)))
    scalar = MLP(1, (4,), 1)
    assert scalar(rows_of(scalar, 2), torch.randn(2, 5, dtype=torch.float64)).shape == (2, 5, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pooling", ["stride", "max"])
def test_a_task_of_nan_leaves_the_others_bit_identical(pooling: str, dtype: torch.dtype) -> None:
    model = Conv4(3, image_size=16, filters=4, pooling=pooling)
    loss = TaskLoss(model, "cross_entropy")
    params = rows_of(model, 4, dtype=dtype)
    x, y = images(4, 3, 1, 16).to(dtype), torch.arange(3).repeat(4, 1)

    def everything(x: Tensor) -> list[Tensor]:
        leaf = params.clone().requires_grad_()
        losses = loss(leaf, Data(x, y))
        (gradient,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
        (product,) = torch.autograd.grad(gradient, leaf, torch.ones_like(leaf))
        return [losses.detach(), gradient.detach(), product]

    broken = x.clone()
    broken[1] = float("nan")
    for clean, dirty in zip(everything(x), everything(broken), strict=True):
        assert dirty[1].isnan().any()
        assert torch.equal(clean[[0, 2, 3]], dirty[[0, 2, 3]])


# --- any nn.Module ----------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """A convolution, a group norm, a weight used twice, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.mix = nn.Linear(4, 4)
        self.again = self.mix
        self.head = nn.Linear(4, 3)
        self.register_buffer("offset", torch.linspace(-1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x))).mean((2, 3)) + self.offset
        return self.head(self.again(torch.tanh(self.mix(x))))


def _looped(module: nn.Module, model: TaskModel, params: Tensor, x: Tensor) -> list[Tensor]:
    """Outputs of the module, one task after another, by PyTorch's own functional call."""
    return [
        torch.func.functional_call(module, model.layout.views(row), (inputs,))
        for row, inputs in zip(params, x, strict=True)
    ]


def test_from_module_equals_the_module_looped_over_tasks() -> None:
    torch.manual_seed(0)
    module = Shared().double()
    model = from_module(module)
    assert model.layout.names == tuple(name for name, _ in module.named_parameters())
    torch.testing.assert_close(
        model.init(seed=0, dtype=torch.float64), nn.utils.parameters_to_vector(module.parameters()).detach()
    )
    params = rows_of(model, 3).requires_grad_()
    x = torch.randn(3, 5, 2, 6, 6, dtype=torch.float64)
    y = torch.randint(3, (3, 5))
    direction = torch.randn_like(params)

    outputs = model(params, x)
    losses = TaskLoss(model, "cross_entropy").criterion(outputs, y)
    (gradient,) = torch.autograd.grad(losses.sum(), params, create_graph=True)
    (product,) = torch.autograd.grad(gradient, params, direction)

    looped = _looped(module, model, params, x)
    total = sum(F.cross_entropy(out, y[task]) for task, out in enumerate(looped))
    (looped_gradient,) = torch.autograd.grad(total, params, create_graph=True)
    (looped_product,) = torch.autograd.grad(looped_gradient, params, direction)
    torch.testing.assert_close(outputs, torch.stack(looped), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, looped_gradient, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(product, looped_product, rtol=1e-8, atol=1e-10)


def test_from_module_keeps_frozen_parameters_and_the_module_itself() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    module[0].requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    model = from_module(module)
    assert model.layout.names == ("2.weight", "2.bias")
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    params = rows_of(model, 2)
    torch.testing.assert_close(model(params, x), torch.stack(_looped(module, model, params, x)))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert module[2].weight.requires_grad


def _with_batch_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).double()


def test_from_module_refuses_running_statistics_unless_told_what_to_do() -> None:
    module = _with_batch_norm()
    with pytest.raises(ValueError, match=r"layer '1' \(BatchNorm2d\) updates running statistics.*batch_norm='task'"):
        from_module(module)

    x = torch.randn(3, 5, 1, 8, 8, dtype=torch.float64)
    by_task = from_module(module, batch_norm="task")
    params = rows_of(by_task, 3)
    module.train()  # uses the batch's statistics, whatever the running ones are
    torch.testing.assert_close(by_task(params, x), torch.stack(_looped(module, by_task, params, x)))

    module.eval()
    constant = from_module(module)
    torch.testing.assert_close(constant(params, x), torch.stack(_looped(module, constant, params, x)))
    assert not torch.allclose(constant(params, x), by_task(params, x))


def test_from_module_refuses_what_it_cannot_differentiate() -> None:
    with pytest.raises(ValueError, match=r"layer '1' \(Dropout\) draws random numbers"):
        from_module(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    from_module(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval())
    with pytest.raises(ValueError, match=r"layer '0' \(LazyLinear\) has no parameters yet"):
        from_module(nn.Sequential(nn.LazyLinear(2)))
    with pytest.raises(ValueError, match="at least one parameter that requires a gradient"):
        from_module(nn.ReLU())
    with pytest.raises(ValueError, match=r"parameters of one dtype, got torch.float32, torch.float64"):
        from_module(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))
    with pytest.raises(TypeError, match=r"module must be an nn.Module, got function"):
        from_module(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_norm must be one of 'error', 'task', got 'running'"):
        from_module(nn.Linear(2, 2), batch_norm="running")


# --- layouts and initial values ---------------------------------------------------------------------------------------


def test_layout_views_and_flatten() -> None:
    layout = ParameterLayout.of({"a": (2, 3), "b": (), "c": (4,)})
    assert (layout.numel, layout.sizes) == (11, (6, 1, 4))
    flat = torch.arange(33.0).reshape(3, 11)
    views = layout.views(flat)
    assert {name: tuple(view.shape) for name, view in views.items()} == {"a": (3, 2, 3), "b": (3,), "c": (3, 4)}
    views["c"][1, 0] = -1  # no copies
    assert flat[1, 7] == -1
    assert torch.equal(layout.flatten(views), flat)
    assert torch.equal(layout.flatten(layout.views(flat[0])), flat[0])
    with pytest.raises(ValueError, match=r"flat must have shape \[..., 11\], got \[3, 10\]"):
        layout.views(flat[:, :10])
    with pytest.raises(ValueError, match=r"missing \['c'\], unknown \['d'\]"):
        layout.flatten({"a": flat, "b": flat, "d": flat})
    with pytest.raises(ValueError, match=r"parameter 'b' must have shape \[3\], got \[2\]"):
        layout.flatten({"a": torch.zeros(3, 2, 3), "b": torch.zeros(2), "c": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match="names must be distinct"):
        ParameterLayout(("a", "a"), (torch.Size([1]), torch.Size([1])))


def _digest(theta: Tensor) -> str:
    return hashlib.sha256(theta.numpy().tobytes()).hexdigest()[:16]


def test_initial_values_have_the_same_bits_everywhere() -> None:
    found = {
        "conv4": _digest(Conv4(5).init(seed=0)),
        "conv4, float64": _digest(Conv4(5).init(seed=0, dtype=torch.float64)),
        "conv4, seed 1": _digest(Conv4(5, filters=8).init(seed=1)),
        "mlp": _digest(MLP(1, (40, 40), 1).init(seed=0)),
    }
    assert found == STORED


STORED = {
    "conv4": "3234bf5c4afa7957",
    "conv4, float64": "005b393e88da15fb",
    "conv4, seed 1": "31acf27118de38c8",
    "mlp": "adcc568b1bb68ac9",
}


def test_initial_values_are_spread_as_documented() -> None:
    model = Conv4(5)
    p = model.layout.views(model.init(seed=11, dtype=torch.float64))
    bound = (6 / (9 * 64 + 9 * 64)) ** 0.5
    weight = p["conv3.weight"]
    assert weight.abs().max() < bound
    assert weight.abs().max() > 0.999 * bound
    assert abs(weight.mean()) < 4 * bound / (3 * weight.numel()) ** 0.5
    assert abs(weight.var() / (bound**2 / 3) - 1) < 0.02
    assert not torch.allclose(p["conv3.weight"], p["conv2.weight"])
    assert (p["norm2.weight"] == 1).all()
    assert (p["norm2.bias"] == 0).all()
    assert (p["linear.bias"] == 0).all()
    assert not torch.equal(model.init(seed=11), model.init(seed=12))
    assert torch.equal(model.init(seed=11), model.init(seed=11))


# --- as settings ------------------------------------------------------------------------------------------------------


def test_a_network_is_fitted_to_the_data() -> None:
    conv4 = Conv4(filters=7, pooling="max", precision="tf32")
    fitted = conv4.fitted((3, 33, 33), 20)
    assert fitted == Conv4(20, in_channels=3, image_size=33, filters=7, pooling="max", precision="tf32")
    assert conv4 == Conv4(filters=7, pooling="max", precision="tf32")
    assert fitted.layout.shapes[0] == (3, 3, 3, 7)
    assert fitted.layout.shapes[-1] == (20,)
    assert MLP(hidden=(6,), activation="tanh").fitted((2, 3), 4) == MLP(6, (6,), 4, activation="tanh")
    assert MLP().fitted((), 1) == MLP(1, (40, 40), 1)
    module = from_module(nn.Linear(2, 3))
    assert module.fitted((2,), 3) is module
    for shape, words in (
        ((1, 28, 27), r"Conv4 needs square images \[channels, size, size\], got inputs of shape \[1, 28, 27\]"),
        ((5,), r"Conv4 needs square images .* got inputs of shape \[5\]"),
        ((3, 15, 15), r"Conv4\.image_size must be at least 16 with pooling='max', got 15"),
    ):
        with pytest.raises(ConfigError, match=words):
            conv4.fitted(shape, 5)


def test_what_training_fills_in_is_marked() -> None:
    marked = {
        cls: {field.name for field in dataclasses.fields(cls) if field.metadata.get("from_data")}
        for cls in (Conv4, MLP)
    }
    assert marked == {Conv4: {"ways", "in_channels", "image_size"}, MLP: {"in_features", "out_features"}}


@pytest.mark.parametrize(
    "model", [Conv4(3, in_channels=2, image_size=20, filters=9, pooling="max"), MLP(4, [5, 6], 7, activation="tanh")]
)
def test_a_network_is_written_and_read(model: TaskModel) -> None:
    theta = model.init(seed=2)  # what has been computed for a model is no part of it
    written = json.loads(json.dumps(to_json(model)))
    assert written["kind"] == {Conv4: "conv4", MLP: "mlp"}[type(model)]
    assert written.keys() == {"kind", *(field.name for field in dataclasses.fields(model))}
    read = from_json(TaskModel, written)
    assert read == model
    assert hash(read) == hash(model)
    assert torch.equal(read.init(seed=2), theta)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again == model
        assert again.layout == model.layout
    other = changed(model, {"precision": "tf32"})
    assert (other.network, other.layout) == (None, model.layout)
    assert model.network is not None
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.precision = "tf32"


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (ConfigError, "Conv4.pooling must be one of 'stride', 'max', got 'mean'", lambda: Conv4(pooling="mean")),
        (
            ConfigError,
            "Conv4.image_size must be at least 16 with pooling='max', got 15",
            lambda: Conv4(image_size=15, pooling="max"),
        ),
        (ConfigError, "Conv4.filters must be at least 1, got 0", lambda: Conv4(5, filters=0)),
        (ConfigTypeError, "Conv4.ways must be an integer, got 5.0", lambda: Conv4(5.0)),
        (ConfigTypeError, "Conv4.in_channels must be an integer, got True", lambda: Conv4(in_channels=True)),
        (
            ConfigError,
            "MLP.activation must be one of 'relu', 'tanh', got 'gelu'",
            lambda: MLP(1, (), 1, activation="gelu"),
        ),
        (ConfigError, "MLP.hidden must be at least 1, got 0", lambda: MLP(1, (2, 0), 1)),
        (ConfigTypeError, "MLP.hidden must be a tuple, got 40", lambda: MLP(1, 40, 1)),
        (ConfigError, "MLP.out_features must be at least 1, got -1", lambda: MLP(1, (2,), -1)),
        (
            ConfigError,
            "task model must be one of 'conv4', 'mlp', got 'resnet'",
            lambda: from_json(TaskModel, {"kind": "resnet"}),
        ),
    ],
)
def test_a_bad_field_is_one_sentence_that_names_it(
    error: type[Exception], words: str, make: Callable[[], object]
) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == words


# --- losses -----------------------------------------------------------------------------------------------------------


def test_criteria_equal_torch() -> None:
    model = MLP(3, (), 4)
    outputs, labels = torch.randn(3, 5, 4, dtype=torch.float64), torch.randint(4, (3, 5))
    loss = TaskLoss(model, "cross_entropy")
    for task in range(3):
        torch.testing.assert_close(loss.criterion(outputs, labels)[task], F.cross_entropy(outputs[task], labels[task]))
    hits = (outputs.argmax(-1) == labels).double().mean(1)
    assert torch.equal(loss.accuracy(outputs, labels), hits)
    targets = torch.randn(3, 5, 4, dtype=torch.float64)
    squared = TaskLoss(model, "mse")
    torch.testing.assert_close(squared.criterion(outputs, targets), ((outputs - targets) ** 2).mean((1, 2)))
    one = outputs[..., :1]
    torch.testing.assert_close(squared.criterion(one, targets[..., 0]), squared.criterion(one, targets[..., :1]))
    assert squared.accuracy(outputs, targets) is None
    own = TaskLoss(model, lambda outputs, targets: (outputs - targets).abs().sum((1, 2)))
    assert own.criterion(outputs, targets).shape == (3,)


def test_errors_name_the_argument() -> None:
    model = Conv4(5, image_size=8, filters=2)
    params, x = model.init(seed=0).expand(2, -1), torch.rand(2, 5, 1, 8, 8)
    loss = TaskLoss(model, "cross_entropy")
    n = model.num_parameters
    for error, words, call in (
        (ValueError, rf"params must have shape \[B, {n}\]", lambda: model(params[0], x)),
        (ValueError, rf"params must have shape \[B, {n}\]", lambda: model(params[:, 1:], x)),
        (TypeError, "params must be a floating-point tensor, got torch.int64", lambda: model(params.long(), x)),
        (TypeError, "params must be a tensor, got list", lambda: model([1.0], x)),
        (ValueError, r"inputs must have shape \[2, S, \*\]", lambda: model(params, x[:1])),
        (
            ValueError,
            r"inputs must have shape \[B, S, 1, 8, 8\], got \[2, 5, 8, 8\]",
            lambda: model(params, x[:, :, 0]),
        ),
        (TypeError, "inputs must have the dtype of params, torch.float32", lambda: model(params, x.double())),
        (ValueError, "inputs must be on the device of params, cpu, got meta", lambda: model(params, x.to("meta"))),
        (ValueError, "seed must be at least 0, got -1", lambda: model.init(seed=-1)),
        (TypeError, "seed must be an integer, got 0.5", lambda: model.init(seed=0.5)),
        (
            TypeError,
            "dtype must be a floating-point type, got torch.int32",
            lambda: model.init(seed=0, dtype=torch.int32),
        ),
        (TypeError, "model must be a TaskModel, got Linear: wrap", lambda: TaskLoss(nn.Linear(1, 1), "mse")),
        (ValueError, "criterion must be one of 'cross_entropy', 'mse', 'nll_loss'", lambda: TaskLoss(model, "hinge")),
        (TypeError, "criterion must be a name or a callable, got int", lambda: TaskLoss(model, 1)),
        (TypeError, "targets must be int64 labels", lambda: loss(params, Data(x, torch.zeros(2, 5)))),
        (
            ValueError,
            r"targets must have shape \[2, 5\], got \[2, 4\]",
            lambda: loss(params, Data(x, torch.zeros(2, 4).long())),
        ),
        (TypeError, "targets must be a tensor, got int", lambda: loss(params, Data(x, [0]))),
        (
            ValueError,
            r"targets must have the shape of the outputs, \[2, 5, 5\], got \[2, 5, 4\]",
            lambda: TaskLoss(model, "mse")(params, Data(x, torch.zeros(2, 5, 4))),
        ),
        (
            ValueError,
            r"criterion must return one loss per task, shape \[2\], got \[\]",
            lambda: TaskLoss(model, lambda outputs, targets: outputs.sum())(params, Data(x, torch.zeros(2, 5))),
        ),
    ):
        with pytest.raises(error, match=words):
            call()


@pytest.mark.long
def test_a_compiled_gradient_is_the_eager_one():
    from imaml_ext import GradientDescent

    module = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    model = from_module(module.double())
    params = torch.randn(5, model.num_parameters, dtype=torch.float64)

    class Data:
        x = torch.randn(5, 6, 3, dtype=torch.float64)
        y = torch.randint(4, (5, 6))

    eager, compiled = (TaskLoss(model, "cross_entropy", compiled=choice) for choice in (False, True))
    for found, expected in zip(compiled.gradient(params, Data), eager.gradient(params, Data), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert not found.requires_grad
    inner = GradientDescent(steps=3, lr=0.1)
    descended = [inner.solve(loss, params[0], Data, lam=0.5).phi for loss in (compiled, eager)]
    torch.testing.assert_close(*descended, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="compiled must be False for a MLP"):
        TaskLoss(MLP(3, [], 4), "cross_entropy", compiled=True)
    with pytest.raises(ValueError, match="targets must have shape"):
        compiled.gradient(params, type("Short", (), {"x": Data.x, "y": Data.y[:, :2]}))
