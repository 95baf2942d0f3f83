"""Omniglot, 20-way 5-shot, by Newton-CG.

Command: imaml train omniglot-20w5s-newton --data.root FOLDER
Time: 156 minutes on one busy CPU core.
Accuracy: 99.15 ± 0.07 % on 1,000 test tasks, in the paper's protocol.
"""

from imaml_ext.recipes._omniglot import omniglot

recipe = omniglot(ways=20, shots=5, newton=True)
