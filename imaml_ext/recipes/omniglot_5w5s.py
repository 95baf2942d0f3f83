"""Omniglot, 5-way 5-shot, 1,200 / 423 characters.

Command: imaml train omniglot-5w5s --data.root FOLDER
"""

from imaml_ext.recipes import omniglot_5w1s
from imaml_ext.settings import changed
from imaml_ext.train.recipe import Recipe

recipe = Recipe(changed(omniglot_5w1s.recipe.config, {"tasks.shots": 5}))
