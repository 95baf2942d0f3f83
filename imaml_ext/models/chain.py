"""nn.Modules that are a chain of layers which the native engine knows: convolutions with batch norm, linear layers.

A module is followed by torch.fx, whatever its class. Where everything that it does is such a layer, `TaskLoss` computes
it by the native engine, as it does `Conv4` and `MLP`, once the two were found to agree. The engine's rows hold the
weight of a layer as the matrix that multiplies from the right, so that parameters are put into another order on the way
there, and back.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from imaml_ext.models.layout import ParameterLayout
from imaml_ext.ops.network import Arranged, Network, NetworkLinearisation, convolution, linear, num_outputs

_RELU = (F.relu, torch.relu, "relu")
_TANH = (torch.tanh, F.tanh, "tanh")
_FLATTEN = (torch.flatten, "flatten")
_PIXELS = ((2, 3), (-2, -1), [2, 3], [-2, -1])


def chain_of(module: nn.Module) -> list[tuple[str, Any]] | None:
    """Returns the steps of a module as [(kind, what)], None where it is no chain of known steps.

    Kinds: "convolution", "norm" and "linear" of (name, layer), and "relu", "tanh", "pool", "mean", "flatten" of None.
    """
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules()):
        return None
    try:  # of a copy, which being traced may change
        graph = fx.symbolic_trace(copy.deepcopy(module)).graph
    except Exception:  # a module of any kind, which has its own ways to refuse being traced
        return None
    steps: list[tuple[str, Any]] = []
    before: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "output":
            return steps if node.args == (before,) else None
        if before is not None and (not node.args or node.args[0] is not before or len(before.users) != 1):
            return None
        if node.op != "placeholder":
            step = _step(module, node)
            if step is None:
                return None
            steps += [step] if step[0] != "identity" else []
        elif before is not None:
            return None
        before = node
    return None


def _step(module: nn.Module, node: fx.Node) -> tuple[str, Any] | None:
    options = (*node.args[1:], *node.kwargs.values())
    if node.op == "call_module":
        return _layer(str(node.target), module.get_submodule(str(node.target)))
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _RELU:
        return ("relu", None)
    if node.target in _TANH and not options:
        return ("tanh", None)
    if node.target in _FLATTEN and not node.kwargs and options in ((1,), (1, -1)):
        return ("flatten", None)
    if node.target in (torch.mean, "mean") and options and True not in options[1:]:
        return ("mean", None) if options[0] in _PIXELS else None
    if node.target is F.max_pool2d:
        return _layer("", nn.MaxPool2d(*node.args[1:], **node.kwargs))  # type: ignore[arg-type]
    return None


def _layer(name: str, layer: nn.Module) -> tuple[str, Any] | None:
    if type(layer) is nn.Conv2d:
        plain = (layer.kernel_size, layer.padding, layer.dilation) == ((3, 3), (1, 1), (1, 1))
        known = plain and layer.groups == 1 and layer.padding_mode == "zeros" and layer.bias is None
        return ("convolution", (name, layer)) if known and layer.stride in ((1, 1), (2, 2)) else None
    if type(layer) is nn.BatchNorm2d:
        of_batch = layer.training and not layer.track_running_stats and layer.affine
        return ("norm", (name, layer)) if of_batch and layer.eps == 1e-5 else None
    if type(layer) is nn.Linear:
        return ("linear", (name, layer)) if layer.bias is not None else None
    if type(layer) is nn.MaxPool2d:
        sizes = {value if isinstance(value, tuple) else (value, value) for value in (layer.kernel_size, layer.stride)}
        plain = sizes == {(2, 2)} and layer.padding in (0, (0, 0)) and layer.dilation in (1, (1, 1))
        return ("pool", None) if plain and not layer.ceil_mode and not layer.return_indices else None
    if type(layer) is nn.AdaptiveAvgPool2d:
        return ("mean", None) if layer.output_size in (1, (1, 1)) else None
    if type(layer) is nn.Flatten:
        return ("flatten", None) if (layer.start_dim, layer.end_dim) == (1, -1) else None
    if type(layer) is nn.Identity or (type(layer) is nn.Dropout and not layer.training):
        return ("identity", None)
    return {nn.ReLU: ("relu", None), nn.Tanh: ("tanh", None)}.get(type(layer))


def _of_pixels(pixels: tuple[int, int], weight: Tensor) -> Tensor:
    """A weight [O, C · H · W] in the engine's order [H, W, C, O]."""
    return weight.unflatten(1, (-1, *pixels)).permute(2, 3, 1, 0)


