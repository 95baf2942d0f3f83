"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from imaml_ext.errors import WriteError


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Opens a file so that a reader, a crash or a full disk sees the old content or the new, never a part.

    What is written appears under `path` when the block ends without an error, with the permissions of any new file.

    Raises:
        WriteError: the file cannot be written; what was there before is unchanged.
    """
    temporary = path.with_name(f".{path.name[:60]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # there is none where all went well
            temporary.unlink()


def atomic_write(path: Path, content: bytes) -> None:
    """Writes `content` as `written_whole` does; raises WriteError likewise."""
    with written_whole(path) as file:
        file.write(content)


def _sync_directory(path: Path) -> None:
    """Makes a rename in this directory outlive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(values: object, *, indent: int | None = 2) -> bytes:
    """`values` as JSON that ends with a newline. JSON has no NaN or infinity: they are written as null."""
    return (json.dumps(_finite(values), indent=indent, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
