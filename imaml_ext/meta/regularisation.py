"""A regularisation λ that is learnt with θ."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imaml_ext.checks import check_choice, check_number
from imaml_ext.models import TaskModel

SHARING = ("global", "layer", "parameter")


class LearnableLam:
    """λ_j = exp(ρ_{g(j)}) > 0 of every parameter j, for groups g of parameters that share one.

    Give it to an algorithm as `lam`, and `log` to an optimiser beside θ:

        lam = LearnableLam(model, 0.5, sharing="layer")
        algorithm = IMAML(loss, lam=lam)
        optimizer = torch.optim.Adam([theta, lam.log], lr=1e-3)
        meta = algorithm.meta_gradient(theta, episodes)
        theta.grad, lam.log.grad = meta.gradient, lam.log_gradient(meta.lam_gradient)

    Args:
        model: whose parameters are regularised. initial: λ > 0 at the start, of all groups.
        sharing: "global", one λ; "layer", one a parameter tensor of the model's layout; "parameter", one each.
        dtype, device: of θ.

    Attributes:
        log: ρ = log λ [G], a leaf.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.
    """

    def __init__(
        self,
        model: TaskModel,
        initial: float,
        *,
        sharing: str = "global",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check_choice("sharing", sharing, SHARING)
        check_number("initial", initial, above=0)
        if not isinstance(model, TaskModel):
            raise TypeError(f"model must be a TaskModel, got {type(model).__name__}")
        self.sharing = sharing
        # Parameters of each group, in the order of the flat vector; None: a group each.
        self._sizes = {"global": (model.num_parameters,), "layer": model.layout.sizes, "parameter": None}[sharing]
        groups = model.num_parameters if self._sizes is None else len(self._sizes)
        self.log = torch.full((groups,), math.log(initial), dtype=dtype, device=device, requires_grad=True)

    @property
    def values(self) -> Tensor:
        """λ of every group, [G]."""
        return self.log.detach().exp()

    def coefficient(self) -> Tensor:
        """λ of every parameter, [1, 1] for one λ, else [1, N]."""
        values = self.values
        if self.sharing == "layer" and self._sizes is not None:
            values = torch.cat([value.expand(size) for value, size in zip(values, self._sizes, strict=True)])
        return values.unsqueeze(0)

    def gather(self, by_parameter: Tensor) -> Tensor:
        """∂F/∂λ [G] from the derivative in every parameter's λ_j, [N]: the sum over what shares a λ."""
        if self._sizes is None:
            return by_parameter
        return torch.stack([group.sum() for group in by_parameter.split(self._sizes)])

    def log_gradient(self, lam_gradient: Tensor) -> Tensor:
        """∂F/∂ρ = λ ∂F/∂λ, [G]."""
        return self.values * lam_gradient
