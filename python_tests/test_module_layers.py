"""Every layer type of torch.nn as a task model, against torch's own module looped over tasks."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from imaml_ext.models import TaskModel, from_module

Inputs = tuple[Tensor, ...]
Case = tuple[Callable[[], nn.Module], Callable[[], Inputs]]
S = 3  # examples per task; every example below is one of such a batch


def floats(*shape: int) -> Callable[[], Inputs]:
    return lambda: (torch.randn(S, *shape, dtype=torch.float64),)


def ids(*shape: int) -> Callable[[], Inputs]:
    return lambda: (torch.randint(7, (S, *shape)),)


def values(of: Any) -> Callable[[], Inputs]:
    given = torch.tensor(of)
    return lambda: (given.double() if given.is_floating_point() else given,)


def several(*makers: Callable[[], Inputs]) -> Callable[[], Inputs]:
    return lambda: tuple(x for make in makers for x in make())


def _attention() -> dict[str, Case]:
    sizes = {"dim_feedforward": 6, "dropout": 0.0, "batch_first": True}

    def encoder(**more: Any) -> nn.Module:
        return nn.TransformerEncoderLayer(4, 2, **sizes, **more)  # type: ignore[arg-type]

    return {
        "MultiheadAttention": (
            lambda: nn.MultiheadAttention(4, 2, batch_first=True),
            several(floats(5, 4), floats(6, 4), floats(6, 4)),
        ),
        "MultiheadAttention eval": (
            lambda: nn.MultiheadAttention(4, 2, batch_first=True).eval(),
            lambda: (torch.randn(S, 5, 4, dtype=torch.float64),) * 3,
        ),
        "TransformerEncoderLayer": (encoder, floats(5, 4)),
        "TransformerEncoderLayer eval": (lambda: encoder(norm_first=True).eval(), floats(5, 4)),
        "TransformerEncoder": (lambda: nn.TransformerEncoder(encoder(), 2).eval(), floats(5, 4)),
        "TransformerDecoderLayer": (
            lambda: nn.TransformerDecoderLayer(4, 2, **sizes),  # type: ignore[arg-type]
            several(floats(3, 4), floats(5, 4)),
        ),
        "TransformerDecoder": (
            lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, **sizes), 1),  # type: ignore[arg-type]
            several(floats(3, 4), floats(5, 4)),
        ),
        "Transformer": (
            lambda: nn.Transformer(4, 2, 1, 1, **sizes).eval(),  # type: ignore[arg-type]
            several(floats(3, 4), floats(5, 4)),
        ),
    }


class _Unpool(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.pool = getattr(nn, f"MaxPool{d}d")(2, return_indices=True)
        self.unpool = getattr(nn, f"MaxUnpool{d}d")(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(x))


class _Weighted(nn.EmbeddingBag):
    def forward(self, input: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input, per_sample_weights=weights)


def _each(form: str, kinds: str, make: Callable[[type], nn.Module], *size: int) -> dict[str, Case]:
    """One case for each of the kinds: `form` with its name, and with 1, 2 and 3 in the place of {d}."""
    found: dict[str, Case] = {}
    for kind in kinds.split():
        for d in (1, 2, 3) if "{d}" in form else (0,):
            name = form.format(kind, d=d)
            shape = size if not d else (*size[:1], *size[1:] * d)
            found[name] = (functools.partial(make, getattr(nn, name)), floats(*shape))
    return found


_POINTWISE = """CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish PReLU ReLU
    ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink"""
CASES: dict[str, Case] = {
    **_each("{}", _POINTWISE, lambda layer: layer(), 4),
    **_each("{}", "GLU LogSoftmax Softmax Softmin", lambda layer: layer(-1), 4),
    **_each("{}", "Dropout AlphaDropout FeatureAlphaDropout", lambda layer: layer(0.4).eval(), 4),
    **_each("{}{d}d", "Dropout", lambda layer: layer(0.4).eval(), 2, 3),
    **_each("{}{d}d", "Conv", lambda layer: layer(4, 6, 3, 2, 1, groups=2), 4, 5),
    **_each("{}{d}d", "ConvTranspose", lambda layer: layer(4, 2, 3, 2, 1, 1, groups=2), 4, 3),
    **_each("{}{d}d", "BatchNorm", lambda layer: layer(2, track_running_stats=False), 2, 3),
    **_each("{}{d}d", "InstanceNorm", lambda layer: layer(2, affine=True), 2, 3),
    **_each("{}{d}d", "AvgPool MaxPool AdaptiveAvgPool AdaptiveMaxPool", lambda layer: layer(2), 2, 5),
    **_each("{}{d}d", "LPPool", lambda layer: layer(2, 2), 2, 4),
    **_each("{}{d}d", "CircularPad ReflectionPad ReplicationPad ZeroPad", lambda layer: layer(1), 2, 3),
    **_each("{}{d}d", "ConstantPad", lambda layer: layer(1, 0.5), 2, 3),
    **{f"MaxUnpool{d}d": (functools.partial(_Unpool, d), floats(2, *[4] * d)) for d in (1, 2, 3)},
    "Softmax2d": (nn.Softmax2d, floats(2, 3, 3)),
    "Threshold": (lambda: nn.Threshold(0.1, 2.0), floats(4)),
    "RReLU": (lambda: nn.RReLU().eval(), floats(4)),
    "Conv2d circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, dilation=2, padding_mode="circular"), floats(2, 6, 5)),
    "BatchNorm2d eval": (lambda: nn.BatchNorm2d(2).eval(), floats(2, 3, 3)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(2).eval(), floats(2, 3, 3)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), floats(4, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(4), floats(3, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), floats(3, 4)),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), floats(4, 3)),
    "CrossMapLRN2d": (lambda: nn.CrossMapLRN2d(2), floats(4, 3, 3)),
    "Bilinear": (lambda: nn.Bilinear(3, 4, 2), several(floats(3), floats(4))),
    "Linear": (lambda: nn.Linear(4, 3), floats(4)),
    "Linear weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), floats(4)),
    "Linear spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), floats(4)),
    "CosineSimilarity": (nn.CosineSimilarity, several(floats(4), floats(4))),
    "PairwiseDistance": (nn.PairwiseDistance, several(floats(4), floats(4))),
    "Embedding": (lambda: nn.Embedding(7, 4, padding_idx=0), ids(5)),
    "Embedding max_norm": (lambda: nn.Embedding(7, 4, padding_idx=-2, max_norm=0.9), ids(5)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(7, 4, padding_idx=0), ids(5)),
    "EmbeddingBag sum": (lambda: _Weighted(7, 4, mode="sum"), several(ids(5), floats(5))),
    "EmbeddingBag max": (lambda: nn.EmbeddingBag(7, 4, mode="max", padding_idx=1), ids(5)),
    "EmbeddingBag offsets": (lambda: nn.EmbeddingBag(7, 4, padding_idx=2), several(ids(), values([0, 0, 2]))),
    "EmbeddingBag last offset": (
        lambda: nn.EmbeddingBag(7, 4, include_last_offset=True),
        several(ids(), values([0, 2, 2, S - 1])),
    ),
    "Flatten": (nn.Flatten, floats(2, 3)),
    "Unflatten": (lambda: nn.Unflatten(1, (2, 2)), floats(4)),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), floats(4, 2, 2)),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), floats(4, 2, 2)),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), floats(1, 4, 4)),
    "Fold": (lambda: nn.Fold((4, 5), 2), floats(8, 12)),
    "Unfold": (lambda: nn.Unfold(2), floats(2, 4, 5)),
    "Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), floats(2, 3, 3)),
    "UpsamplingBilinear2d": (lambda: nn.UpsamplingBilinear2d(scale_factor=2), floats(2, 3, 3)),
    "UpsamplingNearest2d": (lambda: nn.UpsamplingNearest2d(scale_factor=2), floats(2, 3, 3)),
    "LSTM": (lambda: nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, proj_size=2), floats(5, 3)),
    "LSTM no bias": (lambda: nn.LSTM(3, 4, bias=False, proj_size=2), floats(5, 3)),
    "GRU": (lambda: nn.GRU(3, 4, 2, bidirectional=True), floats(5, 3)),
    "RNN": (lambda: nn.RNN(3, 4, 2, batch_first=True), floats(5, 3)),
    "RNN relu": (lambda: nn.RNN(3, 4, nonlinearity="relu"), several(floats(5, 3), values([[[0.5] * 4] * 5]))),
    "LSTMCell": (lambda: nn.LSTMCell(3, 4), floats(3)),
    "GRUCell": (lambda: nn.GRUCell(3, 4), floats(3)),
    "RNNCell": (lambda: nn.RNNCell(3, 4), floats(3)),
    "AdaptiveLogSoftmaxWithLoss": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 7, [2, 4]),
        several(floats(4), values([0, 3, 6])),
    ),
    **_attention(),
}
# Abstract, containers, layers that make themselves one of the above at their first call, or random in every mode.
OTHERS = {"Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Sequential", "Container"}
OTHERS |= {"DataParallel", "RNNBase", "RNNCellBase", "FractionalMaxPool2d", "FractionalMaxPool3d"}


class _Bag(nn.Module):
    """An EmbeddingBag bag by bag, from its definition; torch's own has no second derivative."""

    def __init__(self, bag: nn.EmbeddingBag) -> None:
        super().__init__()
        self.weight, self.mode, self.padding = bag.weight, bag.mode, bag.padding_idx
        self.ends = -1 if bag.include_last_offset else None  # of the offsets that begin a bag

    def forward(self, input: Tensor, more: Tensor | None = None) -> Tensor:
        if input.dim() == 1:
            assert more is not None
            bags, more = list(input.tensor_split(more[1:]))[: self.ends], None
        else:
            bags = list(input)
        found = []
        for i, bag in enumerate(bags):
            rows = [
                self.weight[k] * (1 if more is None else more[i, j]) for j, k in enumerate(bag) if k != self.padding
            ]
            combined = {"sum": lambda r: r.sum(0), "mean": lambda r: r.mean(0), "max": lambda r: r.max(0).values}[
                self.mode
            ]
            found.append(combined(torch.stack(rows)) if rows else torch.zeros_like(self.weight[0]))
        return torch.stack(found)


