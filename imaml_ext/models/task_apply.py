"""Calls of autograd functions that also work under `torch.func.vmap`, at the least price."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType, _add_batch_dim, _unwrap_batched
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack


def apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """Returns `function.apply(*inputs)`.

    torch binds the arguments of a function with a `setup_context`, which vmap needs, to names in every call, and under
    vmap goes through nested structures. For layers of a small network that takes as long as the layers do. So outside
    the transforms of torch.func a function without it is called, and under vmap `function.vmap` directly.
    """
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is None:
        return _plain(function).apply(*inputs)
    if interpreter.key() != TransformType.Vmap:
        return function.apply(*inputs)
    level = interpreter.level()
    unwrapped = [_unwrap_batched(x, level) if isinstance(x, Tensor) else (x, None) for x in inputs]
    tensors, dims = zip(*unwrapped, strict=True)
    if all(dim is None for dim in dims):
        return function.apply(*inputs)
    with temporarily_pop_interpreter_stack():
        found, out_dims = function.vmap(Info(_size(tensors, dims)), dims, *tensors)
    if isinstance(found, Tensor):
        return _add_batch_dim(found, out_dims, level)
    return tuple(_add_batch_dim(x, dim, level) for x, dim in zip(found, out_dims, strict=True))


class Info(NamedTuple):
    """What `function.vmap` is told of the dimension, as torch tells it."""

    batch_size: int


def _size(tensors: tuple[Any, ...], dims: tuple[int | None, ...]) -> int:
    return next(x.shape[dim] for x, dim in zip(tensors, dims, strict=True) if dim is not None)


@cache
def _plain(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    body = {
        "__doc__": function.__doc__,
        "forward": staticmethod(forward),
        "setup_context": staticmethod(torch.autograd.Function.setup_context),
        "backward": staticmethod(function.backward),
    }
    return type(function.__name__, (torch.autograd.Function,), body)
