"""Episodes and their sampler: purity in (seed, stream, step), sharding, labels, rotations, and what is refused."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from imaml_ext.data import ClassImages, EpisodeBatch, EpisodeSampler, LinearClosedForm, LinearSampler, SinusoidSampler
from imaml_ext.rng import choose_distinct, normal, random_words, uniform

CLASSES, DRAWINGS, SIDE = 37, 20, 6


def coded_images(classes: int = CLASSES, drawings: int = DRAWINGS) -> torch.Tensor:
    """Each image says what it is: pixel (0, 0) holds its character, pixel (0, 1) its drawing, and (0, 2) a mark."""
    images = torch.zeros(classes, drawings, SIDE, SIDE, dtype=torch.uint8)
    images[..., 0, 0] = torch.arange(classes, dtype=torch.uint8)[:, None]
    images[..., 0, 1] = torch.arange(drawings, dtype=torch.uint8)
    images[..., 0, 2] = 255
    return images


def make_sampler(**changes: object) -> EpisodeSampler:
    images = changes.pop("images", None)
    options = {"ways": 5, "shots": 3, "queries": 4, "meta_batch": 8, "seed": 11} | changes
    return EpisodeSampler(images or ClassImages(coded_images()), **options)  # type: ignore[arg-type]


def same(a: EpisodeBatch, b: EpisodeBatch) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("support_x", "support_y", "query_x", "query_y"))


def decode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Character and drawing that each image of [B, S, 1, H, W] says it is."""
    codes = (x[:, :, 0] * 255).round().to(torch.int64)
    return codes[..., 0, 0], codes[..., 0, 1]


GOLDEN_WORDS = [11081309348199083634, 6145676823146682330]
GOLDEN_CLASSES = [[14, 5, 22, 3, 6], [9, 20, 2, 11, 6]]


# ---- randomness -----------------------------------------------------------------------------------------------------


def test_words_are_philox_of_seed_stream_step_task() -> None:
    words = random_words(seed=3, stream="train", step=5, first_task=2, num_tasks=3, words_per_task=7)
    # Fixed for ever: a change here changes every task of every run.
    assert words[0, :2].tolist() == GOLDEN_WORDS
    again = random_words(seed=3, stream="train", step=5, first_task=0, num_tasks=9, words_per_task=20)
    assert np.array_equal(words, again[2:5, :7])  # a task's words depend neither on its neighbours nor on their number
    for change in ({"seed": 4}, {"stream": "val"}, {"step": 6}):
        options = {"seed": 3, "stream": "train", "step": 5} | change
        other = random_words(**options, first_task=2, num_tasks=3, words_per_task=7)  # type: ignore[arg-type]
        assert not np.intersect1d(words, other).size


def test_choose_distinct_is_uniform_over_ordered_choices() -> None:
    words = random_words(seed=0, stream="u", step=0, first_task=0, num_tasks=1, words_per_task=2 * 24_000)
    chosen = choose_distinct(words.reshape(-1, 2), 4)  # 12 ordered pairs, 2,000 expected of each
    assert (chosen[:, 0] != chosen[:, 1]).all()
    counts = np.bincount(chosen[:, 0] * 4 + chosen[:, 1], minlength=16).reshape(4, 4)
    expected = counts[~np.eye(4, dtype=bool)]
    assert np.diag(counts).sum() == 0
    assert ((expected - 2000) ** 2 / 2000).sum() < 31.3  # χ² with 11 degrees of freedom, p = 0.001


def test_choose_distinct_can_take_everything() -> None:
    words = random_words(seed=1, stream="u", step=0, first_task=0, num_tasks=50, words_per_task=20)
    assert np.array_equal(np.sort(choose_distinct(words, 20), axis=1), np.tile(np.arange(20), (50, 1)))


def test_uniform_and_normal_have_their_moments() -> None:
    words = random_words(seed=2, stream="u", step=0, first_task=0, num_tasks=1, words_per_task=200_000)
    u, z = uniform(words), normal(words)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.003
    assert abs(u.var() - 1 / 12) < 0.001
    assert abs(z.mean()) < 0.01
    assert abs(z.var() - 1) < 0.015
    assert abs((z**3).mean()) < 0.03


