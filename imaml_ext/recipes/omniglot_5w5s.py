"""Omniglot, 5-way 5-shot, by gradient descent.

Command: imaml train omniglot-5w5s --data.root FOLDER
"""

from imaml_ext.recipes._omniglot import omniglot

recipe = omniglot(ways=5, shots=5)
