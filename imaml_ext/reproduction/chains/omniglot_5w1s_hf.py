"""Omniglot, 5-way 1-shot, 1,200 / 423 characters, by Newton-CG: the published weights of that name.

Command: imaml train omniglot-5w1s-hf --data.root FOLDER
Time: 58 minutes on one busy CPU core.
Accuracy: 97.76 ± 0.26 % on 1,000 test tasks.
"""

from imaml_ext.reproduction.chains._common import from_random_parameters

recipe = from_random_parameters(newton=True, steps=5000)
