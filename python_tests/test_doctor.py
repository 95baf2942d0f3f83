"""`imaml doctor` on installations with one thing wrong each."""

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch

from imaml_ext import _build, _native, _record
from imaml_ext import doctor as doctor_module
from imaml_ext._record import REBUILD, build_record
from imaml_ext.batch import TaskData
from imaml_ext.doctor import architecture_serves, doctor
from imaml_ext.errors import DataError, NativeUnavailableError
from imaml_ext.inner import GradientDescent
from imaml_ext.losses import TaskLoss
from imaml_ext.models import MLP

RECORD = {
    "cuda": False,
    "requested": "auto",
    "reason": "torch is a build without CUDA",
    "cuda_architectures": None,
    "nvcc": None,
    "torch": torch.__version__,
    "torch_cuda": None,
    "cxx11_abi": True,
    "compiler": "c++ 12.2.0",
    "sources": "0123456789abcdef",
    "debug": False,
}


class FakeNative:
    @staticmethod
    def cpu_capability() -> str:
        return "avx2"


@pytest.fixture(autouse=True)
def sound(monkeypatch):
    """An installation with nothing wrong, whatever this one is; data sets that load at once."""
    monkeypatch.setattr(_native, "error", None)
    monkeypatch.setattr(_native, "_C", FakeNative)
    monkeypatch.setattr(doctor_module, "build_record", lambda: RECORD)
    monkeypatch.setattr(doctor_module, "version", lambda name: "1.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("IMAML_DATA_ROOT", "somewhere")
    import imaml_ext.data

    monkeypatch.setattr(imaml_ext.data, "load_glyphs", lambda: np.zeros((1000, 20, 28, 28)))
    monkeypatch.setattr(imaml_ext.data, "load_omniglot", lambda: np.zeros((1623, 20, 28, 28)))


def lines_of(output: str, state: str) -> str:
    return "\n".join(line for line in output.splitlines() if line.strip().startswith(state))


def test_sound_installation(capsys):
    assert doctor() == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output
    assert "avx2" in output
    assert "IMAML_EXT_CUDA=auto: torch is a build without CUDA" in output
    assert "1,623 classes of 20 drawings" in output
    assert "!!" not in output.split("\n", 1)[1]


def test_extension_that_does_not_load(capsys, monkeypatch):
    damaged = ImportError("_C.so: undefined symbol: _ZN2at4_ops")
    monkeypatch.setattr(_native, "error", NativeUnavailableError(_record.not_loaded(damaged)))
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(doctor_module, "build_record", lambda: RECORD | {"torch": "2.6.0"})
    assert doctor() == 1
    output = capsys.readouterr().out
    assert "undefined symbol: _ZN2at4_ops" in lines_of(output, "!!")
    assert "torch 2.6.0" in lines_of(output, "!!")
    assert "pip install --no-build-isolation" in lines_of(output, "->")


def test_adapting_without_the_extension_says_what_to_do(monkeypatch):
    monkeypatch.setattr(_native, "error", NativeUnavailableError(f"built for another torch: {REBUILD}"))
    monkeypatch.setattr(_native, "_C", None)
    model = MLP(1, (8,), 1)
    data = TaskData(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1))
    with pytest.raises(NativeUnavailableError, match=r"built for another.*pip install --no-build-isolation"):
        GradientDescent(steps=1, lr=0.1).solve(TaskLoss(model, "mse"), model.init(seed=0), data, lam=1.0)
    assert TaskLoss(model, "mse", engine="torch")(model.init(seed=0).expand(2, -1), data).shape == (2,)


def test_extension_never_built(capsys, monkeypatch):
    monkeypatch.setattr(_native, "error", ImportError("cannot import name '_C'"))
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(doctor_module, "build_record", lambda: None)
    assert doctor() == 1
    assert "no record of the build" in capsys.readouterr().out


