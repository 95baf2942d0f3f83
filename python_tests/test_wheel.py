"""The wheel of `make wheel`, installed where there is no compiler: `make test-wheel` names it in IMAML_EXT_WHEEL."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

from imaml_ext import _record
from imaml_ext._version import __version__

pytestmark = pytest.mark.skipif("IMAML_EXT_WHEEL" not in os.environ, reason="`make test-wheel` makes a wheel for it")


@pytest.fixture(scope="module")
def wheel() -> Path:
    return Path(os.environ["IMAML_EXT_WHEEL"]).resolve()


def link_with_requirements(name: str, folder: Path, done: set[str]) -> None:
    """Puts an installed distribution and all that it requires into a folder, as links."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name in done:
        return
    done.add(name)
    try:
        files, requirements = distribution(name).files or [], distribution(name).requires or []
    except ImportError:  # required on another system, or by an extra
        return
    for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
        if not (folder / top).exists():
            (folder / top).symlink_to(distribution(name).locate_file(top))
    for requirement in requirements:
        if "extra ==" not in requirement:
            link_with_requirements(re.split(r"[^\w.\-]", requirement)[0], folder, done)


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with this torch and the wheel, and with nothing else."""
    root = tmp_path_factory.mktemp("clean")
    venv.create(root / "venv", with_pip=True)
    torch_alone = root / "torch_alone"
    torch_alone.mkdir()
    link_with_requirements("torch", torch_alone, set())
    packages = next((root / "venv" / "lib").glob("python*/site-packages"))
    (packages / "torch_alone.pth").write_text(f"{torch_alone}\n")
    binaries = root / "venv" / "bin"
    installed = run(binaries, "python", "-m", "pip", "install", "--disable-pip-version-check", str(wheel))
    assert installed.returncode == 0, installed.stderr
    assert "Collecting torch" not in installed.stdout
    return binaries


def run(binaries: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of the environment, with nothing else on the PATH."""
    keep = {key: value for key, value in os.environ.items() if key.startswith("PIP_") or key in ("HOME", "TMPDIR")}
    environ = {**keep, "PATH": str(binaries), "OMP_NUM_THREADS": "1"}
    command = [str(binaries / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environ, cwd=binaries)


def test_metadata_name_the_torch(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(metadata).decode())
    version = f"{__version__}+{_record.label(torch.__version__, None)}"
    assert fields["Version"] == version
    assert _record.requirement(torch.__version__) in fields.get_all("Requires-Dist")
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert wheel.name.startswith(f"imaml_ext-{version}-{python}-{python}-")
    compiled = [name for name in names if name.endswith(".so")]
    assert len(compiled) == 1, "the libraries of torch stay in torch"
    for needed in ("imaml_ext/py.typed", "imaml_ext/_build_info.json", "imaml_ext/pretrained/weights/README.md"):
        assert needed in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"imaml_ext"}


def test_sdist_has_what_a_build_needs_and_no_results(wheel: Path) -> None:
    import tarfile

    with tarfile.open(next(wheel.parent.glob(f"imaml_ext-{__version__}.tar.gz"))) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    for needed in ("CMakeLists.txt", "csrc/bindings.cpp", "examples/cpp/CMakeLists.txt", "imaml_ext/_record.py"):
        assert needed in names
    assert [name for name in names if "/results/" in name] == []


def test_doctor_is_content(clean: Path) -> None:
    result = run(clean, "imaml", "doctor")
    assert result.returncode == 0, result.stdout
    assert "!!" not in result.stdout.split("\n", 1)[1]
    assert "none; only a build needs one" in result.stdout
    version = run(clean, "imaml", "--version").stdout
    assert version == f"imaml_ext {__version__}+{_record.label(torch.__version__, None)}\n"


def test_training(clean: Path, tmp_path: Path) -> None:
    options = (
        "--outer.steps",
        "3",
        "--evaluation.tasks",
        "8",
        "--run.device",
        "cpu",
        "--run-dir",
        str(tmp_path / "run"),
    )
    result = run(clean, "imaml", "train", "glyphs-5w1s", *options)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "result.json").exists()


def test_pretrained_weights_and_a_solve(clean: Path) -> None:
    code = """
import torch, imaml_ext
from imaml_ext.pretrained import load_pretrained
a = torch.rand(3, 20, dtype=torch.float64) + 1
result = imaml_ext.cg(lambda p: a * p, torch.ones_like(a), max_iterations=60, rtol=1e-12)
assert torch.allclose(result.x, 1 / a)
learner = load_pretrained("omniglot-5w1s")
"""
    result = run(clean, "python", "-c", code)
    assert result.returncode == 0, result.stderr
