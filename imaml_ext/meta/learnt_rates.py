"""Inner learning rates that are learnt with θ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from imaml_ext.errors import ConfigError
from imaml_ext.meta.learnt import Learnt

if TYPE_CHECKING:
    from imaml_ext.meta.algorithm import MetaAlgorithm


class LearntRates(Learnt):
    """The learning rates η of the inner gradient descent, from its `lr` and `lr_of` on.

    MAML differentiates its steps in η, which per parameter is Meta-SGD but for the sign; first-order MAML takes the
    gradients of the steps for constants. The implicit gradient does not depend on η.

    Source: Li, Zhou, Chen, Li, Meta-SGD: Learning to Learn Quickly for Few-Shot Learning (2017), arXiv 1707.09835;
    Antoniou, Edwards, Storkey, How to train your MAML (2019), for rates per layer.
    """

    coefficient: ClassVar[str] = "lr"

    def setting(self, algorithm: MetaAlgorithm, like: Tensor) -> Any:
        rate = algorithm.inner.rate(algorithm.loss, like)
        if rate is None:
            raise ConfigError(f"lr cannot be learnt with {type(algorithm.inner).__name__}, which has no learning rate")
        return rate

    def applied(self, problem: Mapping[str, Any], value: Tensor) -> dict[str, Any]:
        return {**problem, "inner": replace(problem["inner"], lr=value, lr_of={})}
