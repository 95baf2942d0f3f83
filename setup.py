"""Compiles csrc/ into `imaml_ext._C`. All metadata is in pyproject.toml.

Environment: IMAML_EXT_CUDA=auto|0|1, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CC; IMAML_EXT_DEBUG=1 compiles
with -O0 -g.
"""

import importlib.util
import json
import os
import platform
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def load_build_support():
    """imaml_ext/_build.py as a module of its own: importing the package would need what is being built."""
    spec = importlib.util.spec_from_file_location("imaml_ext_build", ROOT / "imaml_ext" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def sources(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.joinpath("csrc").glob(pattern))


def native_extension() -> dict:
    """The arguments of setup() that concern the extension module; none for a command that compiles nothing."""
    commands = {*sys.argv[1:]}
    compiles = commands & {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
    if not compiles and "dist_info" not in commands:  # dist_info is pip's first step towards an installation
        return {}
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"imaml-ext compiles against the torch that it will run with, and this Python cannot import it ({error}): "
            "install torch first, then `pip install --no-build-isolation .`"
        ) from None
    if not compiles:
        return {}

    build = load_build_support()
    try:
        decision = build.decide_for_torch()
    except build.BuildError as error:
        raise SystemExit(f"imaml-ext: {error}") from None
    print(f"imaml-ext: building {decision}", file=sys.stderr)
    if decision.build:
        # Read by torch.utils.cpp_extension, the first when it is imported.
        os.environ["CUDA_HOME"] = str(decision.toolkit.root)
        os.environ["TORCH_CUDA_ARCH_LIST"] = decision.architectures
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    debug = os.environ.get("IMAML_EXT_DEBUG") == "1"
    common = ["-std=c++20", *(["-O0", "-g"] if debug else ["-O3"])]
    # No contraction of a*b + c, so that every compiler and instruction set rounds alike. at::parallel_for is an OpenMP
    # template expanded here; -fopenmp stays out of the link so that torch's own OpenMP runtime is the only one loaded.
    cxx = [*common, "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]
    if not debug:
        cxx.append("-g0")  # Python asks for -g: half as much time again, and most of the file
    if platform.system() != "Darwin":
        cxx.append("-fopenmp")
    macros, files, extension = [], sources("**/*.cpp"), CppExtension
    if decision.build:
        macros, files, extension = [("IMAML_EXT_WITH_CUDA", None)], files + sources("**/*.cu"), CUDAExtension

    class BuildWithRecord(BuildExtension):
        """Leaves beside the extension a record of how it was built, for `imaml doctor`."""

        def run(self) -> None:
            if self.editable_mode:  # in place of a temporary folder: the next build compiles only what has changed
                self.build_temp = str(ROOT / "build" / f"editable-{sys.implementation.cache_tag}")
            super().run()
            record = {
                "cuda": decision.build,
                "requested": decision.requested,
                "reason": decision.reason,
                "cuda_architectures": decision.architectures,
                "nvcc": decision.toolkit.version_string if decision.toolkit else None,
                "torch": torch.__version__,
                "torch_cuda": torch.version.cuda,
                "compiler": build.compiler_version(),
                "debug": debug,
            }
            folder = Path(self.get_ext_fullpath("imaml_ext._C")).parent
            (folder / "_build_info.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    return {
        "ext_modules": [
            extension(
                "imaml_ext._C",
                files,
                include_dirs=[str(ROOT / "csrc")],
                define_macros=macros,
                extra_compile_args={
                    "cxx": cxx,
                    "nvcc": [*common, "-Xcompiler", "-ffp-contract=off,-fvisibility=hidden"],
                },
            )
        ],
        "cmdclass": {"build_ext": BuildWithRecord},
    }


setup(**native_extension())
