"""The data sets by name: ``load_dataset("omniglot").sampler("train", ways=5, shots=1, …).sample(step)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from imaml_ext.checks import check_int

from . import cifar, mini_imagenet
from .class_images import ClassImages
from .datasets import Dataset, ImageDataset, LinearDataset, SinusoidDataset
from .folder import load_folder
from .glyphs import GLYPHS_DESCRIPTION, glyph_split, load_glyphs
from .omniglot import PROTOCOLS, character_names, load_omniglot, omniglot_split
from .pictures import LabelledImages, number_range


def load_dataset(name: str, **options: object) -> Dataset:
    """A data set by name, one of ``DATASETS``; ``options`` are those of its builder there.

    Raises:
        ValueError: an unknown name, or an option outside its range.
        TypeError: an option that the data set does not have.
        DataError: the data is missing or damaged.
    """
    taken = dataset_options(name)
    for option in options:
        if option not in taken:
            raise TypeError(f"{option} is no option of {name}, which has {', '.join(taken) or 'none'}")
    return DATASETS[name](**options)


def dataset_options(name: str) -> tuple[str, ...]:
    """The options that ``load_dataset(name, …)`` takes. Raises ValueError for an unknown name."""
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(map(repr, DATASETS))}, got {name!r}")
    return tuple(inspect.signature(DATASETS[name]).parameters)


def _glyphs(*, cache_dir: Path | str | None = None, rotations: bool = True) -> Dataset:
    """rotations: each orientation of a training character is a class."""
    split = glyph_split()
    images = torch.from_numpy(load_glyphs(cache_dir=cache_dir))
    parts, notes = {}, {}
    for part, members in split.items():
        turn = rotations and members.orientations is not None
        parts[part] = ClassImages(
            images,
            names=members.names,
            characters=members.indices,
            rotations=4 if turn else 1,
            orientations=members.orientations if turn else None,
        )
        notes[part] = ", ".join(members.scripts)
    return ImageDataset("glyphs", GLYPHS_DESCRIPTION, parts, notes, drawn=True)


def _omniglot(
    *,
    root: Path | str | None = None,
    cache_dir: Path | str | None = None,
    download: bool = False,
    split_protocol: str = "1200/423",
    validation: int = 0,
    rotations: bool = True,
) -> Dataset:
    """root, cache_dir, download: see ``load_omniglot``; split_protocol, validation: ``omniglot_split``; rotations: each
    orientation of a character is a class."""
    if split_protocol not in PROTOCOLS:
        raise ValueError(f"split_protocol must be one of {', '.join(map(repr, PROTOCOLS))}, got {split_protocol!r}")
    split = omniglot_split(split_protocol, validation=check_int("validation", validation, minimum=0))
    images = torch.from_numpy(load_omniglot(root=root, cache_dir=cache_dir, download=download))
    names = character_names()
    parts = {
        part: ClassImages(images, names=names, characters=members, rotations=4 if rotations else 1)
        for part, members in split.items()
    }
    turned = ", four orientations each" if rotations else ""
    return ImageDataset(
        "omniglot",
        f"Omniglot, 1,623 handwritten characters × 20 drawers, 28×28, split {split_protocol}",
        parts,
        {part: f"{members.size:,} characters{turned}" for part, members in split.items()},
        drawn=True,
    )


def _mini_imagenet(*, root: Path | str | None = None, cache_dir: Path | str | None = None) -> Dataset:
    """See ``load_mini_imagenet``."""
    found = mini_imagenet.load_mini_imagenet(root=root, cache_dir=cache_dir)
    whole = _share(found, mini_imagenet.IMAGES_A_CLASS)
    return _photographs("mini-imagenet", f"mini-ImageNet, 100 classes, 84×84 in colour, {whole}", found)


def _cifar_fs(
    *, root: Path | str | None = None, cache_dir: Path | str | None = None, download: bool = False
) -> Dataset:
    """See ``load_cifar``."""
    found = cifar.load_cifar("cifar-fs", root=root, cache_dir=cache_dir, download=download)
    whole = _share(found, cifar.IMAGES_A_CLASS)
    return _photographs("cifar-fs", f"CIFAR-FS, the classes of CIFAR-100, 32×32 in colour, {whole}", found)


def _fc100(*, root: Path | str | None = None, cache_dir: Path | str | None = None, download: bool = False) -> Dataset:
    """See ``load_cifar``."""
    found = cifar.load_cifar("fc100", root=root, cache_dir=cache_dir, download=download)
    whole = _share(found, cifar.IMAGES_A_CLASS)
    return _photographs("fc100", f"FC100, CIFAR-100 split by superclass, 32×32 in colour, {whole}", found)


def _folder(
    *,
    root: Path | str | None = None,
    cache_dir: Path | str | None = None,
    image_size: int = 84,
    greyscale: bool = False,
    val_fraction: float = 0.16,
    test_fraction: float = 0.2,
) -> Dataset:
    """See ``load_folder``."""
    if root is None:
        raise ValueError("root must be given: a folder that holds one folder of pictures a class")
    found = load_folder(
        root,
        cache_dir=cache_dir,
        image_size=image_size,
        greyscale=greyscale,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
    )
    colours = "in grey" if greyscale else "in colour"
    return _photographs("folder", f"{root}, {len(found.names):,} classes, {image_size}×{image_size} {colours}", found)


def _sinusoid() -> Dataset:
    return SinusoidDataset()


def _linear(*, features: int = 20, condition_number: float = 10.0, noise: float = 0.1) -> Dataset:
    """See ``LinearSampler``."""
    return LinearDataset(features=features, condition_number=condition_number, noise=noise)


DATASETS: dict[str, Callable[..., Dataset]] = {
    "glyphs": _glyphs,
    "omniglot": _omniglot,
    "mini-imagenet": _mini_imagenet,
    "cifar-fs": _cifar_fs,
    "fc100": _fc100,
    "folder": _folder,
    "sinusoid": _sinusoid,
    "linear": _linear,
}


def _photographs(name: str, description: str, found: LabelledImages) -> Dataset:
    images = torch.from_numpy(found.images)
    parts = {
        split: ClassImages(images, counts=found.counts, names=found.names, characters=members)
        for split, members in found.splits.items()
    }
    notes = {split: _some(found.names[i] for i in members) for split, members in found.splits.items()}
    return ImageDataset(name, description, parts, notes, drawn=False)


def _some(names: Iterable[str]) -> str:
    """The first names of a split."""
    listed = list(names)
    return ", ".join(listed[:4]) + (", …" if len(listed) > 4 else "")


def _share(found: LabelledImages, whole: int) -> str:
    """How much of a published data set is there."""
    if (found.counts == whole).all():
        return f"{whole} images a class"
    have = number_range(found.counts)
    return f"{have} images a class of the published {whole}: results do not compare with published ones"
