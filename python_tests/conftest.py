"""What of the tests can run here.

Inputs are drawn afresh in every session. Its header, and its end if a test failed, name its seed; `--seed` takes it: a
test draws the same then, alone or among others.

Tests marked `cuda` run where there is a CUDA device and an extension built for it, and say elsewhere why not. Those
marked `opcheck` too ask about schemas, which a device does not change: `-m "cuda and not opcheck"` is quicker there.

`--native FILE` tests that compiled part in place of the installed one: cpp_tests/cuda_on_cpu makes such files, in
which the CUDA kernels, run by the CPU, are the ops of CPU tensors. Tests marked `cpu_kernels` are about the CPU's
kernels or about the installed file, and say nothing of such a one; `many_iterations` are left out there unless asked
for.
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import zlib

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, metavar="N", help="draw the inputs that a session of this seed has drawn")
    parser.addoption("--native", metavar="FILE", help="the compiled part to test, in place of the installed one")
    parser.addoption("--many-iterations", action="store_true", help="under --native, the long solves too (minutes)")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:  # before pytest-xdist hands the options to its workers
        config.option.seed = random.randrange(1_000_000)
    path = config.getoption("--native")
    if path is None:
        return
    os.environ.setdefault("CUDA_ON_CPU_SEED", str(config.option.seed))
    spec = importlib.util.spec_from_file_location("imaml_ext._C", path)
    if spec is None or spec.loader is None:
        raise pytest.UsageError(f"--native must be an extension module, got {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["imaml_ext._C"] = module


def pytest_report_header(config: pytest.Config) -> list[str]:
    path = config.getoption("--native")
    lines = [f"seed: {config.option.seed}"]
    return lines if path is None else [*lines, f"native: {path}, CUDA_ON_CPU_SEED={os.environ['CUDA_ON_CPU_SEED']}"]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    seed = zlib.crc32(f"{item.config.option.seed} {item.nodeid}".encode())
    torch.manual_seed(seed)
    random.seed(seed)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode, config: pytest.Config
) -> None:
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        terminalreporter.write_line(f"the same inputs again: --seed {config.option.seed}")


def _why_no_cuda() -> str | None:
    from imaml_ext import _native

    if not torch.cuda.is_available():
        return "no CUDA device" if torch.version.cuda else "torch is a build without CUDA"
    if _native.error is not None:
        return f"the extension does not load: {_native.error}"
    return None if _native.native().with_cuda else "the extension was built without CUDA"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
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
