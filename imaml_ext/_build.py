"""What is compiled, and why: the CUDA decision, made once for setup.py, CMakeLists.txt and `imaml doctor`.

Standard library only, and no import of the rest of the package: setup.py and CMakeLists.txt run this file by its path,
before there is a package. `python imaml_ext/_build.py` prints the decision for the torch of that Python.
"""

from __future__ import annotations

import hashlib
import math
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

_BYTES_OF_A_JOB = 2 * 2**30  # what a source that includes all of torch's headers, or a CUDA source, takes at most

_PROBE = """\
#include <cuda_runtime.h>
__global__ void fill(float* x, float value) { x[threadIdx.x] = value; }
extern "C" int probe(float* x, void* stream) {
  fill<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(x, 1.0f);
  return static_cast<int>(cudaGetLastError());
}
"""


_CXX_PROBE = """\
#include <concepts>
#include <span>
template <std::integral T> T first(std::span<const T> x) { return x.front(); }
extern "C" int probe(const int* x) { return first(std::span<const int>(x, 1)); }
"""

_LAUNCHERS = ("ccache", "sccache", "distcc")  # programs that stand before a compiler in CXX


class BuildError(RuntimeError):
    """The build that was asked for is impossible here; the message says why."""


class SettingError(BuildError):
    """An environment variable is wrong: no build is right, not even one without CUDA."""


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
        if environ.get("CXX"):  # as CMakeLists.txt will
            nvcc_flags += ["-ccbin", compiler_command(environ)[1][0]]
        result = _run([root / "bin" / "nvcc", *nvcc_flags, source, "-o", Path(folder) / "probe.so"])
    if result.returncode != 0:
        raise BuildError(f"{nvcc} cannot compile and link a trivial kernel: {_last_line(result.stdout)}")
    return Toolkit(nvcc=nvcc, root=root, version=version)


def choose_architectures(
    nvcc: Path, *, capabilities: Sequence[tuple[int, int]] = (), environ: Mapping[str, str]
) -> str:
    """The GPU architectures to compile for, as a TORCH_CUDA_ARCH_LIST.

    That variable if it is set and not blank; else those of the GPUs of this machine (`capabilities`); else one a
    generation (DEFAULT_ARCHITECTURES). Only what nvcc knows is chosen, and the last is embedded as PTX too.

    Raises:
        SettingError: the variable has what is no number, or what nvcc does not know.
        BuildError: nvcc lists no architecture.
    """
    explicit = environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    wrong = [name for name in explicit if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name)]
    if wrong:
        raise SettingError(f"TORCH_CUDA_ARCH_LIST must be numbers such as '8.0;9.0+PTX', got {wrong[0]!r}")
    names = re.findall(r"compute_(\d+)(\d)\b", _run([nvcc, "--list-gpu-arch"]).stdout)
    known = sorted((int(major), int(minor)) for major, minor in names)
    if explicit:
        strings = ["{}.{}".format(*arch) for arch in known]
        unknown = [name for name in explicit if known and name.partition("+")[0].rstrip("af") not in strings]
        if unknown:
            raise SettingError(f"TORCH_CUDA_ARCH_LIST has {unknown[0]}, and {nvcc} compiles for {', '.join(strings)}")
        return ";".join(explicit)
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
        BuildError: IMAML_EXT_CUDA=1 and CUDA cannot be built, or a variable has a value that it cannot have.
    """
    requested = environ.get("IMAML_EXT_CUDA", "").strip().lower() or "auto"
    if requested not in ("auto", "0", "1"):
        raise SettingError(f"IMAML_EXT_CUDA must be auto, 0 or 1, got {requested!r}")
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
    except SettingError:
        raise
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


def compiler_command(environ: Mapping[str, str] = os.environ) -> tuple[str, list[str]]:
    """$CXX as a launcher, such as ccache, or "", and the compiler with its options; c++ where it is not set."""
    words = shlex.split(environ.get("CXX", "")) or ["c++"]
    if len(words) > 1 and Path(words[0]).name in _LAUNCHERS:
        return words[0], words[1:]
    return "", words


def compiler_version(environ: Mapping[str, str] = os.environ) -> str:
    """The first line of the C++ compiler's `--version`; "" where there is no compiler."""
    result = _run([*compiler_command(environ)[1], "--version"])
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    return "" if result.returncode == 127 else next(iter(lines), "unknown")


