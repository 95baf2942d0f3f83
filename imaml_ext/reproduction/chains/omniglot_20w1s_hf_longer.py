"""Omniglot, 20-way 1-shot, 1,200 / 423, by Newton-CG: 3,200 tasks from omniglot-5w1s-hf-longer.

Command: imaml train omniglot-20w1s-hf-longer --data.root FOLDER
Time: 13 minutes on one CPU core.
Accuracy: 95.66 ± 0.25 % on 500 test tasks.
"""

from imaml_ext.reproduction.chains._common import for_other_tasks

recipe = for_other_tasks("omniglot-5w1s-hf-longer", ways=20, shots=1, newton=True, steps=800)
