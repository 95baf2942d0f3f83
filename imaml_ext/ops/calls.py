"""What can stand around a call: torch.compile, a tracer, a transform of torch.func, autocast."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_MODES = torch._C._TorchDispatchModeKey
C = TypeVar("C", bound=Callable[..., Any])


def eager(function: C) -> C:
    """Decorates a function that torch.compile is to leave alone, with all that it calls: a graph ends before its call.

    In the error where it may not, `_name_rows`, the part of `name` that works on rows, is called `name`.

    As `torch.compiler.disable`, whose import takes a second, does; but that import waits until there is a graph. With
    fullgraph=True, and in torch.export with strict=True, the error of torch.compile says what to do.
    """
    name = function.__name__.removeprefix("_").removesuffix("_rows")
    disabled = None

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal disabled
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.skip_frame(
                msg=f"{name} runs a loop outside torch.compile, so that it cannot be part of a full graph: compile "
                f"with fullgraph=False, or call {name} outside the compiled function (torch.export takes it with "
                "strict=False)"
            )
        if "torch._dynamo" not in sys.modules:
            return function(*arguments, **options)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*arguments, **options)

    return call  # type: ignore[return-value]


def is_traced() -> bool:
    """Whether a tracer of torch or FakeTensorMode is at work: no number may then be looked at."""
    if torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing():
        return True
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in (_MODES.PROXY, _MODES.FAKE))


def is_transformed() -> bool:
    """Whether a transform of torch.func, or a level of forward-mode differentiation, is at work."""
    if torch.compiler.is_dynamo_compiling():  # which has its own rules for them
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def check_untransformed(name: str, **values: object) -> None:
    """Raises RuntimeError where a tensor belongs to a transform of torch.func or has a tangent, which `name` loses."""
    if not is_transformed():
        return
    for argument, value in values.items():
        if not isinstance(value, Tensor):
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(value):
            raise RuntimeError(
                f"{name} must be called outside the transforms of torch.func (grad, vmap, jvp, …), got {argument} from "
                "inside one: give the systems of vmap as rows of one batch, or use imaml_ext.solve, which has the "
                "rules for grad and vmap (and imaml_ext.prox_solve differentiates by torch.autograd)"
            )
        if forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(f"{name} has no forward-mode derivative: {argument} must have no tangent")


def callback(function: C, name: str, argument: str, like: Tensor) -> C:
    """`function` as the solver `name` may call it, where a transform or autocast is at work; else itself.

    Under autocast, results in its dtype come back in the dtype of `like`, as the vectors of a solve have one dtype.
    """
    device = like.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    transformed = is_transformed()
    if not autocast and not transformed:
        return function

    def call(*arguments: Any) -> Any:
        result = function(*arguments)
        if transformed:
            check_untransformed(name, **{f"the result of {argument}": result})
        if autocast and isinstance(result, Tensor) and result.dtype == torch.get_autocast_dtype(device):
            result = result.to(like.dtype)
        return result

    return call  # type: ignore[return-value]
