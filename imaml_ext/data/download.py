"""Downloads, which are torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from imaml_ext.errors import DataError


def download_through_torchvision(what: str, where: Path, fetch: Callable[[Any], object], *, by_hand: str) -> None:
    """Call `fetch` with the module torchvision.datasets, to put the data set `what` into the folder `where`.

    `by_hand`: what a user can put there instead. Raises DataError where torchvision cannot be imported, or fails.
    """
    try:
        from torchvision import datasets
    except Exception as error:  # one built for another torch fails with RuntimeError or OSError, not ImportError
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise DataError(
            f"{what} is downloaded through torchvision, which cannot be imported here ({reason}); install the "
            f"torchvision that belongs to this torch, or put {by_hand} into a folder and give it as root"
        ) from error
    try:
        where.mkdir(parents=True, exist_ok=True)
        fetch(datasets)
    except Exception as error:
        raise DataError(
            f"downloading {what} into {where} failed ({type(error).__name__}: {error}); try again, or put {by_hand} "
            "there"
        ) from error
