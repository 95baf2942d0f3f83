"""Omniglot, 20-way 1-shot, 1,200 / 423 characters.

Command: imaml train omniglot-20w1s --data.root FOLDER
"""

from imaml_ext.recipes import omniglot_5w1s
from imaml_ext.settings import changed
from imaml_ext.train.recipe import Recipe

recipe = Recipe(changed(omniglot_5w1s.recipe.config, {"tasks.ways": 20, "algorithm.inner.steps": 25}))
