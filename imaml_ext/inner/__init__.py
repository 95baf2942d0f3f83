"""The inner problem, argmin_φ L(φ) + ½ Σ λ (φ − θ)², and its solvers."""

from imaml_ext.inner.gradient_descent import InnerResult, gradient_descent

__all__ = ["InnerResult", "gradient_descent"]
