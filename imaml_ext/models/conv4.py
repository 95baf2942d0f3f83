"""The four-layer convolutional network of the few-shot literature, for all tasks at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from imaml_ext.errors import ConfigError
from imaml_ext.models.initialise import glorot_bound, uniform_parameters
from imaml_ext.models.layout import ParameterLayout
from imaml_ext.models.products import Precision
from imaml_ext.models.task_layers import Tap, Taps, batch_norm, conv3x3, linear, max_pool2x2
from imaml_ext.models.task_model import TaskModel, check_inputs, from_data
from imaml_ext.ops import network as native
from imaml_ext.settings import COUNT

_LAYERS = 4


@dataclass(frozen=True)
class Conv4(TaskModel):
    """Four times (3×3 convolution, batch norm on the task's own batch, ReLU), then a linear layer.

    Inputs [B, S, C, H, W] to logits [B, S, ways]. A task's outputs depend on all of its inputs, through the batch norm:
    label a query set in one call.

    Parameters: `conv1.weight` [3, 3, in, filters] (height, width, in, out), `norm1.weight` and `norm1.bias` [filters],
    …, `linear.weight` [features, ways], `linear.bias` [ways]. The convolutions have no bias, which the batch norm would
    cancel. Initial weights are uniform of variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010), the norms' weights
    1, biases 0.

    Source: Finn et al., Model-Agnostic Meta-Learning (2017), section 5.2; Vinyals et al. (2016).
    """

    ways: Annotated[int, COUNT] = from_data(5)  # Classes per task.
    _: KW_ONLY
    in_channels: Annotated[int, COUNT] = from_data(1)  # Channels of an image.
    image_size: Annotated[int, COUNT] = from_data(28)  # Height and width of an image, in pixels.
    filters: Annotated[int, COUNT] = 64  # Channels of every convolution.
    # How images shrink. "stride" (Omniglot): convolutions of stride 2, then the mean over the pixels that remain. "max"
    # (larger images): 2×2 max-pooling after each batch norm; the linear layer reads all pixels that remain.
    pooling: Literal["stride", "max"] = "stride"
    precision: Precision = "float32"  # Precision of the products in the convolutions and the linear layer.

    def __post_init__(self) -> None:
        super().__post_init__()
        leaves_pixels = self.pooling == "stride" or self.image_size >= 2**_LAYERS
        self.require(leaves_pixels, "image_size", f"at least {2**_LAYERS} with pooling='max'")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return (self.in_channels, self.image_size, self.image_size)

    @cached_property
    def layout(self) -> ParameterLayout:
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(1, _LAYERS + 1):
            shapes[f"conv{layer}.weight"] = (3, 3, self.in_channels if layer == 1 else self.filters, self.filters)
            shapes[f"norm{layer}.weight"] = shapes[f"norm{layer}.bias"] = (self.filters,)
        pixels = 1 if self.pooling == "stride" else (self.image_size // 2**_LAYERS) ** 2
        shapes |= {"linear.weight": (self.filters * pixels, self.ways), "linear.bias": (self.ways,)}
        return ParameterLayout.of(shapes)

    @cached_property
    def network(self) -> native.Network | None:
        if self.precision != "float32":
            return None  # the native kernels have no other
        stride, pool, last = (2, "none", "mean") if self.pooling == "stride" else (1, "max", "max")
        first = native.convolution(self.filters, stride=stride, pool=pool) * (_LAYERS - 1)
        final = native.convolution(self.filters, stride=stride, pool=last)
        return self.image_shape + first + final + native.linear(self.ways)

    def fitted(self, input_shape: tuple[int, ...], outputs: int) -> Conv4:
        if len(input_shape) != 3 or input_shape[1] != input_shape[2]:
            expected = "square images [channels, size, size]"
            raise ConfigError(f"Conv4 needs {expected}, got inputs of shape {list(input_shape)}")
        return replace(self, ways=outputs, in_channels=input_shape[0], image_size=input_shape[1])

    def scale_features_(self, theta: Tensor, factor: float) -> Tensor:
        """Multiplies the features that the linear layer reads, at parameters theta [N], by a positive factor; in place.

        The factor goes on the last norm. Features c times as large are learnt from as if the linear layer's inner rate
        were c² times as large and its lambda c² times as small.
        """
        for name in ("weight", "bias"):
            self.layout.views(theta)[f"norm{_LAYERS}.{name}"].mul_(factor)
        return theta

    def _initial(self, seed: int) -> dict[str, Tensor]:
        def bound(name: str, shape: torch.Size) -> float:
            area = 9 if name.startswith("conv") else 1
            return glorot_bound(area * shape[-2], area * shape[-1]) if len(shape) > 1 else 0.0

        values = uniform_parameters(self.layout, bound, seed=seed)
        for name, value in values.items():
            if value.dim() == 1:
                value.fill_(float(name.startswith("norm") and name.endswith("weight")))
        return values

    def _check_inputs(self, params: Tensor, inputs: Tensor) -> None:
        check_inputs(inputs, self.image_shape, params)

    def weighted_layers(self) -> dict[str, Tensor]:
        columns = self.layout.positions
        layers = {f"conv{layer}": columns[f"conv{layer}.weight"].flatten(0, 2) for layer in range(1, _LAYERS + 1)}
        return layers | {"linear": torch.cat([columns["linear.weight"], columns["linear.bias"].unsqueeze(0)])}

    def tapped(self, params: Tensor, inputs: Tensor, added: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        taps = Taps(added)
        return self._outputs(params, inputs, taps), taps.entered

    def _outputs(self, params: Tensor, inputs: Tensor, taps: Taps | None = None) -> Tensor:
        def tap(name: str) -> Tap | None:
            return None if taps is None else partial(taps, name)

        p, strided = self.layout.views(params), self.pooling == "stride"
        x = inputs.permute(0, 1, 3, 4, 2)  # [B, S, H, W, C]
        for layer in range(1, _LAYERS + 1):
            weight, stride = p[f"conv{layer}.weight"], 2 if strided else 1
            x = conv3x3(x, weight, stride=stride, precision=self.precision, tap=tap(f"conv{layer}"))
            x = batch_norm(x, p[f"norm{layer}.weight"], p[f"norm{layer}.bias"])
            x = torch.relu(x if strided else max_pool2x2(x))
        features = x.mean((2, 3)) if strided else x.flatten(2)  # [B, S, features]
        return linear(features, p["linear.weight"], p["linear.bias"], precision=self.precision, tap=tap("linear"))
