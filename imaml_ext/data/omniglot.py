"""Omniglot: 1,623 handwritten characters of 50 alphabets, each by 20 drawers (Lake et al., Science 2015), at 28×28,
ink = 255.

It is read from whichever of these a root folder holds:

- a packed file `omniglot28.npz` (`images` uint8 [32460, 28, 28], rows ordered by subset, alphabet, character, drawer);
- the tree that torchvision unpacks: `images_background/<Alphabet>/characterNN/*.png` and `images_evaluation/…`,
  105×105 in black on white. It is reduced by a Lanczos filter and packed once into the cache.

Which characters are trained on is a fixed list in `omniglot_splits.json`:

- `"1200/423"`, the paper's sizes: the 1,623 names `<Alphabet>/characterNN` in ascending order of their SHA-256; the
  first 1,200 train, the last 423 test. With `validation = v` the last v of the 1,200 are validation instead.
- `"vinyals"`: 1,028 train, 172 validation, 423 test (Vinyals et al., *Matching Networks*, NeurIPS 2016).

A character is shown in one of four orientations, in training and in testing, which makes four classes of it (usual
since Santoro et al. 2016). `orientations` says whether two of one character may meet in a task.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from imaml_ext import _renamed
from imaml_ext.checks import check_choice
from imaml_ext.data import cache
from imaml_ext.data.class_images import ClassImages
from imaml_ext.data.datasets import Dataset, ImageDataset
from imaml_ext.data.source import FileSource
from imaml_ext.errors import DataError
from imaml_ext.pictures import READING_VERSION, Reading
from imaml_ext.pictures.decode import decode
from imaml_ext.pictures.square import squared
from imaml_ext.settings import NOT_NEGATIVE

OMNIGLOT = Reading(size=28, colours="ink", square="ink", margin=0.2)  # the best margin on training characters
NUM_CHARACTERS = 1623
NUM_DRAWERS = 20
_ROWS = NUM_CHARACTERS * NUM_DRAWERS
_PACKED = "omniglot28.npz"
_PACKED_ARRAYS: cache.Expected = {
    "images": ("uint8", (_ROWS, 28, 28)),
    **dict.fromkeys(("alphabet", "character", "drawer"), ("u", (_ROWS,))),
    "alphabet_names": ("U", (50,)),
}


@_renamed.old_keywords(_renamed.omniglot_keywords)
@dataclass(frozen=True, kw_only=True)
class Omniglot(FileSource):
    """Omniglot: 1,623 handwritten characters."""

    download: bool = False  # Download the data set through torchvision when it is not under the root.
    # 1,200 characters to train on and 423 to test, or Vinyals' 1,028 / 172 / 423 with validation.
    split: Literal["1200/423", "vinyals"] = "1200/423"
    # Characters of the protocol 1200/423 that are held out of the 1,200 for validation.
    validation: Annotated[int, NOT_NEGATIVE] = 0
    # Each character of a task in one of four orientations, drawn for the task (the paper's protocol); or every
    # orientation a class of its own, which may meet others of its character; or all upright.
    orientations: Literal["one_per_task", "classes", "upright"] = "one_per_task"

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        _renamed.omniglot_keywords(values)
        return values

    def load(self) -> Dataset:
        split = omniglot_split(self.split, validation=self.validation)
        drawings = load_omniglot(root=self.root, cache_dir=self.cache_dir, download=self.download)
        images, names, turns = torch.from_numpy(drawings), character_names(), 1 if self.orientations == "upright" else 4
        turned = ", four orientations each" if turns > 1 else ""
        parts, notes = {}, {}
        for part, members in split.items():
            parts[part] = ClassImages(
                images,
                names=names,
                characters=members,
                rotations=turns,
                distinct_characters=self.orientations == "one_per_task",
            )
            notes[part] = f"{members.size:,} characters{turned}"
        description = f"Omniglot, 1,623 handwritten characters × 20 drawers, 28×28, split {self.split}"
        return ImageDataset("omniglot", description, parts, notes, reading=OMNIGLOT)


@functools.cache
def _split_file() -> dict[str, dict[str, dict[str, str]]]:
    return json.loads(cache.shipped_text("omniglot_splits.json"))


def character_names() -> tuple[str, ...]:
    """Lists the names `<Alphabet>/characterNN`: background, then evaluation alphabets, each in order of name."""
    alphabets = _split_file()["vinyals"]
    return tuple(
        f"{alphabet}/character{number:02d}"
        for subset in ("background", "evaluation")
        for alphabet, letters in sorted(alphabets[subset].items())
        for number in range(1, len(letters) + 1)
    )


def omniglot_split(protocol: str = "1200/423", *, validation: int = 0) -> dict[str, np.ndarray]:
    """Returns the indices into `character_names()` of each split: {"train", "test"} and "val" where there is one.

    `validation` characters of the 1,200 are held out as "val" (protocol "1200/423" only; Vinyals' has its own 172).

    Raises:
        ValueError: an unknown protocol, or a number of characters that it cannot hold out.
    """
    check_choice("split", protocol, ("1200/423", "vinyals"))
    if protocol == "vinyals" and validation:
        own = "with split 'vinyals', which has 172 of its own"
        raise ValueError(f"validation must be 0 {own}, got {validation}")
    table = _split_file()[protocol]
    codes = np.array(list("".join(table[s][a] for s in ("background", "evaluation") for a in sorted(table[s]))))
    splits = {name: np.nonzero(codes == code)[0] for name, code in (("train", "r"), ("val", "v"), ("test", "e"))}
    if protocol == "1200/423":
        if not 0 <= validation < splits["train"].size:
            raise ValueError(f"validation must be from 0 to {splits['train'].size - 1} characters, got {validation}")
        names = character_names()
        ranked = np.array(sorted(splits["train"], key=lambda i: name_rank(names[i])))
        splits["train"], splits["val"] = np.sort(ranked[: 1200 - validation]), np.sort(ranked[1200 - validation :])
    return {name: members for name, members in splits.items() if members.size}


def name_rank(name: str) -> str:
    """Returns what the "1200/423" protocol orders characters by: a shuffle that needs no random generator."""
    return hashlib.sha256(name.encode()).hexdigest()


def load_omniglot(
    *, root: Path | str | None = None, cache_dir: Path | str | None = None, download: bool = False
) -> np.ndarray:
    """Reads all drawings, uint8 [1623, 20, 28, 28], ink = 255, characters in the order of `character_names()`.

    `root` is a folder that holds the packed file or torchvision's tree, or the parent of one; by default
    `$IMAML_DATA_ROOT`, else the cache. `download=True` fetches the drawings through torchvision into `root` where it
    holds none, or a tree that an interrupted download left incomplete.

    Raises:
        DataError: nothing is found, or what is found is incomplete, truncated or of the wrong format.
    """
    packs = cache.cache_folder(cache_dir)
    where, origin = cache.data_folder(root, packs)
    found = _find(where)
    if download and (found is None or (found.is_dir() and not _is_complete(found))):
        cache.download_through_torchvision(
            "Omniglot",
            where,
            lambda datasets: [datasets.Omniglot(str(where), background=half, download=True) for half in (True, False)],
            by_hand="images_background/ and images_evaluation/ (github.com/brendenlake/omniglot)",
        )
        found = _find(where)
    if found is None:
        raise cache.not_found("Omniglot", f"{_PACKED} nor images_background/", where, origin, download=True)
    images = _load_packed(found) if found.is_file() else _load_tree(found, packs)
    return images.reshape(NUM_CHARACTERS, NUM_DRAWERS, 28, 28)


def _find(where: Path) -> Path | None:
    """Finds the packed file, or the folder that holds images_background, in `where` or a usual folder below it."""
    folders = [where, where / "omniglot", where / "omniglot-py", where / "omniglot" / "omniglot-py"]
    packed = [folder / _PACKED for folder in folders if (folder / _PACKED).is_file()]
    halves = ("images_background", "images_evaluation")
    return next(iter(packed + [folder for folder in folders if any((folder / half).is_dir() for half in halves)]), None)


def _is_complete(folder: Path) -> bool:
    try:
        return bool(_list_tree(folder))
    except DataError:
        return False


def _labels() -> dict[str, np.ndarray]:
    """Returns what a packed file holds beside the images, which are in order of character and drawer."""
    names = [name.rsplit("/character", 1) for name in character_names()]
    alphabets = list(dict.fromkeys(alphabet for alphabet, _ in names))
    return {
        "alphabet": np.repeat([alphabets.index(a) for a, _ in names], NUM_DRAWERS).astype(np.uint8),
        "character": np.repeat([int(n) for _, n in names], NUM_DRAWERS).astype(np.uint8),
        "drawer": np.tile(np.arange(1, NUM_DRAWERS + 1, dtype=np.uint8), NUM_CHARACTERS),
        "alphabet_names": np.array(alphabets),
    }


def _load_packed(path: Path) -> np.ndarray:
    found, known = cache.load_arrays(path, _PACKED_ARRAYS), _labels()
    for labels in (found, known):
        labels["alphabet"] = np.append(labels["alphabet_names"], "")[np.minimum(labels["alphabet"], 50)]
    for name in ("alphabet", "character", "drawer"):
        if not np.array_equal(found[name], known[name]):
            raise DataError(f"{path}: '{name}' does not go through Omniglot in the expected order; create it again")
    return found["images"]


def _load_tree(folder: Path, packs: Path) -> np.ndarray:
    """Reads torchvision's tree, or the file packed from it earlier, whose name carries its place, sizes and times."""
    drawings = _list_tree(folder)

    def read() -> cache.Arrays:
        return {"images": np.stack([_read_drawing(path) for path in drawings]), **_labels()}

    place = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=4).hexdigest()
    state = cache.files_digest(folder, drawings, READING_VERSION)
    packed = packs / "omniglot-packed" / f"omniglot28-{place}-{state}.npz"
    return cache.cached_arrays(packed, _PACKED_ARRAYS, read, superseded=f"omniglot28-{place}-*.npz")["images"]


def _list_tree(folder: Path) -> list[Path]:
    """Lists the 32,460 drawings in order of `character_names()` and drawer."""
    subset_of = {a: f"images_{subset}" for subset, alphabets in _split_file()["vinyals"].items() for a in alphabets}
    drawings: list[Path] = []
    for name in character_names():
        character = folder / subset_of[name.split("/")[0]] / name
        pictures = sorted(character.glob("*.png"))
        if len(pictures) != NUM_DRAWERS:
            missing = f"{character.relative_to(folder)} must hold {NUM_DRAWERS} drawings, found {len(pictures)}"
            both = "images_background and images_evaluation are both needed"
            raise DataError(f"the Omniglot tree {folder} is incomplete: {missing} ({both})")
        drawings += pictures
    return drawings


def _read_drawing(path: Path) -> np.ndarray:
    """Reads one drawing as uint8 [28, 28], ink = 255."""
    drawing = decode(path).convert("L")
    if drawing.size != (105, 105):
        raise DataError(f"{path} must be 105 × 105 pixels, got {drawing.size[0]} × {drawing.size[1]}")
    return 255 - squared(drawing, 28, "squeeze")
