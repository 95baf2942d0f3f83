"""Photographs of drawings that are made, for tests of how pictures are read: Omniglot's drawings on all kinds of paper.

A drawing is laid on a sheet at a random place, size and slight turn, with strokes of some thickness, and the sheet is
lit and photographed under one of `CONDITIONS`. Every number is drawn from one of two disjoint halves of its range:
"tuning" is what the reading was developed on, "held out" is what it is judged by.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

Colour = tuple[float, float, float]
_PAPERS = {
    "tuning": [(236, 226, 190), (200, 222, 240), (205, 170, 130), (230, 200, 205)],
    "held out": [(245, 235, 150), (190, 230, 195), (180, 190, 205), (250, 205, 170)],
}
_INKS = {
    "tuning": [(30, 50, 150), (170, 30, 40), (20, 110, 60), (110, 40, 120)],
    "held out": [(20, 90, 170), (190, 60, 30), (60, 90, 30), (150, 30, 90)],
}
_EQUAL_LUMA = {  # (paper, ink): luma as Pillow weighs it, 0.299 R + 0.587 G + 0.114 B, is the same to one part of 255
    "tuning": [((95, 165, 90), (225, 95, 110)), ((150, 150, 150), (225, 105, 185))],
    "held out": [((110, 170, 70), (235, 95, 135)), ((120, 165, 200), (210, 130, 115))],
}


@dataclass
class Draws:
    """Random numbers from one half of each range: the first and third quarter, or the second and fourth."""

    rng: np.random.Generator
    half: str = "held out"

    def uniform(self, low: float, high: float) -> float:
        quarter = 2 * self.rng.integers(2) + (self.half == "held out")
        return float(low + (high - low) * (quarter + self.rng.random()) / 4)

    def one_of(self, choices: dict[str, list]):
        return choices[self.half][self.rng.integers(len(choices[self.half]))]


@dataclass
class Sheet:
    """What is photographed; a condition changes parts of it."""

    draws: Draws
    height: int = 0
    width: int = 0
    paper: Colour = (246, 246, 242)
    ink: Colour = (35, 35, 45)
    strength: float = 1.0  # of the ink's colour, against that of the paper
    thicken: int = 1  # strokes are wider by that many of the drawing's 105 pixels, less one
    grain: float = 2.0  # standard deviation of the noise
    quality: int = 90  # of the JPEG
    before: list[Callable[[np.ndarray], np.ndarray]] = field(default_factory=list)  # changes of the bare paper
    after: list[Callable[[np.ndarray], np.ndarray]] = field(default_factory=list)  # of the lit scene

    def half_plane(self, *, through: float, soft: float, turn: float | None = None) -> np.ndarray:
        """Returns 0 to 1 [H, W]: on which side of a line a pixel is that passes at `through` of the half diagonal."""
        turn = self.draws.uniform(0, 2 * np.pi) if turn is None else turn
        y, x = np.mgrid[: self.height, : self.width]
        along = (x - self.width / 2) * np.cos(turn) + (y - self.height / 2) * np.sin(turn)
        return np.clip((along - through * min(self.height, self.width) / 2) / max(soft, 1.0) + 0.5, 0, 1)


def _clean(sheet: Sheet) -> None:
    pass


def _shaded(sheet: Sheet) -> None:
    """Light that falls off to one side, and towards the corners."""
    draws = sheet.draws
    y, x = np.mgrid[-1 : 1 : 1j * sheet.height, -1 : 1 : 1j * sheet.width]
    turn = draws.uniform(0, 2 * np.pi)
    light = 1 - draws.uniform(0.2, 0.6) * (1 + x * np.cos(turn) + y * np.sin(turn)) / 2.5
    light *= 1 - draws.uniform(0.0, 0.35) * (x * x + y * y) / 2
    sheet.after.append(lambda scene: scene * light[..., None])


def _shadow(sheet: Sheet) -> None:
    """A shadow's edge across the sheet, often across the drawing: 45 % of the light is left in it."""
    draws = sheet.draws
    dark = sheet.half_plane(through=draws.uniform(-0.7, 0.7), soft=draws.uniform(1, 30))
    light = 1 - (1 - draws.uniform(0.35, 0.55)) * dark
    sheet.after.append(lambda scene: scene * light[..., None])


