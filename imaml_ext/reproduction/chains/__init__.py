"""Holds the recipes of the published Omniglot weights; most begin with the weights that another has left."""
