"""What is kept of an nn.Module, so that it can be called with other values for its parameters, task after task."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from imaml_ext.models.overrides import TaskFunctions

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def where(name: str, layer: nn.Module) -> str:
    """How a message calls a layer."""
    return f"layer {name!r} ({type(layer).__name__})" if name else f"the module ({type(layer).__name__})"


class KeptModule:
    """A copy of a module, and how to call it with given values for all of its parameters.

    Attributes:
        trainable: {name: value} of the parameters that require a gradient, one name each, in the module's order.
        owners: {name: every name under which a layer owns that parameter}; tied layers have several.
        constants: {name: value} of frozen parameters and buffers, where and in the type that `place` has said.
        scratch: names of buffers that every call gets a copy of, to write to: those of a spectral norm's iteration.
        writes_inputs, recomputes: what the first task alone has shown (`probe`): the module changes its inputs in
            place; it calls layers again in the backward pass (activation checkpointing).
    """

    def __init__(self, module: nn.Module, batch_norm: str) -> None:
        self._originals = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.module = copied(module, batch_norm)
        names = {id(p): name for name, p in self.module.named_parameters()}
        self.owners: dict[str, list[str]] = {name: [] for name in names.values()}
        self._constants: dict[str, Tensor] = {}
        self.scratch: set[str] = set()
        self.writes_inputs = self.recomputes = False
        for layer_name, layer in self.module.named_modules():
            prefix = f"{layer_name}." if layer_name else ""
            for own, p in layer._parameters.items():
                if p is not None:
                    self.owners[names[id(p)]].append(prefix + own)
            self._constants |= {prefix + own: b for own, b in layer._buffers.items() if b is not None}
            hooks = any(isinstance(hook, SpectralNorm) for hook in layer._forward_pre_hooks.values())
            if layer.training and (hooks or isinstance(layer, _SpectralNorm)):
                self.scratch |= {prefix + own for own in layer._buffers}
        self.trainable = {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}
        self._check_trainable()
        self._constants |= {
            owner: p.detach()
            for name, p in self.module.named_parameters()
            if not p.requires_grad
            for owner in self.owners[name]
        }
        self._references = list(_references(self.module, names))
        for p in self.module.parameters():
            if p.requires_grad:  # its value is given at every call, and what reads it all the same gets no number
                p.data = p.data.new_full((), float("nan")).expand(p.shape)
        self.module.requires_grad_(False)
        self.dtype = next(iter(self.trainable.values())).dtype
        self._placed: tuple[torch.device, torch.dtype] | None = None
        self.constants = self._constants

    def _check_trainable(self) -> None:
        if not self.trainable:
            raise ValueError("module must have at least one parameter that requires a gradient, got none")
        for name, value in self.trainable.items():
            if not value.is_floating_point():
                raise TypeError(f"parameter {name!r} must be of a real floating-point type, got {value.dtype}")
        for what in ("dtype", "device"):
            if len(found := {str(getattr(p, what)) for p in self.trainable.values()}) > 1:
                raise ValueError(f"module must have parameters of one {what}, got {', '.join(sorted(found))}")

    def chosen(self, patterns: Any) -> dict[str, Tensor]:
        """The trainable parameters with a name, of any owner, that fits one of the patterns.

        Raises:
            TypeError, ValueError: not a list of patterns, or one that fits no trainable parameter.
        """
        if patterns is None:
            return dict(self.trainable)
        if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"adapt must be a list of patterns such as ['head.*'], got {patterns!r}")
        found = {
            pattern: {n for n in self.trainable if any(fnmatchcase(owner, pattern) for owner in self.owners[n])}
            for pattern in patterns
        }
        for pattern in (pattern for pattern, names in found.items() if not names):
            raise ValueError(
                f"adapt must hold patterns that fit trainable parameters, got {pattern!r}; there are "
                f"{', '.join(self.trainable)}"
            )
        if not found:
            raise ValueError("adapt must hold at least one pattern, got none")
        return {name: value for name, value in self.trainable.items() if any(name in names for names in found.values())}

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Puts the constants on a device; those of the parameters' own type follow the type of params."""
        if self._placed == (device, dtype):
            return
        placed = {}
        with torch.inference_mode(False):  # a tensor that is made in it can never be part of a graph
            for name, value in self._constants.items():
                wanted = dtype if value.dtype == self.dtype else value.dtype
                same = value.device == device and value.dtype == wanted
                placed[name] = value if same else value.to(device, wanted)
        lasting = not any(is_functorch_wrapped_tensor(value) for value in placed.values())
        self.constants, self._placed = placed, (device, dtype) if lasting else None

    def __call__(self, values: Mapping[str, Tensor], inputs: Any) -> Any:
        """The module's output for the trainable parameters {name: value}; leaves nothing behind in the module."""
        given = {owner: value for name, value in values.items() for owner in self.owners[name]}
        given |= self.constants
        given |= {name: self.constants[name].clone() for name in self.scratch}
        if self.writes_inputs:
            inputs = pytree.tree_map(Tensor.clone, inputs)
        args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((inputs,), {})
        if isinstance(inputs, Mapping):
            args, kwargs = (), dict(inputs)
        if self.recomputes:
            return self._instance(given)(*args, **kwargs)
        with self._held(given), _differentiable():
            return functional_call(self.module, given, args, kwargs, tie_weights=False)

    def _instance(self, given: Mapping[str, Tensor]) -> nn.Module:
        """A module of its own with the given values, for what is called once more when the call is over."""
        held = {
            **dict(self.module.named_parameters(remove_duplicate=False)),
            **dict(self.module.named_buffers(remove_duplicate=False)),
        }
        instance = copy.deepcopy(self.module, {id(held[name]): value for name, value in given.items()})
        for layer in instance.modules():
            layer.forward = _differentiable()(layer.forward)  # type: ignore[method-assign]
        return instance

    @contextlib.contextmanager
    def _held(self, given: Mapping[str, Tensor]) -> Iterator[None]:
        """Gives the values to plain attributes that hold a parameter too; takes back what the call assigns to any."""
        compiling = torch.compiler.is_compiling()
        before = (
            [] if compiling else [(layer, dict(vars(layer)), dict(layer._buffers)) for layer in self.module.modules()]
        )
        for layer, attribute, leaves, spec in self._references:
            held = [given[leaf] if isinstance(leaf, _Name) else leaf for leaf in leaves]
            vars(layer)[attribute] = pytree.tree_unflatten(held, spec)
        try:
            yield
        finally:
            for layer, attributes, buffers in before:
                vars(layer).clear()
                vars(layer).update(attributes)
                layer._buffers.clear()
                layer._buffers.update(buffers)

    def forbidden(self) -> dict[int, str]:
        """{address of storage: parameter} of what no call may read, as its values come from elsewhere."""
        held = [(name, p) for name, p in self.module.named_parameters() if name in self.trainable]
        read = [*self.trainable.items(), *held, *self._originals.items()]
        return {p.untyped_storage().data_ptr(): name for name, p in read if p.numel()}

    def passed(self) -> None:
        """Lets go of the module that this is a copy of, when the first task alone has shown that it is not read."""
        self._originals = {}


