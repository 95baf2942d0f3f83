"""Solvers for other libraries: one module per library, which is imported when its solver is used."""
