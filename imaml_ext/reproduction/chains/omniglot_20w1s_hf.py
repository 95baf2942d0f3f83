"""Omniglot, 20-way 1-shot, 1,200 / 423 characters, by Newton-CG: the published weights of that name.

Command: imaml train omniglot-20w1s-hf --data.root FOLDER
Time: 82 minutes on one busy CPU core.
Accuracy: 93.77 ± 0.16 % on 2,000 test tasks.
"""

from imaml_ext.reproduction.chains._common import from_random_parameters

recipe = from_random_parameters(ways=20, newton=True, steps=7000)
