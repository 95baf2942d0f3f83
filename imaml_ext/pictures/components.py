"""Connected parts of a mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Parts:
    """Connected parts of a mask, diagonal neighbours included.

    Attributes:
        labels: int [H, W], the part of each pixel, from 0, and -1 outside the mask.
        area: pixels of each part. contact: those on the picture's edge. depth: how far its innermost pixel is from the
            picture's edge. peak: its greatest value.
    """

    labels: np.ndarray
    area: np.ndarray
    contact: np.ndarray
    depth: np.ndarray
    peak: np.ndarray

    def where(self, chosen: np.ndarray) -> np.ndarray:
        """The mask of the chosen parts, bool [parts] -> bool [H, W]."""
        return np.append(chosen, False)[self.labels]

    def beside(self, reach: float) -> np.ndarray:
        """Tells which parts hug the picture's edge to a depth of `reach`, as tables and the corners of shadows do.

        A stroke that runs out of the picture is four times as long as it is wide, or comes from further within. Small
        parts are slivers between edges: a hundredth of the picture, or where the largest part of the others does not
        touch the edge, a fifth of that.
        """
        flat = (self.contact > 0) & (self.depth < reach)
        hugs = flat & ((4 * self.contact**2 > self.area) | (100 * self.area < self.labels.size))
        others = np.where(hugs, 0, self.area)
        if others.any() and self.contact[main := others.argmax()] == 0:
            hugs |= flat & (5 * self.area < self.area[main])
        return hugs


def find_parts(mask: np.ndarray, values: np.ndarray) -> Parts:
    """Finds the parts of a mask bool [H, W]; `values` [H, W] are those that peak."""
    height, width = mask.shape
    count = int(mask.sum())
    number = np.full((height + 1, width + 2), -1)
    number[:height, 1:-1][mask] = np.arange(count)
    here = number[:height, 1:-1]
    pairs = []
    for down, right in ((0, 1), (1, -1), (1, 0), (1, 1)):
        there = number[down : down + height, 1 + right : 1 + right + width]
        both = (here >= 0) & (there >= 0)
        pairs.append(np.stack([here[both], there[both]]))
    labels = np.full(mask.shape, -1)
    labels[mask] = part = _roots(np.concatenate(pairs, axis=1), count)
    y, x = np.nonzero(mask)
    inside = np.minimum(np.minimum(y, height - 1 - y), np.minimum(x, width - 1 - x))
    parts = int(part.max(initial=-1)) + 1
    depth, peak = np.zeros(parts), np.zeros(parts)
    np.maximum.at(depth, part, inside)
    np.maximum.at(peak, part, values[mask])
    area, contact = (np.bincount(p, minlength=parts) for p in (part, part[inside == 0]))
    return Parts(labels, area, contact, depth, peak)


def _roots(pairs: np.ndarray, count: int) -> np.ndarray:
    """Numbers the parts of a graph of `count` nodes and edges [2, n]: each root is hung below the least it touches."""
    parent, (a, b) = np.arange(count), pairs
    while a.size:
        np.minimum.at(parent, np.maximum(parent[a], parent[b]), np.minimum(parent[a], parent[b]))
        while not np.array_equal(parent, above := parent[parent]):
            parent = above
        apart = parent[a] != parent[b]
        a, b = a[apart], b[apart]
    return np.unique(parent, return_inverse=True)[1]
