"""Decodes picture files: upright, without transparency, 8 bits per channel."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from imaml_ext.errors import DataError
from imaml_ext.pictures.stored import StoredPicture

# By the ending of their names, which pictures can be read here; some formats are left out of some builds of Pillow.
_ALWAYS = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff"}
_ALWAYS |= {".ppm", ".pgm", ".pbm", ".pnm", ".tga"}
_WITH = {"webp": (".webp",), "avif": (".avif",), "jpg_2000": (".jp2",)}


def _supported(feature: str) -> bool:
    with warnings.catch_warnings():  # a version of Pillow that has not heard of the feature
        warnings.simplefilter("ignore")
        return bool(features.check(feature))


SUFFIXES = frozenset(_ALWAYS).union(*(suffixes for name, suffixes in _WITH.items() if _supported(name)))
MOST_PIXELS = 2**28  # a gigabyte, as Pillow keeps colours; an A2 sheet scanned at 600 points per inch has 139 million
_LARGE = 2048  # pixels of the shorter side from twice which on a picture is halved as it is decoded
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_pillow = threading.Lock()  # its limit of pixels and Python's filters of warnings are global


def decode(path: Path | StoredPicture, *, transparent: str = "white") -> Image.Image:
    """Decodes a file as "L" or "RGB": turned as its EXIF orientation says, its transparent parts laid on a ground of
    the colour `transparent`, and 16 bits scaled to 8. Of an animation it takes the first frame; colour profiles are
    not applied. A picture whose shorter side has 4,096 pixels or more is halved until it has not.

    Raises:
        DataError: the file is missing, damaged, of more than `MOST_PIXELS` pixels, or no picture.
    """
    with _pillow, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what makes a picture unreadable is an error below
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # large scans are no attack: see MOST_PIXELS
        try:
            # As an open file: by name, Pillow maps TIFFs into memory, and mistakes those that lie on their side.
            with path.open("rb") as stream, Image.open(stream) as file:
                return _plain(_upright(file), transparent)
        except FileNotFoundError as error:
            raise DataError(f"the picture {path} does not exist") from error
        except PermissionError as error:
            raise DataError(f"the picture {path} cannot be read ({error.strerror})") from error
        except DataError as error:
            raise DataError(f"the picture {path} {error}") from error
        except Exception as error:  # Pillow's decoders raise errors of many kinds for damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, UnidentifiedImageError):
                reason = "of no format that is read here; convert it to .png or .jpg"
            raise DataError(f"the picture {path} is damaged or not a picture ({reason})") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _upright(file: Image.Image) -> Image.Image:
    width, height = file.size
    if width * height > MOST_PIXELS:
        size = f"{width:,} × {height:,} pixels"
        raise DataError(f"is too large: it must have at most {MOST_PIXELS / 1e6:.0f} million pixels, got {size}")
    if min(width, height) >= 2 * _LARGE and file.format in ("JPEG", "MPO"):
        file.draft(None, (_LARGE, _LARGE))  # decodes a half, quarter or eighth of the sides, no less than these
    file.load()  # first: reading the orientation may load it too, and Pillow raises for damage the first time only
    # A damaged orientation counts as none, as everywhere: what is shown is the picture, not its record.
    try:
        orientation = file.getexif().get(0x0112, 1)
    except Exception:
        orientation = 1
    turned = orientation in range(2, 9)
    return ImageOps.exif_transpose(file) if turned else file


def _plain(picture: Image.Image, transparent: str) -> Image.Image:
    """The picture as "L" or "RGB"."""
    if picture.mode in _DEEP:
        values, clear = np.asarray(picture), picture.info.get("transparency")
        grey = _eight_bits(values)
        if clear is not None and picture.mode.startswith("I"):
            grey = np.where(values == clear, np.uint8(255 if transparent == "white" else 0), grey)
        return _halved(Image.fromarray(grey))
    clear = picture.has_transparency_data
    if isinstance(colour := picture.info.get("transparency"), tuple) and max(colour) > 255:
        picture.info["transparency"] = tuple(value >> 8 for value in colour)  # as Pillow reduces the 16 bits of pixels
    if picture.mode not in ("L", "RGB", "RGBA") or clear:
        picture = picture.convert("RGBA" if clear else "L" if picture.mode == "1" else "RGB")
    picture = _halved(picture)
    if clear:
        return Image.alpha_composite(Image.new("RGBA", picture.size, transparent), picture).convert("RGB")
    return picture.convert("RGB") if picture.mode == "RGBA" else picture


def _halved(picture: Image.Image) -> Image.Image:
    least = min(picture.size)
    return picture.reduce(2 ** int(np.log2(least / _LARGE))) if least >= 2 * _LARGE else picture


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Scales grey values of more than 8 bits: whole numbers by 65535, fractions by 1, 255 or 65535 as they need."""
    low, high = values.min(), values.max()
    if not (np.isfinite([low, high]).all() and low >= 0 and high <= 65535):
        raise DataError(f"must have grey values from 0 to 65535, got {low:g} to {high:g}")
    most = 65535 if values.dtype.kind in "iu" or high > 255 else 255 if high > 1 else 1
    return (values.astype(np.float32) * np.float32(255 / most) + 0.5).astype(np.uint8)