class _HardSigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x / 6 + 0.5).clamp(0, 1)


class _Normed(nn.Module):
    """A Linear with weight_norm from its definition."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.bias, self.parametrizations = layer.bias, layer.parametrizations

    def forward(self, x: Tensor) -> Tensor:
        g, v = self.parametrizations.weight.original0, self.parametrizations.weight.original1  # type: ignore[union-attr]
        return x @ (g * v / v.square().sum(1, keepdim=True).sqrt()).T + self.bias


def differentiable(layer: nn.Module) -> nn.Module:
    """The layer itself, or one of the same parameters that torch differentiates twice, and rightly."""
    if hasattr(layer, "parametrizations") and hasattr(layer.parametrizations.weight, "original0"):
        return _Normed(layer)
    if isinstance(layer, nn.EmbeddingBag):
        return _Bag(layer)
    return _HardSigmoid() if isinstance(layer, nn.Hardsigmoid) else layer


class Around(nn.Module):
    """A layer of inputs that depend on parameters; all of its outputs in one vector per example, where there are S."""

    def __init__(self, layer: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.layer = layer
        self.scales = nn.ParameterList([torch.rand(x.shape[1:]) + 0.5 for x in inputs if x.is_floating_point()])

    def forward(self, *inputs: Tensor) -> Tensor:
        scales = iter(self.scales)
        y = self.layer(*(x * next(scales) if x.is_floating_point() else x for x in inputs))
        return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(y) if leaf.is_floating_point()])


def derivatives(outputs: Callable[[Tensor], Tensor], params: Tensor, direction: Tensor) -> list[Tensor]:
    """Outputs, gradient and Hessian product of Σ sin(k y_k) (every second derivative is there)."""
    leaf = params.clone().requires_grad_()
    y = outputs(leaf)
    weights = torch.linspace(0.5, 1.5, y[0].numel(), dtype=torch.float64).view(y.shape[1:])
    (gradient,) = torch.autograd.grad((weights * y).sin().sum(), leaf, create_graph=True)
    (product,) = torch.autograd.grad(gradient, leaf, direction)
    return [y.detach(), gradient.detach(), product]


def alone(module: Around, model: TaskModel, inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """Torch's own module, task by task; a layer that writes to its weight gets a copy."""
    module = copy.deepcopy(module)
    module.layer = differentiable(module.layer)

    def outputs(params: Tensor) -> Tensor:
        rows = [{n: v.clone() for n, v in model.layout.views(row).items()} for row in params]
        with sdpa_kernel(SDPBackend.MATH):
            return torch.stack(
                [functional_call(module, row, x) for row, x in zip(rows, zip(*inputs, strict=True), strict=True)]
            )

    return outputs


