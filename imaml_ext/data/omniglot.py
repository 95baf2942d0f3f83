"""Omniglot: 1,623 handwritten characters of 50 alphabets, each by 20 drawers (Lake et al., Science 2015), at 28×28,
ink = 255.

It is read from whichever of these a root folder holds:

- a packed file ``omniglot28.npz`` (``images`` uint8 [32460, 28, 28], rows ordered by subset, alphabet, character,
  drawer);
- the tree that torchvision unpacks: ``images_background/<Alphabet>/characterNN/*.png`` and ``images_evaluation/…``,
  105×105 in black on white. It is reduced by a Lanczos filter and packed once into the cache.

Which characters are trained on is a fixed list in ``omniglot_splits.json``:

- ``"1200/423"``, the paper's sizes: the 1,623 names ``<Alphabet>/characterNN`` in ascending order of their SHA-256; the
  first 1,200 train, the last 423 test. With ``validation = v`` the last v of the 1,200 are validation instead.
- ``"vinyals"``: 1,028 train, 172 validation, 423 test (Vinyals et al., *Matching Networks*, NeurIPS 2016).

As usual the four orientations of a character are four classes, in training and in testing.
"""

from __future__ import annotations

import functools
import hashlib
import json
from importlib import resources
from pathlib import Path

import numpy as np

from imaml_ext.errors import DataError

from .cache import cache_folder, data_folder, load_arrays, save_arrays
from .download import download_through_torchvision

PROTOCOLS = ("1200/423", "vinyals")
NUM_CHARACTERS = 1623
NUM_DRAWERS = 20
SUBSETS = {"images_background": 964, "images_evaluation": 659}  # folder -> characters
_PACKED = "omniglot28.npz"
_PACKED_ARRAYS: dict[str, tuple[str, tuple[int | None, ...]]] = {
    "images": ("uint8", (NUM_CHARACTERS * NUM_DRAWERS, 28, 28)),
    "alphabet": ("u", (NUM_CHARACTERS * NUM_DRAWERS,)),
    "character": ("u", (NUM_CHARACTERS * NUM_DRAWERS,)),
    "drawer": ("u", (NUM_CHARACTERS * NUM_DRAWERS,)),
    "alphabet_names": ("U", (50,)),
}


@functools.cache
def _split_file() -> dict[str, dict[str, dict[str, str]]]:
    return json.loads(resources.files(__package__).joinpath("omniglot_splits.json").read_text(encoding="utf-8"))


def character_names() -> tuple[str, ...]:
    """The 1,623 names ``<Alphabet>/characterNN``: background alphabets, then evaluation alphabets, each in order of
    name."""
    alphabets = _split_file()["vinyals"]
    return tuple(
        f"{alphabet}/character{number:02d}"
        for subset in ("background", "evaluation")
        for alphabet, letters in sorted(alphabets[subset].items())
        for number in range(1, len(letters) + 1)
    )


