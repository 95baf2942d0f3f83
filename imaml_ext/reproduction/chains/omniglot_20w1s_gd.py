"""Omniglot, 20-way 1-shot, 1,200 / 423 characters: 2,400 tasks from omniglot-5w1s-gd-longer.

Command: imaml train omniglot-20w1s-gd --data.root FOLDER
Time: 9 minutes on one CPU core.
Accuracy: 94.97 ± 0.28 % on 500 test tasks.
"""

from imaml_ext.reproduction.chains._common import for_other_tasks

recipe = for_other_tasks("omniglot-5w1s-gd-longer", ways=20, shots=1, newton=False, steps=600)
