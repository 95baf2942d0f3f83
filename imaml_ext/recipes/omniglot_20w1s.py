"""Omniglot, 20-way 1-shot, by gradient descent.

Command: imaml train omniglot-20w1s --data.root FOLDER
"""

from imaml_ext.recipes._omniglot import omniglot

recipe = omniglot(ways=20, shots=1)
