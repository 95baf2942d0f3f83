"""Omniglot, 20-way 5-shot, by gradient descent.

Command: imaml train omniglot-20w5s --data.root FOLDER
"""

from imaml_ext.recipes._omniglot import omniglot

recipe = omniglot(ways=20, shots=5)
