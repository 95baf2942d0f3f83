#!/usr/bin/env bash
# Checks and measures the extension on a GPU: `benchmarks/gpu_check.sh --help`, docs/benchmarks.md.
# PYTHON: the Python to use, with torch, numpy, cmake, ninja, setuptools and pytest in it.
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