def arranged(steps: list[tuple[str, Any]], layout: ParameterLayout, example: torch.Size) -> Arranged | None:
    """Returns the native network of a chain for examples [C, H, W] or [D]; None where the engine has no such one."""
    if len(example) not in (1, 3):
        return None
    network: Network = (example[0], *example[1:]) if len(example) == 3 else (example[0], 1, 1)
    order: list[Tensor] = []
    names: list[str] = []
    image = (example[1], example[2]) if len(example) == 3 else None
    kinds = [kind for kind, _ in steps]

    def take(name: str, arrange: Callable[[Tensor], Tensor]) -> None:
        names.append(name)
        if name in layout.names:
            order.append(arrange(layout.positions[name]).flatten())

    i, flat = 0, image is None
    while i < len(steps):
        kind, what = steps[i]
        if kind == "convolution" and not flat and image is not None and kinds[i + 1 : i + 2] == ["norm"]:
            j = i + 2
            while j < len(steps) and kinds[j] in ("relu", "pool"):
                j += 1
            after, mean = kinds[i + 2 : j], kinds[j : j + 1] == ["mean"]
            if after.count("relu") != 1 or after.count("pool") > 1 or (mean and "pool" in after):
                return None
            (name, layer), (norm, _) = what, steps[i + 1][1]
            take(f"{name}.weight", lambda w: w.permute(2, 3, 1, 0))
            take(f"{norm}.weight", lambda w: w)
            take(f"{norm}.bias", lambda b: b)
            stride = layer.stride[0]
            image = tuple((n - 1) // stride + 1 for n in image)  # type: ignore[assignment]
            pool = "max" if "pool" in after else "mean" if mean else "none"
            if pool == "max":
                image = (image[0] // 2, image[1] // 2)
            elif pool == "mean":
                image = (1, 1)
            network += convolution(layer.out_channels, stride=stride, pool=pool)
            i = j + mean
            if min(image) < 1:
                return None
        elif kind == "flatten":
            flat, i = True, i + 1
        elif kind == "linear" and (flat or image == (1, 1)):
            name, layer = what
            pixels = (1, 1) if image is None else image
            take(f"{name}.weight", functools.partial(_of_pixels, pixels))
            take(f"{name}.bias", lambda b: b)
            activation = kinds[i + 1] if kinds[i + 1 : i + 2] in (["relu"], ["tanh"]) else "identity"
            network += linear(layer.out_features, activation)
            image, flat, i = None, True, i + 1 + (activation != "identity")
        else:
            return None
    # A linear layer is last, whose outputs nothing changes: classes that a task lacks are left out by their biases.
    if kinds[-1:] != ["linear"] or sorted(names) != sorted(layout.names) or names[-1] != layout.names[-1]:
        return None
    return Arranged(network, torch.cat(order))


def agrees(network: Arranged, outputs: Callable[[Tensor, Tensor], Tensor], row: Tensor, example: torch.Size) -> bool:
    """Whether a network computes what a module does, with its first and second derivative, at random examples.

    torch.fx does not see everything that a module does: not a mode such as `no_grad`, nor a forward that was exchanged.

    Args:
        outputs: of params [1, N] and inputs [1, S, *example], differentiable. row: [N], float64.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, p = randn(1, 4, *example), randn(1, len(row))
    y, leaf = randn(1, 4, num_outputs(network)), (row + 0.1 * randn(1, len(row))).requires_grad_()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            found = outputs(leaf, x)
            loss = (found - y).square().mean()
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True, materialize_grads=True)
            product = torch.autograd.grad(gradient, leaf, p, materialize_grads=True)[0]
        ours = NetworkLinearisation(leaf.detach(), x, y, network)
        pairs = ((ours.outputs, found), (ours.gradient, gradient), (ours.product(p), product))
        return all(bool((a - b.detach()).norm() <= 1e-7 * b.detach().norm()) for a, b in pairs)
    except Exception:  # of a module that does not take such examples, or returns something else
        return False
