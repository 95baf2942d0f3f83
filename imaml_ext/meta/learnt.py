"""Meta-parameters that are learnt beside theta: positive coefficients of the inner problem.

A coefficient c is kept as its logarithm, so that it stays positive: c_j = exp(ρ_{g(j)}) of every parameter j, for
groups g of parameters that share one. A new one is a file, and an entry of `Learnt.kinds`.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from imaml_ext.errors import ConfigError
from imaml_ext.losses.loss import Loss
from imaml_ext.ops import as_coefficient

if TYPE_CHECKING:
    from imaml_ext.meta.algorithm import MetaAlgorithm

Sharing = Literal["global", "tensor", "parameter"]  # one value for all, per parameter tensor, per parameter


class Learnt(ABC):
    """A coefficient that is learnt, for the parameters of a loss.

    Attributes:
        coefficient: which coefficient of the inner problem it is, a name that algorithms know derivatives by.

    Raises:
        ConfigError: values per tensor are asked for, and the loss does not know its tensors.
    """

    kinds: ClassVar[dict[str, str]] = {
        "lam": "imaml_ext.meta.learnt_lam.LearntLam",
        "lr": "imaml_ext.meta.learnt_rates.LearntRates",
    }
    coefficient: ClassVar[str]

    def __init__(self, sharing: Sharing, loss: Loss) -> None:
        self.sharing = sharing
        self._sizes: tuple[int, ...] | None = None  # parameters of each group, in the order of the flat vector
        if sharing == "tensor":
            if loss.layout is None:
                raise ConfigError(
                    "learn must be 'global' or 'parameter' for a function, whose parameters have no names"
                )
            self._sizes = loss.layout.sizes

    @abstractmethod
    def setting(self, algorithm: MetaAlgorithm, like: Tensor) -> Any:
        """Returns what the algorithm has set for the coefficient: where the learning begins.

        Raises:
            ConfigError: it has none.
        """

    @abstractmethod
    def applied(self, problem: Mapping[str, Any], value: Tensor) -> dict[str, Any]:
        """Returns the inner problem {"loss", "lam", "inner"} with this value of the coefficient, [1 or B, 1 or N]."""

    def initial(self, algorithm: MetaAlgorithm, theta: Tensor) -> Tensor:
        """Returns ρ [G] for theta [N], the logarithm of what the algorithm has set; of a group, of its mean.

        Raises:
            ConfigError: a coefficient that is not positive.
        """
        setting = self.setting(algorithm, theta.unsqueeze(0))
        row = as_coefficient(setting, self.coefficient, theta.unsqueeze(0)).expand(1, theta.numel())[0]  # [N]
        if not bool((row > 0).all()):
            raise ConfigError(f"{self.coefficient} must be positive where it is learnt, got {row.min().item():g}")
        groups = {"global": (theta.numel(),), "tensor": self._sizes, "parameter": None}[self.sharing]
        if isinstance(setting, Tensor):
            values = row if groups is None else torch.stack([group.mean() for group in row.split(groups)])
            return values.log().to(theta.dtype)
        return torch.full_like(theta[: theta.numel() if groups is None else len(groups)], math.log(setting))

    def value(self, rho: Tensor) -> Tensor:
        """Returns the coefficient of every parameter, [1, 1] for one value, else [1, N], without a graph."""
        values = rho.detach().exp()
        if self._sizes is not None:
            values = torch.cat([value.expand(size) for value, size in zip(values, self._sizes, strict=True)])
        return values.unsqueeze(0)

    def gradient(self, rho: Tensor, by_parameter: Tensor) -> Tensor:
        """Returns ∂F/∂ρ [G] from the derivative in every parameter's coefficient, [N]."""
        if self.sharing == "global":
            gathered = by_parameter.sum().unsqueeze(0)
        elif self._sizes is None:
            gathered = by_parameter
        else:
            gathered = torch.stack([group.sum() for group in by_parameter.split(self._sizes)])
        return rho.detach().exp() * gathered


def learnt(name: str, sharing: Sharing, loss: Loss) -> Learnt:
    """Returns the learnt coefficient called `name`, one of `Learnt.kinds`."""
    module, _, attribute = Learnt.kinds[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)(sharing, loss)