def test_cpu_build_beside_a_cuda_torch(capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(doctor_module, "build_record", lambda: RECORD | {"reason": "no nvcc"})
    monkeypatch.setattr(
        _build,
        "decide_for_torch",
        lambda: _build.CudaDecision(build=True, requested="auto", reason="nvcc is there", architectures="9.0+PTX"),
    )
    assert doctor() == 0
    output = capsys.readouterr().out
    assert "a build today would be with CUDA for 9.0+PTX" in lines_of(output, "--")


def test_cpu_wheel_beside_a_cuda_torch(capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(doctor_module, "build_record", lambda: RECORD | {"requested": "0", "reason": "asked for"})
    assert doctor() == 0
    output = capsys.readouterr().out
    assert "no CUDA tensor can be used" in lines_of(output, "--")
    assert "Everything that training on the CPU needs works." in output


@pytest.mark.parametrize("name", ["numpy", "matplotlib", "tyro", "rich", "safetensors", "pillow", "fonttools"])
def test_a_dependency_that_is_missing(capsys, monkeypatch, name):
    def version(asked):
        if asked == name:
            raise PackageNotFoundError(asked)
        return "1.0"

    monkeypatch.setattr(doctor_module, "version", version)
    assert doctor() == 1
    assert f"pip install {name}" in lines_of(capsys.readouterr().out, "->")


def test_gpu_that_the_build_does_not_serve(capsys, monkeypatch):
    class Properties:
        name, total_memory, major, minor = "Old GPU", 8 * 2**30, 7, 0

    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(
        doctor_module,
        "build_record",
        lambda: RECORD | {"cuda": True, "torch_cuda": "13.0", "cuda_architectures": "8.0;9.0+PTX"},
    )
    assert doctor() == 1
    output = capsys.readouterr().out
    assert "Old GPU, 8 GiB, compute capability 7.0: not served" in lines_of(output, "!!")
    assert "TORCH_CUDA_ARCH_LIST=7.0" in lines_of(output, "->")


def test_torchvision_missing(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Refuse("torchvision", ModuleNotFoundError), *sys.meta_path])
    assert doctor() == 0
    output = capsys.readouterr().out
    assert "torchvision      not installed" in lines_of(output, "--")
    assert "imaml-ext[vision]" in output


def test_torchvision_of_another_torch(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Refuse("torchvision", RuntimeError), *sys.meta_path])
    assert doctor() == 0
    output = capsys.readouterr().out
    assert "cannot be imported: operator torchvision::nms does not exist" in lines_of(output, "--")


class Refuse:
    """An import finder that raises for one package."""

    def __init__(self, package: str, error: type[Exception]):
        self.package, self.error = package, error

    def find_spec(self, name, path=None, target=None):
        if name != self.package:
            return None
        if self.error is ModuleNotFoundError:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        raise self.error("operator torchvision::nms does not exist")


@pytest.mark.parametrize(("root", "code", "state"), [("somewhere", 1, "!!"), (None, 0, "--")])
def test_omniglot_missing(capsys, monkeypatch, root, code, state):
    import imaml_ext.data

    def missing():
        raise DataError("Omniglot was not found: give the folder that has it")

    monkeypatch.setattr(imaml_ext.data, "load_omniglot", missing)
    if root is None:
        monkeypatch.delenv("IMAML_DATA_ROOT")
    assert doctor() == code
    assert "give the folder that has it" in lines_of(capsys.readouterr().out, state)


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        ("7.5;8.0;9.0+PTX", (7, 5), True),
        ("7.5;8.0;9.0+PTX", (8, 9), True),  # later minor of a generation
        ("7.5;8.0;9.0+PTX", (12, 0), True),  # by PTX
        ("7.5;8.0;9.0+PTX", (7, 0), False),
        ("8.6", (8, 0), False),  # earlier minor
        ("8.0 9.0", (10, 0), False),  # no PTX
        ("9.0a", (9, 0), True),
        ("Hopper", (7, 0), True),  # unknown names are not judged
    ],
)
def test_architecture_serves(architectures, capability, expected):
    assert architecture_serves(architectures, capability) is expected


def test_build_record(tmp_path, monkeypatch):
    monkeypatch.setattr(_record, "PACKAGE", tmp_path)
    record = tmp_path / "_build_info.json"
    assert build_record() is None
    record.write_text('{"cuda": tr')  # cut short
    assert build_record() is None
    record.write_text(json.dumps(RECORD))
    assert build_record() == RECORD


def test_record_of_this_build_has_what_the_doctor_reads():
    path = Path(_build.__file__).parent / "_build_info.json"
    if not path.exists():
        pytest.skip("the extension was not built here")
    assert set(json.loads(path.read_text())) == set(RECORD)
