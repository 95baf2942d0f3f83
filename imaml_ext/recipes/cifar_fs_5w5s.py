"""CIFAR-FS, 5-way 5-shot.

Command: imaml train cifar-fs-5w5s --data.root FOLDER
"""

from imaml_ext.recipes import cifar_fs_5w1s
from imaml_ext.settings import changed
from imaml_ext.train.recipe import Recipe

recipe = Recipe(changed(cifar_fs_5w1s.recipe.config, {"tasks.shots": 5}))