@contextlib.contextmanager
def _differentiable() -> Iterator[None]:
    """Has torch take the forms of its functions that can be differentiated twice, and task by task."""
    reentrant = checkpoint.CheckpointFunction
    if not torch.compiler.is_compiling():
        checkpoint.CheckpointFunction = _NotReentrant  # type: ignore[assignment, misc]
    try:
        with sdpa_kernel(SDPBackend.MATH), TaskFunctions():
            yield
    finally:
        if not torch.compiler.is_compiling():
            checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]


class _NotReentrant:
    """In place of what use_reentrant=True calls, which gives parameters that are no leaves no gradient."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def _stay() -> None:
    """In place of `flatten_parameters`, which moves the weights of recurrent layers together on a GPU."""


class _Name(str):
    """Stands for the parameter of that name in a structure."""


def _references(module: nn.Module, names: Mapping[int, str]) -> Iterator[tuple[nn.Module, str, list[Any], Any]]:
    """Plain attributes of layers, such as lists, that hold parameters: (layer, attribute, leaves, structure)."""
    for layer in module.modules():
        for attribute, value in vars(layer).items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            leaves, spec = pytree.tree_flatten(value)
            if any(id(leaf) in names for leaf in leaves if isinstance(leaf, Tensor)):
                yield layer, attribute, [_Name(names[id(v)]) if id(v) in names else v for v in leaves], spec


def copied(module: nn.Module, batch_norm: str) -> nn.Module:
    """A copy of the module without what the algorithms cannot differentiate through.

    Raises:
        TypeError, ValueError: a layer that is refused, by name.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, (*_WRAPPERS, torch.jit.ScriptModule)) or hasattr(layer, "_orig_mod"):
            raise TypeError(
                f"module must be a plain nn.Module, got {where(name, layer)}: pass the module that it was made from"
            )
        if any(nn.parameter.is_lazy(p) for p in layer.parameters(recurse=False)):
            raise ValueError(f"{where(name, layer)} has no parameters yet: call the module once on an example first")
    # Plain attributes: what shares memory with a trainable parameter stays so, for `probe` to find where it is read; a
    # tensor with a graph, such as a feature that the last call has kept, is none that deepcopy takes.
    parameters = {id(p): p for p in module.parameters()}
    memory = {p.untyped_storage().data_ptr() for p in parameters.values() if p.requires_grad}
    memo: dict[int, Any] = {}
    for value in (v for layer in module.modules() for v in pytree.tree_leaves(vars(layer)) if isinstance(v, Tensor)):
        if id(value) in parameters or value.layout is not torch.strided:
            continue
        if value.untyped_storage().data_ptr() in memory:
            memo[id(value)] = value.detach()
        elif value.grad_fn is not None:
            memo[id(value)] = value.detach().clone()
    try:
        module = copy.deepcopy(module, memo)
    except Exception as error:
        raise TypeError(f"module must be one that copy.deepcopy takes, got {type(module).__name__}: {error}") from error
    for name, layer in module.named_modules():
        _check_layer(name, layer, batch_norm)
        if isinstance(layer, nn.RNNBase):  # vmap's tensors have no address, and those of a row are to stay in it
            layer.flatten_parameters = _stay  # type: ignore[method-assign]
    return module


