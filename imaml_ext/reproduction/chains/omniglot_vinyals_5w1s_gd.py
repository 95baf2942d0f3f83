"""Omniglot, 5-way 1-shot, Vinyals' split: 6,400 tasks from omniglot-vinyals-start.

Command: imaml train omniglot-vinyals-5w1s-gd --data.root FOLDER
Time: 5 minutes on one CPU core.
Accuracy: 97.44 ± 0.20 % on 2,000 test tasks.
"""

from imaml_ext.reproduction.chains._common import from_weights

recipe = from_weights("omniglot-vinyals-start", 400, changes={**VALIDATED_VINYALS, "evaluation.every": 200})
