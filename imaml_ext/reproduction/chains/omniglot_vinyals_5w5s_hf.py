"""Omniglot, 5-way 5-shot, Vinyals' split, NewtonCG: 1,200 tasks from omniglot-vinyals-5w1s-hf.

Command: imaml train omniglot-vinyals-5w5s-hf --data.root FOLDER
Time: 5 minutes on one CPU core.
Accuracy: 99.20 ± 0.13 % on 1,000 test tasks.
"""

from imaml_ext.reproduction.chains._common import on_larger_tasks

recipe = on_larger_tasks("omniglot-vinyals-5w1s-hf", 300, ways=5, shots=5, newton=True, changes=VINYALS)
