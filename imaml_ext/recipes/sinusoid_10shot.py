"""Sinusoid regression from 10 points.

Command: imaml train sinusoid-10shot
Time: 97 seconds on one CPU core.
Accuracy: mean squared error 0.27 ± 0.06 on 1,000 test tasks.
"""

from imaml_ext.recipes import sinusoid_5shot
from imaml_ext.settings import changed
from imaml_ext.train.recipe import Recipe

recipe = Recipe(changed(sinusoid_5shot.recipe.config, {"tasks.shots": 10}))
