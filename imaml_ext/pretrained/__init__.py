"""Trained meta-parameters, and the few lines that adapt them to examples of one's own."""

from imaml_ext.errors import WeightsError
from imaml_ext.pretrained.adapted import AdaptedLearner, load_adapted
from imaml_ext.pretrained.images import read_images
from imaml_ext.pretrained.learner import FewShotLearner, learn_pictures, load_pretrained
from imaml_ext.pretrained.state_dict import torch_state_dict
from imaml_ext.pretrained.weights import Card, Weights, pretrained_names, read_weights, save_weights

__all__ = [
    "AdaptedLearner",
    "Card",
    "FewShotLearner",
    "Weights",
    "WeightsError",
    "learn_pictures",
    "load_adapted",
    "load_pretrained",
    "pretrained_names",
    "read_images",
    "read_weights",
    "save_weights",
    "torch_state_dict",
]
