"""Omniglot, 5-way 1-shot, 1,200 / 423 characters: 112,000 tasks more from the weights omniglot-5w1s-gd.

Command: imaml train omniglot-5w1s-gd-shared --data.root FOLDER
Time: 53 minutes on one CPU core.
Accuracy: 98.49 ± 0.17 % on 2,000 test tasks.
"""

from imaml_ext.reproduction.chains._common import GradientDescent, from_weights

recipe = from_weights(
    "omniglot-5w1s-gd", 7000, seed=1, changes={"algorithm.inner": GradientDescent(8, lr=0.2), "outer.lr": 2e-3}
)
