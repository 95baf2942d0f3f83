"""Omniglot, 20-way 5-shot, Vinyals' split: 320 tasks from omniglot-vinyals-5w1s-gd.

Command: imaml train omniglot-vinyals-20w5s-gd --data.root FOLDER
Time: 5 minutes on one CPU core.
Accuracy: 96.77 ± 0.30 % on 200 test tasks.
"""

from imaml_ext.reproduction.chains._common import for_other_tasks, on_vinyals_split

recipe = on_vinyals_split(for_other_tasks("omniglot-vinyals-5w1s-gd", ways=20, shots=5, newton=False, steps=80))
