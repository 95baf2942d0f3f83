"""Glyphs: the built-in data set. Characters of many scripts, drawn from the font files that matplotlib installs.

A class is a shape: code points that look alike in the fonts (Latin A, Greek Alpha, Cyrillic А) are one class, and it
belongs to one script. The 20 "drawers" are different faces (sans, serif, mono; bold, oblique; STIX, Computer Modern)
under small affine distortions. Training, validation and test have scripts of their own; a shape that a training script
also has is not in validation or test. Pictures are 28×28 uint8, ink = 255, like Omniglot's.

There are 1,681 training classes (5,192 with those quarter turns that look like nothing else), 88 for validation and 168
for test. The nearest support image, pixel by pixel, is right on 72.4 ± 0.7 % of the test queries at 5-way 1-shot, on
91.1 ± 0.5 % at 5-way 5-shot and on 52.1 ± 0.4 % at 20-way 1-shot (Omniglot, 1200/423: 45.1, 66.6 and 25.0): glyphs is
the easier of the two.

Which classes there are, and which faces draw them, is a fixed list in `glyphs.json`, which
`benchmarks/make_glyph_table.py` made. Everything is drawn in integer arithmetic from the outlines, so the bytes are the
same on every machine as long as the font files are: those of matplotlib 3.5 to 3.11 (DejaVu 2.37, STIX 1.1) are.
"""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from imaml_ext.data.cache import cache_folder, cached_arrays, shipped_text
from imaml_ext.data.class_images import ClassImages
from imaml_ext.data.datasets import Dataset, ImageDataset
from imaml_ext.data.raster import SIZE, SUB, FontFile, draw, transform
from imaml_ext.data.source import CachedSource
from imaml_ext.errors import DataError
from imaml_ext.pictures import Reading
from imaml_ext.rng import philox_words

NUM_DRAWERS = 20
_SEED = 0x676C79706873
RADIUS = 10 * SUB  # the longer side of a character is 20 pixels before distortion
_MATRIX_SPREAD = (13, 22, 22, 13)  # percent of RADIUS: entries xx, xy, yx, yy of the matrix vary by up to this much
_SHIFT_SPREAD = 3 * SUB // 2  # each centre is off by up to 1.5 pixels
_READING = Reading(size=SIZE, colours="ink", square="ink", margin=0.2)  # 20 of 28 pixels, as drawn here
_REINSTALL = "reinstall matplotlib from the package index"


@dataclass(frozen=True, kw_only=True)
class Glyphs(CachedSource):
    """Glyphs: characters of many scripts, drawn from font files."""

    rotations: bool = True  # In training, a character in each of four orientations is a class of its own.

    def load(self) -> Dataset:
        classes = glyph_table().classes
        images = torch.from_numpy(load_glyphs(cache_dir=self.cache_dir))
        names = [c.name for c in classes]
        parts, notes = {}, {}
        for part, members in glyph_split().items():
            # Only training has orientations: turned, a character of the others may look like another one.
            turned = self.rotations and part == "train"
            turns = np.array([classes[i].orientations for i in members]) if turned else None
            parts[part] = ClassImages(
                images, names=names, characters=members, rotations=4 if turned else 1, orientations=turns
            )
            notes[part] = ", ".join(dict.fromkeys(classes[i].script for i in members))
        description = (
            "characters of many scripts drawn from matplotlib's fonts, 20 drawings each, 28×28, split by script"
        )
        return ImageDataset(
            "glyphs",
            f"glyphs, {description}",
            parts,
            notes,
            reading=_READING,
        )


class GlyphClass(NamedTuple):
    """A class of characters that look alike."""

    script: str
    split: str
    code_point: int  # what is drawn
    faces: tuple[int, ...]  # which font files draw it
    orientations: tuple[bool, ...]  # which of four quarter turns are classes of their own
    look_alikes: tuple[int, ...]  # the other code points that are this class

    @property
    def name(self) -> str:
        return unicodedata.name(chr(self.code_point), f"U+{self.code_point:04X}").lower()


class GlyphTable(NamedTuple):
    """The fonts, (file name, SHA-256) of each face, and the classes in the order of the images."""

    fonts: tuple[tuple[str, str], ...]
    classes: tuple[GlyphClass, ...]
    digest: str


@functools.cache
def glyph_table() -> GlyphTable:
    """Reads the fixed list of classes that the package ships."""
    text = shipped_text("glyphs.json")
    table = json.loads(text)
    classes = [
        GlyphClass(
            script=script["name"],
            split=script["split"],
            code_point=int(code_point, 16),
            faces=tuple(i for i in range(len(table["fonts"])) if int(faces, 16) >> i & 1),
            orientations=tuple(str(turn) in turns for turn in range(4)),
            look_alikes=tuple(int(c, 16) for c in look_alikes.split()),
        )
        for script in table["scripts"]
        for code_point, faces, turns, look_alikes in script["classes"]
    ]
    fonts = tuple((font["file"], font["sha256"]) for font in table["fonts"])
    return GlyphTable(fonts, tuple(classes), hashlib.sha256(text.encode()).hexdigest())


