"""mini-ImageNet, 5-way 5-shot.

Command: imaml train mini-imagenet-5w5s --data.root FOLDER
"""

from imaml_ext.recipes import mini_imagenet_5w1s
from imaml_ext.settings import changed
from imaml_ext.train.recipe import Recipe

recipe = Recipe(changed(mini_imagenet_5w1s.recipe.config, {"tasks.shots": 5}))
