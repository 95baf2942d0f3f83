"""Omniglot, 5-way 1-shot, 1,200 / 423 characters, by Newton-CG: from omniglot-5w1s-gd-shared.

Command: imaml train omniglot-5w1s-hf-longer --data.root FOLDER
Time: 82 minutes on one CPU core.
Accuracy: 99.10 ± 0.11 % on 2,000 test tasks.
"""

from imaml_ext.reproduction.chains._common import by_smaller_inner_steps

recipe = by_smaller_inner_steps("omniglot-5w1s-gd-shared", newton=True, steps=4000, feature_scale=3.0)