def glyph_split() -> dict[str, np.ndarray]:
    """Returns the indices into the classes of `glyph_table()` of "train", "val" and "test"."""
    split_of = np.array([c.split for c in glyph_table().classes])
    return {split: np.nonzero(split_of == split)[0] for split in ("train", "val", "test")}


def load_glyphs(*, cache_dir: Path | str | None = None) -> np.ndarray:
    """Returns all drawings, uint8 [classes, 20, 28, 28], ink = 255; drawn at the first call (seconds), then cached.

    Warns where font files differ from those the list was made with: the pictures then differ too.

    Raises:
        DataError: matplotlib or a font file is missing, or the cache cannot be written.
    """
    table, folder = glyph_table(), font_folder()
    hashes = [_sha256(folder / name) for name, _ in table.fonts]
    changed = [name for (name, known), found in zip(table.fonts, hashes, strict=True) if found != known]
    if changed:
        warnings.warn(
            f"the font files {', '.join(changed)} in {folder} are not those that glyphs was defined with: its pictures "
            "differ here, and accuracies do not compare with those of other machines",
            stacklevel=2,
        )
    constants = repr((_SEED, RADIUS, _MATRIX_SPREAD, _SHIFT_SPREAD, NUM_DRAWERS, SIZE, SUB))
    key = hashlib.sha256("\n".join([table.digest, constants, *hashes]).encode()).hexdigest()[:16]
    path = cache_folder(cache_dir) / "glyphs" / f"glyphs-{key}.npz"
    shape = (len(table.classes), NUM_DRAWERS, SIZE, SIZE)
    return cached_arrays(path, {"images": ("uint8", shape)}, lambda: {"images": render_glyphs(table, folder)})["images"]


def font_folder() -> Path:
    """Returns where matplotlib keeps its font files; raises DataError where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise DataError("glyphs is drawn from matplotlib's font files: pip install matplotlib") from error
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def render_glyphs(table: GlyphTable, folder: Path) -> np.ndarray:
    """Draws every class of the table: uint8 [classes, 20, 28, 28]."""
    fonts = [_open_font(folder / name) for name, _ in table.fonts]
    images = np.empty((len(table.classes), NUM_DRAWERS, SIZE, SIZE), dtype=np.uint8)
    for number, glyph in enumerate(table.classes):
        outlines = []
        for face in glyph.faces:
            outline = fonts[face].outline(glyph.code_point)
            if outline is None:
                missing = f"lacks {glyph.name} (U+{glyph.code_point:04X})"
                raise DataError(f"the font file {folder / table.fonts[face][0]} {missing}; {_REINSTALL}")
            outlines.append(outline)
        images[number] = draw_distorted(outlines, glyph.code_point)
    return images


def draw_distorted(outlines: list[np.ndarray], code_point: int) -> np.ndarray:
    """Makes the 20 drawings of a character: uint8 [20, 28, 28].

    Faces take turns in random order, under random distortions. Both are drawn by Philox counters of the code point: a
    class does not depend on which others there are.
    """
    raw = philox_words((_SEED, 0), NUM_DRAWERS * 8, (0, code_point, 0, 0)).reshape(NUM_DRAWERS, 8)
    order = np.argsort(raw[: len(outlines), 7], kind="stable")
    spread = [RADIUS * percent // 100 for percent in _MATRIX_SPREAD] + [_SHIFT_SPREAD] * 2
    noise = [_symmetric(raw[:, i], limit) for i, limit in enumerate(spread)]  # six times int64 [20]
    matrices = np.stack([RADIUS + noise[0], noise[1], noise[2], RADIUS + noise[3]], axis=1).reshape(-1, 2, 2)
    shifts = np.stack(noise[4:], axis=1)
    outlines = [outlines[order[drawer % len(order)]] for drawer in range(NUM_DRAWERS)]
    edges = [transform(*each) for each in zip(outlines, matrices, shifts, strict=True)]
    return draw(np.concatenate(edges), np.repeat(np.arange(NUM_DRAWERS), [len(e) for e in edges]), NUM_DRAWERS)


def _symmetric(words: np.ndarray, limit: int) -> np.ndarray:
    """Turns words into whole numbers from −limit to limit, uniformly."""
    return (((words >> np.uint64(32)) * np.uint64(2 * limit + 1)) >> np.uint64(32)).astype(np.int64) - limit


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"the font file {path} cannot be read ({error.strerror}); {_REINSTALL}") from error


def _open_font(path: Path) -> FontFile:
    try:
        return FontFile(path)
    except Exception as error:  # fontTools raises many kinds for a damaged file
        raise DataError(f"the font file {path} is damaged ({error}); {_REINSTALL}") from error
