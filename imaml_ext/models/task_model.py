"""A model as a function of many tasks at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from imaml_ext.checks import check_int
from imaml_ext.models.layout import ParameterLayout
from imaml_ext.ops.network import Arranged, Network
from imaml_ext.settings import Choice


class TaskModel(Choice, ABC):
    """outputs [B, S, *] = model(params [B, N], inputs [B, S, *]), row b of the outputs from row b of both alone.

    Differentiable in `params` twice, for Hessian-vector products. A subclass gives the layout and initial values of its
    parameters and computes outputs; the arguments it gets have been checked.
    """

    kinds: ClassVar[dict[str, str]] = {"conv4": "imaml_ext.models.conv4.Conv4", "mlp": "imaml_ext.models.mlp.MLP"}

    precision: str = "float32"  # of its products, where it has a choice (`products.Precision`)
    structured_inputs: ClassVar[bool] = False  # whether the inputs may be a tuple, list or mapping of tensors

    @property
    @abstractmethod
    def layout(self) -> ParameterLayout:
        """Where each parameter lies in a row of `params`; a `cached_property` in every subclass."""

    @property
    def network(self) -> Network | None:
        """The description of the model for the native ops, if they know it."""
        return None

    def network_for(self, inputs: Any) -> Network | Arranged | None:
        """The network for these inputs [B, S, *], where the native ops know it."""
        return self.network

    def tasks_at_once(self, params: Tensor, inputs: Any) -> int | None:
        """How many tasks of these, params [B, N] and inputs [B, S, *], are best gone through together; None: all."""
        return None

    @property
    def num_parameters(self) -> int:
        """N."""
        return self.layout.numel

    @property
    def shared_layout(self) -> ParameterLayout:
        """Where the parameters that all tasks share lie in the values of `sharing`; empty where there are none."""
        return ParameterLayout.of({})

    def initial_shared(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """Returns the initial values [N_s] of the parameters that all tasks share."""
        return torch.empty(0, dtype=dtype, device=device)

    def sharing(self, values: Tensor) -> TaskModel:
        """Returns the model with these values [N_s] of the parameters that tasks share; a graph into them is kept.

        Raises:
            TypeError: the model has no such parameters.
        """
        raise TypeError(f"model must have parameters that tasks share, got {type(self).__name__}")

    @abstractmethod
    def fitted(self, input_shape: tuple[int, ...], outputs: int) -> TaskModel:
        """Returns the same network for examples of this shape and so many outputs; ConfigError if they do not fit."""

    def init(self, *, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """Returns initial meta-parameters theta [N], the same bits for a seed (an integer of at least 0) everywhere."""
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point type, got {dtype}")
        theta = self.layout.flatten(self._initial(check_int("seed", seed, minimum=0)))
        return theta.to(device=device, dtype=dtype)

    def check_shared(self, values: Tensor) -> None:
        """Raises TypeError or ValueError unless values are a floating-point tensor [N_s]."""
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"values must be a floating-point tensor, got {got}")
        if values.shape != (self.shared_layout.numel,):
            expected = f"[{self.shared_layout.numel}] (the parameters that the tasks share)"
            raise ValueError(f"values must have shape {expected}, got {list(values.shape)}")

    def __call__(self, params: Tensor, inputs: Any) -> Any:
        """Returns outputs [B, S, *] for params [B, N], a flat row per task, and inputs [B, S, *], its examples.

        Models of `structured_inputs` take and return structures of such tensors too.

        Raises:
            TypeError, ValueError: a shape, dtype or device that does not fit; names the argument.
        """
        self.check(params, inputs)
        return self._outputs(params, inputs)

    def check(self, params: Tensor, inputs: Any) -> None:
        """Raises TypeError or ValueError where the arguments of `__call__` do not fit."""
        leaves = pytree.tree_leaves(inputs) if self.structured_inputs else [inputs]
        for name, value in (("params", params), *(("inputs", leaf) for leaf in leaves)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if not leaves:
            raise TypeError(f"inputs must hold at least one tensor, got an empty {type(inputs).__name__}")
        if params.dim() != 2 or params.shape[1] != self.num_parameters:
            expected = f"[B, {self.num_parameters}] (one row of parameters per task)"
            raise ValueError(f"params must have shape {expected}, got {list(params.shape)}")
        if not params.is_floating_point():
            raise TypeError(f"params must be a floating-point tensor, got {params.dtype}")
        for leaf in leaves:
            if leaf.dim() < 2 or leaf.shape[0] != params.shape[0]:
                expected = f"[{params.shape[0]}, S, *] (the examples of each task of params)"
                raise ValueError(f"inputs must have shape {expected}, got {list(leaf.shape)}")
            if leaf.device != params.device:
                raise ValueError(f"inputs must be on the device of params, {params.device}, got {leaf.device}")
        self._check_inputs(params, inputs)

    def weighted_layers(self) -> dict[str, Tensor]:
        """Returns the layers that multiply by a weight, for KFAC: {name: the parameter between each input and output}.

        int64 [I, O], positions in a row of `params`; a bias is a last input, of 1. A model that has layers overrides
        this and `tapped`.

        Raises:
            TypeError: the model does not tell its layers.
        """
        raise TypeError(f"model must tell its layers (weighted_layers, tapped) for KFAC, got {type(self).__name__}")

    def tapped(self, params: Tensor, inputs: Tensor, added: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the outputs, and what enters the weighted layers without the 1 of a bias: {name: [B, P, I]}.

        P rows per task: examples, or examples times positions. What leaves layer `name` has `added[name]` [B, P, O]
        added to it, if there is such a thing, so that a derivative in it is one in the layer's outputs.
        """
        raise NotImplementedError

    def _check_inputs(self, params: Tensor, inputs: Any) -> None:
        """Raises for what a model demands of its inputs beyond that: nothing, unless it says so."""

    @abstractmethod
    def _initial(self, seed: int) -> dict[str, Tensor]:
        """Returns {name: [*shape]} in float64, or in the model's own type."""

    @abstractmethod
    def _outputs(self, params: Tensor, inputs: Tensor) -> Tensor:
        """Maps params [B, N], inputs [B, S, *] to [B, S, *]."""


def from_data(default: int) -> Any:
    """Declares a field that training sets to what the data has (`fitted`), so that nobody needs to give it."""
    return field(default=default, metadata={"from_data": True})


def check_inputs(inputs: Tensor, example_shape: tuple[int, ...], params: Tensor) -> None:
    """Raises TypeError or ValueError unless inputs are [B, S, *example_shape] of the type of params."""
    if tuple(inputs.shape[2:]) != example_shape:
        expected = ", ".join(map(str, ("B", "S", *example_shape)))
        raise ValueError(f"inputs must have shape [{expected}], got {list(inputs.shape)}")
    if inputs.dtype != params.dtype:
        raise TypeError(f"inputs must have the dtype of params, {params.dtype}, got {inputs.dtype}")