def test_sampling_does_not_touch_global_random_state() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    make_sampler().sample(0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


# ---- purity ---------------------------------------------------------------------------------------------------------


def test_classes_of_a_step_are_fixed() -> None:
    assert make_sampler(meta_batch=2).indices(7).classes.tolist() == GOLDEN_CLASSES


def test_sample_is_a_function_of_seed_stream_step() -> None:
    sampler = make_sampler()
    first = sampler.sample(3)
    sampler.sample(9)
    assert same(first, sampler.sample(3))
    assert same(first, make_sampler().sample(3))
    assert not same(first, sampler.sample(4))
    assert not same(first, make_sampler(seed=12).sample(3))
    assert not same(first, make_sampler(stream="val").sample(3))


def test_sample_is_the_same_in_another_process() -> None:
    program = (
        "import hashlib, torch\n"
        "from imaml_ext.data import ClassImages, EpisodeSampler\n"
        "images = torch.arange(30 * 20 * 16).remainder(251).to(torch.uint8).view(30, 20, 4, 4)\n"
        "s = EpisodeSampler(ClassImages(images, rotations=4), ways=5, shots=2, queries=3, meta_batch=4, seed=1)\n"
        "e = s.sample(17)\n"
        "print(hashlib.sha256(b''.join(t.numpy().tobytes() for t in (e.support_x, e.query_x))).hexdigest())\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=_environment(seed)
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert len(outputs.pop().strip()) == 64


def _environment(hash_seed: str) -> dict[str, str]:
    import os

    return os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shards_are_slices_of_the_batch(world: int) -> None:
    sampler = make_sampler(images=ClassImages(coded_images(), rotations=4))
    whole = sampler.sample(5)
    parts = [sampler.sample(5, shard=(rank, world)) for rank in range(world)]
    assert sum(p.num_tasks for p in parts) == 8
    assert max(p.num_tasks for p in parts) - min(p.num_tasks for p in parts) <= 1
    for rank, part in enumerate(parts):
        assert same(part, whole.shard(rank, world))
    joined = EpisodeBatch(
        *(torch.cat([getattr(p, n) for p in parts]) for n in ("support_x", "support_y", "query_x", "query_y"))
    )
    assert same(joined, whole)


def test_shard_gathers_its_own_images_only(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[int] = []
    original = ClassImages.gather

    def spy(self: ClassImages, classes: np.ndarray, drawings: np.ndarray, **options: object) -> torch.Tensor:
        gathered.append(classes.size)
        return original(self, classes, drawings, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ClassImages, "gather", spy)
    make_sampler().sample(0, shard=(1, 4))
    assert gathered == [2 * 5 * 3, 2 * 5 * 4]


def test_tasks_do_not_depend_on_the_size_of_the_batch() -> None:
    small, large = make_sampler(meta_batch=3).sample(2), make_sampler(meta_batch=8).sample(2)
    assert torch.equal(small.support_x, large.support_x[:3])


# ---- content --------------------------------------------------------------------------------------------------------


def test_every_image_has_the_label_of_its_class() -> None:
    sampler = make_sampler()
    for step in range(20):
        batch = sampler.sample(step)
        assert batch.support_x.shape == (8, 15, 1, SIDE, SIDE)
        assert batch.query_x.shape == (8, 20, 1, SIDE, SIDE)
        assert batch.support_x.dtype == torch.float32
        assert batch.support_y.dtype == torch.int64
        assert torch.equal(batch.support_y, torch.arange(5).repeat_interleave(3).repeat(8, 1))  # class-major
        assert torch.equal(batch.query_y, torch.arange(5).repeat_interleave(4).repeat(8, 1))
        support, support_drawing = decode(batch.support_x)
        query, query_drawing = decode(batch.query_x)
        for task in range(8):
            of_label = support[task].view(5, 3)[:, 0]
            assert of_label.unique().numel() == 5
            assert torch.equal(support[task], of_label[batch.support_y[task]])
            assert torch.equal(query[task], of_label[batch.query_y[task]])
            for way in range(5):
                seen = set(support_drawing[task].view(5, 3)[way].tolist())
                asked = set(query_drawing[task].view(5, 4)[way].tolist())
                assert len(seen) == 3
                assert len(asked) == 4
                assert not seen & asked


def test_all_drawings_can_be_used_and_still_never_overlap() -> None:
    batch = make_sampler(ways=CLASSES, shots=7, queries=13, meta_batch=2).sample(0)
    for task in range(2):
        support = decode(batch.support_x)[1][task].view(CLASSES, 7)
        query = decode(batch.query_x)[1][task].view(CLASSES, 13)
        assert torch.equal(torch.cat([support, query], 1).sort(1).values, torch.arange(20).expand(CLASSES, 20))


def test_classes_and_drawings_are_uniform() -> None:
    sampler = make_sampler(meta_batch=50)
    chosen = [sampler.indices(step) for step in range(40)]
    classes = np.bincount(np.concatenate([c.classes.ravel() for c in chosen]), minlength=CLASSES)
    drawings = np.bincount(np.concatenate([c.support.ravel() for c in chosen]), minlength=DRAWINGS)
    for counts, limit in ((classes, 68.0), (drawings, 43.8)):  # χ² with 36 and 19 degrees of freedom, p = 0.001
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < limit


def test_distinct_characters_each_in_one_orientation_as_an_independent_sampler_draws_them() -> None:
    """Against Python's own generator, which draws the published protocol word for word: characters, then angles."""
    allowed = np.ones((11, 4), dtype=bool)
    allowed[3, 1:], allowed[7, 2] = False, False  # turned, these look like themselves
    options: dict[str, Any] = {"rotations": 4, "orientations": allowed, "distinct_characters": True}
    images = ClassImages(coded_images(11, 5), **options)
    sampler = make_sampler(images=images, ways=4, shots=1, queries=1, meta_batch=3000)
    classes = np.concatenate([sampler.indices(step).classes for step in range(4)])  # [12,000, 4]
    characters, turns = images.character[classes], images.quarter_turns[classes]
    assert all(len(set(row)) == 4 for row in characters.tolist())
    assert (classes < images.num_classes).all()

    drawn = random.Random(5)
    expected_pairs, expected_turns = np.zeros((11, 11)), np.zeros((11, 4))
    for _ in range(12_000):
        chosen = drawn.sample(range(11), 4)
        expected_pairs[chosen[0], chosen[1]] += 1
        for character in chosen:
            expected_turns[character, drawn.choice(np.flatnonzero(allowed[character]))] += 1
    pairs, found_turns = np.zeros((11, 11)), np.zeros((11, 4))
    np.add.at(pairs, (characters[:, 0], characters[:, 1]), 1)
    np.add.at(found_turns, (characters.ravel(), turns.ravel()), 1)
    for found, expected, freedom in ((pairs, expected_pairs, 109), (found_turns, expected_turns, 39)):
        assert ((found == 0) == (expected == 0)).all()
        there = expected > 0
        statistic = ((found - expected)[there] ** 2 / (found + expected)[there]).sum()  # χ² of two samples
        assert statistic < freedom + 5.5 * math.sqrt(2 * freedom)

    for size in (2, 5):  # the same tasks on any number of processes
        parts = [
            make_sampler(images=images, ways=4, shots=2, queries=1).indices(7, shard=(k, size)) for k in range(size)
        ]
        whole = make_sampler(images=images, ways=4, shots=2, queries=1).indices(7)
        for name in ("classes", "support", "query"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    with pytest.raises(ValueError, match="ways must not exceed the 11 characters there are, got 12"):
        make_sampler(images=images, ways=12, shots=1, queries=1)


def test_rotations_are_classes_and_agree_with_rot90() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (9, 4, 5, 5), dtype=torch.uint8, generator=generator)
    rotated = ClassImages(images, rotations=4, names=[f"c{i}" for i in range(9)])
    assert rotated.num_classes == 36
    assert rotated.num_characters == 9
    classes, drawings = np.meshgrid(np.arange(36), np.arange(4), indexing="ij")
    gathered = rotated.gather(classes, drawings, dtype=torch.float64)
    assert gathered.shape == (36, 4, 1, 5, 5)
    for class_id in range(36):
        character, turns = divmod(class_id, 4)  # class id = 4 · character + quarter turns
        expected = torch.rot90(images[character], turns, (-2, -1)).to(torch.float64) / 255
        assert torch.equal(gathered[class_id, :, 0], expected)
        assert rotated.name(class_id) == f"c{character}" + (f" rotated {90 * turns}°" if turns else "")


def test_subset_and_orientations_choose_the_classes() -> None:
    images = coded_images()
    orientations = np.array([[True, False, False, True], [True, True, False, False], [True, False, False, False]])
    some = ClassImages(images, characters=[30, 2, 5], rotations=4, orientations=orientations)
    assert some.character.tolist() == [30, 30, 2, 2, 5]
    assert some.quarter_turns.tolist() == [0, 3, 0, 1, 0]
    assert some.num_characters == 3
    turned = some.gather(np.array([3]), np.array([6]))
    assert torch.equal(turned[0, 0], torch.rot90(images[2, 6].float() / 255))


def test_colour_images_come_out_channels_first() -> None:
    images = torch.randint(0, 256, (6, 4, 5, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for rotations in (1, 4):
        classes = ClassImages(images, rotations=rotations)
        assert classes.image_shape == (3, 5, 5)
        last = classes.num_classes - 1
        got = classes.gather(np.array([0, last]), np.array([1, 2]))
        turned = torch.rot90(images[5, 2], rotations - 1, (0, 1))
        assert torch.equal(got, torch.stack([images[0, 1], turned]).permute(0, 3, 1, 2).float() / 255)


def test_dtype_and_values() -> None:
    batch = make_sampler(dtype=torch.float64).sample(0)
    assert batch.query_x.dtype == torch.float64
    assert batch.query_x.min() == 0
    assert batch.query_x.max() == 1
    moved = batch.to(dtype=torch.float32)
    assert moved.query_x.dtype == torch.float32
    assert moved.query_y.dtype == torch.int64
    assert batch.support.x is batch.support_x
    assert batch.query.y is batch.query_y
    assert batch.num_tasks == 8


class _LargestTensors(TorchDispatchMode):
    """Bytes of the largest floating-point, uint8 and integer tensors that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {"float": 0, "uint8": 0, "int": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            kind = "float" if result.is_floating_point() else "uint8" if result.dtype == torch.uint8 else "int"
            self.bytes[kind] = max(self.bytes[kind], result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("rotations", [1, 4])
def test_gathering_needs_the_batch_and_little_more(rotations: int) -> None:
    images = ClassImages(torch.zeros(50, 20, 28, 28, dtype=torch.uint8), rotations=rotations)
    sampler = EpisodeSampler(images, ways=20, shots=5, queries=5, meta_batch=4, seed=0)
    count = 4 * 20 * 5
    with _LargestTensors() as largest:
        batch = sampler.sample(0)
    assert batch.support_x.untyped_storage().nbytes() == count * 784 * 4
    assert batch.support_x.is_contiguous()
    assert largest.bytes["float"] == count * 784 * 4
    assert largest.bytes["int"] <= count * 8  # one number an image, none a pixel
    # Never larger than the gathered bytes (the data set itself, of which operations return views, aside).
    assert largest.bytes["uint8"] == max(count * 784, images.images.numel())


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": 38}, "ways must not exceed the 37 classes"),
        ({"shots": 10, "queries": 11}, r"shots \+ queries must not exceed the 20 drawings a class has, got 10 \+ 11"),
        ({"ways": 0}, "ways must be at least 1, got 0"),
        ({"shots": -1}, "shots must be at least 1, got -1"),
        ({"queries": 0}, "queries must be at least 1"),
        ({"meta_batch": 0}, "meta_batch must be at least 1"),
        ({"seed": -3}, "seed must be at least 0"),
    ],
)
def test_sampler_refuses_wrong_numbers(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler(**changes)


@pytest.mark.parametrize("changes", [{"ways": 2.5}, {"ways": "5"}, {"shots": True}, {"dtype": torch.int64}])
def test_sampler_refuses_wrong_types(changes: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=next(iter(changes))):
        make_sampler(**changes)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ((2, 2), "rank must be below world_size = 2"),
        ((0, 9), "world_size must not exceed the 8 tasks"),
        ((-1, 2), "rank"),
    ],
)
def test_sampler_refuses_wrong_shards(shard: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler().sample(0, shard=shard)
    with pytest.raises(ValueError, match=message):
        make_sampler().sample(0).shard(*shard)


def test_sampler_refuses_negative_step() -> None:
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        make_sampler().sample(-1)


@pytest.mark.parametrize(
    ("error", "images", "options", "message"),
    [
        (TypeError, torch.zeros(3, 4, 5, 5), {}, "torch.uint8 tensor, got torch.float32"),
        (TypeError, [1, 2], {}, "torch.uint8 tensor, got list"),
        (ValueError, torch.zeros(3, 4, 5, dtype=torch.uint8), {}, r"got \(3, 4, 5\)"),
        (ValueError, torch.zeros(3, 0, 5, 5, dtype=torch.uint8), {}, "no empty dimension"),
        (ValueError, torch.zeros(3, 4, 5, 6, dtype=torch.uint8), {"rotations": 4}, "needs square images, got 5 × 6"),
        (ValueError, torch.zeros(3, 4, 5, 5, dtype=torch.uint8), {"rotations": 2}, "rotations must be 1 or 4, got 2"),
        (ValueError, torch.zeros(3, 4, 5, 5, dtype=torch.uint8), {"names": ["a"]}, "names must be one per character"),
        (ValueError, torch.zeros(3, 4, 5, 5, dtype=torch.uint8), {"characters": [0, 3]}, "indices below 3"),
        (ValueError, torch.zeros(3, 4, 5, 5, dtype=torch.uint8), {"characters": [1, 1]}, "distinct"),
        (
            ValueError,
            torch.zeros(3, 4, 5, 5, dtype=torch.uint8),
            {"orientations": np.ones((3, 4), bool)},
            r"orientations must be bool \[3, 1\]",
        ),
    ],
)
def test_class_images_refuse(error: type[Exception], images: object, options: dict, message: str) -> None:
    with pytest.raises(error, match=message):
        ClassImages(images, **options)  # type: ignore[arg-type]


def test_episode_batch_refuses_sides_that_disagree() -> None:
    x, y = torch.zeros(2, 3, 1), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="query_x and query_y must agree"):
        EpisodeBatch(x, y, x, y[:, :2])
    with pytest.raises(ValueError, match="same number of tasks, got 2 and 1"):
        EpisodeBatch(x, y, x[:1], y[:1])


# ---- sinusoid -------------------------------------------------------------------------------------------------------


def test_sinusoid_is_the_sine_of_its_parameters() -> None:
    sampler = SinusoidSampler(shots=10, queries=15, meta_batch=400, seed=0, dtype=torch.float64)
    batch = sampler.sample(1)
    amplitude, phase = (torch.from_numpy(p)[:, None, None] for p in sampler.parameters(1))
    assert batch.support_x.shape == (400, 10, 1)
    assert batch.query_y.shape == (400, 15, 1)
    for side in (batch.support, batch.query):
        torch.testing.assert_close(side.y, amplitude * torch.sin(side.x - phase), rtol=0, atol=1e-14)
    assert 0.1 <= amplitude.min() < 0.2
    assert 4.9 < amplitude.max() <= 5
    assert 0 <= phase.min() < 0.05
    assert 3.09 < phase.max() <= np.pi
    assert -5 <= batch.support_x.min() < -4.9
    assert 4.9 < batch.support_x.max() <= 5


@pytest.mark.parametrize(
    "sampler",
    [
        SinusoidSampler(shots=3, queries=4, meta_batch=6, seed=2),
        LinearSampler(features=3, shots=4, queries=5, meta_batch=6, seed=2),
    ],
    ids=["sinusoid", "linear"],
)
def test_regression_samplers_are_pure_and_shard(sampler: SinusoidSampler | LinearSampler) -> None:
    whole = sampler.sample(4)
    assert same(whole, sampler.sample(4))
    assert not same(whole, sampler.sample(5))
    assert same(sampler.sample(4, shard=(1, 4)), whole.shard(1, 4))


# ---- linear ---------------------------------------------------------------------------------------------------------


def test_linear_tasks_have_the_condition_number_asked_for() -> None:
    sampler = LinearSampler(features=7, shots=12, queries=9, meta_batch=5, seed=0, condition_number=1e4, noise=0.0)
    batch = sampler.sample(0)
    for side in (batch.support, batch.query):
        eigenvalues = torch.linalg.eigvalsh(side.x.mT @ side.x / side.x.shape[1])
        torch.testing.assert_close(eigenvalues[:, -1], torch.ones(5, dtype=torch.float64))
        torch.testing.assert_close(eigenvalues[:, 0], torch.full((5,), 1e-4, dtype=torch.float64), rtol=1e-8, atol=0)
        torch.testing.assert_close(side.y.squeeze(-1), (side.x @ sampler.weights(0)[..., None]).squeeze(-1))


@pytest.mark.parametrize("distinct", [2, 3, 7])
def test_linear_tasks_have_the_distinct_eigenvalues_asked_for(distinct: int) -> None:
    sampler = LinearSampler(
        features=7, shots=12, queries=9, meta_batch=5, seed=0, condition_number=100.0, eigenvalues=distinct
    )
    batch = sampler.sample(0)
    for side in (batch.support, batch.query):
        eigenvalues = torch.linalg.eigvalsh(side.x.mT @ side.x / side.x.shape[1])  # [B, 7], ascending
        levels = 100.0 ** torch.linspace(-1, 0, distinct, dtype=torch.float64)
        nearest = (eigenvalues.log().unsqueeze(-1) - levels.log()).abs().min(-1)  # of the levels, for every eigenvalue
        assert nearest.values.max() < 1e-8
        assert all(set(row.tolist()) == set(range(distinct)) for row in nearest.indices)


def test_linear_noise_has_its_size() -> None:
    options = {"features": 2, "shots": 500, "queries": 2, "meta_batch": 20, "seed": 0}
    noisy, clean = (LinearSampler(noise=n, **options).sample(0) for n in (0.3, 0.0))  # type: ignore[arg-type]
    assert abs((noisy.support_y - clean.support_y).std().item() - 0.3) < 0.01


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_linear_closed_form_is_the_derivative_of_the_solved_problem(scale: float) -> None:
    batch = LinearSampler(features=4, shots=6, queries=5, meta_batch=3, seed=1, condition_number=30.0).sample(0)
    form = LinearClosedForm(batch, scale=scale)
    theta = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64)
    lam = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)

    def loss(x: torch.Tensor, y: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:  # [B]
        return scale * ((x @ phi[..., None]).squeeze(-1) - y.squeeze(-1)).square().mean(1)

    phi = form.solution(theta, lam).requires_grad_()
    inner = loss(batch.support.x, batch.support.y, phi) + 0.5 * (lam * (phi - theta) ** 2).sum(1)
    (gradient,) = torch.autograd.grad(inner.sum(), phi)
    assert gradient.abs().max() < 1e-12  # stationary

    def outer(theta: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        return loss(batch.query.x, batch.query.y, form.solution(theta, lam)).mean()

    by_theta, by_lam = form.meta_gradient(theta, lam)
    step = 1e-6
    for j in range(4):
        e = torch.zeros(4, dtype=torch.float64)
        e[j] = step
        assert abs((outer(theta + e, lam) - outer(theta - e, lam)) / (2 * step) - by_theta[j]) < 1e-8
        assert abs((outer(theta, lam + e) - outer(theta, lam - e)) / (2 * step) - by_lam[j]) < 1e-8
    scalar_theta, scalar_lam = form.meta_gradient(theta, 0.7)
    full_theta, full_lam = form.meta_gradient(theta, torch.full((4,), 0.7, dtype=torch.float64))
    assert torch.equal(scalar_theta, full_theta)
    assert torch.equal(scalar_lam, full_lam)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 2}, "shots must be at least features = 3, got 2"),
        ({"queries": 1}, "queries must be at least features"),
        ({"condition_number": 0.5}, "condition_number must be at least 1"),
        ({"condition_number": float("nan")}, "condition_number"),
        ({"features": 1}, "condition_number must be 1 where features = 1"),
        ({"eigenvalues": 1}, "eigenvalues must be at least 2, got 1"),
        ({"eigenvalues": 4}, "eigenvalues must not exceed features = 3, got 4"),
        ({"noise": -1.0}, "noise must be"),
        ({"meta_batch": 0}, "meta_batch must be at least 1"),
    ],
)
def test_linear_refuses(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearSampler(**({"features": 3, "shots": 4, "queries": 4, "meta_batch": 2, "seed": 0} | changes))  # type: ignore[arg-type]


# ---- another device -------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_episodes_on_the_gpu_are_those_of_the_cpu() -> None:
    images = ClassImages(coded_images(), rotations=4)
    on_gpu = make_sampler(images=images, device="cuda").sample(3)
    assert on_gpu.support_x.is_cuda
    assert on_gpu.query_y.is_cuda
    assert same(on_gpu.to(device="cpu"), make_sampler(images=images).sample(3))
