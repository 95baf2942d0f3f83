"""Parameters in the names and shapes of plain torch.nn layers, for a module of one's own."""

from __future__ import annotations

from torch import Tensor

from imaml_ext.errors import WeightsError
from imaml_ext.models import MLP, Conv4, TaskModel


def torch_state_dict(model: TaskModel, theta: Tensor) -> dict[str, Tensor]:
    """Returns parameters theta [N] of a `Conv4` or an `MLP` as the state_dict of a module of torch.nn layers.

    Conv4: `features.0.conv.weight` [out, in, 3, 3], `features.0.norm.weight` and `.bias` [out], … `features.3…`, then
    `linear.weight` [ways, features] and `linear.bias`. A convolution has padding 1 and no bias, and stride 2 where the
    pooling is "stride". The norm is that of the batch alone, in training and test: `nn.BatchNorm2d(filters,
    track_running_stats=False)`. The linear layer reads the mean over the pixels with pooling "stride", and all pixels,
    flattened as `nn.Flatten` does, with pooling "max".

    MLP: `0.weight` [out, in], `0.bias`, `2.weight`, …, as `nn.Sequential(nn.Linear, nn.ReLU, nn.Linear, …)` has them.

    Raises:
        WeightsError: another model.
    """
    views = model.layout.views(theta)
    if isinstance(model, MLP):
        layers = range(len(model.hidden) + 1)
        named = {f"{2 * layer}.weight": views[f"{layer}.weight"].T for layer in layers}
        named |= {f"{2 * layer}.bias": views[f"{layer}.bias"] for layer in layers}
    elif isinstance(model, Conv4):
        named = {}
        for layer in range(4):
            here = f"features.{layer}"
            named[f"{here}.conv.weight"] = views[f"conv{layer + 1}.weight"].permute(3, 2, 0, 1)
            named |= {f"{here}.norm.{name}": views[f"norm{layer + 1}.{name}"] for name in ("weight", "bias")}
        pixels_first = views["linear.weight"].unflatten(0, (-1, model.filters))  # [pixels, filters, ways]
        named |= {"linear.weight": pixels_first.permute(2, 1, 0).flatten(1), "linear.bias": views["linear.bias"]}
    else:
        raise WeightsError(f"only Conv4 and MLP have a form as torch.nn layers, got {type(model).__name__}")
    return {name: value.contiguous().clone() for name, value in named.items()}