def _check_layer(name: str, layer: nn.Module, batch_norm: str) -> None:
    if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.training and layer.track_running_stats:
        if batch_norm != "task":
            raise ValueError(
                f"{where(name, layer)} updates running statistics, which are no function of the parameters: pass "
                "batch_norm='task' to normalise by each task's own batch, or call module.eval() to use the "
                "statistics as constants"
            )
        layer.track_running_stats = False
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.training and layer.p > 0:
        raise ValueError(f"{where(name, layer)} draws random numbers in training mode: call its eval(), or set p = 0")


Output = str | int | Callable[[Any], Any] | None


def check_output(output: Output) -> None:
    """Raises TypeError unless `output` is a name, an index, a function or nothing."""
    if output is not None and not callable(output) and (isinstance(output, bool) or not isinstance(output, (str, int))):
        raise TypeError(f"output must be a name, an index or a function, got {output!r}")


def picked(y: Any, output: Output) -> Any:
    """What the criterion sees of what a module returns.

    Raises:
        ValueError: there is nothing of that name or index.
    """
    if output is None:
        return y
    if callable(output):
        return output(y)
    try:
        return getattr(y, output) if isinstance(output, str) and hasattr(y, output) else y[output]
    except (KeyError, IndexError, TypeError):
        got = f"got {output!r} of a {type(y).__name__}"
        raise ValueError(f"output must be one of what the module returns, {got}") from None
