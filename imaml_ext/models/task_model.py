"""A model as a function of many tasks at once."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from imaml_ext.checks import check_int
from imaml_ext.models.layout import ParameterLayout
from imaml_ext.ops.network import Network


class TaskModel(ABC):
    """outputs [B, S, *] = model(params [B, N], inputs [B, S, *]), row b of the outputs from row b of both alone.

    Differentiable in `params` as often as the algorithms need (twice, for Hessian-vector products). A subclass sets
    `layout`, gives initial parameters and computes outputs; the arguments it gets have been checked.
    """

    layout: ParameterLayout
    network: Network | None = None  # what the native ops know the model as, if they do
    precision: str = "float32"  # of its products, where it has a choice (`products.PRECISIONS`)

    @property
    def num_parameters(self) -> int:
        """N."""
        return self.layout.numel

    def init(self, *, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """Initial meta-parameters theta [N], the same bits for a seed everywhere.

        Raises:
            TypeError, ValueError: `seed` is not an integer of at least 0, `dtype` not a floating-point type.
        """
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point type, got {dtype}")
        theta = self.layout.flatten(self._initial(check_int("seed", seed, minimum=0)))
        return theta.to(device=device, dtype=dtype)

    def __call__(self, params: Tensor, inputs: Tensor) -> Tensor:
        """Outputs [B, S, *] of every task.

        Args:
            params: [B, N], a flat row of parameters a task. inputs: [B, S, *], the examples of each task.

        Raises:
            TypeError, ValueError: a shape, dtype or device that does not fit; names the argument.
        """
        self.check(params, inputs)
        return self._outputs(params, inputs)

    def check(self, params: Tensor, inputs: Tensor) -> None:
        """Raises TypeError or ValueError where the arguments of `__call__` do not fit."""
        for name, value in (("params", params), ("inputs", inputs)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if params.dim() != 2 or params.shape[1] != self.num_parameters:
            raise ValueError(
                f"params must have shape [B, {self.num_parameters}] (one row of parameters a task), "
                f"got {list(params.shape)}"
            )
        if not params.is_floating_point():
            raise TypeError(f"params must be a floating-point tensor, got {params.dtype}")
        if inputs.dim() < 2 or inputs.shape[0] != params.shape[0]:
            raise ValueError(
                f"inputs must have shape [{params.shape[0]}, S, *] (the examples of each task of params), "
                f"got {list(inputs.shape)}"
            )
        if inputs.device != params.device:
            raise ValueError(f"inputs must be on the device of params, {params.device}, got {inputs.device}")
        self._check_inputs(params, inputs)

    def _check_inputs(self, params: Tensor, inputs: Tensor) -> None:  # noqa: B027
        """What a model demands of its inputs beyond that: nothing, unless it says so."""

    @abstractmethod
    def _initial(self, seed: int) -> dict[str, Tensor]:
        """{name: [*shape]} in float64, or in the model's own type."""

    @abstractmethod
    def _outputs(self, params: Tensor, inputs: Tensor) -> Tensor:
        """params [B, N], inputs [B, S, *] -> [B, S, *]."""


def check_inputs(inputs: Tensor, example_shape: tuple[int, ...], params: Tensor) -> None:
    """What a network of fixed input shape demands beyond `TaskModel.__call__`.

    Raises:
        TypeError, ValueError: inputs are not [B, S, *example_shape] of the type of params.
    """
    if tuple(inputs.shape[2:]) != example_shape:
        expected = ", ".join(map(str, ("B", "S", *example_shape)))
        raise ValueError(f"inputs must have shape [{expected}], got {list(inputs.shape)}")
    if inputs.dtype != params.dtype:
        raise TypeError(f"inputs must have the dtype of params, {params.dtype}, got {inputs.dtype}")
