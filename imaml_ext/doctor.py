"""`imaml doctor`: versions, how the extension was built, what it can use, and what to do about whatever is missing."""

from __future__ import annotations

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from imaml_ext import _build, _native
from imaml_ext._record import REBUILD, build_record, local_version, unfit
from imaml_ext._version import __version__
from imaml_ext.errors import DataError

_OK, _NOTE, _BAD = "ok", "--", "!!"


class _Report:
    """Prints findings as they come, and remembers whether one of them was bad."""

    def __init__(self) -> None:
        self.healthy = True

    def section(self, title: str) -> None:
        print(f"\n{title}")

    def line(self, label: str, finding: str, *, state: str = _OK, advice: str = "") -> None:
        self.healthy &= state != _BAD
        print(f"  {state} {label:<16} {finding}", flush=True)
        if advice:
            print(f"     {'':<16} -> {advice}", flush=True)


def doctor() -> int:
    """Shows versions, how the extension was built, what it can use, and what to do about whatever is missing.

    Returns 0 if everything that training needs works, else 1.
    """
    report = _Report()
    print("imaml doctor     ok: fine   --: optional or worth knowing   !!: must be put right")
    record = build_record()
    _versions(report)
    _extension(report, record)
    _processors(report, record)
    _packages(report)
    _data(report)
    where = "" if record is None or record["cuda"] or not torch.version.cuda else " on the CPU"
    sound = f"\nEverything that training{where} needs works."
    print(sound if report.healthy else "\nPut right what is marked !! first.")
    return 0 if report.healthy else 1


def architecture_serves(architectures: str, capability: tuple[int, int]) -> bool:
    """Tells whether code for a TORCH_CUDA_ARCH_LIST such as "8.0;9.0+PTX" runs on this compute capability."""
    for architecture in architectures.replace(" ", ";").split(";"):
        number, _, ptx = architecture.partition("+")
        major, _, minor = number.rstrip("af").partition(".")
        if not (major.isdigit() and minor.isdigit()):
            return True  # a name such as "Hopper": not for us to judge
        built = (int(major), int(minor))
        # Machine code runs on later minors of its generation, PTX on everything later.
        if (built[0] == capability[0] and built <= capability) or (ptx and built <= capability):
            return True
    return False


