"""Any nn.Module as a task model."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils import _pytree as pytree

from imaml_ext.checks import check_choice
from imaml_ext.models.chain import agrees, arranged, chain_of
from imaml_ext.models.layout import ParameterLayout
from imaml_ext.models.prepare import KeptModule, Output, check_output, picked
from imaml_ext.models.probe import cannot_batch, layer_of, probe
from imaml_ext.models.task_layers import Taps
from imaml_ext.models.task_model import TaskModel
from imaml_ext.ops.network import Arranged
from imaml_ext.ops.recording import recordable, recording


def from_module(
    module: nn.Module,
    *,
    batch_norm: str = "error",
    adapt: Sequence[str] | None = None,
    tasks: str = "auto",
    output: Output = None,
) -> ModuleModel:
    """Makes a `TaskModel` of a module that takes a task's inputs [S, *] and returns its outputs [S, *].

    The flat row holds the parameters that require a gradient, in the order of `named_parameters()` (tied ones once);
    frozen parameters and buffers are constants, the same for all tasks. `init` returns the values that the module has
    when this is called, whatever the seed; the module itself is neither changed nor kept.

    The inputs [B, S, *] may be a tuple, for module(*x), or a mapping, for module(**x).

    Args:
        batch_norm: a batch norm in training mode with running statistics is no function of the parameters. "error"
            refuses it; "task" normalises by the task's own batch, as few-shot learners do. In evaluation mode the
            statistics are constants.
        adapt: patterns of names, as ["head.*"], of the parameters that each task adapts. The others that require a
            gradient are shared by the tasks: in `shared_layout` and `initial_shared`, not in the row.
        tasks: "vmap" runs the module for all tasks at once; "loop" for one after another, which does for every module
            that runs alone; "auto" takes vmap, and where a module cannot run so, the loop with a warning. With "auto"
            a meta-gradient on the CPU goes through a large network for a few tasks after another, or for one, where
            that is faster. All agree to rounding.
        output: the name, index or function that takes what the module returns to what the criterion sees; without it
            that is what the module returns, a tensor or a structure of tensors.

    Raises:
        TypeError, ValueError: not a module, no trainable parameter, parameters of several dtypes or devices, a batch
            norm or dropout in training mode as above, or an argument that is none of those above. The first call of
            the model refuses a module that draws random numbers, changes a buffer, or reads a parameter by another
            way than its layer's attribute.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    check_choice("batch_norm", batch_norm, ("error", "task"))
    check_choice("tasks", tasks, ("auto", "vmap", "loop"))
    check_output(output)
    return ModuleModel(KeptModule(module, batch_norm), adapt, tasks, output)


