"""Picture files as arrays: one way to read them, for training, packing, `imaml predict` and your own code."""

from imaml_ext.pictures.decode import SUFFIXES
from imaml_ext.pictures.reading import READING_VERSION, Reading, read_pictures
from imaml_ext.pictures.stored import StoredPicture

__all__ = ["READING_VERSION", "SUFFIXES", "Reading", "StoredPicture", "read_pictures"]
