"""Omniglot, 20-way 1-shot, Vinyals' split, by Newton-CG: 3,200 tasks from omniglot-vinyals-5w1s-hf.

Command: imaml train omniglot-vinyals-20w1s-hf --data.root FOLDER
Time: 13 minutes on one CPU core.
Accuracy: 92.73 ± 0.32 % on 500 test tasks.
"""

from imaml_ext.reproduction.chains._common import for_other_tasks, on_vinyals_split

recipe = on_vinyals_split(for_other_tasks("omniglot-vinyals-5w1s-hf", ways=20, shots=1, newton=True, steps=800))
