"""Omniglot, 20-way 1-shot, Vinyals' split: 2,400 tasks from omniglot-vinyals-5w1s-gd.

Command: imaml train omniglot-vinyals-20w1s-gd --data.root FOLDER
Time: 10 minutes on one CPU core.
Accuracy: 90.65 ± 0.37 % on 500 test tasks.
"""

from imaml_ext.reproduction.chains._common import for_other_tasks, on_vinyals_split

recipe = on_vinyals_split(for_other_tasks("omniglot-vinyals-5w1s-gd", ways=20, shots=1, newton=False, steps=600))
