"""Initial parameters with the same bits on every machine and with every version of torch and NumPy.

The raw words of `imaml_ext.rng` become uniform numbers by integer shifts and one rounding each; no function whose last
bit differs between machines is involved (square roots are rounded correctly everywhere).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from imaml_ext.models.layout import ParameterLayout
from imaml_ext.rng import philox_words


def uniform_parameters(
    layout: ParameterLayout, bound: Callable[[str, torch.Size], float], *, seed: int
) -> dict[str, Tensor]:
    """Draws every parameter of a layout, float64, uniform in ±bound(name, shape), from the seed and its index alone."""
    values = {}
    for index, (name, shape) in enumerate(zip(layout.names, layout.shapes, strict=True)):
        words = philox_words((seed, index), math.prod(shape))
        odd = ((words >> np.uint64(40)) << np.uint64(1)).astype(np.float64) + 1.0  # 2k + 1, k uniform in 0 … 2²⁴ − 1
        values[name] = torch.from_numpy((odd * 2.0**-24 - 1.0) * bound(name, shape)).reshape(shape)
    return values


def glorot_bound(fan_in: int, fan_out: int) -> float:
    """Returns the bound of a uniform distribution of variance 2 / (fan_in + fan_out); Glorot and Bengio (2010)."""
    return math.sqrt(6.0 / (fan_in + fan_out))


def he_bound(fan_in: int) -> float:
    """Returns the bound of a uniform distribution of variance 2 / fan_in, for a ReLU after it; He et al. (2015)."""
    return math.sqrt(6.0 / fan_in)
