"""What several examples of this folder use: a linear classifier, and the table at the end."""

from __future__ import annotations

from torch import Tensor

Rows = dict[str, dict[str, float]]  # {who: {what: figure}}


def linear(phi: Tensor, x: Tensor) -> Tensor:
    """Outputs [B, n, C] of linear classifiers; phi [B, C (D + 1)], each row a weight and a bias per class."""
    weight, bias = phi.unflatten(1, (-1, x.shape[-1] + 1)).split([x.shape[-1], 1], dim=2)  # [B, C, D], [B, C, 1]
    return x @ weight.mT + bias.mT  # x [n, D], or one [n, D] per row of phi


def show(rows: Rows) -> None:
    """Prints a line per row, under the names of the figures."""
    figures, name_width = list(next(iter(rows.values()))), max(map(len, rows))
    widths = [max(10, len(figure)) for figure in figures]
    print(" " * name_width, *(f"{figure:>{width}}" for figure, width in zip(figures, widths, strict=True)), sep="  ")
    for name, row in rows.items():
        cells = (f"{row[figure]:>{width}.4g}" for figure, width in zip(figures, widths, strict=True))
        print(f"{name:{name_width}}", *cells, sep="  ")
