"""The old name of `imaml_ext.reproduction`, for one release."""

from imaml_ext._renamed import old_module

old_module(__name__, "imaml_ext.reproduction")
