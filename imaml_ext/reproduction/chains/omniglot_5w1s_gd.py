"""Omniglot, 5-way 1-shot, 1,200 / 423 characters: the published weights of that name.

Command: imaml train omniglot-5w1s-gd --data.root FOLDER
Time: 80 minutes on one CPU core.
Accuracy: 98.42 ± 0.14 % on 2,000 test tasks.
"""

from imaml_ext.reproduction.chains._common import from_random_parameters

recipe = from_random_parameters(newton=False, steps=36_000)
