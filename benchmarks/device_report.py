"""The stamp of a GPU check: hardware and versions, and whether the extension runs on the device. Printed as JSON.

python benchmarks/device_report.py                # exit code 1 where the extension does not run on a GPU
python benchmarks/device_report.py --device cpu
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from imaml_ext import _build, _native, cg
from imaml_ext._record import build_record
from imaml_ext.train.environment import environment

ROOT = Path(__file__).resolve().parents[1]


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def digest_of_sources() -> str:
    """Of the package and its kernels: what a stamp knows them by where there is no commit."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "csrc").rglob("*.*"), *(ROOT / "imaml_ext").rglob("*.py")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def stamp(device: torch.device) -> dict[str, Any]:
    """What results are kept for: where one of these differs they are not of the same thing."""
    found = {**environment(device), "sources": digest_of_sources()}
    del found["instructions"], found["threads"]  # the first is known only once the extension is built
    for name in ("triton", "jax", "torchopt"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    try:
        found["nvcc"] = "{}.{}".format(*_build.nvcc_version(_build.find_nvcc(os.environ)))
    except _build.BuildError:
        found["nvcc"] = None
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found["gpu"] = f"{gpu.name}, {gpu.multi_processor_count} multiprocessors, {gpu.total_memory / 2**30:.0f} GiB"
        found["capability"] = f"{gpu.major}.{gpu.minor}"
        found["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return found


def why_unusable(device: torch.device) -> str | None:
    """Solves one system on the device; None where that works."""
    if _native.error is not None:
        return f"the extension does not load: {_native.error}"
    if device.type == "cuda" and not _native.native().with_cuda:
        return "the extension was built without CUDA"
    try:
        b = torch.randn(2, 1000, device=device)
        x = cg(lambda p: 2 * p, b, shift=1.0, max_iterations=2).x
        return None if torch.allclose(3 * x, b, atol=1e-5) else f"3 x is off b by {(3 * x - b).abs().max():.2g}"
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    there = device.type != "cuda" or torch.cuda.is_available()
    why = why_unusable(device) if there else "no CUDA device"
    try:
        toolkit = str(_build.toolkit_root(_build.find_nvcc(os.environ)))
    except _build.BuildError:
        toolkit = None
    report = {
        "stamp": stamp(device if there else torch.device("cpu")),
        "cuda": torch.cuda.is_available(),
        "toolkit": toolkit,
        "extension": build_record(),
        "unusable": why,
    }
    print(json.dumps(report, indent=2, ensure_ascii=False), flush=True)
    print(f"the extension runs on {device}" if why is None else f"unusable: {why}", file=sys.stderr)
    return int(why is not None)


if __name__ == "__main__":
    sys.exit(main())
