"""SciPy: the example of `scipy.sparse.linalg.cg`'s documentation, at a size where the matrix counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from imaml_ext.integrations.scipy import cg as cg_of_columns
from integration_examples import Meter, Run

PACKAGES = ("scipy",)
EXAMPLE = (
    "Systems of one symmetric positive definite matrix, the example of the documentation of scipy.sparse.linalg.cg. "
    "Enlarged from 4 unknowns and one right-hand side to kernel ridge regression: an RBF kernel of 2000 points in 3 "
    "dimensions plus 1, dense, and 16 right-hand sides, each to a relative residual of 1e-8."
)
CHANGE = (
    "X = np.stack([scipy.sparse.linalg.cg(A, b, rtol=1e-8)[0] for b in B.T], axis=1)",
    "X = imaml_ext.integrations.scipy.cg(A, B, rtol=1e-8)[0]",
)
REASON = (
    "SciPy's cg takes one right-hand side, and reads the matrix from memory for each product. Ours takes all columns: "
    "one product of matrices reads it once for all of them. The number of products with a vector is the same."
)


def example(ours: bool, *, size: int = 2000, columns: int = 16) -> Run:
    from scipy.sparse.linalg import LinearOperator, cg
    from scipy.spatial.distance import cdist

    rng = np.random.default_rng(1)
    points = rng.uniform(size=(size, 3))
    matrix = np.exp(-8 * cdist(points, points, "sqeuclidean")) + np.eye(size)
    B = rng.standard_normal((size, columns))
    meter = Meter()
    multiply = meter.counted(matrix.__matmul__, lambda v: v.size // size)
    A = LinearOperator(matrix.shape, matvec=multiply, matmat=multiply, dtype=matrix.dtype)

    def solve_all() -> Any:
        if ours:
            return cg_of_columns(A, B, rtol=1e-8)[0]
        return np.stack([cg(A, b, rtol=1e-8)[0] for b in B.T], axis=1)

    return meter.run(torch.from_numpy(meter.timed(solve_all)()))
