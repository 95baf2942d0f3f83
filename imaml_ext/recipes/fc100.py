"""FC100, 5-way 1-shot; `--tasks.shots 5` for 5-shot.

Test classes are unlike those of training.

Command: imaml train fc100 --data.root FOLDER
"""

from imaml_ext.data import FC100
from imaml_ext.recipes import cifar_fs
from imaml_ext.settings import changed
from imaml_ext.train.recipe import Recipe

recipe = Recipe(changed(cifar_fs.recipe.config, {"data": FC100()}))