def _table(sheet: Sheet) -> None:
    """The sheet ends, on one side or two, before the picture does."""
    draws = sheet.draws
    turn = draws.uniform(-0.1, 0.1) + np.pi / 2 * draws.rng.integers(4)
    table = sheet.half_plane(through=draws.uniform(0.78, 0.95), soft=2, turn=turn)
    if draws.rng.random() < 0.5:
        other = sheet.half_plane(through=draws.uniform(0.78, 0.95), soft=2, turn=turn + np.pi / 2)
        table = np.maximum(table, other)
    wood = np.array([draws.uniform(50, 150), draws.uniform(40, 110), draws.uniform(25, 80)])
    fibre = 1 + draws.uniform(0.02, 0.12) * draws.rng.standard_normal((sheet.height, 1))
    # The table is put over the drawing too: a hand leaves a margin, but lighting comes later.
    sheet.before.append(lambda scene: scene * (1 - table[..., None]) + (wood * fibre[..., None]) * table[..., None])


def _ruled(sheet: Sheet, directions: int, dark: float = 1.0) -> None:
    draws = sheet.draws
    period = draws.uniform(0.035, 0.09) * min(sheet.height, sheet.width) * (1 if directions == 2 else 1.6)
    tint = np.array([[110, 150, 220], [150, 150, 160], [200, 120, 120], [110, 190, 170]][draws.rng.integers(4)])
    strength, wide, tilt = draws.uniform(0.3, 1.0), draws.uniform(1.0, 3.0), draws.uniform(-0.1, 0.1)
    y, x = np.mgrid[: sheet.height, : sheet.width]
    lines = np.zeros((sheet.height, sheet.width))
    for turn in (tilt, tilt + np.pi / 2)[:directions]:
        at = (y * np.cos(turn) + x * np.sin(turn) + draws.uniform(0, period)) % period
        lines = np.maximum(lines, np.clip(wide / 2 + 0.5 - np.abs(at - period / 2), 0, 1))
    share = strength * lines[..., None]
    sheet.before.insert(0, lambda scene: scene * (1 - share + share * dark * tint / 255))


def _coloured_paper(sheet: Sheet) -> None:
    sheet.paper = sheet.draws.one_of(_PAPERS)
    sheet.ink = sheet.draws.one_of(_INKS)


def _yellow(sheet: Sheet) -> None:
    """Yellow ink on white: hardly any luma apart."""
    sheet.ink = (sheet.draws.uniform(225, 250), sheet.draws.uniform(205, 235), sheet.draws.uniform(20, 110))


def _equal_luma(sheet: Sheet) -> None:
    sheet.paper, sheet.ink = sheet.draws.one_of(_EQUAL_LUMA)


def _chalk(sheet: Sheet) -> None:
    """Light ink on a dark ground."""
    level = sheet.draws.uniform(20, 80)
    sheet.paper, sheet.ink = (0.8 * level, level, 0.9 * level), (225, 225, 215)
    sheet.strength = sheet.draws.uniform(0.6, 1.0)


def _marker(sheet: Sheet) -> None:
    sheet.thicken = int(sheet.draws.uniform(3, 8))


def _pencil(sheet: Sheet) -> None:
    """Thin grey strokes, with the paper's grain in them."""
    sheet.ink, sheet.strength, sheet.thicken = (70, 70, 75), sheet.draws.uniform(0.25, 0.6), 0


def _faint(sheet: Sheet) -> None:
    """Low contrast."""
    sheet.strength = sheet.draws.uniform(0.12, 0.3)


def _noisy(sheet: Sheet) -> None:
    sheet.grain, sheet.quality = sheet.draws.uniform(8, 25), int(sheet.draws.uniform(15, 50))


def _everything(sheet: Sheet) -> None:
    """Coloured, squared paper on a table, in shading and a shadow's edge, by a noisy camera."""
    _coloured_paper(sheet)
    _ruled(sheet, 2)
    _shaded(sheet)
    _shadow(sheet)
    _table(sheet)
    sheet.grain, sheet.quality = sheet.draws.uniform(2, 8), int(sheet.draws.uniform(40, 85))


CONDITIONS: dict[str, Callable[[Sheet], None]] = {
    "clean": _clean,
    "shading": _shaded,
    "shadow's edge": _shadow,
    "table's edge": _table,
    "squared paper": functools.partial(_ruled, directions=2),
    "lined paper": functools.partial(_ruled, directions=1),
    "coloured paper and ink": _coloured_paper,
    "yellow on white": _yellow,
    "equal luma": _equal_luma,
    "light on dark": _chalk,
    "marker": _marker,
    "pencil": _pencil,
    "low contrast": _faint,
    "noise and JPEG": _noisy,
    "everything": _everything,
    "squares in dark print": functools.partial(_ruled, directions=2, dark=0.6),
}


