"""Omniglot, 5-way 5-shot, by Newton-CG.

Command: imaml train omniglot-5w5s-newton --data.root FOLDER
"""

from imaml_ext.recipes._omniglot import omniglot

recipe = omniglot(ways=5, shots=5, newton=True)
