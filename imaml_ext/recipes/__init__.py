"""Holds the recipes of `imaml train`, one per file; the file `omniglot_5w1s.py` is the recipe `omniglot-5w1s`.

A recipe file is a Python file with a variable `recipe`. The first line of its docstring is the summary that
`imaml train --help` shows; its command, and time and accuracy where they have been measured, follow.
"""
