"""Has CMakeLists.txt compile csrc/ into `imaml_ext._C`. All metadata is in pyproject.toml.

Environment: IMAML_EXT_CUDA=auto|0|1, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CC; IMAML_EXT_DEBUG=1 compiles
with -O0 -g.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMMANDS_THAT_NEED_TORCH = {"bdist_wheel", "build", "build_ext", "develop", "dist_info", "editable_wheel", "install"}


class CMakeBuild(build_ext):
    """Builds the one extension with CMake, and leaves beside it a record of how, for `imaml doctor`."""

    def run(self) -> None:
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                raise SystemExit(f"imaml-ext is compiled by CMake and ninja, and there is no {tool}: pip install {tool}")
        # An editable installation keeps its objects: the next build compiles only what has changed, and the tests of
        # cpp_tests/ are built from them (Makefile).
        folder = ROOT / "build" / "cmake" if self.editable_mode or self.inplace else Path(self.build_temp) / "cmake"
        forget_if_moved(folder)
        folder.mkdir(parents=True, exist_ok=True)
        told = subprocess.run(
            [sys.executable, ROOT / "imaml_ext" / "_build.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if told.returncode != 0:
            raise SystemExit(f"imaml-ext: {told.stderr.strip()}")
        answer = json.loads(told.stdout)
        print(f"imaml-ext: building {answer['decision']}", file=sys.stderr)
        (folder / "answer.json").write_text(told.stdout, encoding="utf-8")
        debug = os.environ.get("IMAML_EXT_DEBUG") == "1"
        self.call(
            *("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}"),
            f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}",
            f"-DIMAML_EXT_ANSWER={(folder / 'answer.json').resolve()}",
        )
        jobs = os.environ.get("MAX_JOBS")
        self.call("cmake", "--build", folder, "--target", "_C", *(["--parallel", jobs] if jobs else []))
        target = Path(self.get_ext_fullpath("imaml_ext._C"))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "_C.so", target)
        record = json.dumps({**answer["record"], "debug": debug}, indent=2)
        (target.parent / "_build_info.json").write_text(record + "\n", encoding="utf-8")

    def call(self, *command: object) -> None:
        """Runs a command whose own output says what went wrong."""
        if subprocess.run([str(word) for word in command]).returncode != 0:
            raise SystemExit(f"imaml-ext: `{' '.join(map(str, command))}` failed; its messages are above")


def forget_if_moved(folder: Path) -> None:
    """Deletes a build folder that was made for sources in another place: CMake refuses to use it."""
    cache = folder / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text(encoding="utf-8"):
        shutil.rmtree(folder)


if COMMANDS_THAT_NEED_TORCH & {*sys.argv[1:]} and importlib.util.find_spec("torch") is None:
    raise SystemExit(
        "imaml-ext compiles against the torch that it will run with, and this Python has none: "
        "install torch first, then `pip install --no-build-isolation .`"
    )
setup(ext_modules=[Extension("imaml_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
