"""mini-ImageNet, 5-way 1-shot; `--tasks.shots 5` for 5-shot.

The paper's settings: lambda 0.5, 10 gradient steps, 5 CG steps. From random parameters, inner steps of 0.1 descend
where those of 0.2 and 0.4 first climb.

Command: imaml train mini-imagenet --data.root FOLDER
"""

from imaml_ext.data import MiniImageNet
from imaml_ext.inner import GradientDescent
from imaml_ext.meta import IMAML
from imaml_ext.models import Conv4
from imaml_ext.train.config import EvaluationSettings, Outer, RunSettings, Tasks, TrainConfig
from imaml_ext.train.recipe import Recipe

recipe = Recipe(
    TrainConfig(
        data=MiniImageNet(),
        tasks=Tasks(ways=5, shots=1, queries=15),
        model=Conv4(filters=32, pooling="max"),
        algorithm=IMAML(lam=0.5, inner=GradientDescent(steps=10, lr=0.1), curvature="gauss_newton"),
        outer=Outer(steps=20_000, meta_batch=4, lr=1e-3, schedule="cosine"),
        evaluation=EvaluationSettings(tasks=1000, every=1000),
        run=RunSettings(log_every=50, checkpoint_every=500),
    )
)
