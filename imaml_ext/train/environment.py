"""The stamp of a result: the versions and the hardware that it comes from."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch

from imaml_ext import _native, ops
from imaml_ext._version import __version__


def environment(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Returns versions and hardware as plain JSON values; nothing that names a machine or a user."""
    stamp: dict[str, Any] = {
        "imaml_ext": __version__,
        "commit": _source_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "instructions": None if _native.error else ops.cpu_capability(),  # of imaml_ext's own kernels
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if processes > 1:
        stamp["processes"] = processes
    if device.type == "cuda":
        stamp["gpu"] = torch.cuda.get_device_name(device)
        stamp["cuda"] = torch.version.cuda
    return stamp


def _source_commit() -> str:
    """Returns the commit that the package is imported from, with a + where its files differ; "" outside a checkout."""
    package = Path(__file__).parents[1]
    if not (package.parent / ".git").exists():
        return ""
    command = ["git", "-C", str(package), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