def _call(model: TaskModel, inputs: Inputs, params: Tensor) -> Tensor:
    return model(params, inputs)


def check_equal(module: Around, models: list[TaskModel], inputs: Inputs) -> None:
    """All tasks in each of the models, and the first of them by itself, against torch."""
    theta = models[0].init(seed=0, dtype=torch.float64)
    params = theta + 0.1 * torch.randn(len(inputs[0]), theta.numel(), dtype=torch.float64)
    direction = torch.randn_like(params)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = derivatives(alone(module, models[0], inputs), params, direction)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    for model in models:
        for tasks in (len(params), 1):
            x = tuple(each[:tasks] for each in inputs)
            found = derivatives(functools.partial(_call, model, x), params[:tasks], direction[:tasks])
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs[:tasks], rtol=1e-10, atol=1e-11)


# Layers that vmap cannot run, and what torch itself cannot differentiate twice.
LOOPED = {"AdaptiveLogSoftmaxWithLoss"}
ONCE = {"CrossMapLRN2d"}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", sorted(CASES.keys() - ONCE))
def test_a_layer_is_as_torch_computes_it_for_each_task(name: str) -> None:
    torch.manual_seed(len(name))
    make, example = CASES[name]
    module = Around(make(), example()).double()
    inputs = tuple(torch.stack(each) for each in zip(*(example() for _ in range(4)), strict=True))
    if name in LOOPED:
        with pytest.raises(
            RuntimeError, match=rf"layer 'layer' \({name}\) cannot run for all tasks at once .*'loop'\)"
        ):
            from_module(module, tasks="vmap")(from_module(module).init(seed=0).double().expand(4, -1), inputs)
    ways = ("loop",) if name in LOOPED else ("vmap", "loop")
    check_equal(module, [from_module(module, tasks=way) for way in ways], inputs)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_derivatives_by_finite_differences() -> None:
    """Torch's own second derivatives are not always right; a row of padding and a scaled one have none by design."""
    torch.manual_seed(0)
    step, wrong = 1e-5, {}
    for name in sorted(CASES.keys() - ONCE - {"Embedding", "Embedding max_norm"}):
        make, example = CASES[name]
        module = Around(make(), example()).double()
        inputs = tuple(x.unsqueeze(0) for x in example())
        model = from_module(module, tasks="loop")
        params = model.init(seed=0, dtype=torch.float64).unsqueeze(0)
        along = torch.randn_like(params)

        def at(
            t: float, model: TaskModel = model, x: Any = inputs, p: Tensor = params, d: Tensor = along
        ) -> list[Tensor]:
            return derivatives(lambda q: model(q, x), p + t * d, d)

        (y_more, g_more, _), (y_less, g_less, _), (_, gradient, product) = at(step), at(-step), at(0.0)
        weights = torch.linspace(0.5, 1.5, y_more[0].numel(), dtype=torch.float64)
        slope = ((weights * y_more).sin() - (weights * y_less).sin()).sum() / (2 * step)
        errors = [slope - (gradient * along).sum(), (product - (g_more - g_less) / (2 * step)).abs().max()]
        scales = [gradient.norm() * along.norm(), product.norm()]
        if not all(abs(e) <= 1e-6 * (1 + s) for e, s in zip(errors, scales, strict=True)):
            wrong[name] = [float(e) for e in errors]
    assert not wrong


def test_every_layer_type_has_a_case() -> None:
    types = {
        name
        for name, value in vars(nn).items()
        if inspect.isclass(value)
        and issubclass(value, nn.Module)
        and not name.startswith("Lazy")
        and "Loss" not in name
    }
    assert types - {name.split()[0] for name in CASES} == OTHERS
