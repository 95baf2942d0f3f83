"""Tasks to learn from: episodes, their samplers, and the data sets they come from."""

from imaml_ext.errors import DataError

from .augment import Augmentation
from .baseline import nearest_neighbour_accuracy
from .cifar import cifar_split, load_cifar
from .class_images import ClassImages
from .datasets import Dataset, ImageDataset, Sampler
from .episodes import EpisodeBatch, EpisodeIndices, EpisodeSampler
from .folder import load_folder
from .glyphs import glyph_split, load_glyphs
from .linear import LinearClosedForm, LinearSampler
from .mini_imagenet import load_mini_imagenet
from .omniglot import load_omniglot, omniglot_split
from .pictures import LabelledImages
from .registry import DATASETS, dataset_options, load_dataset
from .sheets import image_grid, sample_sheet, summary
from .sinusoid import SinusoidSampler

__all__ = [
    "DATASETS",
    "Augmentation",
    "ClassImages",
    "DataError",
    "Dataset",
    "EpisodeBatch",
    "EpisodeIndices",
    "EpisodeSampler",
    "ImageDataset",
    "LabelledImages",
    "LinearClosedForm",
    "LinearSampler",
    "Sampler",
    "SinusoidSampler",
    "cifar_split",
    "dataset_options",
    "glyph_split",
    "image_grid",
    "load_cifar",
    "load_dataset",
    "load_folder",
    "load_glyphs",
    "load_mini_imagenet",
    "load_omniglot",
    "nearest_neighbour_accuracy",
    "omniglot_split",
    "sample_sheet",
    "summary",
]
