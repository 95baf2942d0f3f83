"""Omniglot, 5-way 5-shot, Vinyals' split, by Newton-CG: 1,200 tasks from omniglot-vinyals-5w1s-hf.

Command: imaml train omniglot-vinyals-5w5s-hf --data.root FOLDER
Time: 5 minutes on one CPU core.
Accuracy: 99.20 ± 0.13 % on 1,000 test tasks.
"""

from imaml_ext.reproduction.chains._common import for_other_tasks, on_vinyals_split

recipe = on_vinyals_split(for_other_tasks("omniglot-vinyals-5w1s-hf", ways=5, shots=5, newton=True, steps=300))
