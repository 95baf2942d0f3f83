"""Omniglot, 5-way 1-shot, 1,200 / 423 characters.

The paper's settings (section 4 and appendix): lambda 2, 16 gradient steps (25 where there are 20 ways), 5 CG steps,
Adam. The curvature is the Gauss-Newton matrix, because with the Hessian these settings get worse as they train
(docs/reproduction/experiments.md).

Command: imaml train omniglot-5w1s --data.root FOLDER
"""

from imaml_ext.data import Omniglot
from imaml_ext.inner import GradientDescent
from imaml_ext.meta import IMAML
from imaml_ext.models import Conv4
from imaml_ext.train.config import EvaluationSettings, Outer, RunSettings, Tasks, TrainConfig
from imaml_ext.train.recipe import Recipe

recipe = Recipe(
    TrainConfig(
        data=Omniglot(),
        tasks=Tasks(ways=5, shots=1, queries=5),
        model=Conv4(filters=64),
        algorithm=IMAML(lam=2.0, inner=GradientDescent(steps=16, lr=0.1), curvature="gauss_newton"),
        outer=Outer(steps=20_000, meta_batch=16, lr=1e-3),
        evaluation=EvaluationSettings(tasks=1000),
        run=RunSettings(log_every=20, checkpoint_every=500),
    )
)
