"""Archives in place of a folder: they are unpacked once, into the cache."""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
from pathlib import Path

from imaml_ext.errors import DataError
from imaml_ext.files import atomic_write
from imaml_ext.progress import say_once

FOLDER = "unpacked"  # in the cache


def unpacked(path: Path, cache: Path) -> Path:
    """Returns the folder that holds the content of a tar archive, of any compression; any other path as it is.

    Where all of it is in one folder, that folder is returned. Members that would leave the folder are refused.

    Raises:
        DataError: the archive is damaged, or there is no space for its content.
    """
    try:
        if not path.is_file() or not tarfile.is_tarfile(path):
            return path
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from error
    target = place(path, cache)
    if target is None:
        return path
    if not target.is_dir():
        say_once(f"unpacking {path} into {target}")
        _unpack(path, target)
    entries = [entry for entry in target.iterdir() if not entry.name.startswith(".")]
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else target


def place(path: Path, cache: Path) -> Path | None:
    """Returns the folder in the cache that an archive is unpacked into; None where there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    facts = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode("utf-8", "surrogatepass")
    return cache / FOLDER / hashlib.blake2b(facts, digest_size=8).hexdigest()


def _unpack(path: Path, target: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise DataError(f"{path} is not unpacked by this Python, which has no safe way to: unpack it by hand")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=target.parent) as folder:
            content = Path(folder) / "content"  # of the usual permissions, which the folder around it has not
            content.mkdir()
            with tarfile.open(path) as archive:
                archive.extractall(content, filter="data")
            os.replace(content, target)
        atomic_write(target.with_suffix(".of"), os.fsencode(path.resolve()))
    except OSError as error:
        if target.is_dir():  # another process was faster
            return
        reason = error.strerror or error
        raise DataError(f"the archive {path} could not be unpacked into {target} ({reason})") from error
    except Exception as error:  # each compression has an error of its own
        raise DataError(f"the archive {path} is damaged, or not one of data ({error})") from error