# What autograd may keep of tasks that go through a module together. Beyond it more tasks make no product faster on a
# CPU, and their memory is fresh every time.
_BYTES_AT_ONCE = 2**29


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

    structured_inputs = True

    def __init__(self, kept: KeptModule, adapt: Sequence[str] | None, tasks: str, output: Output) -> None:
        self._kept, self._output = kept, output
        self._way = {"tasks": tasks, "probed": ""}  # of all copies that `sharing` makes
        self._values = kept.chosen(adapt)
        self._first_shared = {name: value for name, value in kept.trainable.items() if name not in self._values}
        self._shared: dict[str, Tensor] | None = None
        self._networks: dict[Any, Any] = {}  # of every shape of examples
        self._bytes: dict[Any, int] = {}  # that autograd keeps of a task, of every size of one

    @cached_property
    def layout(self) -> ParameterLayout:
        return ParameterLayout.of({name: p.shape for name, p in self._values.items()})

    @cached_property
    def shared_layout(self) -> ParameterLayout:
        return ParameterLayout.of({name: p.shape for name, p in self._first_shared.items()})

    def initial_shared(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        if not self._first_shared:
            return super().initial_shared(dtype, device)
        return self.shared_layout.flatten(self._first_shared).to(device, dtype)

    def sharing(self, values: Tensor) -> TaskModel:
        if not self._first_shared:
            return super().sharing(values)
        self.check_shared(values)
        model = copy.copy(self)
        model._shared = self.shared_layout.views(values)
        return model

    def state_dict(self, row: Tensor) -> dict[str, Tensor]:
        """Returns {name: values} of a task's row [N], and of what the tasks share, for the module's own
        `load_state_dict(…, strict=False)`. Views of the row; tied parameters are there under each of their names.

        Raises:
            TypeError, ValueError: the row is no floating-point tensor [N].
        """
        if not isinstance(row, Tensor) or row.shape != (self.num_parameters,):
            got = list(row.shape) if isinstance(row, Tensor) else type(row).__name__
            raise ValueError(f"row must have shape [{self.num_parameters}] (the parameters of one task), got {got}")
        values = self._shared_values(row) | self.layout.views(row)
        return {owner: values[name] for name in self._kept.trainable for owner in self._kept.owners[name]}

    def network_for(self, inputs: Any) -> Arranged | None:
        """On the CPU, the network of a chain of layers, all of whose parameters are adapted (`chain`)."""
        if not (isinstance(inputs, Tensor) and inputs.is_cpu) or self._way["tasks"] == "loop" or self._first_shared:
            return None
        example = inputs.shape[2:]
        if example not in self._networks:
            if "steps" not in self._networks:
                self._networks["steps"] = chain_of(self._kept.module) if self._output is None else None
            steps = self._networks["steps"]
            found = None if steps is None else arranged(steps, self.layout, example)
            if found is not None:
                row = self.layout.flatten(self._values).double().cpu()
                found = found if agrees(found, self._outputs, row, example) else None
            self._networks[example] = found
        return self._networks[example]

    def tasks_at_once(self, params: Tensor, inputs: Any) -> int | None:
        if self._way["tasks"] != "auto" or not params.is_cpu or self.network_for(inputs) is not None:
            return None
        self.check(params, inputs)
        size = params.dtype, *(x.shape[1:] for x in pytree.tree_leaves(inputs))
        if size not in self._bytes:
            self._bytes[size] = self._saved(params[:1], pytree.tree_map(lambda x: x[:1], inputs))
        return max(1, _BYTES_AT_ONCE // max(1, self._bytes[size]))

    def _saved(self, params: Tensor, inputs: Any) -> int:
        """Bytes that autograd keeps of the outputs of one task."""
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with recording(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = self._outputs(recordable(params).detach().requires_grad_(), recordable(inputs))
        del outputs  # and what was kept, with which addresses are told apart
        return sum(found.values())

    def fitted(self, input_shape: tuple[int, ...], outputs: int) -> ModuleModel:
        """Returns the model itself: a module takes what it was made for."""
        return self

    def _initial(self, seed: int) -> dict[str, Tensor]:
        return self._values

    def _shared_values(self, params: Tensor) -> dict[str, Tensor]:
        given = self._first_shared if self._shared is None else self._shared
        return {name: value.to(params.device, params.dtype) for name, value in given.items()}

    def _check_inputs(self, params: Tensor, inputs: Any) -> None:
        self.place(params)
        if self._way["probed"] or not len(params) or torch.compiler.is_compiling():
            return
        with torch.inference_mode(False):
            first = {name: value[0] for name, value in self.layout.views(params).items()}
            one = pytree.tree_map(lambda x: x[0], inputs)
            probe(self._kept, self._shared_values(params) | first, one, self._call)
        if self._kept.recomputes and self._way["tasks"] != "loop":
            self._take_loop("the module calls layers again in the backward pass (activation checkpointing)", None)
        self._kept.passed()
        self._way["probed"] = "yes"

    def _call(self, values: Mapping[str, Tensor], inputs: Any) -> Any:
        return picked(self._kept(values, inputs), self._output)

    def _outputs(self, params: Tensor, inputs: Any) -> Any:
        self.place(params)
        shared = self._shared_values(params)
        return self._each_task(lambda row, x: self._call(shared | row, x), self.layout.views(params), inputs)

    def _each_task(self, function: Callable[..., Any], *rows: Any) -> Any:
        """The results of function(*row), stacked, for the B rows of structures of tensors [B, *]."""
        if self._way["tasks"] == "loop":
            return _looped(function, *rows)
        try:
            return vmap(function)(*rows)
        except Exception as error:
            if torch.compiler.is_compiling() or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            if "random operation" in str(error):  # on a path that the first call did not take
                raise ValueError(f"{layer_of(self._kept, error)} draws random numbers") from error
            results = _looped(function, *rows)  # raises what is wrong with a task alone
            self._take_loop(cannot_batch(self._kept, error), error)
            return results

    def _take_loop(self, reason: str, error: Exception | None) -> None:
        if self._way["tasks"] == "vmap":
            raise RuntimeError(f"{reason}: use from_module(…, tasks='loop')") from error
        warnings.warn(f"{reason}: its tasks run one by one, as by from_module(…, tasks='loop')", stacklevel=2)
        self._way["tasks"] = "loop"

    def weighted_layers(self) -> dict[str, Tensor]:
        columns, layers = self.layout.positions, {}
        for name, layer in self._kept.module.named_modules():
            weight, bias = (f"{name}.{what}".lstrip(".") for what in ("weight", "bias"))
            if weight not in columns or not _is_product(layer):
                continue
            layers[name] = columns[weight].flatten(1).mT  # [I, O]
            if bias in columns:
                layers[name] = torch.cat([layers[name], columns[bias].unsqueeze(0)])
        return layers

    def tapped(self, params: Tensor, inputs: Any, added: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if self._kept.recomputes:
            raise ValueError("module must not use activation checkpointing for KFAC")
        self.place(params)
        shared = self._shared_values(params)

        def outputs(row: dict[str, Tensor], x: Any, added: dict[str, Tensor]) -> Any:
            taps = Taps(added)
            with _hooks(self._kept.module, self.weighted_layers(), taps):
                return self._call(shared | row, x), taps.entered

        return self._each_task(outputs, self.layout.views(params), inputs, dict(added))

    def place(self, params: Tensor) -> None:
        """Puts the module's constants where params are; moves them the first time only."""
        if not torch.compiler.is_compiling():
            self._kept.place(params.device, params.dtype)


def _looped(function: Callable[..., Any], *rows: Any) -> Any:
    leaves, spec = pytree.tree_flatten(rows)
    split = zip(*(leaf.unbind(0) for leaf in leaves), strict=True)  # in one: its derivative is one stack
    results = [pytree.tree_flatten(function(*pytree.tree_unflatten(task, spec))) for task in split]
    stacked = [torch.stack(each) for each in zip(*(found for found, _ in results), strict=True)]
    return pytree.tree_unflatten(stacked, results[0][1])