def photograph(drawing: np.ndarray | None, condition: str, draws: Draws) -> Image.Image:
    """Makes the photograph "RGB" of a drawing, bool [105, 105], under one of `CONDITIONS`; None: of the empty sheet."""
    sheet = Sheet(draws, height=int(draws.uniform(360, 640)), width=int(draws.uniform(360, 640)))
    CONDITIONS[condition](sheet)
    scene = np.full((sheet.height, sheet.width, 3), sheet.paper, dtype=np.float64)
    for change in sheet.before:
        scene = change(scene)
    if drawing is not None:
        ink = sheet.strength * _strokes(drawing, sheet)
        if sheet.thicken == 0:
            ink = ink * np.clip(1 + 0.25 * draws.rng.standard_normal(ink.shape), 0, 1.3)
        # As dyes do, ink takes its share of the light that the paper, with its lines, gives back; chalk covers it.
        under = scene / np.array(sheet.paper)
        scene = scene * (1 - ink[..., None]) + ink[..., None] * np.array(sheet.ink) * np.minimum(under, 1)
    for change in sheet.after:
        scene = change(scene)
    scene = scene + draws.rng.normal(0, sheet.grain, scene.shape)
    picture = Image.fromarray(np.rint(scene.clip(0, 255)).astype(np.uint8))
    file = io.BytesIO()
    picture.filter(ImageFilter.GaussianBlur(0.6)).save(file, "jpeg", quality=sheet.quality)
    return Image.open(file)


def _strokes(drawing: np.ndarray, sheet: Sheet) -> np.ndarray:
    """Lays a drawing on the middle seven tenths of the sheet: 0 to 1 [H, W]."""
    draws, side = sheet.draws, min(sheet.height, sheet.width)
    picture = Image.fromarray(np.where(drawing, 255, 0).astype(np.uint8))
    if sheet.thicken > 1:
        disc = np.hypot(*np.mgrid[-4:5, -4:5]) <= sheet.thicken / 2
        padded = np.pad(drawing, 4)
        wide = np.zeros_like(padded)
        for dy, dx in np.argwhere(disc) - 4:
            wide |= np.roll(padded, (dy, dx), (0, 1))
        picture = Image.fromarray(np.where(wide, 255, 0).astype(np.uint8))
    if (box := picture.getbbox()) is None:
        raise ValueError("drawing must show something")
    picture = picture.crop((box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2))
    large = draws.uniform(0.3, 0.62) * side / max(picture.size)
    large = min(large, 0.05 * side)  # no stroke becomes wider than a thick pen makes it: a dot stays a dot
    picture = picture.resize([max(8, round(large * n)) for n in picture.size], Image.Resampling.BICUBIC)
    picture = picture.filter(ImageFilter.GaussianBlur(0.4 * large))
    sharp = np.clip((np.asarray(picture, dtype=np.float64) / 255 - 0.45) / 0.1, 0, 1)
    if sheet.thicken == 0:
        sharp = np.clip((np.asarray(picture, dtype=np.float64) / 255 - 0.35) / 0.5, 0, 1)
    picture = Image.fromarray(np.rint(255 * sharp).astype(np.uint8))
    picture = picture.rotate(draws.uniform(-8, 8), Image.Resampling.BICUBIC, expand=True)
    left, top = (
        int(0.15 * n + draws.uniform(0, 1) * max(int(0.7 * n) - m, 0))
        for n, m in zip((sheet.width, sheet.height), picture.size, strict=True)
    )
    ink = Image.new("L", (sheet.width, sheet.height))
    ink.paste(picture, (left, top))
    return np.asarray(ink, dtype=np.float64) / 255


@functools.cache
def _packed() -> tuple[np.ndarray, int, int]:
    with np.load(Path(os.environ["IMAML_DATA_ROOT"]) / "omniglot" / "omniglot105.npz") as file:
        height, width = map(int, file["shape"])
        return file["images_packed"], height, width


def drawing(character: int, drawer: int) -> np.ndarray:
    """Reads one of Omniglot's own drawings, bool [105, 105], from `$IMAML_DATA_ROOT/omniglot/omniglot105.npz`."""
    packed, height, width = _packed()
    bits = np.unpackbits(packed[20 * character + drawer], count=height * width)
    return bits.reshape(height, width).view(bool)


def save_photographs(
    folder: Path, characters: Sequence[int], conditions: Sequence[str], rng: np.random.Generator, *, each: int = 5
) -> dict[str, list[Path]]:
    """Writes folders of photographs, {folder of a character: its `each` pictures}, each under one of the conditions."""
    written: dict[str, list[Path]] = {}
    for character in characters:
        place = folder / f"character{character:04d}"
        place.mkdir(parents=True)
        drawers = rng.permutation(20)[:each]
        for number, drawer in enumerate(drawers):
            condition = conditions[int(rng.integers(len(conditions)))]
            picture = photograph(drawing(character, drawer), condition, Draws(rng))
            path = place / f"photograph{number}.jpg"
            picture.save(path, quality=92)
            written.setdefault(place.name, []).append(path)
    return written
