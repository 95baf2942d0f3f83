"""Any nn.Module as a task model."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from imaml_ext.models.layout import ParameterLayout
from imaml_ext.models.task_layers import Taps
from imaml_ext.models.task_model import TaskModel


def from_module(module: nn.Module, *, batch_norm: str = "error") -> TaskModel:
    """Makes a `TaskModel` of a module that takes a task's inputs [S, *] and returns its outputs [S, *].

    The flat row holds the parameters that require a gradient, in the order of `named_parameters()` (shared ones once);
    frozen parameters and buffers are constants, the same for all tasks. `init` returns the values that the module has
    when this is called, whatever the seed; the module itself is neither changed nor kept.

    Batch norm with running statistics is no function of the parameters and is refused by default. With
    `batch_norm="task"` it normalises by the task's own batch, as few-shot learners do; in evaluation mode
    (`module.eval()`) its statistics are constants. Dropout must be in evaluation mode.

    Raises:
        TypeError, ValueError: not a module, no trainable parameter, parameters of several dtypes or devices, a batch
            norm or dropout as described above, an unknown `batch_norm`.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if batch_norm not in ("error", "task"):
        raise ValueError(f"batch_norm must be 'error' or 'task', got {batch_norm!r}")
    return ModuleModel(_prepared(module, batch_norm))


def _prepared(module: nn.Module, batch_norm: str) -> nn.Module:
    """Returns a copy without what the algorithms cannot differentiate through."""
    module = copy.deepcopy(module)
    for name, layer in module.named_modules():
        where = f"layer {name!r} ({type(layer).__name__})" if name else f"the module ({type(layer).__name__})"
        if any(nn.parameter.is_lazy(p) for p in layer.parameters(recurse=False)):
            raise ValueError(f"{where} has no parameters yet: call the module once on an example first")
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            if batch_norm == "task":
                layer.track_running_stats = False
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            elif layer.training and layer.track_running_stats:
                raise ValueError(
                    f"{where} updates running statistics, which are no function of the parameters: pass "
                    "batch_norm='task' to normalise by each task's own batch, or call module.eval() to use the "
                    "statistics as constants"
                )
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.training and layer.p > 0:
            raise ValueError(f"{where} draws random numbers in training mode: call its eval(), or set p = 0")
    return module


def _is_product(layer: nn.Module) -> bool:
    """Whether a layer is what KFAC knows: every output row is the product of an input row, or patch, with a weight."""
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


@contextlib.contextmanager
def _hooks(module: nn.Module, names: Iterable[str], taps: Taps) -> Iterator[None]:
    """Has the named layers tell `taps` what enters them, as rows, and leave with what these return."""

    def hook(name: str, layer: nn.Module, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        if name in taps.entered:
            raise ValueError(f"module must call layer {name!r} once for KFAC, got a second call")
        if isinstance(layer, nn.Linear):
            return taps(name, inputs[0].flatten(0, -2), y.flatten(0, -2)).view_as(y)
        sizes = {what: getattr(layer, what) for what in ("dilation", "padding", "stride")}
        patches = nn.functional.unfold(inputs[0], layer.kernel_size, **sizes)  # type: ignore[arg-type]  # [S, I, T]
        rows = y.flatten(2).mT  # [S, T, O]
        tapped = taps(name, patches.mT.flatten(0, 1), rows.flatten(0, 1))
        return tapped.view(rows.shape).mT.reshape(y.shape)

    layers = dict(module.named_modules())
    handles = [layers[name].register_forward_hook(functools.partial(hook, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class ModuleModel(TaskModel):
    """Calls an nn.Module; made by `from_module`."""

    def __init__(self, module: nn.Module) -> None:
        trainable = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("module must have at least one parameter that requires a gradient, got none")
        for what in ("dtype", "device"):
            if len(found := {str(getattr(p, what)) for p in trainable.values()}) > 1:
                raise ValueError(f"module must have parameters of one {what}, got {', '.join(sorted(found))}")
        self._module, self._values = module.requires_grad_(False), trainable

    @cached_property
    def layout(self) -> ParameterLayout:
        return ParameterLayout.of({name: p.shape for name, p in self._values.items()})

    def fitted(self, input_shape: tuple[int, ...], outputs: int) -> ModuleModel:
        """Returns the model itself: a module takes what it was made for."""
        return self

    def _initial(self, seed: int) -> dict[str, Tensor]:
        return self._values

    def _outputs(self, params: Tensor, inputs: Tensor) -> Tensor:
        self.place(params)
        return vmap(lambda parameters, x: functional_call(self._module, parameters, (x,)))(
            self.layout.views(params), inputs
        )

    def weighted_layers(self) -> dict[str, Tensor]:
        columns, layers = self.layout.positions, {}
        for name, layer in self._module.named_modules():
            weight, bias = (f"{name}.{what}".lstrip(".") for what in ("weight", "bias"))
            if weight not in columns or not _is_product(layer):
                continue
            layers[name] = columns[weight].flatten(1).mT  # [I, O]
            if bias in columns:
                layers[name] = torch.cat([layers[name], columns[bias].unsqueeze(0)])
        return layers

    def tapped(self, params: Tensor, inputs: Tensor, added: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        self.place(params)

        def outputs(parameters: dict[str, Tensor], x: Tensor, added: dict[str, Tensor]) -> Any:
            taps = Taps(added)
            with _hooks(self._module, self.weighted_layers(), taps):
                return functional_call(self._module, parameters, (x,)), taps.entered

        return vmap(outputs)(self.layout.views(params), inputs, dict(added))

    def place(self, params: Tensor) -> None:
        """Puts the module's constants where params are; moves them the first time only."""
        if not torch.compiler.is_compiling():
            self._module.to(params.device, params.dtype)
