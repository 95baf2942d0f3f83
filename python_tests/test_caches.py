"""The cache: whose it is, what is damaged and what cannot be read, what takes the place of what, and its clearing."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imaml_ext import progress
from imaml_ext.cli import main
from imaml_ext.data import Folder, cache, packing, prune
from imaml_ext.errors import DataError, option_prefix
from imaml_ext.files import atomic_write
from imaml_ext.pictures import Reading

SMALL = Reading(size=4)
EXPECTED = {"a": ("i", (3,))}


@pytest.fixture(autouse=True)
def said_anew() -> Iterator[None]:
    progress.say_once.cache_clear()
    yield
    option_prefix.set(None)


def write_folder(root: Path, classes: int = 4, *, each: int = 3) -> None:
    """Folders train/ and test/, half of the classes in each."""
    for number in range(classes):
        folder = root / ("train" if number < classes / 2 else "test") / f"class-{number}"
        folder.mkdir(parents=True)
        for image in range(each):
            Image.new("RGB", (8, 8), (number * 20, image * 20, 0)).save(folder / f"{image}.png")


def folder_of(tmp_path: Path, **options: object) -> Folder:
    return Folder(**({"root": tmp_path / "mine", "cache_dir": tmp_path / "cache", "pictures": SMALL} | options))


def packed_in(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "pictures").iterdir())


# ---- permissions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_permissions_of_any_new_file(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_folder(tmp_path / "mine")
        folder_of(tmp_path).read()
        atomic_write(tmp_path / "written", b"x")
        with tarfile.open(tmp_path / "mine.tar", "w") as archive:
            archive.add(tmp_path / "mine", "mine")
        folder_of(tmp_path, root=tmp_path / "mine.tar").read()
        (unpacked,) = (path for path in (tmp_path / "cache" / "unpacked").iterdir() if path.is_dir())
    finally:
        os.umask(before)
    for path in (*packed_in(tmp_path), tmp_path / "written"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    for path in (tmp_path / "cache" / "pictures", unpacked):
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask


def as_another_user(call: Callable[[], int]) -> tuple[int, str]:
    """Calls a function in a process of the user nobody; returns its result and what it wrote to stderr."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(said.fileno(), 2)
                sys.stderr = os.fdopen(2, "w")
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                out.write(str(call()).encode())
                out.flush()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        said.seek(0)
        text = said.read().decode()
        assert status == 0, text
        return int(out.read()), text


