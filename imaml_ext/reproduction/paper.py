"""The paper's letter and its figures: what the experiments compare with."""

from __future__ import annotations

from imaml_ext.data import Omniglot
from imaml_ext.inner import GradientDescent
from imaml_ext.meta import IMAML
from imaml_ext.models import Conv4
from imaml_ext.train.config import EvaluationSettings, Outer, RunSettings, Tasks, TrainConfig

COLUMNS = {"5w1s": "5-way 1-shot", "5w5s": "5-way 5-shot", "20w1s": "20-way 1-shot", "20w5s": "20-way 5-shot"}

# Accuracy in percent and its 95 % interval: table 2 of Rajeswaran et al., arXiv 1909.04630.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "maml": {"5w1s": (98.7, 0.4), "5w5s": (99.9, 0.1), "20w1s": (95.8, 0.3), "20w5s": (98.9, 0.2)},
    "fomaml": {"5w1s": (98.3, 0.5), "5w5s": (99.2, 0.2), "20w1s": (89.4, 0.5), "20w5s": (97.9, 0.1)},
    "reptile": {"5w1s": (97.68, 0.04), "5w5s": (99.48, 0.06), "20w1s": (89.43, 0.14), "20w5s": (97.12, 0.32)},
    "imaml-gd": {"5w1s": (99.16, 0.35), "5w5s": (99.67, 0.12), "20w1s": (94.46, 0.42), "20w5s": (98.69, 0.1)},
    "imaml-hf": {"5w1s": (99.50, 0.26), "5w5s": (99.74, 0.11), "20w1s": (96.18, 0.36), "20w5s": (99.14, 0.1)},
}


def size_of(column: str) -> tuple[int, int]:
    """Returns ways and shots of a column."""
    ways, shots = column.removesuffix("s").split("w")
    return int(ways), int(shots)


def paper_settings(column: str) -> TrainConfig:
    """Returns the settings of section 4 and the appendix: λ = 2, 16 gradient steps (25 for 20 ways), 5 CG steps, Adam.

    The curvature is the Gauss-Newton matrix: with the Hessian these settings get worse as they train. Tasks have five
    queries per class.
    """
    ways, shots = size_of(column)
    return TrainConfig(
        data=Omniglot(),
        tasks=Tasks(ways=ways, shots=shots, queries=5),
        model=Conv4(filters=64),
        algorithm=IMAML(lam=2.0, inner=GradientDescent(16 if ways == 5 else 25, lr=0.1), curvature="gauss_newton"),
        outer=Outer(steps=20_000, meta_batch=16, lr=1e-3),
        evaluation=EvaluationSettings(tasks=1000),
        run=RunSettings(log_every=20, checkpoint_every=500),
    )
