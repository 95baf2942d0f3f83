"""What of the cache is of no use any more, and its removal."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from imaml_ext.data import archives, packing
from imaml_ext.data.cache import UnreadableError, cache_folder, files_digest, load_arrays
from imaml_ext.errors import DataError
from imaml_ext.pictures import READING_VERSION

_DAY = 24 * 3600.0
_PACKED = re.compile(r".*-\d+-[0-9a-f]{8}-(?P<state>[0-9a-f]{16})\.npz")
_UNFINISHED = re.compile(r"\..*\.\d+-[0-9a-f]{8}\.tmp")  # of files.written_whole
_OMNIGLOT = re.compile(r"omniglot28-[0-9a-f]{8}-[0-9a-f]{16}\.npz")


def prune_cache(cache_dir: Path | None = None, *, dry_run: bool = False) -> dict[Path, int]:
    """Removes what nothing reads any more: pictures packed from a folder that has changed or is gone, or by an earlier
    version; archives unpacked that have changed or are gone; and what processes left that were killed more than a day
    ago.

    Args:
        dry_run: removes nothing.

    Returns:
        What was removed, or would be: {path: its bytes}. What may not be removed is left out.
    """
    cache = cache_folder(cache_dir)
    removed: dict[Path, int] = {}
    unpacked = set(_unpacked(cache))
    for path in sorted({*_packed(cache, unpacked), *unpacked, *_leftovers(cache)}):
        size = sum(p.lstat().st_size for p in [path, *path.rglob("*")] if not p.is_dir())
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            if not dry_run:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed[path] = size
    return removed


def _packed(cache: Path, gone: set[Path]) -> Iterator[Path]:
    for path in (cache / packing.FOLDER).glob("*.npz"):
        if not path.name.startswith(".") and not _is_of_today(path, gone):
            yield path
    yield from (p for p in (cache / "omniglot-packed").glob("*.npz") if not _OMNIGLOT.fullmatch(p.name))


def _is_of_today(path: Path, gone: set[Path]) -> bool:
    """Tells whether the files that pictures were packed from are as they were, and not in a folder that goes.

    A packed file that cannot be read is taken for one of today.
    """
    form = _PACKED.fullmatch(path.name)
    if form is None:
        return False
    try:
        folder, files = packing.origin(load_arrays(path, packing.ORIGIN))
    except UnreadableError:
        return True
    except DataError:
        return False
    if any(parent in gone for parent in (folder, *folder.parents)):
        return False
    return files_digest(folder, files, READING_VERSION) == form["state"]


def _unpacked(cache: Path) -> Iterator[Path]:
    for note in (cache / archives.FOLDER).glob("*.of"):
        with contextlib.suppress(OSError):
            if archives.place(Path(note.read_text(errors="surrogateescape")), cache) != note.with_suffix(""):
                yield from (path for path in (note, note.with_suffix("")) if path.exists())


def _leftovers(cache: Path) -> Iterator[Path]:
    """What this package writes before it has its name, and downloads that have stopped, never anything deeper."""
    places = (cache, *(cache / name for name in (packing.FOLDER, "omniglot-packed", "glyphs")))
    found = [path for place in places for path in place.glob(".*.tmp") if _UNFINISHED.fullmatch(path.name)]
    for path in (*found, *(cache / archives.FOLDER).glob(".*.tmp"), *cache.glob("*.part")):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > _DAY:
                yield path
