"""Teach a pretrained learner your own characters, from one photograph or drawing of each.

    python examples/own_drawings.py a.png b.png c.png --which unknown1.png unknown2.png

One image per class, on any plain ground, with dark or light ink. Without arguments, five glyphs take their place, which
are drawn with the fonts of matplotlib.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from imaml_ext.pretrained import load_pretrained, read_images


@dataclass(frozen=True)
class Options:
    """Tell drawings apart, from one example of each class."""

    examples: tyro.conf.Positional[tuple[Path, ...]] = ()
    """One image of each class, two or more; the class is called by the file's name."""

    which: tuple[Path, ...] = ()
    """Images of unknown class."""

    weights: str = "omniglot-5w1s-gd"
    """Pretrained weights, by name or file."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if bool(options.examples) != bool(options.which):
        raise SystemExit("give both: example images, and --which with images to be told apart; or neither")
    with tempfile.TemporaryDirectory() as folder:
        examples, which = (options.examples, options.which) if options.examples else draw_glyphs(Path(folder))

        learner = load_pretrained(options.weights)
        if len(examples) > learner.ways:
            learner = load_pretrained(options.weights, ways=len(examples))
        adapted = learner.adapt(read_images(examples, learner.reading), torch.arange(len(examples)))
        probabilities = adapted.predict(read_images(which, learner.reading))  # [Q, ways]

    for path, row in zip(which, probabilities, strict=True):
        best = int(row[: len(examples)].argmax())
        print(f"{path.name}: {examples[best].stem} ({100 * row[best]:.0f} %)")


def draw_glyphs(folder: Path, letters: str = "ЖΩҨЊÆ") -> tuple[list[Path], list[Path]]:
    """Five letters in one face to learn from, the same in another face and size to be told apart."""
    drawn: list[list[Path]] = []
    for family, size in (("DejaVu Sans", 60), ("DejaVu Serif", 90)):
        font = ImageFont.truetype(font_manager.findfont(family), size)
        drawn.append([])
        for letter in letters:
            image = Image.new("L", (160, 160), 255)
            ImageDraw.Draw(image).text((80, 80), letter, font=font, fill=0, anchor="mm")
            path = folder / f"{letter}{'' if size == 60 else '-unknown'}.png"
            image.save(path)
            drawn[-1].append(path)
    return drawn[0], drawn[1]


if __name__ == "__main__":
    main()
