"""Omniglot, 5-way 1-shot, Vinyals' split, by Newton-CG: 48,000 tasks from omniglot-vinyals-start.

Command: imaml train omniglot-vinyals-5w1s-hf --data.root FOLDER
Time: 64 minutes on one CPU core.
Accuracy: 97.97 ± 0.17 % on 2,000 test tasks.
"""

from imaml_ext.reproduction.chains._common import by_smaller_inner_steps, on_vinyals_split

recipe = on_vinyals_split(by_smaller_inner_steps("omniglot-vinyals-start", newton=True, steps=3000, feature_scale=3.0))
