"""A regularisation λ that is learnt with θ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from imaml_ext.meta.learnt import Learnt

if TYPE_CHECKING:
    from imaml_ext.meta.algorithm import MetaAlgorithm


class LearntLam(Learnt):
    """λ of the proximal term, from the algorithm's `lam` on.

    Source: Rajeswaran et al., arXiv 1909.04630, section 3 (λ as a meta-parameter).
    """

    coefficient: ClassVar[str] = "lam"

    def setting(self, algorithm: MetaAlgorithm, like: Tensor) -> Any:
        return algorithm.lam

    def applied(self, problem: Mapping[str, Any], value: Tensor) -> dict[str, Any]:
        return {**problem, "lam": value}
