"""FC100, 5-way 5-shot, by the stages of cifar-fs-5w5s.

Test classes are unlike those of training.

Command: imaml train fc100-5w5s --data.root FOLDER
Time: 90 minutes on one busy CPU core.
Accuracy: 49.0 ± 0.6 % on 1,000 test tasks.
"""

from imaml_ext.data import FC100
from imaml_ext.recipes import cifar_fs_5w5s
from imaml_ext.settings import changed
from imaml_ext.train.recipe import Recipe

_photographs = cifar_fs_5w5s.recipe
recipe = Recipe(changed(_photographs.config, {"data": FC100()}), _photographs.stages)