@pytest.mark.parametrize("state", ["nothing", "whole", "damaged", "unreadable"])
def test_a_cache_that_may_only_be_read(state: str) -> None:
    """What another user's cache has is read; otherwise pictures are read again, with a line, and nothing is lost."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs the rights of the first")
    place = Path(tempfile.mkdtemp())  # one that other users may look into
    try:
        place.chmod(0o755)
        write_folder(place / "mine")
        folder = Folder(root=place / "mine", cache_dir=place / "cache", pictures=SMALL)
        for _ in range(2):  # every module that is needed is imported: the other user may not see them
            expected = folder.read().images
        (packed,) = (place / "cache" / "pictures").iterdir()
        if state == "nothing":
            packed.unlink()
        elif state == "damaged":
            packed.write_bytes(packed.read_bytes()[:300])
        elif state == "unreadable":
            packed.chmod(0o600)
        before = packed.read_bytes() if packed.exists() else None
        for path in (place / "cache", *(place / "cache").rglob("*"), *(place / "mine").rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o600 if (state, path) == ("unreadable", packed) else 0o644)
        progress.say_once.cache_clear()
        found, said = as_another_user(lambda: int(folder.read().images.astype(int).sum()))
        assert found == int(expected.astype(int).sum())
        assert (packed.read_bytes() if packed.exists() else None) == before
        wanted = {
            "nothing": "going on without the cache: the data cache ",
            "whole": "",
            "damaged": "set IMAML_CACHE to a folder with space that you may write to",
            "unreadable": "the data cache is passed over: ",
        }
        assert wanted[state] in said
        assert ("cache" in said) == bool(wanted[state])
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_what_cannot_be_read_is_not_damaged(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.npz"
    cache.save_arrays(path, {"a": np.arange(3)})
    before = path.read_bytes()

    def fails(*args: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(np, "load", fails)
        with pytest.raises(cache.UnreadableError, match="cannot be read"):
            cache.load_arrays(path, EXPECTED)
        made = cache.cached_arrays(path, EXPECTED, lambda: {"a": np.array([7, 8, 9])})
    assert made["a"].tolist() == [7, 8, 9]
    assert path.read_bytes() == before
    assert os.strerror(code) in capsys.readouterr().err


def test_a_damaged_file_stays_until_another_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    cache.save_arrays(path, {"a": np.arange(3)})
    for keep in (0, 10, 100, path.stat().st_size - 1):
        cache.save_arrays(path, {"a": np.arange(3)})
        damaged = path.read_bytes()[:keep]
        path.write_bytes(damaged)

        def fails() -> dict[str, np.ndarray]:
            raise DataError("a picture is damaged")

        with pytest.raises(DataError, match="a picture is damaged"):
            cache.cached_arrays(path, EXPECTED, fails)
        assert path.read_bytes() == damaged
        assert cache.cached_arrays(path, EXPECTED, lambda: {"a": np.arange(3) + 1})["a"].tolist() == [1, 2, 3]
        assert cache.load_arrays(path, EXPECTED)["a"].tolist() == [1, 2, 3]


def test_a_full_disk_loses_nothing_but_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "mine")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        images = folder_of(tmp_path).read().images
        assert packed_in(tmp_path) == []
    assert "No space left on device" in capsys.readouterr().err
    assert np.array_equal(folder_of(tmp_path).read().images, images)
    assert len(packed_in(tmp_path)) == 1


# ---- what takes the place of what -----------------------------------------------------------------------------------


def test_a_packed_file_goes_when_another_state_of_its_folder_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "mine")
    write_folder(tmp_path / "other" / "mine")
    folder_of(tmp_path).read()
    folder_of(tmp_path, root=tmp_path / "other" / "mine").read()  # of the same name, and elsewhere
    folder_of(tmp_path, pictures=Reading(size=5)).read()
    before = packed_in(tmp_path)
    assert len(before) == 3
    os.utime(tmp_path / "mine" / "train" / "class-0" / "1.png", ns=(0, 0))
    folder_of(tmp_path).read()
    after = packed_in(tmp_path)
    assert len(after) == 3
    assert len({*before, *after}) == 4
    # Another way to read pictures is another state too: what was packed is not believed.
    images = folder_of(tmp_path).read().images
    monkeypatch.setattr(packing, "READING_VERSION", packing.READING_VERSION + 1)
    monkeypatch.setattr(Reading, "read", lambda self, path: np.full((4, 4, 3), 77, np.uint8))
    assert (folder_of(tmp_path).read().images == 77).all()
    assert not (images == 77).all()
    assert len(packed_in(tmp_path)) == 3


def test_packing_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "mine")
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    folder_of(tmp_path).read()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reading mine")]
    assert [line.split()[2] for line in lines] == [f"{i}/12" for i in range(1, 13)]
    folder_of(tmp_path).read()
    assert "reading" not in capsys.readouterr().err


# ---- clearing -------------------------------------------------------------------------------------------------------


def test_prune_removes_what_nothing_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("kept", "gone", "changed"):
        write_folder(tmp_path / name)
        folder_of(tmp_path, root=tmp_path / name).read()
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            archive.add(tmp_path / name, name)
        folder_of(tmp_path, root=tmp_path / f"{name}.tar").read()
    place = tmp_path / "cache"
    shutil.rmtree(tmp_path / "gone")
    (tmp_path / "gone.tar").unlink()
    os.utime(tmp_path / "changed" / "train" / "class-0" / "0.png", ns=(0, 0))
    os.utime(tmp_path / "changed.tar", ns=(0, 0))
    data = place / "omniglot-py" / "images_background"
    data.mkdir(parents=True)
    for path in (data / "0001_01.png", place / "omniglot28.npz", place / "glyphs.npz"):
        path.write_bytes(b"of the user")
    old = [
        place / "pictures" / "mine-4-0123456789abcdef.npz",
        place / "pictures" / ".a.npz.17-0123abcd.tmp",
        place / "x.zip.part",
    ]
    young = [place / "pictures" / ".b.npz.17-0123abcd.tmp", place / "y.part"]
    for path in (*old, *young):
        path.write_bytes(bytes(1000))
    (data / "of-the-user.part").write_bytes(b"")
    (place / ".notes.tmp").write_bytes(b"")
    for path in (*old[1:], data / "of-the-user.part", place / ".notes.tmp"):
        os.utime(path, (time.time() - 90_000,) * 2)
    before = {path for path in place.rglob("*") if path.is_file()}
    would = prune.prune_cache(place, dry_run=True)
    assert {path for path in place.rglob("*") if path.is_file()} == before

    assert main(["data", "prune", "--cache-dir", str(place)]) == 0
    out = capsys.readouterr().out
    assert all(str(path) in out for path in would)
    assert out.splitlines()[-1].split()[1:3] == ["MB", "freed,"]
    assert all(size > 0 for size in would.values())
    left = {path for path in place.rglob("*") if path.is_file()}
    # Of folders and archives alike, what was packed or unpacked from "kept" alone is there still.
    assert sorted(path.name.split("-")[0] for path in (place / "pictures").glob("[!.]*")) == ["kept", "kept"]
    assert len([path for path in (place / "unpacked").iterdir() if path.is_dir()]) == 1
    assert not left & set(old)
    assert set(young) <= left
    assert {data / "0001_01.png", place / "omniglot28.npz", place / "glyphs.npz"} <= left
    assert {data / "of-the-user.part", place / ".notes.tmp"} <= left
    assert {path for path in before - left if not any(p in would for p in (path, *path.parents))} == set()
    folder_of(tmp_path, root=tmp_path / "kept").read()
    assert {path for path in place.rglob("*") if path.is_file()} == left
    assert prune.prune_cache(place) == {}
    assert prune.prune_cache(tmp_path / "nowhere") == {}
