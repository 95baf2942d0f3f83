"""What is compiled, and why: the CUDA decision, made once for setup.py, CMakeLists.txt and `imaml doctor`.

Standard library only, and no import of the rest of the package: setup.py and CMakeLists.txt run this file by its path,
before there is a package. `python imaml_ext/_build.py` prints the decision for the torch of that Python.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# One architecture a generation: code for 8.0 runs on every 8.x. GPUs newer than the last are served by its PTX, which
# their driver compiles at the first launch.
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "9.0")

_PROBE = """\
#include <cuda_runtime.h>
__global__ void fill(float* x, float value) { x[threadIdx.x] = value; }
extern "C" int probe(float* x, void* stream) {
  fill<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(x, 1.0f);
  return static_cast<int>(cudaGetLastError());
}
"""


class BuildError(RuntimeError):
    """The build that was asked for is impossible here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Toolkit:
    """A CUDA toolkit whose nvcc compiles and links on this machine."""

    nvcc: Path
    root: Path  # what CUDA_HOME must be: root/bin/nvcc exists
    version: tuple[int, int]

    @property
    def version_string(self) -> str:
        return "{}.{}".format(*self.version)


@dataclass(frozen=True, kw_only=True)
class CudaDecision:
    """Whether the CUDA sources are part of the build, in words (`reason`) and with what they are compiled."""

    build: bool
    requested: str  # IMAML_EXT_CUDA: "auto", "0" or "1"
    reason: str
    toolkit: Toolkit | None = None
    architectures: str | None = None  # a TORCH_CUDA_ARCH_LIST, "8.0;9.0+PTX"

    def __str__(self) -> str:
        what = f"with CUDA for {self.architectures}" if self.build else "CPU only"
        return f"{what} (IMAML_EXT_CUDA={self.requested}: {self.reason})"


def _run(command: Sequence[str | Path], *, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs a tool; one that cannot even be started answers with status 127 and the reason as its output."""
    try:
        return subprocess.run(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, stdout=str(error))


def find_nvcc(environ: Mapping[str, str]) -> Path:
    """The nvcc to use: CUDA_HOME's (or CUDA_PATH's) if one is set, else the PATH's, else /usr/local/cuda's.

    Raises:
        BuildError: there is none.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := environ.get(variable):
            nvcc = Path(home) / "bin" / "nvcc"
            if not os.access(nvcc, os.X_OK):
                raise BuildError(f"{variable}={home} holds no bin/nvcc")
            return nvcc
    found = shutil.which("nvcc", path=environ.get("PATH", os.defpath)) or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        raise BuildError("no nvcc: neither CUDA_HOME, nor the PATH, nor /usr/local/cuda has one")
    return Path(found)


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    """The CUDA version of `nvcc`.

    Raises:
        BuildError: it does not say.
    """
    output = _run([nvcc, "--version"]).stdout
    if match := re.search(r"release (\d+)\.(\d+)", output):
        return int(match[1]), int(match[2])
    raise BuildError(f"{nvcc} does not work: `nvcc --version` says {_last_line(output)!r}")


def toolkit_root(nvcc: Path) -> Path:
    """The folder of the toolkit behind `nvcc`, as nvcc itself tells it.

    The nvcc on the PATH is often a script or a link outside the toolkit, whose grandparent (what torch would take for
    CUDA_HOME) holds no CUDA at all. A dry run prints `#$ TOP=<root>`.
    """
    output = _run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]).stdout
    if match := re.search(r"^#\$ TOP=(.+?)\s*$", output, flags=re.MULTILINE):
        return Path(match[1].strip("\"'")).resolve()
    return nvcc.resolve().parent.parent


def probe_toolkit(nvcc: Path, environ: Mapping[str, str]) -> Toolkit:
    """Asks nvcc for its root and version and has it compile and link a kernel.

    Raises:
        BuildError: it does not work, in which case the message carries the last line that it said.
    """
    version = nvcc_version(nvcc)
    root = toolkit_root(nvcc)
    if not os.access(root / "bin" / "nvcc", os.X_OK):
        raise BuildError(f"{nvcc} belongs to the toolkit {root}, which holds no bin/nvcc; set CUDA_HOME")
    with tempfile.TemporaryDirectory(prefix="imaml_ext-nvcc-") as folder:
        source = Path(folder) / "probe.cu"
        source.write_text(_PROBE, encoding="utf-8")
        nvcc_flags = ["-std=c++20", "-shared", "--cudart", "shared", "-Xcompiler", "-fPIC"]
        if compiler := environ.get("CXX"):  # as CMakeLists.txt will
            nvcc_flags += ["-ccbin", shlex.split(compiler)[-1]]
        result = _run([root / "bin" / "nvcc", *nvcc_flags, source, "-o", Path(folder) / "probe.so"])
    if result.returncode != 0:
        raise BuildError(f"{nvcc} cannot compile and link a trivial kernel: {_last_line(result.stdout)}")
    return Toolkit(nvcc=nvcc, root=root, version=version)


