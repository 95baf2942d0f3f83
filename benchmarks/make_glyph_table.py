"""Makes `imaml_ext/data/glyphs.json`, the fixed list of the classes of glyphs: `python benchmarks/make_glyph_table.py`.

The list ships with the package; this is how it came about, and how to change it.

- Candidates: letters, digits and symbols of the blocks below that a base face has. Precomposed accented letters
  (Unicode decomposes them) are left out: they differ from their base by a few pixels. So are Braille, Ogham, box
  drawing, arrows and the like, whose members differ by tiny marks or are bars.
- Each is drawn undistorted in its base face, blurred, and compared by cosine. Pairs above `MERGE` are one class,
  and so are chains of such pairs. A class belongs to the first script of the list that has a member in it: training
  scripts come first.
- A face draws a class only if its picture is nearer to that class's base picture than to any other class's.
- In training, a quarter turn of a class is a class of its own if it resembles nothing that came before it.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import unicodedata
from pathlib import Path

import numpy as np

from imaml_ext.data import glyphs
from imaml_ext.data.glyphs import RADIUS, font_folder
from imaml_ext.data.raster import FontFile, draw, transform

MERGE = 0.95
FACES = (
    *(f"DejaVuSans{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"DejaVuSansMono{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"STIXGeneral{style}.ttf" for style in ("", "Bol", "Italic", "BolIta")),
    *(f"{name}.ttf" for name in ("cmr10", "cmss10", "cmtt10", "cmb10")),
)
BASE_FACES = ("DejaVuSans.ttf", "STIXGeneral.ttf")
_ASCII_ONLY = ("cmr10", "cmss10", "cmtt10", "cmb10")  # their other positions are not Unicode

# (script, split, blocks [first, last)); an earlier script owns the shapes that a later one shares with it.
SCRIPTS: tuple[tuple[str, str, tuple[tuple[int, int], ...]], ...] = (
    (
        "Latin",
        "train",
        (
            (0x30, 0x3A),
            (0x41, 0x5B),
            (0x61, 0x7B),
            (0xC0, 0x2B0),
            (0x1D00, 0x1DC0),
            (0x1E00, 0x1F00),
            (0x2C60, 0x2C80),
            (0xA720, 0xA800),
        ),
    ),
    ("Greek", "train", ((0x370, 0x400),)),
    ("Cyrillic", "train", ((0x400, 0x530), (0xA640, 0xA6A0))),
    ("Canadian Aboriginal", "train", ((0x1400, 0x1680),)),
    ("Arabic", "train", ((0x600, 0x700), (0x750, 0x780))),
    ("Lisu", "train", ((0xA4D0, 0xA500),)),
    ("Old Italic", "train", ((0x10300, 0x10330),)),
    ("Mathematical letters", "train", ((0x2100, 0x2150), (0x1D49C, 0x1D56C))),
    ("Symbols", "train", ((0x2200, 0x2400), (0x25A0, 0x2776), (0x27C0, 0x27F0), (0x2980, 0x2B00))),
    ("Armenian", "val", ((0x530, 0x590),)),
    ("Lao", "val", ((0xE80, 0xF00),)),
    ("Georgian", "test", ((0x10A0, 0x1100), (0x2D00, 0x2D30))),
    ("Hebrew", "test", ((0x5D0, 0x5EB),)),
    ("N'Ko", "test", ((0x7C0, 0x7EB),)),
    ("Tifinagh", "test", ((0x2D30, 0x2D80),)),
)
_BLUR = ((-2, 1), (-1, 4), (0, 6), (1, 4), (2, 1))
_CATEGORIES = ("Lu", "Ll", "Lo", "Nd", "Sm", "So")


def build_table(folder: Path) -> dict[str, object]:
    """Builds the content of `glyphs.json` for the font files in `folder`."""
    fonts = [FontFile(folder / name) for name in FACES]
    base_order = [FACES.index(name) for name in BASE_FACES]
    candidates: list[tuple[int, int]] = []  # (script, code point)
    pictures: list[np.ndarray] = []
    for script, (_, _, blocks) in enumerate(SCRIPTS):
        for code_point in (c for first, last in blocks for c in range(first, last)):
            if not _is_candidate(code_point):
                continue
            outline = next((o for f in base_order if (o := fonts[f].outline(code_point)) is not None), None)
            if outline is not None:
                candidates.append((script, code_point))
                pictures.append(_plain(outline))
    features = _features(np.stack(pictures))
    class_of = _merge(features)

    @functools.cache
    def faces_of(code_point: int) -> list[int]:
        usable = [f for f, name in enumerate(FACES) if code_point < 0x80 or not name.startswith(_ASCII_ONLY)]
        return [f for f in usable if fonts[f].outline(code_point) is not None]

    representatives: list[int] = []  # candidate that stands for each class
    members = [np.nonzero(class_of == c)[0] for c in range(class_of.max() + 1)]
    for group in members:
        owner = min(candidates[i][0] for i in group)
        own = [i for i in group if candidates[i][0] == owner]
        representatives.append(
            max((int(i) for i in own), key=lambda i: (len(faces_of(candidates[i][1])), -candidates[i][1]))
        )
    base = features[representatives]  # [classes, pixels]

    order = sorted(range(len(members)), key=lambda c: candidates[representatives[c]])
    train = [c for c in order if SCRIPTS[candidates[representatives[c]][0]][1] == "train"]
    turns = dict.fromkeys(order, "0")
    kept = base[train]
    for c in train:
        picture = pictures[representatives[c]]
        for turn in (1, 2, 3):
            turned = _features(np.rot90(picture, turn)[None])
            if (kept @ turned[0]).max() < MERGE:
                turns[c] += str(turn)
                kept = np.concatenate([kept, turned])

    scripts = [{"name": name, "split": split, "classes": []} for name, split, _ in SCRIPTS]
    for c in order:
        script, code_point = candidates[representatives[c]]
        mask = 0
        for face in faces_of(code_point):
            outline = fonts[face].outline(code_point)
            assert outline is not None
            if int((base @ _features(_plain(outline)[None])[0]).argmax()) == c:
                mask |= 1 << face
        others = " ".join(f"{candidates[i][1]:x}" for i in members[c] if candidates[i][1] != code_point)
        scripts[script]["classes"].append([f"{code_point:x}", f"{mask:x}", turns[c], others])  # type: ignore[attr-defined]
    digests = [{"file": n, "sha256": hashlib.sha256((folder / n).read_bytes()).hexdigest()} for n in FACES]
    return {"fonts": digests, "scripts": [s for s in scripts if s["classes"]]}


def _is_candidate(code_point: int) -> bool:
    character = chr(code_point)
    decomposition = unicodedata.decomposition(character)
    return unicodedata.category(character) in _CATEGORIES and (not decomposition or decomposition.startswith("<font>"))


def _plain(outline: np.ndarray) -> np.ndarray:
    edges = transform(outline, np.array([[RADIUS, 0], [0, RADIUS]]), np.zeros(2, np.int64))
    return draw(edges, np.zeros(len(edges), np.int64), 1)[0]


def _features(images: np.ndarray) -> np.ndarray:
    """Returns blurred (binomial, 5×5) pictures as unit vectors, [n, pixels]."""
    blurred = np.pad(images.astype(np.int64), ((0, 0), (2, 2), (2, 2)))
    for axis in (1, 2):
        shifted = [weight * np.roll(blurred, shift, axis) for shift, weight in _BLUR]
        blurred = np.sum(shifted, axis=0)
    flat = blurred.reshape(len(images), -1).astype(np.float64)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def _merge(features: np.ndarray) -> np.ndarray:
    """Numbers the class of each candidate: connected components of the pairs whose cosine is at least MERGE."""
    count = len(features)
    label = np.full(count, -1)
    classes = 0
    for start in range(count):
        if label[start] >= 0:
            continue
        frontier = np.array([start])
        while frontier.size:
            label[frontier] = classes
            near = (features[frontier] @ features.T >= MERGE).any(axis=0)
            frontier = np.nonzero(near & (label < 0))[0]
        classes += 1
    return label


def write_table(path: Path, table: dict[str, object]) -> None:
    """Writes one class per line."""
    lines = json.dumps(table, separators=(", ", ": ")).replace('[["', '[\n["').replace('"], ["', '"],\n["')
    lines = lines.replace('{"name"', '\n{"name"').replace('{"file"', '\n{"file"')
    path.write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0] + ".").parse_args()
    result = build_table(font_folder())
    write_table(Path(glyphs.__file__).with_name("glyphs.json"), result)
    for entry in result["scripts"]:  # type: ignore[attr-defined]
        turned = sum(len(c[2]) for c in entry["classes"])
        faces = np.mean([bin(int(c[1], 16)).count("1") for c in entry["classes"]])
        print(f"{entry['split']:5} {entry['name']:22} {len(entry['classes']):5} {turned:5} faces {faces:.1f}")
