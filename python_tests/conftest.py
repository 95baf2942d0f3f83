"""What of the tests can run here.

Tests marked `cuda` run where there is a CUDA device and an extension built for it, and say elsewhere why not.

`--native FILE` tests that compiled part in place of the installed one: csrc/tests/cuda_on_cpu makes such files, in
which the CUDA kernels, run by the CPU, are the ops of CPU tensors. Tests marked `cpu_kernels` are about csrc/cpu or
about the installed file, and say nothing of such a one; `many_iterations` are left out there unless asked for.
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--native", metavar="FILE", help="the compiled part to test, in place of the installed one")
    parser.addoption("--many-iterations", action="store_true", help="under --native, the long solves too (minutes)")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--native")
    if path is None:
        return
    os.environ.setdefault("CUDA_ON_CPU_SEED", str(random.randrange(1_000_000)))
    spec = importlib.util.spec_from_file_location("imaml_ext._C", path)
    if spec is None or spec.loader is None:
        raise pytest.UsageError(f"--native must be an extension module, got {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["imaml_ext._C"] = module


def pytest_report_header(config: pytest.Config) -> str | None:
    path = config.getoption("--native")
    return f"native: {path}, CUDA_ON_CPU_SEED={os.environ['CUDA_ON_CPU_SEED']}" if path is not None else None


def _why_no_cuda() -> str | None:
    from imaml_ext import _native

    if not torch.cuda.is_available():
        return "no CUDA device" if torch.version.cuda else "torch is a build without CUDA"
    if _native.error is not None:
        return f"the extension does not load: {_native.error}"
    return None if _native.native().with_cuda else "the extension was built without CUDA"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    emulated = config.getoption("--native") is not None
    reasons = {
        "cuda": _why_no_cuda(),
        "cpu_kernels": "about the CPU's kernels" if emulated else None,
        "many_iterations": (
            "thousands of steps, each thread by thread: --many-iterations"
            if emulated and not config.getoption("--many-iterations")
            else None
        ),
    }
    for mark, reason in reasons.items():
        if reason is not None:
            for item in items:
                if item.get_closest_marker(mark):
                    item.add_marker(pytest.mark.skip(reason=reason))
