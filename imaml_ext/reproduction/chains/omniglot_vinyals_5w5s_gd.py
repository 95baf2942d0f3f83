"""Omniglot, 5-way 5-shot, Vinyals' split: 1,600 tasks from omniglot-vinyals-5w1s-gd.

Command: imaml train omniglot-vinyals-5w5s-gd --data.root FOLDER
Time: 6 minutes on one CPU core.
Accuracy: 99.12 ± 0.13 % on 1,000 test tasks.
"""

from imaml_ext.reproduction.chains._common import for_other_tasks, on_vinyals_split

recipe = on_vinyals_split(for_other_tasks("omniglot-vinyals-5w1s-gd", ways=5, shots=5, newton=False, steps=400))
