"""The four-layer convolutional network of the few-shot literature, for all tasks at once."""

from __future__ import annotations

import torch
from torch import Tensor

from imaml_ext.checks import check_int
from imaml_ext.models.initialise import glorot_bound, uniform
from imaml_ext.models.layout import ParameterLayout
from imaml_ext.ops.network import describe_input, describe_layer
from imaml_ext.models.products import check_precision
from imaml_ext.models.task_layers import batch_norm, conv3x3, linear, max_pool2x2
from imaml_ext.models.task_model import TaskModel, check_inputs

_LAYERS = 4


class Conv4(TaskModel):
    """Four times (3×3 convolution, batch norm on the task's own batch, ReLU), then a linear layer.

    Inputs [B, S, C, H, W] to logits [B, S, ways]. `pooling="stride"` (Omniglot): convolutions of stride 2, and the
    mean over what pixels remain goes into the linear layer. `pooling="max"` (larger images): stride 1, 2×2 max-pooling
    after the batch norm, and all pixels go into the linear layer.

    A task's outputs depend on all of its inputs, through the batch norm: label a query set in one call.

    Parameters: `conv1.weight` [3, 3, in, filters] (height, width, in, out), `norm1.weight` and `norm1.bias` [filters],
    …, `linear.weight` [features, ways], `linear.bias` [ways]. The convolutions have no bias, which the batch norm would
    cancel. Initial weights are uniform of variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010), the norms' weights
    1, biases 0.

    Args:
        ways: classes a task. in_channels, image_size: of the square inputs.
        filters: channels of every convolution. pooling: "stride" or "max".
        precision: of the convolutions and the linear layer, "float32", "tf32" or "bfloat16" (`products.product`).

    Raises:
        TypeError, ValueError: a size below 1, an unknown pooling or precision, images that four max-poolings leave
            nothing of.

    Source: Finn et al., Model-Agnostic Meta-Learning (2017), section 5.2; Vinyals et al. (2016).
    """

    def __init__(
        self,
        ways: int,
        *,
        in_channels: int = 1,
        image_size: int = 28,
        filters: int = 64,
        pooling: str = "stride",
        precision: str = "float32",
    ) -> None:
        for name, value in (
            ("ways", ways),
            ("in_channels", in_channels),
            ("image_size", image_size),
            ("filters", filters),
        ):
            check_int(name, value, minimum=1)
        if pooling not in ("stride", "max"):
            raise ValueError(f"pooling must be 'stride' or 'max', got {pooling!r}")
        if pooling == "max" and image_size < 2**_LAYERS:
            raise ValueError(f"image_size must be at least {2**_LAYERS} with pooling='max', got {image_size}")
        self.ways = ways
        self.image_shape = (in_channels, image_size, image_size)
        self.filters = filters
        self.pooling = pooling
        self.precision = check_precision(precision)
        features = filters if pooling == "stride" else filters * (image_size // 2**_LAYERS) ** 2
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(1, _LAYERS + 1):
            shapes[f"conv{layer}.weight"] = (3, 3, in_channels if layer == 1 else filters, filters)
            shapes[f"norm{layer}.weight"] = (filters,)
            shapes[f"norm{layer}.bias"] = (filters,)
        shapes["linear.weight"] = (features, ways)
        shapes["linear.bias"] = (ways,)
        self.layout = ParameterLayout.of(shapes)
        stride = 2 if pooling == "stride" else 1
        last = "mean" if pooling == "stride" else "max"
        pools = ("none" if pooling == "stride" else "max",) * (_LAYERS - 1) + (last,)
        if precision != "float32":
            return  # the native kernels have no other
        network = describe_input(*self.image_shape)
        for pool in pools:
            network += describe_layer(filters, kernel=3, stride=stride, norm="batch", activation="relu", pool=pool)
        self.network = network + describe_layer(ways)

    def scale_features_(self, theta: Tensor, factor: float) -> Tensor:
        """Multiplies the features that the linear layer reads, at parameters theta [N], by a positive factor; in place.

        The factor goes on weight and bias of the last norm. Features c times as large are learnt from as if the linear
        layer's inner rate were c² times as large and its lambda c² times as small: its weights need move by 1/c of what
        they had to for the same logits.
        """
        views = self.layout.views(theta)
        views[f"norm{_LAYERS}.weight"].mul_(factor)
        views[f"norm{_LAYERS}.bias"].mul_(factor)
        return theta

    def _initial(self, seed: int) -> dict[str, Tensor]:
        values = {}
        for index, (name, shape) in enumerate(zip(self.layout.names, self.layout.shapes, strict=True)):
            if len(shape) == 1:
                values[name] = torch.full(shape, float(name.startswith("norm") and name.endswith("weight")))
            else:
                area = 9 if name.startswith("conv") else 1
                bound = glorot_bound(area * shape[-2], area * shape[-1])
                values[name] = uniform(tuple(shape), bound, seed=seed, index=index)
        return {name: value.double() for name, value in values.items()}

    def _check_inputs(self, params: Tensor, inputs: Tensor) -> None:
        check_inputs(inputs, self.image_shape, params)

    def _outputs(self, params: Tensor, inputs: Tensor) -> Tensor:
        p = self.layout.views(params)
        x = inputs.permute(0, 1, 3, 4, 2)  # [B, S, H, W, C]
        for layer in range(1, _LAYERS + 1):
            x = conv3x3(
                x, p[f"conv{layer}.weight"], stride=2 if self.pooling == "stride" else 1, precision=self.precision
            )
            x = batch_norm(x, p[f"norm{layer}.weight"], p[f"norm{layer}.bias"])
            x = torch.relu(x if self.pooling == "stride" else max_pool2x2(x))
        features = x.mean((2, 3)) if self.pooling == "stride" else x.flatten(2)  # [B, S, features]
        return linear(features, p["linear.weight"], p["linear.bias"], precision=self.precision)
