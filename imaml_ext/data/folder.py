"""Pictures of your own: a folder that holds a folder of pictures for each class."""

from __future__ import annotations

import hashlib
from pathlib import Path

from imaml_ext.checks import check_int
from imaml_ext.errors import DataError

from .cache import cache_folder
from .pictures import SPLITS, LabelledImages, list_classes, load_classes, load_split_tree


def load_folder(
    root: Path | str,
    *,
    cache_dir: Path | str | None = None,
    image_size: int = 84,
    greyscale: bool = False,
    val_fraction: float = 0.16,
    test_fraction: float = 0.2,
) -> LabelledImages:
    """The pictures ``root/<class>/*.png`` (.jpg, .jpeg), scaled to image_size × image_size.

    Where root holds ``train/`` or ``test/`` with a folder a class, these, and ``val/`` where it is there, are the
    splits. Otherwise classes are put in the order of the SHA-256 of their names, a shuffle that needs no random
    generator: the last ``test_fraction`` of them test, ``val_fraction`` before these validate, and the rest train; a
    fraction is rounded to whole classes.

    Raises:
        ValueError: a size or a fraction outside its range.
        DataError: the folder, or pictures in it, are missing or damaged, a class has no picture, or a split no class.
    """
    folder, cache = Path(root).expanduser(), cache_folder(cache_dir)
    image_size = check_int("image_size", image_size, minimum=1)
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
    if not folder.is_dir():
        raise DataError(f"root {folder} is not a folder; it must hold one folder of pictures a class")
    if any(path.is_dir() for split in SPLITS for path in (folder / split).glob("*")):
        return load_split_tree(folder, size=image_size, greyscale=greyscale, cache=cache)

    classes = list_classes(folder)
    ranked = sorted(classes, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    sizes = {"val": int(len(ranked) * val_fraction + 0.5), "test": int(len(ranked) * test_fraction + 0.5)}
    sizes = {"train": len(ranked) - sum(sizes.values())} | sizes
    for split, wanted in (("train", 1 - val_fraction - test_fraction), ("val", val_fraction), ("test", test_fraction)):
        if sizes[split] < 1 and not (split == "val" and wanted == 0):
            raise DataError(
                f"{folder} holds {len(ranked)} classes, which leaves none for {split!r} with val_fraction = "
                f"{val_fraction:g} and test_fraction = {test_fraction:g}"
            )
    parts, begin = {}, 0
    for split, size in sizes.items():
        if size:
            parts[split] = {name: classes[name] for name in sorted(ranked[begin : begin + size])}
        begin += size
    return load_classes(folder, parts, size=image_size, greyscale=greyscale, cache=cache)
