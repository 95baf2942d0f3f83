"""imaml_ext: batched conjugate gradients over Hessian-vector products, and meta-learning with implicit gradients."""

from imaml_ext._native import NativeUnavailableError
from imaml_ext._version import __version__
from imaml_ext.solvers import CGError, CGResult, CGStatus, cg

__all__ = ["CGError", "CGResult", "CGStatus", "NativeUnavailableError", "__version__", "cg"]
