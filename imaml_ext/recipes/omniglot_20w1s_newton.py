"""Omniglot, 20-way 1-shot, by Newton-CG.

Command: imaml train omniglot-20w1s-newton --data.root FOLDER
"""

from imaml_ext.recipes._omniglot import omniglot

recipe = omniglot(ways=20, shots=1, newton=True)
