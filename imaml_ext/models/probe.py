"""A first task alone: what a module does beside being a function of its parameters and inputs, and in which layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from imaml_ext.models.prepare import KeptModule, where

# What an error of torch.func.vmap says (a regular expression), and what that means to the one who wrote the module.
_HINDRANCES = {
    r"data-dependent control flow": "an `if` or a loop in it depends on the values of a tensor",
    r"calling \.item\(\)|aten::equal|allclose": "it reads the value of a tensor as a number, as `item()` does",
    r"access (data pointer|storage)": "it reads the memory of a tensor, as `numpy()` and `tolist()` do",
    r"dynamic shape|differently shaped|output_size": "a shape depends on the values of a tensor, as of a boolean mask",
    r"inplace|more elements than|match the broadcast shape": "it writes into a tensor without the tasks' dimension",
    r"setup_context staticmethod|not have vmap support": "it has an autograd.Function without a rule for vmap",
    r"[Bb]atching rule|vmap|functorch": "torch.func.vmap has no rule for a function in it",
}
_HOOKS = "the module has hooks on saved tensors"


class _Refused(ValueError):
    """What has been found by an operation's arguments; the layer is known from the traceback."""


class _Watch(TorchDispatchMode):
    """Refuses operations that draw random numbers, and those that read parameters by their storage."""

    def __init__(self, forbidden: Mapping[int, str]) -> None:
        super().__init__()
        self._forbidden = forbidden

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _Refused(
                f"draws random numbers ({func.overloadpacket}), so that it is no function of the parameters: call its "
                "eval(), or draw them outside and give them with the inputs"
            )
        for value in pytree.tree_leaves((args, kwargs)):
            strided = isinstance(value, Tensor) and value.layout is torch.strided
            if strided and (name := self._forbidden.get(value.untyped_storage().data_ptr())):
                raise _Refused(
                    f"reads parameter {name!r} by another way than an attribute of its layer, where no other value can "
                    "be put in its place"
                )
        return func(*args, **(kwargs or {}))


def probe(kept: KeptModule, values: Mapping[str, Tensor], inputs: Any, call: Any) -> None:
    """Runs `call(values, inputs)` for one task, and raises for what the module does besides.

    Raises:
        ValueError: it draws random numbers, reads a parameter that is out of reach, or changes a buffer.
        TypeError: it returns no tensors, or fails for inputs of this type and not for those of the parameters' type.
    """
    values = {name: value.detach().clone() for name, value in values.items()}
    inputs = pytree.tree_map(lambda x: x.detach().clone(), inputs)
    versions = {name: value._version for name, value in kept.constants.items()}
    before = [x._version for x in pytree.tree_leaves(inputs)]
    hook = kept.module.register_forward_hook(lambda *_: _check_buffers(kept, versions))
    try:
        y = _watched(kept, values, inputs, call)
    except _Refused as refused:
        raise ValueError(f"{layer_of(kept, refused)} {refused}") from None
    except (RuntimeError, TypeError, ValueError) as error:
        found = _of_type(kept, values, inputs, call, error)
        if found is None:
            raise
        raise found from error
    finally:
        hook.remove()
    kept.writes_inputs = before != [x._version for x in pytree.tree_leaves(inputs)]
    for leaf in pytree.tree_leaves(y):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"module must return a tensor or a structure of tensors, got one with a {type(leaf).__name__}: choose "
                "what the criterion sees by output="
            )


def _watched(kept: KeptModule, values: Mapping[str, Tensor], inputs: Any, call: Any) -> Any:
    with torch.enable_grad(), _Watch(kept.forbidden()):
        try:
            with torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS):
                return call(values, inputs)
        except RuntimeError as error:
            if _HOOKS not in str(error):
                raise
            kept.recomputes = True
            return call(values, inputs)


def _check_buffers(kept: KeptModule, versions: Mapping[str, int]) -> None:
    for layer_name, layer in kept.module.named_modules():
        for own, value in layer._buffers.items():
            name = f"{layer_name}.{own}" if layer_name else own
            if name in kept.scratch:
                continue
            if value is not kept.constants.get(name) or (value is not None and value._version != versions[name]):
                raise ValueError(
                    f"{where(layer_name, layer)} changes its buffer {own!r} in its forward, so that it is no function "
                    "of the parameters: call its eval(), or keep it from changing the buffer"
                )


def _of_type(kept: KeptModule, values: Any, inputs: Any, call: Any, error: Exception) -> Exception | None:
    """An error about the type of the inputs, if that is what is wrong."""
    dtype = next(iter(values.values())).dtype
    wrong = {str(x.dtype) for x in pytree.tree_leaves(inputs) if x.dtype != dtype}
    if not wrong:
        return None
    try:
        call(values, pytree.tree_map(lambda x: x.to(dtype), inputs))
    except Exception:
        return None
    return TypeError(
        f"inputs must have the dtype of params, {dtype}, got {', '.join(sorted(wrong))}, which "
        f"{layer_of(kept, error)} does not take"
    )


def layer_of(kept: KeptModule, error: BaseException) -> str:
    """The innermost layer in whose forward an error was raised, as a message calls it."""
    names = {id(layer): (name, layer) for name, layer in kept.module.named_modules()}
    found = names[id(kept.module)]
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return where(*found)


def cannot_batch(kept: KeptModule, error: Exception) -> str:
    """Says that a module that runs for a task alone has failed for all of them at once, and why."""
    first = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
    meanings = (meaning for pattern, meaning in _HINDRANCES.items() if re.search(pattern, str(error)))
    return f"{layer_of(kept, error)} cannot run for all tasks at once ({next(meanings, first)})"
