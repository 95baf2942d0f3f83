"""Loads the compiled part, if it was built for this torch, or remembers why it did not load."""

from __future__ import annotations

from types import ModuleType

import torch

from imaml_ext._record import build_record, not_loaded, unfit
from imaml_ext.errors import NativeUnavailableError

_C: ModuleType | None = None
error: ImportError | None = None  # its message is one sentence that says what to do

# Asked before the libraries are loaded: those of another torch fail with a missing symbol, or crash.
if reason := unfit(
    build_record(), torch=torch.__version__, cuda=torch.version.cuda, cxx11_abi=torch.compiled_with_cxx11_abi()
):
    error = NativeUnavailableError(reason)
else:
    try:
        from imaml_ext import _C  # type: ignore[attr-defined,no-redef]
    except ImportError as raised:
        error = NativeUnavailableError(not_loaded(raised))
        error.__cause__ = raised


def native(device: torch.device | None = None) -> ModuleType:
    """The compiled part, for tensors of `device`.

    Raises:
        NativeUnavailableError: it did not load, or has no CUDA code for a CUDA device; says why and what to do.
    """
    if _C is None:
        raise NativeUnavailableError(str(error)) from error
    if device is not None and device.type == "cuda" and not _C.with_cuda:
        raise NativeUnavailableError(f"the compiled part of imaml_ext cannot compute on {device}: {no_cuda_code()}")
    return _C


def no_cuda_code() -> str:
    """Says why this build has no CUDA code, and what to do."""
    record = build_record() or {"requested": "?", "reason": "there is no record of the build"}
    return (
        f"it was built without CUDA (IMAML_EXT_CUDA={record['requested']}: {record['reason']}); install a wheel with "
        "CUDA, or build it again with an nvcc and IMAML_EXT_CUDA=1"
    )
