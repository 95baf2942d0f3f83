"""What every meta-learning algorithm offers the outer loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from imaml_ext.models import Data


class Episodes(Protocol):
    """A batch of tasks, each with a support and a query set."""

    @property
    def support(self) -> Data: ...

    @property
    def query(self) -> Data: ...


@dataclass(frozen=True)
class MetaGradient:
    """∂F/∂θ [N] of a batch of tasks, and 0-d tensors that describe the step; nothing has been read back."""

    gradient: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class MetaAlgorithm(Protocol):
    """Adapts meta-parameters to tasks, and says how to improve them."""

    def adapt(self, theta: Tensor, support: Data) -> Tensor:
        """Task parameters phi [B, N] from theta [N] and the support sets."""
        ...

    def meta_gradient(self, theta: Tensor, episodes: Episodes) -> MetaGradient:
        """The gradient of the mean query loss of the adapted tasks with respect to theta [N]."""
        ...