def _versions(report: _Report) -> None:
    report.section("Versions")
    report.line("imaml_ext", __version__ + local_version())
    report.line("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    flavour = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    if torch.version.hip:
        flavour = f"ROCm {torch.version.hip}"
    report.line("torch", f"{torch.__version__} ({flavour})")
    for name in ("numpy", "matplotlib", "tyro", "rich", "safetensors", "pillow", "fonttools"):
        try:
            report.line(name, version(name))
        except PackageNotFoundError:
            report.line(name, "not installed", state=_BAD, advice=f"pip install {name}")
    report.line("C++ compiler", _build.compiler_version() or "none; only a build needs one")
    try:
        nvcc = _build.find_nvcc(os.environ)
        number = "{}.{}".format(*_build.nvcc_version(nvcc))
        report.line("nvcc", f"{number}: {nvcc}, of the toolkit {_build.toolkit_root(nvcc)}")
    except _build.BuildError as error:
        report.line("nvcc", str(error), state=_NOTE if not torch.version.cuda else _OK)


def _extension(report: _Report, record: dict[str, Any] | None) -> None:
    report.section("Extension")
    if _native.error is None:
        report.line("compiled part", "loads")
    else:
        report.line("compiled part", str(_native.error), state=_BAD)
    if record is None:
        report.line("built", "no record of the build", state=_NOTE if _native.error is None else _BAD)
        return
    what = f"with CUDA for {record['cuda_architectures']}" if record["cuda"] else "CPU only"
    report.line("built", what + (", without optimisation" if record["debug"] else ""))
    report.line("because", f"IMAML_EXT_CUDA={record['requested']}: {record['reason']}")
    same = not unfit(record, torch=torch.__version__, cuda=torch.version.cuda)
    report.line(
        "built against",
        f"torch {record['torch']}, {record['compiler']}" + (f", nvcc {record['nvcc']}" if record["nvcc"] else ""),
        state=_OK if same else _BAD,
        advice="" if same else f"torch is now {torch.__version__}; {REBUILD}",
    )
    if torch.version.cuda and not record["cuda"]:
        _cuda_now(report, record)


def _cuda_now(report: _Report, record: dict[str, Any]) -> None:
    """Prints what a build today would do for CUDA, where the one that is there has none, and torch has."""
    if record["requested"] == "0":
        finding, advice = "no CUDA tensor can be used, though torch has CUDA", "a wheel or a build with CUDA can"
        report.line("CUDA", finding, state=_NOTE, advice=advice)
        return
    try:
        decision = _build.decide_for_torch()
    except _build.BuildError as error:
        finding, advice = str(error), ""
    else:
        finding, advice = f"a build today would be {decision}", REBUILD
        if not decision.build:
            finding = f"still not possible: {decision.reason}"
            advice = f"install nvcc of CUDA {torch.version.cuda} or set CUDA_HOME, then {REBUILD}"
    report.line("CUDA now", finding, state=_NOTE, advice=advice)


def _processors(report: _Report, record: dict[str, Any] | None) -> None:
    report.section("Can use")
    if _native.error is None:
        report.line("instructions", str(_native.native().cpu_capability()))
    wanted = os.environ.get("OMP_NUM_THREADS")
    limit = f" (OMP_NUM_THREADS={wanted})" if wanted else ""
    report.line("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors{limit}")
    known = {"gloo": "is_gloo_available", "NCCL": "is_nccl_available"}
    job = torch.distributed
    backends = [name for name, test in known.items() if job.is_available() and getattr(job, test)()]
    report.line("torchrun", f"over {', '.join(backends)}" if backends else "no", state=_OK if backends else _NOTE)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            _gpu(report, index, record)
    else:
        why, advice = "torch sees none", "nvidia-smi tells whether the driver does"
        if not torch.version.cuda:
            why, advice = "torch is a build without CUDA", "for a GPU, install a torch with CUDA"
        report.line("GPU", f"none: {why}", state=_NOTE, advice=advice)


def _gpu(report: _Report, index: int, record: dict[str, Any] | None) -> None:
    gpu = torch.cuda.get_device_properties(index)
    finding = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
    state, advice = _OK, ""
    if record is not None and not record["cuda"]:
        finding, state, advice = finding + ": the extension has no CUDA code", _NOTE, "see above"
    elif record is not None and not architecture_serves(record["cuda_architectures"], (gpu.major, gpu.minor)):
        finding += f": not served by code for {record['cuda_architectures']}"
        state, advice = _BAD, f"build again with TORCH_CUDA_ARCH_LIST={gpu.major}.{gpu.minor}"
    report.line(f"GPU {index}", finding, state=state, advice=advice)


def _packages(report: _Report) -> None:
    report.section("Optional packages")
    uses = {"torchvision": ("to download Omniglot", "vision"), "tensorboard": ("to write its events", "tensorboard")}
    for name, (use, extra) in uses.items():
        try:
            importlib.import_module(name)
            report.line(name, version(name))
        except Exception as error:  # a torchvision built for another torch fails with RuntimeError or OSError
            finding, advice = "not installed", f"{use}: pip install 'imaml-ext[{extra}]'"
            if not (isinstance(error, ModuleNotFoundError) and error.name == name):
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                finding = f"installed, but cannot be imported: {reason}"
                advice = f"install the {name} that belongs to torch {torch.__version__}; only what needs it is affected"
            report.line(name, finding, state=_NOTE, advice=advice)


def _data(report: _Report) -> None:
    from imaml_ext.data import load_glyphs, load_omniglot

    report.section("Data")
    root = os.environ.get("IMAML_DATA_ROOT")
    report.line("IMAML_DATA_ROOT", root or "not set", state=_OK if root else _NOTE)
    for name, load, missing in (("glyphs", load_glyphs, _BAD), ("omniglot", load_omniglot, _BAD if root else _NOTE)):
        try:
            classes, drawings = load().shape[:2]
            report.line(name, f"{classes:,} classes of {drawings} drawings")
        except DataError as error:
            report.line(name, str(error), state=missing)
