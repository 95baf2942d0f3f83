"""Has CMakeLists.txt compile csrc/ into `imaml_ext._C`. What depends on torch is here; all else is in pyproject.toml.

What is built works with one torch, and its metadata ask for that one. Sources serve any torch.

Environment: IMAML_EXT_CUDA=auto|0|1, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX; IMAML_EXT_DEBUG=1 compiles with
-O0 -g. IMAML_EXT_LOCAL_VERSION=1 has the version name the torch too, 0.1.0+torch2.14.cu130, which tells wheels of one
index apart. Not otherwise: pip refuses an sdist whose build has another version than its name.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMMANDS_THAT_NEED_TORCH = {"bdist_wheel", "build", "build_ext", "develop", "dist_info", "editable_wheel", "install"}


def load(name: str) -> ModuleType:
    """A module of the package by its path: the package itself cannot be imported yet."""
    spec = importlib.util.spec_from_file_location(f"imaml_ext_setup{name}", ROOT / "imaml_ext" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


_build, _record = load("_build"), load("_record")


def build_answer() -> dict[str, Any] | None:
    """What imaml_ext/_build.py says of the torch of this Python; None for a command that needs no torch."""
    if not COMMANDS_THAT_NEED_TORCH & {*sys.argv[1:]}:
        return None
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "imaml-ext compiles against the torch that it will run with, and this Python has none: "
            "install torch first, then `pip install --no-build-isolation .`"
        )
    told = subprocess.run([sys.executable, ROOT / "imaml_ext" / "_build.py"], capture_output=True, text=True)
    if told.returncode != 0:
        raise SystemExit(f"imaml-ext: {told.stderr.strip()}")
    answer: dict[str, Any] = json.loads(told.stdout)
    return answer


class CMakeBuild(build_ext):
    """Builds the one extension with CMake, and leaves beside it a record of how, for `imaml doctor`."""

    def run(self) -> None:
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                raise SystemExit(
                    f"imaml-ext is compiled by CMake and ninja, and there is no {tool}: pip install {tool}"
                )
        # An editable installation keeps its objects: the next build compiles only what has changed, and the tests of
        # cpp_tests/ are built from them (Makefile).
        folder = ROOT / "build" / "cmake" if self.editable_mode or self.inplace else Path(self.build_temp) / "cmake"
        forget_if_other(folder, ANSWER)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"imaml-ext: building {ANSWER['decision']}", file=sys.stderr)
        (folder / "answer.json").write_text(json.dumps(ANSWER), encoding="utf-8")
        debug = os.environ.get("IMAML_EXT_DEBUG") == "1"
        self.call(
            *("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}"),
            f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}",
            f"-DIMAML_EXT_ANSWER={(folder / 'answer.json').resolve()}",
            *(f"-DCMAKE_{language}_COMPILER_LAUNCHER={ANSWER['launcher']}" for language in ("CXX", "CUDA")),
        )
        self.call("cmake", "--build", folder, "--target", "_C", "--parallel", _build.parallel_jobs())
        target = Path(self.get_ext_fullpath("imaml_ext._C"))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "_C.so", target)
        record = json.dumps({**ANSWER["record"], "debug": debug}, indent=2)
        (target.parent / "_build_info.json").write_text(record + "\n", encoding="utf-8")

    def call(self, *command: object) -> None:
        """Runs a command whose own output says what went wrong."""
        environ = {**os.environ, "CXX": ANSWER["cxx"]}  # without a launcher, which CMake would take for the compiler
        if subprocess.run([str(word) for word in command], env=environ).returncode != 0:
            raise SystemExit(f"imaml-ext: `{' '.join(map(str, command))}` failed; its messages are above")


def forget_if_other(folder: Path, answer: dict[str, Any]) -> None:
    """Deletes a build folder of sources in another place or of another compiler: CMake would not take the new one."""
    cache, before = folder / "CMakeCache.txt", folder / "answer.json"
    if not cache.exists():
        return
    moved = f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text(encoding="utf-8")
    if moved or (before.exists() and json.loads(before.read_text(encoding="utf-8")).get("cxx") != answer["cxx"]):
        shutil.rmtree(folder)


try:
    _build.check_build_host(ROOT, platform=sys.platform, setuptools=setuptools.__version__)
    _build.parallel_jobs()
except _build.BuildError as error:
    raise SystemExit(str(error)) from None
ANSWER = build_answer()
VERSION, TORCH = load("_version").__version__, "torch>=2.6"
if ANSWER is not None:
    built = ANSWER["record"]
    if os.environ.get("IMAML_EXT_LOCAL_VERSION") == "1":
        VERSION += "+" + _record.label(built["torch"], built["torch_cuda"] if built["cuda"] else None)
    TORCH = _record.requirement(built["torch"])
setup(
    version=VERSION,
    install_requires=[TORCH, "numpy", "tyro", "rich", "matplotlib", "fonttools", "pillow>=10.1", "safetensors"],
    ext_modules=[Extension("imaml_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
