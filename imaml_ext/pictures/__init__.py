"""Picture files as arrays: one way to read them, for training, packing, `imaml predict` and your own code."""

from imaml_ext.pictures.reading import Reading, read_pictures

__all__ = ["Reading", "read_pictures"]
