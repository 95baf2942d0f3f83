"""Recurrent layers step by step: torch's fused ones have no batching rule, and on CUDA no second derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]  # (h,) or (h, c), each [batch, hidden]
Step = Callable[..., State]


def _elman(function: Callable[[Tensor], Tensor], x: Tensor, state: State, w: Tensor, b: Tensor | None) -> State:
    """h' = function(x + W h + b), where x is what the input adds."""
    return (function(x + F.linear(state[0], w, b)),)


def _gru(x: Tensor, state: State, w: Tensor, b: Tensor | None) -> State:
    """h' = (1 − z) n + z h, n = tanh(x_n + r (W h + b)_n)."""
    (h,) = state
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), F.linear(h, w, b).chunk(3, -1)
    z, n = torch.sigmoid(x_z + h_z), torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (n + z * (h - n),)


def _lstm(x: Tensor, state: State, w: Tensor, b: Tensor | None) -> State:
    """c' = f c + i g, h' = o tanh(c')."""
    h, c = state
    i, f, g, o = (x + F.linear(h, w, b)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _layers(
    fused: Callable[..., Any],
    step: Step,
    input: Tensor,
    hx: Any,
    weights: Any,
    biases: Any,
    layers: Any = 1,
    dropout: Any = 0.0,
    training: Any = False,
    bidirectional: Any = False,
    batch_first: bool = False,
) -> tuple[Tensor, ...]:
    """What `fused`, torch's own, returns: the outputs [T, batch, directions · hidden] and every layer's last state."""
    if isinstance(biases, (list, tuple)):  # packed sequences
        return fused(input, hx, weights, biases, layers, dropout, training, bidirectional, batch_first)
    first = hx if isinstance(hx, (list, tuple)) else (hx,)  # each [layers · directions, batch, hidden]
    directions = 2 if bidirectional else 1
    per = len(weights) // (layers * directions)
    x = input.transpose(0, 1) if batch_first else input
    last: list[State] = []
    for layer in range(layers):
        found = []
        if layer and dropout:
            x = F.dropout(x, dropout, training)
        for direction in range(directions):
            k = layer * directions + direction
            w_ih, w_hh, *rest = weights[k * per : (k + 1) * per]
            b_ih, b_hh = rest[:2] if biases else (None, None)
            projection = rest[-1] if len(rest) % 2 else None  # of an LSTM with proj_size
            state, outputs = tuple(s[k] for s in first), []
            added = F.linear(x, w_ih, b_ih)  # of all times at once
            for t in reversed(range(len(x))) if direction else range(len(x)):
                state = step(added[t], state, w_hh, b_hh)
                if projection is not None:
                    state = (F.linear(state[0], projection), *state[1:])
                outputs.append(state[0])
            found.append(torch.stack(outputs[::-1] if direction else outputs))
            last.append(state)
        x = torch.cat(found, -1)
    return (x.transpose(0, 1) if batch_first else x, *(torch.stack(each) for each in zip(*last, strict=True)))


def _cell(
    step: Step, input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Any = None
) -> Any:
    pair = isinstance(hx, (list, tuple))
    state = step(F.linear(input, w_ih, b_ih), tuple(hx) if pair else (hx,), w_hh, b_hh)
    return state if pair else state[0]


_STEPS: dict[str, Step] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": functools.partial(_elman, torch.tanh),
    "rnn_relu": functools.partial(_elman, torch.relu),
}
RECURRENT: dict[Callable[..., Any], Callable[..., Any]] = {
    **{getattr(torch, name): functools.partial(_layers, getattr(torch, name), step) for name, step in _STEPS.items()},
    **{getattr(torch, f"{name}_cell"): functools.partial(_cell, step) for name, step in _STEPS.items()},
}
