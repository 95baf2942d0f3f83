"""FC100, 5-way 1-shot: test classes unlike those of training.

Command: imaml train fc100-5w1s --data.root FOLDER
"""

from imaml_ext.data import FC100
from imaml_ext.recipes import cifar_fs_5w1s
from imaml_ext.settings import changed
from imaml_ext.train.recipe import Recipe

recipe = Recipe(changed(cifar_fs_5w1s.recipe.config, {"data": FC100()}))
