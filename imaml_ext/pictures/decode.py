"""Decodes picture files: upright, without transparency, 8 bits per channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from imaml_ext.errors import DataError
from imaml_ext.pictures.stored import StoredPicture

_DEEP = ("I;16", "I;16B", "I;16L", "I")


def decode(path: Path | StoredPicture, *, transparent: str = "white") -> Image.Image:
    """Decodes a file as "L" or "RGB": turned as its EXIF orientation says, its transparent parts laid on a ground of
    the colour `transparent`, and 16 bits scaled to 8.

    Raises:
        DataError: the file is missing, damaged or no picture.
    """
    try:
        with path.open("rb") as stream, Image.open(stream) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode in _DEEP:
                deep = np.asarray(picture).astype(np.int64)
                return Image.fromarray(((deep.clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                ground = Image.new("RGBA", picture.size, transparent)
                return Image.alpha_composite(ground, picture).convert("RGB")
            return picture.convert("L" if picture.mode in ("1", "L") else "RGB")
    except FileNotFoundError as error:
        raise DataError(f"the picture {path} does not exist") from error
    except Exception as error:  # the decoders raise errors of many kinds for a damaged file
        raise DataError(f"the picture {path} is damaged or not a picture ({error})") from error
