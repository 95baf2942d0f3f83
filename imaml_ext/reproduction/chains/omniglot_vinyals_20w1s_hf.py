"""Omniglot, 20-way 1-shot, Vinyals' split, NewtonCG: 3,200 tasks from omniglot-vinyals-5w1s-hf.

Command: imaml train omniglot-vinyals-20w1s-hf --data.root FOLDER
Time: 13 minutes on one CPU core.
Accuracy: 92.73 ± 0.32 % on 500 test tasks.
"""

from imaml_ext.reproduction.chains._common import on_larger_tasks

recipe = on_larger_tasks("omniglot-vinyals-5w1s-hf", 800, ways=20, shots=1, newton=True, changes=VINYALS)
