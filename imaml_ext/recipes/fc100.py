"""FC100, 5-way 1-shot.

Test classes are unlike those of training.

Command: imaml train fc100 --data.root FOLDER
Time: 53 minutes on one busy CPU core.
Accuracy: 35.6 ± 0.5 % on 1,000 test tasks.
"""

from imaml_ext.data import FC100
from imaml_ext.recipes import cifar_fs
from imaml_ext.settings import changed
from imaml_ext.train.recipe import Recipe

recipe = Recipe(changed(cifar_fs.recipe.config, {"data": FC100()}))
