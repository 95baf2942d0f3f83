"""Linear solvers over Hessian-vector products, one system a row."""

from imaml_ext.solvers.cg import CGError, CGResult, CGStatus, cg

__all__ = ["CGError", "CGResult", "CGStatus", "cg"]
