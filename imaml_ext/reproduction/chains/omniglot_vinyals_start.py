"""Omniglot, 5-way 1-shot, Vinyals' split: what the other recipes of this split begin with.

Command: imaml train omniglot-vinyals-start --data.root FOLDER
Time: 54 minutes on one CPU core.
Accuracy: 96.69 ± 0.25 % on 2,000 test tasks.
"""

from imaml_ext.reproduction.chains._common import from_random_parameters, on_vinyals_split

recipe = on_vinyals_split(from_random_parameters(newton=False, steps=5500))