def omniglot_split(protocol: str = "1200/423", *, validation: int = 0) -> dict[str, np.ndarray]:
    """Indices into ``character_names()`` of each split: {"train", "test"} and "val" where there is one.

    ``validation`` characters of the 1,200 are held out as "val" (protocol "1200/423" only; Vinyals' has its own 172).
    Raises ValueError that names the argument.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"split_protocol must be one of {', '.join(map(repr, PROTOCOLS))}, got {protocol!r}")
    if protocol == "vinyals" and validation:
        raise ValueError(
            f"validation must be 0 with split_protocol 'vinyals', which has 172 of its own, got {validation}"
        )
    table = _split_file()[protocol]
    letters = "".join(table[s][a] for s in ("background", "evaluation") for a in sorted(table[s]))
    codes = np.array(list(letters))
    splits = {name: np.nonzero(codes == code)[0] for name, code in (("train", "r"), ("val", "v"), ("test", "e"))}
    if protocol == "1200/423":
        if not 0 <= validation < splits["train"].size:
            raise ValueError(f"validation must be from 0 to {splits['train'].size - 1} characters, got {validation}")
        names = character_names()
        ranked = np.array(sorted(splits["train"], key=lambda i: name_rank(names[i])))
        splits["train"], splits["val"] = np.sort(ranked[: 1200 - validation]), np.sort(ranked[1200 - validation :])
    return {name: members for name, members in splits.items() if members.size}


def name_rank(name: str) -> str:
    """What the "1200/423" protocol orders characters by: a shuffle that needs no random generator."""
    return hashlib.sha256(name.encode()).hexdigest()


def load_omniglot(
    *, root: Path | str | None = None, cache_dir: Path | str | None = None, download: bool = False
) -> np.ndarray:
    """All drawings, uint8 [1623, 20, 28, 28], ink = 255, characters in the order of ``character_names()``.

    ``root``: a folder that holds the packed file or torchvision's tree, or the parent of one; by default
    ``$IMAML_DATA_ROOT``, else the cache. ``download=True`` fetches the drawings through torchvision into ``root``
    where it holds none, or a tree that an interrupted download left incomplete.

    Raises DataError where nothing is found, or what is found is incomplete, truncated or of the wrong format.
    """
    cache = cache_folder(cache_dir)
    where, origin = data_folder(root, cache)
    found = _find(where)
    if download and (found is None or (found.is_dir() and not _is_complete(found))):
        _download(where)
        found = _find(where)
    if found is None:
        state = "holds neither omniglot28.npz nor images_background/" if where.is_dir() else "is not a folder"
        raise DataError(
            f"Omniglot was not found: {origin} {where} {state}; give the folder that has it as root or in "
            "IMAML_DATA_ROOT, or pass download=True to fetch it through torchvision"
        )
    return _load_packed(found) if found.is_file() else _load_tree(found, cache)


def _find(where: Path) -> Path | None:
    """The packed file, or the folder that holds images_background, in ``where`` or a usual folder below it."""
    folders = [where, where / "omniglot", where / "omniglot-py", where / "omniglot" / "omniglot-py"]
    for folder in folders:
        if (folder / _PACKED).is_file():
            return folder / _PACKED
    for folder in folders:
        if any((folder / subset).is_dir() for subset in SUBSETS):
            return folder
    return None


def _is_complete(folder: Path) -> bool:
    try:
        return bool(_list_tree(folder))
    except DataError:
        return False


def _load_packed(path: Path) -> np.ndarray:
    arrays = load_arrays(path, _PACKED_ARRAYS)
    names = arrays["alphabet_names"]
    if int(arrays["alphabet"].max()) >= names.size:
        raise DataError(
            f"{path}: array 'alphabet' must hold indices below {names.size}, got {arrays['alphabet'].max()}"
        )
    each = slice(None, None, NUM_DRAWERS)
    pairs = zip(arrays["alphabet"][each], arrays["character"][each], strict=True)
    found = [f"{names[alphabet]}/character{number:02d}" for alphabet, number in pairs]
    if found != list(character_names()):
        raise DataError(f"{path} does not hold the 1,623 characters of Omniglot in the expected order; create it again")
    expected = np.tile(np.arange(1, NUM_DRAWERS + 1), NUM_CHARACTERS)
    if not np.array_equal(arrays["drawer"], expected):
        raise DataError(
            f"{path}: array 'drawer' must count 1 to {NUM_DRAWERS} for each character; create the file again"
        )
    return arrays["images"].reshape(NUM_CHARACTERS, NUM_DRAWERS, 28, 28)


def _load_tree(folder: Path, cache: Path) -> np.ndarray:
    """Read torchvision's tree, or the file packed from it earlier: the file's name carries sizes and times of the
    drawings."""
    drawings = _list_tree(folder)
    state = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8)
    for path in drawings:
        stat = path.stat()
        state.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    packed = cache / "omniglot-packed" / f"omniglot28-{state.hexdigest()}.npz"
    if packed.is_file():
        try:
            return _load_packed(packed)
        except DataError:
            packed.unlink(missing_ok=True)  # damaged; it holds nothing that is not read from the tree again below
    images = np.stack([_read_drawing(path) for path in drawings])  # [32460, 28, 28]
    names = [name.rsplit("/character", 1) for name in character_names()]
    alphabet_names = list(dict.fromkeys(alphabet for alphabet, _ in names))
    save_arrays(
        packed,
        {
            "images": images,
            "alphabet": np.repeat([alphabet_names.index(a) for a, _ in names], NUM_DRAWERS).astype(np.uint8),
            "character": np.repeat([int(n) for _, n in names], NUM_DRAWERS).astype(np.uint8),
            "drawer": np.tile(np.arange(1, NUM_DRAWERS + 1, dtype=np.uint8), NUM_CHARACTERS),
            "alphabet_names": np.array(alphabet_names),
        },
    )
    return images.reshape(NUM_CHARACTERS, NUM_DRAWERS, 28, 28)


def _list_tree(folder: Path) -> list[Path]:
    """The 32,460 drawings in order of ``character_names()`` and drawer."""
    subset_of = {a: f"images_{subset}" for subset, alphabets in _split_file()["vinyals"].items() for a in alphabets}
    drawings: list[Path] = []
    for name in character_names():
        character = folder / subset_of[name.split("/")[0]] / name
        pictures = sorted(character.glob("*.png")) if character.is_dir() else []
        if len(pictures) != NUM_DRAWERS:
            raise DataError(
                f"the Omniglot tree {folder} is incomplete: {character.relative_to(folder)} must hold {NUM_DRAWERS} "
                f"drawings, found {len(pictures)} (images_background and images_evaluation are both needed)"
            )
        drawings += pictures
    return drawings


def _read_drawing(path: Path) -> np.ndarray:
    """One drawing as uint8 [28, 28], ink = 255."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("reading Omniglot's .png drawings needs Pillow: pip install pillow") from error
    try:
        with Image.open(path) as file:
            drawing = file.convert("L")
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} is damaged or not a picture ({error}); download Omniglot again") from error
    if drawing.size != (105, 105):
        raise DataError(f"{path} must be 105 × 105 pixels, got {drawing.size[0]} × {drawing.size[1]}")
    return 255 - np.asarray(drawing.resize((28, 28), Image.Resampling.LANCZOS))


def _download(where: Path) -> None:
    download_through_torchvision(
        "Omniglot",
        where,
        lambda datasets: [datasets.Omniglot(str(where), background=half, download=True) for half in (True, False)],
        by_hand="images_background/ and images_evaluation/ (github.com/brendenlake/omniglot)",
    )
