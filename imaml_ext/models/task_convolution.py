"""Convolutions with weights of their own for every task, differentiable to any order.

y = conv(x, w) is linear in x and in w. Its derivatives x̄ = convX(ȳ, w) and w̄ = convW(x, ȳ) are two more such maps, and
the derivatives of all three are these three again. torch makes the second derivatives of convolutions whose kernels are
as large as images.

Everything is channels-last and contiguous: x [R, S, H, W, C], w [R, kh, kw, C, O] and y [R, S, H', W', O] for R weights
with S images each. With groups a weight has C / groups channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from imaml_ext.models.task_apply import apply

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """The sizes of a convolution: image (H, W) and kernel (kh, kw), and how the kernel moves."""

    image: Pair
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    def output(self, axis: int) -> int:
        """H' or W'."""
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (self.image[axis] + 2 * self.padding[axis] - reach) // self.stride[axis] + 1

    @property
    def steps(self) -> tuple[Pair, Pair, Pair]:
        """Stride, padding and dilation."""
        return self.stride, self.padding, self.dilation


class _Bilinear(torch.autograd.Function):
    """One of the three maps, of two tensors and a geometry."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        first, second, ctx.geometry = inputs
        ctx.save_for_backward(first, second)


class Convolve(_Bilinear):
    """y = conv(x, w)."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        x, w = x.contiguous(), w.contiguous()
        return _method(x.dtype, geometry, *x.shape[:2], *w.shape[3:]).forward(x, w, geometry)

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor | None, ...]:
        (x, w), (by_x, by_w) = ctx.saved_tensors, ctx.needs_input_grad[:2]
        x_bar = apply(ConvolveBack, y_bar, w, ctx.geometry) if by_x else None
        return x_bar, apply(ConvolveWeight, x, y_bar, ctx.geometry) if by_w else None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, w: Tensor, geometry: Geometry) -> tuple[Tensor, int]:
        return _with_weight(Convolve, info.batch_size, in_dims, x, w, geometry)


class ConvolveBack(_Bilinear):
    """x̄ = convX(ȳ, w), the adjoint of `Convolve` in x."""

    @staticmethod
    def forward(y_bar: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        y_bar, w = y_bar.contiguous(), w.contiguous()
        return _method(y_bar.dtype, geometry, *y_bar.shape[:2], *w.shape[3:]).back(y_bar, w, geometry)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        (y_bar, w), (by_y, by_w) = ctx.saved_tensors, ctx.needs_input_grad[:2]
        y = apply(Convolve, x, w, ctx.geometry) if by_y else None
        return y, apply(ConvolveWeight, x, y_bar, ctx.geometry) if by_w else None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], y_bar: Tensor, w: Tensor, geometry: Geometry) -> tuple[Tensor, int]:
        return _with_weight(ConvolveBack, info.batch_size, in_dims, y_bar, w, geometry)


class ConvolveWeight(_Bilinear):
    """w̄ = convW(x, ȳ), the adjoint of `Convolve` in w."""

    @staticmethod
    def forward(x: Tensor, y_bar: Tensor, geometry: Geometry) -> Tensor:
        x, y_bar = x.contiguous(), y_bar.contiguous()
        channels = x.shape[4] // geometry.groups
        return _method(x.dtype, geometry, *x.shape[:2], channels, y_bar.shape[4]).weight(x, y_bar, geometry)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, ...]:
        (x, y_bar), (by_x, by_y) = ctx.saved_tensors, ctx.needs_input_grad[:2]
        x_bar = apply(ConvolveBack, y_bar, w, ctx.geometry) if by_x else None
        return x_bar, apply(Convolve, x, w, ctx.geometry) if by_y else None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, y_bar: Tensor, geometry: Geometry) -> tuple[Tensor, int]:
        return apply(ConvolveWeight, *_rows(info.batch_size, in_dims, x, y_bar), geometry).unflatten(
            0, (info.batch_size, -1)
        ), 0


class TurnWeight(torch.autograd.Function):
    """Takes w [R, O, C, kh · kw], as torch has it, to [R, kh · kw, C, O], or back; its derivative is its inverse."""

    @staticmethod
    def forward(w: Tensor, back: bool) -> Tensor:
        return torch.ops.imaml_ext.layer_turn_weights(w.contiguous(), back)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.back = inputs[1]

    @staticmethod
    def backward(ctx: Any, w_bar: Tensor) -> tuple[Tensor, None]:
        return apply(TurnWeight, w_bar, not ctx.back), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], w: Tensor, back: bool) -> tuple[Tensor, int]:
        return apply(TurnWeight, *_rows(info.batch_size, in_dims, w), back).unflatten(0, (info.batch_size, -1)), 0


def _rows(size: int, in_dims: tuple[Any, ...], *tensors: Tensor) -> list[Tensor]:
    """Tensors [R, …] with a dimension of `size` tasks each, or without, to [tasks · R, …]."""
    rows = []
    for tensor, dim in zip(tensors, in_dims, strict=False):
        each = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        rows.append(each.flatten(0, 1))
    return rows


def _with_weight(
    function: Any, size: int, in_dims: tuple[Any, ...], x: Tensor, w: Tensor, geometry: Geometry
) -> tuple[Tensor, int]:
    """A map of x [R, S, …] and w: tasks that share the weight are more images of it, others more rows."""
    if in_dims[1] is None:
        images = x.movedim(in_dims[0], 1).flatten(1, 2)  # [R, tasks · S, …]
        return apply(function, images, w, geometry).unflatten(1, (size, -1)), 1
    return apply(function, *_rows(size, in_dims, x, w), geometry).unflatten(0, (size, -1)), 0


# --- how a convolution is computed ------------------------------------------------------------------------------------


class _Torch:
    """Row by row by torch's own convolutions."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, g: Geometry) -> Tensor:
        def convolve(x: Tensor, w: Tensor) -> Tensor:
            return torch.ops.aten.convolution(x, w, None, *g.steps, False, [0, 0], g.groups)

        return _each_row(convolve, _images(x), _weights(w)).movedim(2, -1).contiguous()

    @staticmethod
    def back(y_bar: Tensor, w: Tensor, g: Geometry) -> Tensor:
        like = y_bar.new_empty(1).expand(y_bar.shape[1], w.shape[3] * g.groups, *g.image)  # asked for its shape alone
        rows = _each_row(lambda y_bar, w: _torch_backward(y_bar, like, w, g, 0), _images(y_bar), _weights(w))
        return rows.movedim(2, -1).contiguous()

    @staticmethod
    def weight(x: Tensor, y_bar: Tensor, g: Geometry) -> Tensor:
        like = x.new_empty(1).expand(y_bar.shape[4], x.shape[4] // g.groups, *g.kernel)
        rows = _each_row(lambda x, y_bar: _torch_backward(y_bar, x, like, g, 1), _images(x), _images(y_bar))
        return rows.permute(0, 3, 4, 2, 1).contiguous()


def _images(x: Tensor) -> Tensor:
    return x.permute(0, 1, 4, 2, 3)


def _weights(w: Tensor) -> Tensor:
    return w.permute(0, 4, 3, 1, 2)


def _torch_backward(y_bar: Tensor, x: Tensor, w: Tensor, g: Geometry, which: int) -> Tensor:
    wanted = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(y_bar, x, w, None, *g.steps, False, [0, 0], g.groups, wanted)[which]


def _each_row(function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    rows = [function(*pair) for pair in zip(a, b, strict=True)]
    return torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0)


class _Patches:
    """One batched matrix product over the patches of all images."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, g: Geometry) -> Tensor:
        return torch.bmm(_patches(x, g), w.flatten(1, 3)).view(*x.shape[:2], g.output(0), g.output(1), -1)

    @staticmethod
    def back(y_bar: Tensor, w: Tensor, g: Geometry) -> Tensor:
        patches = torch.bmm(y_bar.flatten(1, 3), w.flatten(1, 3).mT)
        patches = patches.view(-1, *y_bar.shape[2:4], patches.shape[-1])
        x_bar = torch.ops.imaml_ext.layer_patches_adjoint(patches, g.image, g.kernel, *g.steps)
        return x_bar.view(*y_bar.shape[:2], *x_bar.shape[1:])

    @staticmethod
    def weight(x: Tensor, y_bar: Tensor, g: Geometry) -> Tensor:
        product = torch.bmm(_patches(x, g).mT, y_bar.flatten(1, 3))
        return product.view(product.shape[0], *g.kernel, -1, product.shape[-1])


def _patches(x: Tensor, g: Geometry) -> Tensor:
    """[R, S H' W', kh kw C]"""
    if g.kernel == (1, 1) and g.stride == (1, 1) and g.padding == (0, 0):
        return x.flatten(1, 3)
    patches = torch.ops.imaml_ext.layer_patches(x.flatten(0, 1), g.kernel, *g.steps)
    return patches.view(x.shape[0], -1, patches.shape[-1])


class _Pixels:
    """Tap by tap, products of a task's pixels that stay in the cache, without patches."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, g: Geometry) -> Tensor:
        return torch.ops.imaml_ext.task_convolve(x, w, *g.steps)

    @staticmethod
    def back(y_bar: Tensor, w: Tensor, g: Geometry) -> Tensor:
        return torch.ops.imaml_ext.task_convolve_back(y_bar, w, g.image, *g.steps)

    @staticmethod
    def weight(x: Tensor, y_bar: Tensor, g: Geometry) -> Tensor:
        return torch.ops.imaml_ext.task_convolve_weight(x, y_bar, g.kernel, *g.steps)


@dataclass(frozen=True)
class _Winograd:
    """3×3 weights without stride, by tiles of m × m pixels: (m + 2)² multiplications where there were 9 m².

    Source: Lavin and Gray, Fast algorithms for convolutional neural networks (2016).
    """

    m: int

    def forward(self, x: Tensor, w: Tensor, g: Geometry) -> Tensor:
        return torch.ops.imaml_ext.winograd_convolve(x, w, self.m, g.padding[0], False)

    def back(self, y_bar: Tensor, w: Tensor, g: Geometry) -> Tensor:
        return torch.ops.imaml_ext.winograd_convolve(y_bar, w, self.m, 2 - g.padding[0], True)

    def weight(self, x: Tensor, y_bar: Tensor, g: Geometry) -> Tensor:
        return torch.ops.imaml_ext.winograd_weight(x, y_bar, self.m, g.padding[0])


@cache
def _method(dtype: torch.dtype, g: Geometry, rows: int, images: int, channels: int, out: int) -> Any:
    """The fastest way that there is, as measured on one core with AVX-512."""
    if g.groups > 1:
        return _Torch
    pixels, taps = g.output(0) * g.output(1), g.kernel[0] * g.kernel[1]
    still = g.stride == g.dilation == (1, 1)
    if min(channels, out) < 16 or (taps == 1 and still):
        return _Patches
    if g.kernel == (3, 3) and still and g.padding in ((0, 0), (1, 1), (2, 2)) and pixels >= 64:
        return _Winograd(4 if pixels > 196 else 2)
    if channels % 16 == 0 and out % 16 == 0 and channels * out <= 2**14:
        return _Pixels
    return _Torch if dtype == torch.float32 and images * pixels * out * channels * taps > 10**7 else _Patches