def choose_architectures(
    nvcc: Path, *, capabilities: Sequence[tuple[int, int]] = (), environ: Mapping[str, str]
) -> str:
    """The GPU architectures to compile for, as a TORCH_CUDA_ARCH_LIST.

    That variable if it is set; else those of the GPUs of this machine (`capabilities`); else one a generation
    (DEFAULT_ARCHITECTURES). Only what nvcc knows is chosen, and the last is embedded as PTX too.
    """
    if explicit := environ.get("TORCH_CUDA_ARCH_LIST"):
        return explicit
    names = re.findall(r"compute_(\d+)(\d)\b", _run([nvcc, "--list-gpu-arch"]).stdout)
    known = sorted((int(major), int(minor)) for major, minor in names)
    if not known:
        raise BuildError(f"`{nvcc} --list-gpu-arch` lists no architecture; set TORCH_CUDA_ARCH_LIST")
    # Binaries run on later minors of their generation: a GPU newer than nvcc takes the best that nvcc knows, with PTX.
    present = {max((arch for arch in known if arch <= capability), default=known[0]) for capability in capabilities}
    default = {arch for arch in known if "{}.{}".format(*arch) in DEFAULT_ARCHITECTURES}
    chosen = sorted(present or default or {known[0]})
    return ";".join("{}.{}".format(*arch) for arch in chosen) + "+PTX"


def decide_cuda(
    *,
    torch_cuda: str | None,
    torch_hip: str | None = None,
    capabilities: Sequence[tuple[int, int]] = (),
    environ: Mapping[str, str] = os.environ,
) -> CudaDecision:
    """Whether to build the CUDA sources.

    IMAML_EXT_CUDA=auto (the default) builds them where torch has CUDA and a working nvcc of the same major version is
    found, with or without a GPU in the machine; 0 never does; 1 does or fails.

    Args:
        torch_cuda: `torch.version.cuda`, None for a CPU build of torch.
        torch_hip: `torch.version.hip`.
        capabilities: compute capabilities of the GPUs that torch sees.
        environ: IMAML_EXT_CUDA, CUDA_HOME, CUDA_PATH, PATH, CXX and TORCH_CUDA_ARCH_LIST are read.

    Raises:
        BuildError: IMAML_EXT_CUDA=1 and CUDA cannot be built, or IMAML_EXT_CUDA is none of auto, 0, 1.
    """
    requested = environ.get("IMAML_EXT_CUDA", "").strip().lower() or "auto"
    if requested not in ("auto", "0", "1"):
        raise BuildError(f"IMAML_EXT_CUDA must be auto, 0 or 1, got {requested!r}")
    if requested == "0":
        return CudaDecision(build=False, requested=requested, reason="asked for")
    try:
        if torch_hip is not None:
            raise BuildError(f"torch is built for ROCm {torch_hip}, and the kernels are CUDA's")
        if torch_cuda is None:
            try:
                aside = f"; {find_nvcc(environ)} is left unused"
            except BuildError:
                aside = ""
            raise BuildError(f"torch is a build without CUDA{aside}")
        toolkit = probe_toolkit(find_nvcc(environ), environ)
        if toolkit.version[0] != int(torch_cuda.split(".")[0]):
            raise BuildError(
                f"{toolkit.nvcc} is CUDA {toolkit.version_string} and torch is built for CUDA {torch_cuda}: "
                "the major versions must agree"
            )
        architectures = choose_architectures(toolkit.nvcc, capabilities=capabilities, environ=environ)
    except BuildError as error:
        if requested == "1":
            raise BuildError(f"IMAML_EXT_CUDA=1, but CUDA cannot be built: {error}") from None
        return CudaDecision(build=False, requested=requested, reason=str(error))
    reason = f"torch is built for CUDA {torch_cuda} and {toolkit.nvcc} is CUDA {toolkit.version_string}"
    return CudaDecision(build=True, requested=requested, reason=reason, toolkit=toolkit, architectures=architectures)


def decide_for_torch(environ: Mapping[str, str] = os.environ) -> CudaDecision:
    """`decide_cuda` for the torch that this Python imports."""
    import torch

    devices = range(torch.cuda.device_count()) if torch.version.cuda else ()
    return decide_cuda(
        torch_cuda=torch.version.cuda,
        torch_hip=torch.version.hip,
        capabilities=[torch.cuda.get_device_capability(device) for device in devices],
        environ=environ,
    )


def compiler_version(environ: Mapping[str, str] = os.environ) -> str:
    """The first line of the C++ compiler's `--version` ($CXX, else c++), or what is wrong with it."""
    result = _run([*shlex.split(environ.get("CXX") or "c++"), "--version"])
    return next((line.strip() for line in result.stdout.splitlines() if line.strip()), "unknown")


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing")


def _main() -> int:
    """Prints, as JSON, what CMakeLists.txt must know and what `imaml doctor` shows of a build."""
    import json
    import sys

    sys.path.pop(0)  # this script's own folder, the package: its modules are not top-level ones
    import torch
    from torch.utils import cpp_extension

    try:
        decision = decide_for_torch()
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    answer = {
        "decision": str(decision),
        "include_dirs": ";".join(cpp_extension.include_paths()),
        "library_dir": cpp_extension.TORCH_LIB_PATH,
        "cxx11_abi": int(torch.compiled_with_cxx11_abi()),
        "cuda_root": str(decision.toolkit.root) if decision.toolkit else "",
        "record": {
            "cuda": decision.build,
            "requested": decision.requested,
            "reason": decision.reason,
            "cuda_architectures": decision.architectures,
            "nvcc": decision.toolkit.version_string if decision.toolkit else None,
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "compiler": compiler_version(),
        },
    }
    print(json.dumps(answer, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
