"""The record of the build, beside the compiled part, and whether that part can be used with the torch that is here.

Standard library only, and quick: it is read whenever the package is imported, before torch.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).absolute().parent
REBUILD = (
    "install the wheel that is made for this torch, or build it again in its sources with "
    "`pip install --no-build-isolation --force-reinstall --no-deps .`"
)


def build_record() -> dict[str, Any] | None:
    """Returns what setup.py wrote beside the extension when it was built; None where there is no such record."""
    try:
        record = json.loads((PACKAGE / "_build_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def abi_of(version: str) -> str:
    """What torch versions under which an extension works have in common: "2.13" of 2.13.1+cpu, all of a pre-release."""
    public = version.partition("+")[0]
    release = re.fullmatch(r"(\d+\.\d+)(\.\d+)*(\.post\d+)?", public)
    return release[1] if release else public


def label(torch_version: str, cuda: str | None) -> str:
    """The local version of a build: "torch2.13.cpu", or "torch2.14.cu130" where it has code for CUDA 13.0."""
    return f"torch{abi_of(torch_version)}.{'cu' + cuda.replace('.', '') if cuda else 'cpu'}"


def local_version() -> str:
    """What `label` of this build adds to the version of the package: "+torch2.14.cu130"; "" where nothing is built."""
    record = build_record()
    return "" if record is None else "+" + label(record["torch"], record["torch_cuda"] if record["cuda"] else None)


def requirement(torch_version: str) -> str:
    """What the metadata of a build ask of pip: the torch versions that it can be used with."""
    abi = abi_of(torch_version)
    return f"torch=={abi}" + (".*" if re.fullmatch(r"\d+\.\d+", abi) else "")


def unfit(record: Mapping[str, Any] | None, *, torch: str, cuda: str | None, cxx11_abi: bool | None = None) -> str:
    """Says in one sentence why a build cannot be used with a torch; "" where it can.

    Args:
        record: of the build. None, no record, is no reason.
        torch, cuda: `torch.__version__` and `torch.version.cuda`.
        cxx11_abi: `torch.compiled_with_cxx11_abi()`; None: not known yet.
    """
    if record is None:
        return ""
    built = f"the compiled part of imaml_ext was built for torch {record['torch']}"
    if abi_of(record["torch"]) != abi_of(torch):
        return f"{built} and cannot be used with torch {torch}: {REBUILD}"
    if record["cuda"] and (cuda or "").partition(".")[0] != record["torch_cuda"].partition(".")[0]:
        here = f"CUDA {cuda}" if cuda else "no CUDA"
        return f"{built} with CUDA {record['torch_cuda']}, and torch {torch} has {here}: {REBUILD}"
    if cxx11_abi is not None and record.get("cxx11_abi", cxx11_abi) != cxx11_abi:
        return f"{built} of another C++ ABI (_GLIBCXX_USE_CXX11_ABI={record['cxx11_abi']:d}): {REBUILD}"
    return ""


def unfit_for_installed_torch() -> str:
    """`unfit` for the torch that would be imported, without importing it; "" where there is none."""
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        version, cuda = getattr(torch, "__version__", None), getattr(getattr(torch, "version", None), "cuda", None)
        return "" if version is None else unfit(build_record(), torch=str(version), cuda=cuda)
    if spec is None or spec.origin is None:
        return ""
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    values = dict(re.findall(r"^(__version__|cuda)\b[^=\n]*= *'([^']*)'", text, flags=re.MULTILINE))
    return unfit(build_record(), torch=values["__version__"], cuda=values.get("cuda")) if values else ""


def not_loaded(error: ImportError) -> str:
    """Says in one sentence why the compiled part did not load, and what to do."""
    built = sorted(PACKAGE.glob("_C.*"))
    if any((PACKAGE / f"_C{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        return f"the compiled part of imaml_ext does not load ({error}): {REBUILD}, then look at `imaml doctor`"
    if built:
        here = "{}.{}".format(*sys.version_info)
        return f"the compiled part of imaml_ext is for another Python ({built[0].name}), and this is {here}: {REBUILD}"
    if (PACKAGE.parent / "setup.py").exists():
        return (
            f"Python has imported the sources of imaml_ext in {PACKAGE.parent}, where the compiled part is not built"
            f"{_hidden_installation()}: start Python in another folder, or build it there with "
            "`pip install --no-build-isolation -e .`"
        )
    return f"the installed imaml_ext in {PACKAGE} has no compiled part: {REBUILD}"


def _hidden_installation() -> str:
    """Names the installation that the sources hide, where there is one."""
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != PACKAGE.parent]
    spec = importlib.machinery.PathFinder.find_spec("imaml_ext", elsewhere)
    return f", and which hide the installation in {Path(spec.origin).parent}" if spec and spec.origin else ""
