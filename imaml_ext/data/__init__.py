"""Tasks to learn from: episodes, their samplers, and the data sets they come from."""

from imaml_ext.batch import EpisodeBatch
from imaml_ext.data.augment import Augmentation
from imaml_ext.data.cifar import FC100, CifarFS, cifar_split
from imaml_ext.data.class_images import ClassImages
from imaml_ext.data.cub import Cub
from imaml_ext.data.datasets import Dataset, ImageDataset, Sampler
from imaml_ext.data.episodes import EpisodeSampler
from imaml_ext.data.folder import Folder
from imaml_ext.data.glyphs import Glyphs, glyph_split, load_glyphs
from imaml_ext.data.linear import Linear, LinearClosedForm, LinearSampler
from imaml_ext.data.mini_imagenet import MiniImageNet
from imaml_ext.data.omniglot import Omniglot, load_omniglot, omniglot_split
from imaml_ext.data.sheets import image_grid, nearest_neighbour_accuracy, sample_sheet, summary
from imaml_ext.data.sinusoid import Sinusoid, SinusoidSampler
from imaml_ext.data.source import DataSource, load_dataset
from imaml_ext.data.splits import RecordedClasses
from imaml_ext.data.tiered_imagenet import TieredImageNet
from imaml_ext.errors import DataError

__all__ = [
    "FC100",
    "Augmentation",
    "CifarFS",
    "ClassImages",
    "Cub",
    "DataError",
    "DataSource",
    "Dataset",
    "EpisodeBatch",
    "EpisodeSampler",
    "Folder",
    "Glyphs",
    "ImageDataset",
    "Linear",
    "LinearClosedForm",
    "LinearSampler",
    "MiniImageNet",
    "Omniglot",
    "RecordedClasses",
    "Sampler",
    "Sinusoid",
    "SinusoidSampler",
    "TieredImageNet",
    "cifar_split",
    "glyph_split",
    "image_grid",
    "load_dataset",
    "load_glyphs",
    "load_omniglot",
    "nearest_neighbour_accuracy",
    "omniglot_split",
    "sample_sheet",
    "summary",
]