def probe_compiler(environ: Mapping[str, str] = os.environ) -> None:
    """Has the C++ compiler, through its launcher, compile and link a few lines of C++20.

    Raises:
        BuildError: there is none, or it cannot; the message carries the first error that it reported.
    """
    launcher, command = compiler_command(environ)
    told = f"CXX={environ['CXX']}" if environ.get("CXX") else "c++; CXX names another"
    for program in (launcher, command[0]):
        if program and shutil.which(program, path=environ.get("PATH", os.defpath)) is None:
            raise BuildError(f"there is no C++ compiler {program!r} ({told}): install g++ 11 or later, or clang++ 14")
    with tempfile.TemporaryDirectory(prefix="imaml_ext-cxx-") as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(_CXX_PROBE, encoding="utf-8")
        shared = ["-std=c++20", "-fPIC", "-shared", str(source), "-o", f"{folder}/probe.so"]
        result = _run([launcher, *command, *shared] if launcher else [*command, *shared])
    if result.returncode != 0:
        errors = [line.strip() for line in result.stdout.splitlines() if "error" in line]
        raise BuildError(
            f"the C++ compiler ({told}) cannot compile C++20: {(errors or [_last_line(result.stdout)])[0]}"
        )


def parallel_jobs(environ: Mapping[str, str] = os.environ) -> int:
    """Compilations at a time: MAX_JOBS, else the processors, as far as the free memory serves them.

    Raises:
        SettingError: MAX_JOBS is no number of jobs.
    """
    if asked := environ.get("MAX_JOBS", "").strip():
        if not asked.isdigit() or int(asked) < 1:
            raise SettingError(f"MAX_JOBS must be a whole number of at least 1, got {asked!r}")
        return int(asked)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(processors, free_memory() / _BYTES_OF_A_JOB)))


def free_memory(root: Path = Path("/")) -> float:
    """Bytes that this process may still use, of the machine's and of its cgroup's; infinity where nothing says."""
    free = [math.inf]
    try:
        text = (root / "proc/meminfo").read_text(encoding="utf-8")
        free += [1024.0 * int(number) for number in re.findall(r"^MemAvailable: *(\d+) kB", text, re.MULTILINE)]
        limit, used = ((root / "sys/fs/cgroup" / name).read_text() for name in ("memory.max", "memory.current"))
        free += [float(limit) - float(used)]
    except (OSError, ValueError):  # another system, no cgroup, or one without a limit ("max")
        pass
    return min(free)


def check_build_host(sources: Path, *, platform: str, setuptools: str) -> None:
    """What setup.py asks before anything else.

    Raises:
        BuildError: a system that is not supported, a setuptools that cannot read pyproject.toml, or sources that cannot
            be written to.
    """
    if platform not in ("linux", "darwin"):
        raise BuildError(f"imaml-ext is built on Linux and macOS, not on {platform}; under Windows use WSL 2")
    if int(setuptools.split(".")[0]) < 77:
        raise BuildError(
            f"imaml-ext needs setuptools 77 or later, and this is {setuptools}: pip install 'setuptools>=77'"
        )
    if not os.access(sources, os.W_OK):
        raise BuildError(f"the sources in {sources} cannot be written to, and a build leaves files there: copy them")


def sources_digest(csrc: Path) -> str:
    """A digest of the names and contents of the sources: which of them an extension was built from."""
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(csrc).as_posix()} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


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
        probe_compiler()
        decision = decide_for_torch()
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    launcher, compiler = compiler_command()
    answer = {
        "decision": str(decision),
        "launcher": launcher,
        "cxx": shlex.join(compiler),
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
            "cxx11_abi": torch.compiled_with_cxx11_abi(),
            "compiler": compiler_version(),
            "sources": sources_digest(Path(__file__).resolve().parents[1] / "csrc"),
        },
    }
    print(json.dumps(answer, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
