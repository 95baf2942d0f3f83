"""What is said where the compiled part is missing, of another torch or Python, or without CUDA; and the type checkers.

Installations of every sort are copies of the package, beside a torch that is no more than its version.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from training_tools import small_config

import imaml_ext
from imaml_ext import _native, _record, ops
from imaml_ext.batch import TaskData
from imaml_ext.cli import main
from imaml_ext.errors import NativeUnavailableError
from imaml_ext.files import json_bytes
from imaml_ext.losses import TaskLoss
from imaml_ext.models import MLP
from imaml_ext.ops import network as network_ops
from imaml_ext.train import train

ROOT = Path(imaml_ext.__file__).parents[1]
RECORD = {"cuda": False, "requested": "0", "reason": "asked for", "torch": "2.13.0+cpu", "torch_cuda": None}
CUDA_RECORD = RECORD | {"cuda": True, "torch": "2.14.1+cu130", "torch_cuda": "13.0"}
USE = "import imaml_ext, imaml_ext._native as n\nprint(n.error); n.native()"


class Installation:
    """A copy of the package in a folder, beside a torch of some version."""

    def __init__(self, folder: Path, *, torch_version: str, cuda: str | None = None) -> None:
        self.folder, self.package = folder, folder / "imaml_ext"
        leave_out = shutil.ignore_patterns("*.so", "*.json", "weights", "__pycache__")
        shutil.copytree(ROOT / "imaml_ext", self.package, ignore=leave_out)
        stub = folder / "torch"
        stub.mkdir()
        text = f"__version__ = {torch_version!r}\ncuda: Optional[str] = {cuda!r}\n"
        (stub / "version.py").write_text("from typing import Optional\n" + text)
        (stub / "__init__.py").write_text(
            "from torch import version\nfrom torch.version import __version__\n"
            "def compiled_with_cxx11_abi():\n    return True\n"
        )

    def built(self, record: dict[str, object]) -> Installation:
        """Gives it a record of its build, and a compiled part that tells when it is loaded."""
        (self.package / "_build_info.json").write_bytes(json_bytes(record))
        (self.package / "_C.py").write_text("print('LOADED')\nwith_cuda = False\n")
        return self

    def run(self, code: str, *more_folders: Path) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(map(str, (self.folder, *more_folders)))
        environ = {**os.environ, "PYTHONPATH": path}
        # Without site-packages: an editable installation there would find modules that this one lacks.
        command = [sys.executable, "-S", "-c", code]
        return subprocess.run(command, capture_output=True, text=True, env=environ, cwd="/")


def sentence(result: subprocess.CompletedProcess[str]) -> str:
    """What a failed use of the compiled part ends with."""
    assert result.returncode == 1, result.stdout
    return result.stderr.strip().splitlines()[-1].removeprefix("imaml_ext.errors.NativeUnavailableError: ")


# --- the torch that it was built for ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "cuda", "record", "expected"),
    [
        ("2.14.1+cu130", "13.0", RECORD, "was built for torch 2.13.0+cpu and cannot be used with torch 2.14.1+cu130"),
        ("2.14.0", None, CUDA_RECORD, "was built for torch 2.14.1+cu130 with CUDA 13.0, and torch 2.14.0 has no CUDA"),
        ("2.14.1+cu126", "12.6", CUDA_RECORD, "with CUDA 13.0, and torch 2.14.1+cu126 has CUDA 12.6"),
        ("2.13.0+cpu", None, RECORD | {"cxx11_abi": False}, "of another C++ ABI (_GLIBCXX_USE_CXX11_ABI=0)"),
    ],
)
def test_another_torch_is_one_sentence_before_anything_is_loaded(
    tmp_path: Path, version: str, cuda: str | None, record: dict[str, object], expected: str
) -> None:
    here = Installation(tmp_path, torch_version=version, cuda=cuda).built(record)
    result = here.run(USE)
    said = sentence(result)
    assert expected in said
    assert "pip install --no-build-isolation" in said
    assert "LOADED" not in result.stdout
    warned = here.run("import imaml_ext; print(imaml_ext.__version__)")  # torch is not imported for that
    assert warned.returncode == 0
    assert ("cxx11_abi" in record) or expected in warned.stderr


@pytest.mark.parametrize(("version", "cuda"), [("2.13.0+cpu", None), ("2.13.4+cu130", "13.0"), ("2.13.1.post2", None)])
def test_every_patch_of_the_torch_that_it_was_built_for(tmp_path: Path, version: str, cuda: str | None) -> None:
    result = Installation(tmp_path, torch_version=version, cuda=cuda).built(RECORD).run(USE)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == ["LOADED", "None"]


def test_a_pre_release_of_torch_is_not_taken_for_another() -> None:
    nightly = RECORD | {"torch": "2.15.0.dev20261101+cpu"}
    assert _record.unfit(nightly, torch="2.15.0.dev20261101+cu130", cuda="13.0") == ""
    assert "cannot be used with torch 2.15.0" in _record.unfit(nightly, torch="2.15.0", cuda=None)
    assert _record.requirement("2.15.0.dev20261101+cpu") == "torch==2.15.0.dev20261101"
    assert _record.requirement("2.13.1+cpu") == "torch==2.13.*"


@pytest.mark.parametrize(
    ("version", "cuda", "expected"),
    [
        ("2.13.0+cpu", None, "torch2.13.cpu"),
        ("2.14.1+cu130", "13.0", "torch2.14.cu130"),
        ("2.10.0", None, "torch2.10.cpu"),
    ],
)
def test_label(version: str, cuda: str | None, expected: str) -> None:
    assert _record.label(version, cuda) == expected


def test_version_names_the_torch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import imaml_ext.cli as cli

    monkeypatch.setattr(cli, "local_version", lambda: "+torch2.13.cpu")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"imaml_ext {imaml_ext.__version__}+torch2.13.cpu\n"


# --- no compiled part ---------------------------------------------------------------------------------------------


def test_sources_that_are_imported_instead_of_the_installation(tmp_path: Path) -> None:
    checkout = Installation(tmp_path / "checkout", torch_version="2.13.0")
    (checkout.folder / "setup.py").write_text("")
    said = sentence(checkout.run(USE))
    assert f"Python has imported the sources of imaml_ext in {checkout.folder}, where the compiled part is not" in said
    assert "`pip install --no-build-isolation -e .`" in said
    assert "hide" not in said
    installed = Installation(tmp_path / "site-packages", torch_version="2.13.0").built(RECORD)
    assert f"hide the installation in {installed.package}" in sentence(checkout.run(USE, installed.folder))


def test_a_compiled_part_of_another_python(tmp_path: Path) -> None:
    here = Installation(tmp_path, torch_version="2.13.0")
    (here.package / "_C.cpython-38-x86_64-linux-gnu.so").write_bytes(b"")
    python = "{}.{}".format(*sys.version_info)
    assert f"for another Python (_C.cpython-38-x86_64-linux-gnu.so), and this is {python}" in sentence(here.run(USE))


def test_a_compiled_part_that_is_damaged(tmp_path: Path) -> None:
    here = Installation(tmp_path, torch_version="2.13.0")
    (here.package / f"_C{_record.importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"\x7fELF")
    said = sentence(here.run(USE))
    assert said.startswith("the compiled part of imaml_ext does not load (")
    assert "imaml doctor" in said


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "error", NativeUnavailableError("the compiled part is not there: build it"))
    monkeypatch.setattr(_native, "_C", None)


def test_every_op_asks_for_the_compiled_part(missing: None) -> None:
    a, theta = torch.ones(2, 3), torch.ones(3)
    network = (3, 1, 1, *network_ops.linear(3))
    x, y, params = torch.ones(2, 4, 3), torch.ones(2, 4, 3), torch.ones(2, 12)
    linearised = object.__new__(network_ops.NetworkLinearisation)
    linearised.__dict__ |= {"_params": params, "_tape": a, "_y": y, "_network": network, "_given": network}
    uses = [
        lambda: imaml_ext.cg(lambda p: p, a),
        ops.cpu_capability,
        lambda: ops.prox_gradient_(a, a, theta, 1.0),
        lambda: ops.prox_penalty(a, theta, 1.0),
        lambda: ops.prox_sgd_step_(a, a, theta, 1.0, 0.1),
        lambda: ops.prox_momentum_step_(a, a, a, theta, 1.0, 0.1, 0.9),
        lambda: ops.prox_adam_step_(a, a, a, a, theta, 1.0, 0.1, 0.9, 0.99, 1e-8, 1),
        lambda: network_ops.supports(params),
        lambda: network_ops.network_outputs(params, x, network),
        lambda: network_ops.network_gradient(params, x, y, network),
        lambda: network_ops.network_losses(params, x, y, network),
        lambda: network_ops.network_descend_(params, params, a, a, x, y, network, 1),
        lambda: network_ops.NetworkLinearisation(params, x, y, network),
        lambda: linearised.product(params),
        lambda: linearised.curvature(params),
    ]
    for use in uses:
        with pytest.raises(NativeUnavailableError, match="not there: build it"):
            use()
    assert torch.equal(a, torch.ones(2, 3))


def test_a_run_asks_for_the_compiled_part_before_it_writes_anything(missing: None, tmp_path: Path) -> None:
    with pytest.raises(NativeUnavailableError, match="not there: build it"):
        train(small_config(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# --- no CUDA code -------------------------------------------------------------------------------------------------


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    class CpuOnly:
        with_cuda = False

    monkeypatch.setattr(_native, "error", None)
    monkeypatch.setattr(_native, "_C", CpuOnly)
    monkeypatch.setattr(_native, "build_record", lambda: RECORD)
    network_ops._warn_without_cuda.cache_clear()


def test_cuda_tensors_and_a_build_without_cuda_are_an_error(without_cuda: None) -> None:
    with FakeTensorMode():
        a = torch.ones(2, 3, device="cuda")
        uses = (
            lambda: imaml_ext.cg(lambda p: p, a),
            lambda: ops.prox_penalty(a, a, 1.0),
            lambda: network_ops.network_outputs(a, a.unsqueeze(0), (3, 1, 1, *network_ops.linear(1))),
        )
        for use in uses:
            with pytest.raises(NativeUnavailableError, match=r"cannot compute on cuda.*IMAML_EXT_CUDA=0: asked for"):
                use()


def test_a_loss_on_cuda_warns_once_that_there_is_no_cuda_code(without_cuda: None) -> None:
    loss = TaskLoss(MLP(1, (8,), 1), "mse")
    with FakeTensorMode():
        phi = torch.ones(2, 25, device="cuda")
        data = TaskData(torch.zeros(2, 3, 1, device="cuda"), torch.zeros(2, 3, 1, device="cuda"))
        with pytest.warns(RuntimeWarning, match=r"left to torch's own ops.*IMAML_EXT_CUDA=0: asked for"):
            loss(phi, data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert loss(phi, data).shape == (2,)


# --- type checkers ------------------------------------------------------------------------------------------------

PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
TYPOS = {
    "imaml_ext.cgg(1)": "cgg",
    "from imaml_ext.solvers import Minres": "Minres",
    "from imaml_ext.meta import prox_solved": "prox_solved",
    "from imaml_ext.models import Conv5": "Conv5",
    "from imaml_ext.inner import NewtonCGG": "NewtonCGG",
    "from imaml_ext.train import trane": "trane",
}
NAMES = """\
from imaml_ext import cg, prox_solve
from imaml_ext.meta import implicit_solve, prox_solve as prox_solve_of_meta
from imaml_ext.solvers import MINRES, cg as cg_of_solvers
cg(1)
cg_of_solvers(1)
prox_solve(1)
prox_solve_of_meta(1)
"""


@pytest.fixture(scope="module")
def snippets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python blocks of the README and of docs/, a file for each page; names in wrong places; and typos."""
    folder = tmp_path_factory.mktemp("snippets")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        blocks = PYTHON_BLOCK.findall(page.read_text(encoding="utf-8"))
        if blocks:
            (folder / f"{page.stem}_page.py").write_text("\n".join(blocks), encoding="utf-8")
    (folder / "names.py").write_text(NAMES)
    (folder / "typos.py").write_text("import imaml_ext\n" + "\n".join(TYPOS) + "\n")
    return folder


