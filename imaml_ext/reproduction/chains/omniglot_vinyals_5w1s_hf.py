"""Omniglot, 5-way 1-shot, Vinyals' split, NewtonCG: 48,000 tasks from omniglot-vinyals-start.

Command: imaml train omniglot-vinyals-5w1s-hf --data.root FOLDER
Time: 64 minutes on one CPU core.
Accuracy: 97.97 ± 0.17 % on 2,000 test tasks.
"""

from imaml_ext.reproduction.chains._common import from_weights

recipe = from_weights(
    "omniglot-vinyals-start",
    3000,
    newton=True,
    changes={**VALIDATED_VINYALS, "evaluation.every": 500, **LARGER_FEATURES},
)
