"""Classes that hold different numbers of images, and the tasks that are made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from imaml_ext.data import ClassImages, EpisodeSampler
from imaml_ext.rng import choose_distinct, random_words

COUNTS = [7, 3, 12, 5, 4, 9]


def coded(channels: tuple[int, ...] = ()) -> torch.Tensor:
    """Images of COUNTS classes: pixel (0, 0) holds the class, pixel (0, 1) the number within it."""
    images = torch.zeros(sum(COUNTS), 4, 4, *channels, dtype=torch.uint8)
    pairs = [(label, number) for label, count in enumerate(COUNTS) for number in range(count)]
    for row, (label, number) in enumerate(pairs):
        images[row, 0, 0], images[row, 0, 1] = label, number
    return images


@pytest.mark.parametrize("channels", [(), (3,)])
def test_images_of_ragged_classes_are_found(channels: tuple[int, ...]) -> None:
    classes = ClassImages(coded(channels), counts=COUNTS, characters=[4, 0, 2], names=list("abcdef"))
    assert classes.drawings.tolist() == [4, 7, 12]
    assert classes.num_drawings is None
    assert classes.image_shape == (3 if channels else 1, 4, 4)
    assert [classes.name(i) for i in range(3)] == ["e", "a", "c"]
    picked = classes.gather(np.array([[0, 1], [2, 2]]), np.array([[3, 6], [0, 11]])) * 255  # [2, 2, C, 4, 4]
    assert picked[..., 0, 0, 0].tolist() == [[4, 0], [2, 2]]
    assert picked[..., 0, 0, 1].tolist() == [[3, 6], [0, 11]]


def test_tasks_of_ragged_classes_use_every_image_and_none_twice() -> None:
    sampler = EpisodeSampler(
        ClassImages(coded(), counts=COUNTS), ways=4, shots=1, queries=2, meta_batch=50, seed=3, stream="train"
    )
    seen: dict[int, set[int]] = {label: set() for label in range(len(COUNTS))}
    for step in range(6):
        batch = sampler.sample(step)
        both = torch.cat([batch.support_x.view(50, 4, 1, 4, 4), batch.query_x.view(50, 4, 2, 4, 4)], 2) * 255
        labels, numbers = both[..., 0, 0].round().long(), both[..., 0, 1].round().long()  # [tasks, ways, 3]
        for task in range(50):
            assert labels[task, :, 0].unique().numel() == 4
            for way in range(4):
                assert labels[task, way].unique().numel() == 1
                assert numbers[task, way].unique().numel() == 3
                seen[int(labels[task, way, 0])] |= set(numbers[task, way].tolist())
    assert {label: len(numbers) for label, numbers in seen.items()} == dict(enumerate(COUNTS))


def test_equal_counts_are_the_tasks_of_equal_classes() -> None:
    images = torch.arange(6 * 5 * 9).remainder(251).to(torch.uint8).view(6, 5, 3, 3)
    options = {"ways": 3, "shots": 2, "queries": 3, "meta_batch": 4, "seed": 1}
    square = EpisodeSampler(ClassImages(images, rotations=4), **options).sample(2)
    flat = EpisodeSampler(ClassImages(images.flatten(0, 1), counts=[5] * 6, rotations=4), **options).sample(2)
    assert torch.equal(square.support_x, flat.support_x)
    assert torch.equal(square.query_x, flat.query_x)


def test_a_population_of_its_own_for_each_row() -> None:
    words = random_words(seed=0, stream="u", step=0, first_task=0, num_tasks=3, words_per_task=4)
    together = choose_distinct(words, np.array([4, 9, 600]))
    for row, population in enumerate([4, 9, 600]):
        assert np.array_equal(together[row : row + 1], choose_distinct(words[row : row + 1], population))
    assert sorted(together[0]) == [0, 1, 2, 3]


def test_a_class_of_too_few_images_is_named() -> None:
    classes = ClassImages(coded(), counts=COUNTS, names=["ant", "bee", "cat", "dog", "elk", "fox"])
    with pytest.raises(
        ValueError, match=r"shots \+ queries must not exceed the 3 drawings class 'bee' has, got 2 \+ 2"
    ):
        EpisodeSampler(classes, ways=2, shots=2, queries=2, meta_batch=1, seed=0)


@pytest.mark.parametrize("counts", [[7, 3, 12, 5, 4, 8], [7, 3, 12, 5, 13, 0], [], [[40]]])
def test_counts_must_add_up(counts: list) -> None:
    with pytest.raises(ValueError, match="counts must be one positive number per character, 40 in sum"):
        ClassImages(coded(), counts=counts)
