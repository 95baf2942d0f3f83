"""Omniglot, 20-way 1-shot, by gradient descent.

Command: imaml train omniglot-20w1s --data.root FOLDER
Time: 62 minutes on one busy CPU core.
Accuracy: 96.07 ± 0.27 % on 1,000 test tasks, in the paper's protocol.
"""

from imaml_ext.recipes._omniglot import omniglot

recipe = omniglot(ways=20, shots=1)
