"""setup.py: what the sources and what a build are called and require, and which build folders are used again."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

import imaml_ext

ROOT = Path(imaml_ext.__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")
RECORD = {"cuda": False, "torch": "2.13.0+cpu", "torch_cuda": None}


def run_setup(monkeypatch: pytest.MonkeyPatch, command: str, record: dict[str, Any] | None = None) -> dict[str, Any]:
    """What setup.py defines, and as "told" what it tells setuptools; `record` is that of a build."""
    told: dict[str, Any] = {}
    answer = json.dumps({"record": record})
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: told.update(keywords))
    monkeypatch.setattr(sys, "argv", ["setup.py", command])
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, answer, ""))
    return {**runpy.run_path(str(ROOT / "setup.py")), "told": told}


def test_sources_serve_any_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    told = run_setup(monkeypatch, "sdist")["told"]
    assert told["version"] == imaml_ext.__version__
    assert "torch>=2.6" in told["install_requires"]


@pytest.mark.parametrize(
    ("record", "label", "requirement"),
    [
        (RECORD, "torch2.13.cpu", "torch==2.13.*"),
        (RECORD | {"torch": "2.14.1+cu130", "torch_cuda": "13.0"}, "torch2.14.cpu", "torch==2.14.*"),  # a CPU build
        (RECORD | {"cuda": True, "torch": "2.14.1+cu130", "torch_cuda": "13.0"}, "torch2.14.cu130", "torch==2.14.*"),
    ],
)
@pytest.mark.parametrize("command", ["bdist_wheel", "dist_info", "editable_wheel"])
def test_a_build_belongs_to_one_torch(
    monkeypatch: pytest.MonkeyPatch, command: str, record: dict[str, Any], label: str, requirement: str
) -> None:
    monkeypatch.setenv("IMAML_EXT_LOCAL_VERSION", "1")
    told = run_setup(monkeypatch, command, record)["told"]
    assert told["version"] == f"{imaml_ext.__version__}+{label}"
    assert requirement in told["install_requires"]
    assert not any(needed.startswith("torch>") for needed in told["install_requires"])


def test_a_build_has_the_version_of_its_sdist_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip discards an sdist whose build has another version than its file's name."""
    monkeypatch.delenv("IMAML_EXT_LOCAL_VERSION", raising=False)
    told = run_setup(monkeypatch, "dist_info", RECORD)["told"]
    assert told["version"] == imaml_ext.__version__
    assert "torch==2.13.*" in told["install_requires"]


@pytest.mark.parametrize(
    ("home", "compiler", "kept"), [("{root}", "g++", True), ("/elsewhere", "g++", False), ("{root}", "clang++", False)]
)
def test_a_build_folder_of_other_sources_or_another_compiler_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str, compiler: str, kept: bool
) -> None:
    forget_if_other = run_setup(monkeypatch, "egg_info")["forget_if_other"]
    folder = tmp_path / "cmake"
    forget_if_other(folder, {"cxx": "g++"})  # none yet
    folder.mkdir()
    (folder / "CMakeCache.txt").write_text(f"CMAKE_HOME_DIRECTORY:INTERNAL={home.format(root=ROOT)}\n")
    (folder / "answer.json").write_text(json.dumps({"cxx": compiler}))
    forget_if_other(folder, {"cxx": "g++"})
    assert folder.exists() is kept


def test_setup_asks_first(tmp_path: Path) -> None:
    """Before it reads pyproject.toml, which an old setuptools does not understand."""
    stub = tmp_path / "setuptools"
    (stub / "command").mkdir(parents=True)
    (stub / "__init__.py").write_text("__version__ = '65.5.0'\nExtension = setup = None\n")
    (stub / "command" / "__init__.py").write_text("")
    (stub / "command" / "build_ext.py").write_text("build_ext = object\n")
    command = [sys.executable, ROOT / "setup.py", "egg_info"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1
    assert result.stderr.startswith("imaml-ext needs setuptools 77 or later, and this is 65.5.0")


@pytest.mark.long
def test_another_torch_compiles_every_object_again(tmp_path: Path) -> None:
    """Its headers may have the same place and an older time than the objects."""
    build = [sys.executable, str(ROOT / "imaml_ext" / "_build.py")]
    environ = {**os.environ, "IMAML_EXT_CUDA": "0"}
    answer = json.loads(subprocess.run(build, capture_output=True, text=True, env=environ, check=True).stdout)
    compiled = []
    for torch in (answer["record"]["torch"], "2.99.0+cpu"):
        answer["record"]["torch"] = torch
        (tmp_path / "answer.json").write_text(json.dumps(answer))
        options = [
            "-G",
            "Ninja",
            f"-DIMAML_EXT_ANSWER={tmp_path}/answer.json",
            f"-DPython3_EXECUTABLE={sys.executable}",
        ]
        configured = subprocess.run(
            ["cmake", "-S", ROOT, "-B", tmp_path / "build", *options], capture_output=True, text=True
        )
        assert configured.returncode == 0, configured.stderr
        commands = subprocess.run(
            ["ninja", "-C", tmp_path / "build", "-t", "commands", "_C"], capture_output=True, text=True, check=True
        ).stdout
        lines = [line for line in commands.splitlines() if " -c " in line]
        compiled.append({re.search(r" -c (\S+)", line)[1]: line for line in lines})  # type: ignore[index]
    before, after = compiled
    assert len(before) > 10
    assert before.keys() == after.keys()
    assert [source for source in before if before[source] == after[source]] == []
