"""Initial parameters with the same bits on every machine and with every version of torch and NumPy.

The words come raw from NumPy's Philox bit generator, whose output is fixed by its published algorithm (Salmon et al.,
SC 2011). They become uniform numbers by integer shifts and one rounding each; no function of a mathematics library,
whose last bit differs between machines, is involved.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from imaml_ext.rng import philox_words


def uniform(shape: tuple[int, ...], bound: float, *, seed: int, index: int) -> Tensor:
    """float64 numbers, uniform in (−bound, bound), a function of (seed, index) alone: [*shape].

    Args:
        bound: in IEEE arithmetic from the shape (square roots are rounded correctly everywhere).
        seed: of the whole model, at least 0. index: of the parameter within the model.
    """
    words = philox_words((seed, index), math.prod(shape))
    odd = ((words >> np.uint64(40)) << np.uint64(1)).astype(np.float64) + 1.0  # 2k + 1, k uniform in 0 … 2²⁴ − 1
    return torch.from_numpy((odd * 2.0**-24 - 1.0) * bound).reshape(shape)


def glorot_bound(fan_in: int, fan_out: int) -> float:
    """The bound of a uniform distribution of variance 2 / (fan_in + fan_out); Glorot and Bengio (2010)."""
    return math.sqrt(6.0 / (fan_in + fan_out))


def he_bound(fan_in: int) -> float:
    """The bound of a uniform distribution of variance 2 / fan_in, for layers before a ReLU; He et al. (2015)."""
    return math.sqrt(6.0 / fan_in)
