"""Tasks to learn from: episodes, their samplers, and the data sets they come from."""

from .baseline import nearest_neighbour_accuracy
from .datasets import (
    DATASETS,
    Dataset,
    ImageDataset,
    Sampler,
    image_grid,
    load_dataset,
    sample_sheet,
    summary,
)
from .episodes import ClassImages, EpisodeBatch, EpisodeIndices, EpisodeSampler, TaskData
from .errors import DataError
from .glyphs import glyph_split, load_glyphs
from .linear import LinearClosedForm, LinearSampler
from .omniglot import load_omniglot, omniglot_split
from .sinusoid import SinusoidSampler

__all__ = [
    "DATASETS",
    "ClassImages",
    "DataError",
    "Dataset",
    "EpisodeBatch",
    "EpisodeIndices",
    "EpisodeSampler",
    "ImageDataset",
    "LinearClosedForm",
    "LinearSampler",
    "Sampler",
    "SinusoidSampler",
    "TaskData",
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
