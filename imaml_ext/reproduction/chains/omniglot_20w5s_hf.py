"""Omniglot, 20-way 5-shot, 1,200 / 423, by Newton-CG: 240 tasks from omniglot-5w1s-hf-longer.

Command: imaml train omniglot-20w5s-hf --data.root FOLDER
Time: 5 minutes on one CPU core.
Accuracy: 98.78 ± 0.20 % on 200 test tasks.
"""

from imaml_ext.reproduction.chains._common import for_other_tasks

recipe = for_other_tasks("omniglot-5w1s-hf-longer", ways=20, shots=5, newton=True, steps=60)
