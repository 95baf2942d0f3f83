"""A multi-layer perceptron for all tasks at once, with one batched matrix product per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Annotated, Literal

import torch
from torch import Tensor

from imaml_ext.models.initialise import glorot_bound, he_bound, uniform_parameters
from imaml_ext.models.layout import ParameterLayout
from imaml_ext.models.products import Precision
from imaml_ext.models.task_layers import Taps, linear
from imaml_ext.models.task_model import TaskModel, check_inputs, from_data
from imaml_ext.ops import network as native
from imaml_ext.settings import COUNT


@dataclass(frozen=True)
class MLP(TaskModel):
    """Linear layers with a ReLU or tanh between them: inputs [B, S, *] (flattened) to outputs [B, S, out_features].

    Parameters `0.weight` [in, out], `0.bias` [out], `1.weight`, …: a weight is stored as the matrix that multiplies a
    row of features from the right. Initial weights: uniform of variance 2 / fan_in (ReLU, He et al. 2015) or
    2 / (fan_in + fan_out) (tanh and the last layer, Glorot and Bengio 2010); biases zero.
    """

    in_features: Annotated[int, COUNT] = from_data(1)  # Numbers in an input.
    hidden: Annotated[tuple[int, ...], COUNT] = (40, 40)  # Widths of the hidden layers; none for a linear model.
    out_features: Annotated[int, COUNT] = from_data(1)  # Numbers in an output.
    _: KW_ONLY
    activation: Literal["relu", "tanh"] = "relu"  # The function between the layers.
    precision: Precision = "float32"  # Precision of the layers' products.

    @property
    def widths(self) -> tuple[int, ...]:
        """Features before the first layer and after each."""
        return (self.in_features, *self.hidden, self.out_features)

    @cached_property
    def layout(self) -> ParameterLayout:
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (fan_in, fan_out) in enumerate(pairwise(self.widths)):
            shapes |= {f"{layer}.weight": (fan_in, fan_out), f"{layer}.bias": (fan_out,)}
        return ParameterLayout.of(shapes)

    @cached_property
    def network(self) -> native.Network | None:
        if self.precision != "float32":
            return None  # the native kernels have no other
        hidden = (number for width in self.hidden for number in native.linear(width, self.activation))
        return (self.in_features, 1, 1, *hidden, *native.linear(self.out_features))

    def fitted(self, input_shape: tuple[int, ...], outputs: int) -> MLP:
        return replace(self, in_features=math.prod(input_shape), out_features=outputs)

    def _initial(self, seed: int) -> dict[str, Tensor]:
        def bound(name: str, shape: torch.Size) -> float:
            relu_follows = self.activation == "relu" and name != f"{len(self.hidden)}.weight"
            return 0.0 if len(shape) == 1 else he_bound(shape[0]) if relu_follows else glorot_bound(*shape)

        return uniform_parameters(self.layout, bound, seed=seed)

    def _check_inputs(self, params: Tensor, inputs: Tensor) -> None:
        check_inputs(_flattened(inputs), (self.in_features,), params)

    def weighted_layers(self) -> dict[str, Tensor]:
        columns = self.layout.positions
        names = [str(layer) for layer in range(len(self.hidden) + 1)]
        return {n: torch.cat([columns[f"{n}.weight"], columns[f"{n}.bias"].unsqueeze(0)]) for n in names}

    def tapped(self, params: Tensor, inputs: Tensor, added: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        taps = Taps(added)
        return self._outputs(params, inputs, taps), taps.entered

    def _outputs(self, params: Tensor, inputs: Tensor, taps: Taps | None = None) -> Tensor:
        x, p = _flattened(inputs), self.layout.views(params)
        for layer in range(len(self.hidden) + 1):
            if layer:
                x = torch.relu(x) if self.activation == "relu" else torch.tanh(x)
            tap = None if taps is None else partial(taps, str(layer))
            weight, bias = p[f"{layer}.weight"], p[f"{layer}.bias"]
            x = linear(x, weight, bias, precision=self.precision, tap=tap)  # [B, S, out]
        return x


def _flattened(inputs: Tensor) -> Tensor:
    """[B, S, *] -> [B, S, in]."""
    return inputs.flatten(2) if inputs.dim() > 2 else inputs.unsqueeze(2)
