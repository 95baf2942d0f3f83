"""Deblurring with learnt penalties: a λ per filter, learnt from pairs of sharp and blurred images.

An image is recovered from its blurred and noisy version y, with known blur k, as the minimum of a convex energy:

    φ*(y, λ) = argmin_φ  ½ ‖k ∗ φ − y‖² + Σ_f λ_f Σ_pixels √((d_f ∗ φ)² + ε²),

where d_f are the 3×3 discrete cosine filters but the constant one. λ is to make the squared error of the training
images small. The reference has the same energy and one λ for all filters, the best of a grid on the training images.
The images are photographs of CIFAR-100 where IMAML_DATA_ROOT has them, else built-in glyphs. The blur is by motion.

Source: Kunisch and Pock, A bilevel optimization approach for parameter learning in variational models (2013).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy
import torch
from common import Rows, show
from torch import Tensor
from torch.nn.functional import normalize, pad

import imaml_ext
from imaml_ext.data import load_glyphs

EPSILON, NOISE = 0.01, 0.01  # where images are in [0, 1]
FORWARD = imaml_ext.NewtonCG(steps=10, linear_solver=imaml_ext.CG(20, rtol=1e-2, check_every=5))
BACKWARD = imaml_ext.CG(200, rtol=1e-3, check_every=5)


def load(count: int, generator: torch.Generator) -> tuple[str, Tensor]:
    """What the images are, and grey images [count, 1, H, H]."""
    file = Path(os.environ.get("IMAML_DATA_ROOT", "")) / "cifar100" / "cifar100_100_per_class.npz"
    found = numpy.load(file)["images"].mean(3) if file.is_file() else load_glyphs().reshape(-1, 28, 28)
    name, images = "photographs" if file.is_file() else "glyphs", torch.from_numpy(found).float()
    return name, images[torch.randperm(len(images), generator=generator)[:count]].unsqueeze(1) / 255


def cosines(size: int) -> Tensor:
    """The filters of the discrete cosine transform but the constant one, [size² − 1, size, size]."""
    n = torch.arange(size)
    rows = normalize(torch.cos(torch.pi / size * n.unsqueeze(1) * (n + 0.5)), dim=1)
    return torch.einsum("ai,bj->abij", rows, rows).flatten(0, 1)[1:]


def motion(width: int, length: int = 7) -> Tensor:
    """Blur along rows, [1, width, width], about the pixel (0, 0)."""
    row = ((torch.arange(width) < length) / length).roll(-(length // 2))
    return pad(row.expand(1, 1, width), (0, 0, 0, width - 1))


def filtered(images: Tensor, filters: Tensor) -> Tensor:
    """[B, F, H, H], of images [B, 1, H, H] that repeat beyond their edges, and filters [F, size, size]."""
    size = images.shape[-2:]
    return torch.fft.irfft2(torch.fft.rfft2(images) * torch.fft.rfft2(filters, s=size), s=size)


def energy(phi: Tensor, lam: Tensor, y: Tensor, blur: Tensor, filters: Tensor) -> Tensor:
    """[B], of images [B, 1, H, H] and λ [F]."""
    data = 0.5 * (filtered(phi, blur) - y).square().sum((1, 2, 3))
    return data + (filtered(phi, filters).square() + EPSILON**2).sqrt().sum((2, 3)) @ lam


def main(images: int = 24, outer_steps: int = 15, grid: int = 9, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    name, sharp = load(2 * images, generator)
    blur, filters = motion(sharp.shape[-1]), cosines(3)
    blurred = filtered(sharp, blur) + NOISE * torch.randn(sharp.shape, generator=generator)
    halves = {"training": slice(images), "test": slice(images, None)}

    def deblur(half: slice, lam: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Returns φ*, and its squared errors [images]."""
        args = (lam, blurred[half], blur, filters)
        phi = imaml_ext.argmin(energy, start, args, inner=FORWARD, linear_solver=BACKWARD)
        return phi.detach(), (phi - sharp[half]).square().mean((1, 2, 3))

    train = halves["training"]
    lams = torch.logspace(-4, -2, grid).unsqueeze(1).expand(-1, len(filters))  # [grid, F]
    shared = min(lams, key=lambda lam: float(deblur(train, lam, blurred[train])[1].mean()))
    log_lam, phi = shared.log().requires_grad_(), blurred[train]
    optimizer = torch.optim.Adam([log_lam], lr=0.2)
    for _ in range(outer_steps):
        optimizer.zero_grad()
        phi, errors = deblur(train, log_lam.exp(), phi)
        errors.mean().backward()
        optimizer.step()

    def decibels(lam: Tensor) -> dict[str, float]:
        """Signal-to-noise ratios of the peak, the means over images."""
        errors = {what: deblur(half, lam, blurred[half])[1] for what, half in halves.items()}
        return {f"{what}, dB": float(-10 * each.log10().mean()) for what, each in errors.items()}

    learnt, tuned = decibels(log_lam.detach().exp()), decibels(shared)
    return {f"{name}, λ per filter": learnt, f"{name}, one λ by grid search": tuned}


if __name__ == "__main__":
    show(main())
