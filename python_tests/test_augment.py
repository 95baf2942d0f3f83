"""Augmentation: each change against its definition, and the tasks that it is a part of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from imaml_ext.data import Augmentation, ClassImages, EpisodeSampler, Linear
from imaml_ext.errors import ConfigError
from imaml_ext.models import MLP, Conv4
from imaml_ext.rng import random_words
from imaml_ext.train.config import Tasks, TrainConfig

EVERYTHING = Augmentation(flip=True, crop_padding=2, brightness=0.4, contrast=0.4, saturation=0.4)


def images(count: int = 60, channels: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(count, channels, 8, 9, dtype=dtype, generator=torch.Generator().manual_seed(0))


def words(count: int = 60) -> np.ndarray:
    drawn = random_words(seed=0, stream="a", step=0, first_task=0, num_tasks=1, words_per_task=count * 6)
    return drawn.reshape(count, 6)


def test_flip_reverses_the_columns_of_about_half() -> None:
    before = images()
    after = Augmentation(flip=True)(before, words())
    mirrored = [torch.equal(b, a.flip(-1)) for a, b in zip(after, before, strict=True)]
    same = [torch.equal(b, a) for a, b in zip(after, before, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert 15 < sum(mirrored) < 45


@pytest.mark.parametrize("flip", [False, True])
def test_crop_is_a_window_of_the_padded_image(flip: bool) -> None:
    before = images()
    after = Augmentation(crop_padding=2, flip=flip)(before, words())
    windows = set()
    for a, b in zip(after, before, strict=True):
        padded = torch.nn.functional.pad(b, (2, 2, 2, 2))
        places = [
            (down, right, turned)
            for down in range(5)
            for right in range(5)
            for turned in (False, True)
            if torch.equal(a.flip(-1) if turned else a, padded[:, down : down + 8, right : right + 9])
        ]
        assert len(places) == 1
        windows.add(places[0])
    assert {down for down, _, _ in windows} == {right for _, right, _ in windows} == set(range(5))
    assert {turned for _, _, turned in windows} == ({False, True} if flip else {False})


def test_distortion_is_a_bilinear_look_up_through_a_matrix_near_the_identity() -> None:
    before, spread = images(6, channels=2), 0.3
    drawn = random_words(seed=1, stream="a", step=0, first_task=0, num_tasks=1, words_per_task=60).reshape(6, 10)
    change = Augmentation(affine=spread)
    assert (change.words, Augmentation(flip=True).words) == (10, 6)
    after = change(before, drawn)
    height, width = before.shape[2:]
    for image, found, row in zip(before.numpy(), after.numpy(), drawn, strict=True):
        u = (row[6:] >> np.uint64(11)) * 2.0**-53
        matrix = np.eye(2) + spread * (2 * u.reshape(2, 2) - 1)
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)))
        for y in range(height):
            for x in range(width):
                right, down = matrix @ [(2 * x + 1) / width - 1, (2 * y + 1) / height - 1]
                column, line = ((right + 1) * width - 1) / 2, ((down + 1) * height - 1) / 2
                left, top = int(np.floor(column)), int(np.floor(line))
                expected = np.zeros(2)
                for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    weight = (1 - abs(line - top - dy)) * (1 - abs(column - left - dx))
                    inside = -2 <= top + dy < height + 2 and -2 <= left + dx < width + 2
                    expected += weight * (padded[:, top + dy + 2, left + dx + 2] if inside else 0)
                np.testing.assert_allclose(found[:, y, x], expected, atol=1e-12)


def test_brightness_is_a_factor_within_its_bounds() -> None:
    before = images() * 0.5  # nothing reaches 1
    ratio = (Augmentation(brightness=0.4)(before, words()) / before).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert 0.6 <= ratio.min() < 0.65
    assert 1.35 < ratio.max() <= 1.4


def test_contrast_keeps_the_mean_and_scales_what_differs() -> None:
    before = 0.25 + 0.5 * images(channels=1)
    after = Augmentation(contrast=0.3)(before, words())
    mean = before.mean((1, 2, 3), keepdim=True)
    factor = ((after - mean) / (before - mean)).flatten(1)
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-6, atol=0)
    torch.testing.assert_close(after.mean((1, 2, 3), keepdim=True), mean)
    assert 0.7 - 1e-9 <= factor.min() < 0.75
    assert 1.25 < factor.max() <= 1.3 + 1e-9


def test_saturation_keeps_the_luma_and_leaves_grey_alone() -> None:
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(1, 3, 1, 1)
    before = 0.4 + 0.1 * images()
    after = Augmentation(saturation=1.0)(before, words())
    luma = (before * weights).sum(1, keepdim=True)
    torch.testing.assert_close((after * weights).sum(1, keepdim=True), luma)
    factor = ((after - luma) / (before - luma)).flatten(1)
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-6, atol=1e-9)
    assert factor.min() < 0.2
    assert 1.8 < factor.max() <= 2
    grey = luma.expand(-1, 3, -1, -1)
    torch.testing.assert_close(Augmentation(saturation=1.0)(grey, words()), grey)


def test_values_stay_in_their_bounds() -> None:
    extreme = Augmentation(brightness=1.0, contrast=1.0, saturation=1.0)
    after = extreme(images(), words())
    assert after.min() == 0
    assert after.max() == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_padding": -1}, "crop_padding must be at least 0, got -1"),
        ({"brightness": 1.5}, r"brightness must be at least 0 and at most 1, got 1.5"),
        ({"contrast": float("nan")}, r"contrast must be finite, got nan"),
    ],
)
def test_settings_are_checked(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


# ---- in tasks -------------------------------------------------------------------------------------------------------


def sampler(augmentation: Augmentation | None = EVERYTHING, **changes: object) -> EpisodeSampler:
    pictures = torch.randint(0, 256, (9, 6, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    options = {"ways": 3, "shots": 2, "queries": 3, "meta_batch": 7, "seed": 5} | changes
    return EpisodeSampler(ClassImages(pictures), augmentation=augmentation, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_augmented_tasks_are_pure_and_shard(dtype: torch.dtype) -> None:
    whole = sampler(dtype=dtype).sample(4)
    again = sampler(dtype=dtype, meta_batch=9).sample(4)
    assert torch.equal(whole.support_x, again.support_x[:7])
    for world in (2, 7):
        parts = [sampler(dtype=dtype).sample(4, shard=(rank, world)) for rank in range(world)]
        for side in ("support_x", "query_x"):
            assert torch.equal(torch.cat([getattr(part, side) for part in parts]), getattr(whole, side))
    for other in (sampler(dtype=dtype).sample(5), sampler(dtype=dtype, seed=6).sample(4)):
        assert not torch.equal(other.support_x, whole.support_x)


def test_augmentation_changes_images_but_not_which() -> None:
    plain, changed = sampler(None), sampler(Augmentation(brightness=0.1))
    assert np.array_equal(plain.indices(2).support, changed.indices(2).support)
    before, after = plain.sample(2), changed.sample(2)
    assert torch.equal(before.support_y, after.support_y)
    ratio = after.support_x.sum((2, 3, 4)) / before.support_x.sum((2, 3, 4))  # [B, S]
    assert ((ratio - 1).abs() < 0.11).all()
    assert ratio.unique().numel() == ratio.numel()
    assert torch.equal(sampler(Augmentation()).sample(2).query_x, before.query_x)


def test_images_that_cannot_be_changed_so() -> None:
    ink = ClassImages(torch.zeros(3, 4, 8, 8, dtype=torch.uint8))
    options = {"ways": 2, "shots": 1, "queries": 1, "meta_batch": 1, "seed": 0}
    with pytest.raises(ValueError, match=r"saturation must be 0 for images without colours, got 0\.2"):
        EpisodeSampler(ink, augmentation=Augmentation(saturation=0.2), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="crop_padding must be below the 8 × 8 pixels, got 8"):
        EpisodeSampler(ink, augmentation=Augmentation(crop_padding=8), **options)  # type: ignore[arg-type]


def test_only_training_is_augmented() -> None:
    from imaml_ext.train.experiment import build

    plain = TrainConfig(tasks=Tasks(ways=3, queries=2), model=Conv4(filters=4))
    changed = replace(plain, augment=Augmentation(flip=True, crop_padding=3))
    before, after = build(plain), build(changed)

    def tasks(experiment, split: str, **options: bool) -> torch.Tensor:
        return experiment.sampler(split, tasks=2, seed=0, **options).sample(0).support_x

    assert not torch.equal(tasks(before, "train", augmented=True), tasks(after, "train", augmented=True))
    assert torch.equal(tasks(before, "train", augmented=True), tasks(before, "train"))
    for split in ("train", "val", "test"):  # as they are judged
        assert torch.equal(tasks(before, split), tasks(after, split))


def test_regression_has_no_images_to_change() -> None:
    with pytest.raises(ConfigError, match=r"augment\.crop_padding must be left out for the data set 'linear', which"):
        TrainConfig(data=Linear(), model=MLP(), augment=Augmentation(crop_padding=1))
