"""Tests marked `cuda` run where there is a CUDA device and an extension built for it, and say elsewhere why not."""

import pytest
import torch

from imaml_ext import _native


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device" if torch.version.cuda else "torch is a build without CUDA"
    if _native.error is not None:
        return f"the extension does not load: {_native.error}"
    return None if _native.native().with_cuda else "the extension was built without CUDA"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_no_cuda()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=reason))
