"""Omniglot, 5-way 1-shot, by Newton-CG.

Command: imaml train omniglot-5w1s-newton --data.root FOLDER
"""

from imaml_ext.recipes._omniglot import omniglot

recipe = omniglot(ways=5, shots=1, newton=True)