def judged(output: str) -> None:
    """The pages have no error, every typo has, and what shares its name with a module is called as a function."""
    lines = [line for line in output.splitlines() if re.search(r"\berror\b", line) and ".py:" in line]
    assert [line for line in lines if "_page.py:" in line] == []
    for name in TYPOS.values():
        assert any("typos.py:" in line and f'"{name}"' in line for line in lines), f"{name} passes:\n{output}"
    for number in (4, 5, 6, 7):
        of_line = [line for line in lines if f"names.py:{number}:" in line]
        assert of_line, output
        assert not any("not callable" in line.lower() for line in of_line), output
    assert not any(f"names.py:{number}:" in line for number in (1, 2, 3) for line in lines), output


@pytest.mark.long
def test_mypy_understands_the_pages(snippets: Path) -> None:
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", "--cache-dir"]
    files = sorted(map(str, snippets.glob("*.py")))
    environ = {**os.environ, "MYPYPATH": str(ROOT)}
    result = subprocess.run(
        [*command, str(snippets / "cache"), *files], capture_output=True, text=True, env=environ, cwd=snippets
    )
    judged(result.stdout)


@pytest.mark.long
def test_pyright_understands_the_pages(snippets: Path) -> None:
    pyright = shutil.which("pyright")
    if pyright is None or shutil.which("node") is None:  # pyright would fetch a node from the network
        pytest.skip("pyright or node is not installed")
    # The pages' own losses have no types: what their methods return is not compared with the base class. And pages may
    # import what is not installed here: wandb, optuna.
    settings = {"extraPaths": [str(ROOT)], "reportIncompatibleMethodOverride": False, "reportMissingImports": False}
    (snippets / "pyrightconfig.json").write_bytes(json_bytes(settings))
    command = [pyright, "--pythonpath", sys.executable, "--project", str(snippets)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=snippets)
    judged(result.stdout)
