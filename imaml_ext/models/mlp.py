"""A multi-layer perceptron, all tasks in one batched matrix product a layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from imaml_ext.checks import check_int
from imaml_ext.models.initialise import glorot_bound, he_bound, uniform
from imaml_ext.models.layout import ParameterLayout
from imaml_ext.ops.network import describe_input, describe_layer
from imaml_ext.models.products import check_precision
from imaml_ext.models.task_layers import linear
from imaml_ext.models.task_model import TaskModel, check_inputs

_ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


class MLP(TaskModel):
    """Linear layers with a ReLU or tanh between them: inputs [B, S, *] (flattened) to outputs [B, S, out_features].

    Parameters `0.weight` [in, out], `0.bias` [out], `1.weight`, …: a weight is stored as the matrix that multiplies a
    row of features from the right. Initial weights: uniform of variance 2 / fan_in (ReLU, He et al. 2015) or
    2 / (fan_in + fan_out) (tanh and the last layer, Glorot and Bengio 2010); biases zero.

    Args:
        in_features: entries of an example. hidden: widths of the hidden layers, empty for a linear model.
        out_features: entries of an output. activation: "relu" or "tanh".
        precision: of the layers' products, "float32", "tf32" or "bfloat16" (`products.product`).

    Raises:
        TypeError, ValueError: a size below 1, an unknown activation or precision.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        *,
        activation: str = "relu",
        precision: str = "float32",
    ) -> None:
        widths = (in_features, *hidden, out_features)
        names = ("in_features", *(f"hidden[{i}]" for i in range(len(hidden))), "out_features")
        for name, width in zip(names, widths, strict=True):
            check_int(name, width, minimum=1)
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(map(repr, _ACTIVATIONS))}, got {activation!r}")
        self.widths = widths
        self.activation = activation
        self.precision = check_precision(precision)
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
            shapes[f"{layer}.weight"] = (fan_in, fan_out)
            shapes[f"{layer}.bias"] = (fan_out,)
        self.layout = ParameterLayout.of(shapes)
        if precision != "float32":
            return  # the native kernels have no other
        self.network = describe_input(in_features)
        for width in hidden:
            self.network += describe_layer(width, activation=activation)
        self.network += describe_layer(out_features)

    def _initial(self, seed: int) -> dict[str, Tensor]:
        last = len(self.widths) - 2
        values = {}
        for index, (name, shape) in enumerate(zip(self.layout.names, self.layout.shapes, strict=True)):
            relu_follows = self.activation == "relu" and name != f"{last}.weight"
            bound = 0.0 if len(shape) == 1 else he_bound(shape[0]) if relu_follows else glorot_bound(*shape)
            values[name] = uniform(shape, bound, seed=seed, index=index)
        return values

    def _check_inputs(self, params: Tensor, inputs: Tensor) -> None:
        check_inputs(_flattened(inputs), (self.widths[0],), params)

    def _outputs(self, params: Tensor, inputs: Tensor) -> Tensor:
        x = _flattened(inputs)
        p = self.layout.views(params)
        activation = _ACTIVATIONS[self.activation]
        for layer in range(len(self.widths) - 1):
            if layer:
                x = activation(x)
            x = linear(x, p[f"{layer}.weight"], p[f"{layer}.bias"], precision=self.precision)  # [B, S, out]
        return x


def _flattened(inputs: Tensor) -> Tensor:
    """[B, S, *] -> [B, S, in]."""
    return inputs.flatten(2) if inputs.dim() > 2 else inputs.unsqueeze(2)
