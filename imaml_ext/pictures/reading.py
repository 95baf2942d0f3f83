"""How picture files become arrays: a data set has a `Reading`, its weights carry it, and pictures are read by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from imaml_ext.errors import DataError
from imaml_ext.pictures.decode import decode
from imaml_ext.pictures.ink import cut_to_ink, find_ink
from imaml_ext.pictures.square import squared
from imaml_ext.pictures.stored import StoredPicture
from imaml_ext.settings import COUNT, NOT_NEGATIVE, Settings

# Raised whenever the same file and `Reading` give other pixels than before: caches of pictures carry it in their key.
READING_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Reading(Settings):
    """Says how a picture file becomes an array of size × size pixels."""

    size: Annotated[int, COUNT] = 84  # Pixels per side.
    # "rgb" and "grey" keep the picture as it is; "ink" is 1 where something is drawn, and 0 on the ground around it.
    colours: Literal["rgb", "grey", "ink"] = "rgb"
    # Strokes are darker or lighter than the ground, all of them; "either" is decided for each picture.
    ink: Literal["either", "dark", "light"] = "either"
    # How a picture becomes a square: it is squeezed, cut to its middle, padded, or cut to the ink that it shows.
    square: Literal["squeeze", "middle", "pad", "ink"] = "squeeze"
    margin: Annotated[float, NOT_NEGATIVE] = 0.2  # Margin around the ink, of the side of the ink's square.
    transparent: Literal["white", "black"] = "white"  # What a picture with a transparent ground is laid on.

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.square != "ink" or self.colours == "ink", "square", "'ink' only with colours 'ink'")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is read."""
        return (3 if self.colours == "rgb" else 1, self.size, self.size)

    def read(self, path: Path | str | StoredPicture) -> np.ndarray:
        """Reads one file, or its content: uint8 [size, size], or [size, size, 3] in colour.

        Raises:
            DataError: the file is missing, damaged or no picture; or it is blank, where ink is looked for.
        """
        path = Path(path) if isinstance(path, str) else path
        picture = decode(path, transparent=self.transparent)
        if self.colours == "ink":
            picture = find_ink(picture, self.ink, path, size=self.size)
            if self.square == "ink":
                return squared(cut_to_ink(picture, self.margin), self.size, "pad")
        return squared(picture.convert("RGB" if self.colours == "rgb" else "L"), self.size, self.square)


def read_pictures(paths: Sequence[Path | str], reading: Reading) -> np.ndarray:
    """Reads picture files: uint8 [n, size, size], or [n, size, size, 3] in colour.

    Raises:
        DataError: files are missing, damaged, no pictures, or blank where ink is looked for: names each of them.
        TypeError: `paths` is a single path.
    """
    if isinstance(paths, str | Path):
        raise TypeError(f"paths must be a list of files, got a single one, {str(paths)!r}")
    colours, size, _ = reading.shape
    images = np.empty((len(paths), size, size) if colours == 1 else (len(paths), size, size, 3), dtype=np.uint8)
    problems = []
    for image, path in zip(images, paths, strict=True):
        try:
            image[:] = reading.read(path)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise unreadable(problems, len(paths))
    return images


def unreadable(problems: Sequence[str], total: int) -> DataError:
    """Returns the error for some pictures of `total`, with a sentence for each of them."""
    if len(problems) == 1:
        return DataError(problems[0])
    return DataError("\n  ".join([f"{len(problems)} of {total} pictures cannot be read:", *problems]))
