"""Omniglot, 5-way 1-shot, Vinyals' split: 6,400 tasks from omniglot-vinyals-start.

Command: imaml train omniglot-vinyals-5w1s-gd --data.root FOLDER
Time: 5 minutes on one CPU core.
Accuracy: 97.44 ± 0.20 % on 2,000 test tasks.
"""

from imaml_ext.reproduction.chains._common import by_smaller_inner_steps, on_vinyals_split

recipe = on_vinyals_split(by_smaller_inner_steps("omniglot-vinyals-start", newton=False, steps=400))
