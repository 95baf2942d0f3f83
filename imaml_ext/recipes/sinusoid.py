"""Sinusoid regression from 5 points; `--tasks.shots 10` for 10.

With tanh and the Gauss-Newton matrix, gradient descent stays within the inner problems.

Command: imaml train sinusoid
Time: 34 seconds on one CPU core.
Accuracy: mean squared error 0.69 ± 0.11 on 1,000 test tasks.
"""

from imaml_ext.data import Sinusoid
from imaml_ext.inner import GradientDescent
from imaml_ext.meta import IMAML
from imaml_ext.models import MLP
from imaml_ext.train.config import EvaluationSettings, Outer, RunSettings, Tasks, TrainConfig
from imaml_ext.train.recipe import Recipe

recipe = Recipe(
    TrainConfig(
        data=Sinusoid(),
        tasks=Tasks(shots=5, queries=10),
        model=MLP(hidden=(40, 40), activation="tanh"),
        algorithm=IMAML(lam=0.1, inner=GradientDescent(steps=20, lr=0.01), damping=1.0, curvature="gauss_newton"),
        outer=Outer(steps=3000, meta_batch=25, lr=3e-3, schedule="cosine"),
        evaluation=EvaluationSettings(tasks=1000, meta_batch=250, every=300),
        run=RunSettings(log_every=50, checkpoint_every=1000),
    )
)
