"""Omniglot, 20-way 5-shot, Vinyals' split, by Newton-CG: 240 tasks from omniglot-vinyals-5w1s-hf.

Command: imaml train omniglot-vinyals-20w5s-hf --data.root FOLDER
Time: 5 minutes on one CPU core.
Accuracy: 97.43 ± 0.29 % on 200 test tasks.
"""

from imaml_ext.reproduction.chains._common import for_other_tasks, on_vinyals_split

recipe = on_vinyals_split(for_other_tasks("omniglot-vinyals-5w1s-hf", ways=20, shots=5, newton=True, steps=60))
