"""The data sets: Omniglot from every source it is read from, glyphs, splits, the cache, and damaged or missing data."""

from __future__ import annotations

import hashlib
import os
import runpy
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from training_tools import packed_omniglot

from imaml_ext import data
from imaml_ext.data import cache, glyphs, load_dataset, omniglot
from imaml_ext.data.omniglot import character_names, load_omniglot, name_rank, omniglot_split
from imaml_ext.errors import ConfigTypeError, DataError
from imaml_ext.settings import from_json, to_json

# Every byte of glyphs, as drawn from the font files of matplotlib 3.5 to 3.11.
GLYPHS_SHA256 = "f1e119ea59a15114d46425d2a0ad54c68f930f49ae8c88fa2264af961812e045"


@pytest.fixture(scope="module")
def real_root() -> Path:
    root = os.environ.get("IMAML_DATA_ROOT")
    if not root:
        pytest.skip("IMAML_DATA_ROOT is not set: it names the folder of the real data")
    if not (Path(root) / "omniglot" / "omniglot28.npz").is_file():
        pytest.skip(f"IMAML_DATA_ROOT {root} holds no omniglot/omniglot28.npz")
    return Path(root)


@pytest.fixture
def no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAML_DATA_ROOT", raising=False)


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "omniglot28.npz"
    cache.save_arrays(path, packed_omniglot())
    return path


# ---- Omniglot: splits -----------------------------------------------------------------------------------------------


def test_omniglot_has_its_characters() -> None:
    names = character_names()
    assert len(names) == len(set(names)) == 1623
    alphabets = [name.split("/")[0] for name in names]
    assert len(dict.fromkeys(alphabets)) == 50
    assert alphabets[963] == "Tifinagh"  # 964 background characters
    assert alphabets[964] == "Angelic"  # 659 evaluation characters


@pytest.mark.parametrize(
    ("protocol", "options", "sizes"),
    [
        ("1200/423", {}, {"train": 1200, "test": 423}),
        ("1200/423", {"validation": 100}, {"train": 1100, "val": 100, "test": 423}),
        ("vinyals", {}, {"train": 1028, "val": 172, "test": 423}),
    ],
)
def test_omniglot_splits_are_disjoint_and_complete(protocol: str, options: dict, sizes: dict) -> None:
    splits = omniglot_split(protocol, **options)
    assert {name: len(set(members.tolist())) for name, members in splits.items()} == sizes
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(1623))


def test_the_papers_split_follows_its_rule() -> None:
    names = character_names()
    ranked = sorted(range(1623), key=lambda i: hashlib.sha256(names[i].encode()).hexdigest())
    assert name_rank(names[0]) == hashlib.sha256(names[0].encode()).hexdigest()
    splits = omniglot_split("1200/423", validation=7)
    assert splits["train"].tolist() == sorted(ranked[:1193])
    assert splits["val"].tolist() == sorted(ranked[1193:1200])
    assert splits["test"].tolist() == sorted(ranked[1200:])
    assert omniglot_split()["test"].tolist() == splits["test"].tolist()


def test_vinyals_split_is_the_published_one(real_root: Path) -> None:
    import json

    names = character_names()
    for split, members in omniglot_split("vinyals").items():
        published = json.loads((real_root / "omniglot" / "splits_vinyals" / f"{split}.json").read_text())
        expected = {f"{a}/{c}" for part in published.values() for a, characters in part.items() for c in characters}
        assert {names[i] for i in members} == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: omniglot_split("800/823"), "split must be one of '1200/423', 'vinyals', got '800/823'"),
        (lambda: omniglot_split("vinyals", validation=3), "validation must be 0 with split 'vinyals'"),
        (lambda: omniglot_split(validation=1200), "validation must be from 0 to 1199 characters, got 1200"),
        (lambda: load_dataset("omniglot", split="x"), "split must be one of"),
        (lambda: load_dataset("omniglot", validation=-1), "validation must be at least 0, got -1"),
        (
            lambda: load_dataset("imagenet"),
            "data source must be one of 'glyphs', 'omniglot', 'mini-imagenet', 'tiered-imagenet'",
        ),
    ],
)
def test_unknown_names_and_protocols_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- Omniglot: sources ----------------------------------------------------------------------------------------------


def test_real_omniglot(real_root: Path) -> None:
    dataset = load_dataset("omniglot", root=real_root)
    assert dataset.kind == "classification"
    assert dataset.input_shape == (1, 28, 28)
    assert dataset.splits == ("train", "test")
    train, test = dataset.images("train"), dataset.images("test")
    assert (train.num_characters, train.num_classes, train.num_drawings) == (1200, 4800, 20)
    assert (test.num_characters, test.num_classes) == (423, 1692)
    assert not set(train.character.tolist()) & set(test.character.tolist())
    images = train.images
    assert images.shape == (1623, 20, 28, 28)
    assert (images.amax((2, 3)) > 128).all()  # ink in each drawing,
    assert images.float().mean() < 64  # little of it
    batch = dataset.sampler("train", ways=20, shots=5, queries=5, meta_batch=2, seed=0).sample(0)
    assert batch.support_x.shape == (2, 100, 1, 28, 28)
    # Drawings of one character resemble each other more than those of others do: labels mean something.
    support, query = batch.support_x.flatten(2), batch.query_x.flatten(2)
    nearest = batch.support_y.gather(1, torch.cdist(query, support).argmin(-1))
    assert (nearest == batch.query_y).float().mean() > 0.3  # 0.05 by chance


@pytest.mark.parametrize("place", ["omniglot28.npz", "omniglot/omniglot28.npz"])
@pytest.mark.parametrize("how", ["root", "environment", "cache"])
def test_packed_file_is_found(
    place: str, how: str, packed_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_root: None
) -> None:
    target = tmp_path / place
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(packed_file)
    options: dict = {"root": tmp_path} if how == "root" else {}
    monkeypatch.setenv("IMAML_CACHE", str(tmp_path if how == "cache" else tmp_path / "elsewhere"))
    if how == "environment":
        monkeypatch.setenv("IMAML_DATA_ROOT", str(tmp_path))
    images = load_omniglot(**options)
    assert images.shape == (1623, 20, 28, 28)
    assert (images[:, :, 0, 0] == np.arange(1, 21)).all()


def test_explicit_root_wins_over_the_environment(
    packed_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAML_DATA_ROOT", str(packed_file.parent))
    with pytest.raises(DataError, match=r"root .*nowhere is not a folder"):
        load_omniglot(root=tmp_path / "nowhere")


@pytest.fixture(scope="module")
def real_tree(real_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tree that torchvision unpacks, written from the original drawings: black on white, 105×105."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("omniglot-tree")
    with np.load(real_root / "omniglot" / "omniglot105.npz") as z:
        height, width = z["shape"]
        ink = np.unpackbits(z["images_packed"], axis=1, count=height * width).reshape(-1, height, width).astype(bool)
        char_id, drawer, split = z["char_id"], z["drawer"], z["split"]
        names = [
            f"{z['alphabet_names'][a]}/character{c:02d}" for a, c in zip(z["alphabet"], z["character"], strict=True)
        ]
    for i, name in enumerate(names):
        character = folder / "omniglot-py" / ("images_background", "images_evaluation")[split[i]] / name
        if drawer[i] == 1:
            character.mkdir(parents=True)
        Image.fromarray(~ink[i]).save(character / f"{char_id[i]:04d}_{drawer[i]:02d}.png", compress_level=1)
    return folder


@pytest.mark.long
def test_tree_gives_the_packed_drawings_and_is_packed_once(
    real_root: Path, real_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = load_omniglot(root=real_root)
    from_tree = load_omniglot(root=real_tree, cache_dir=tmp_path)
    assert np.array_equal(packed, from_tree)
    (stored,) = (tmp_path / "omniglot-packed").iterdir()

    def unexpected(path: Path) -> np.ndarray:
        raise AssertionError(f"{path} was read again")

    with monkeypatch.context() as patch:
        patch.setattr(omniglot, "_read_drawing", unexpected)
        for place in (real_tree, real_tree / "omniglot-py"):
            assert np.array_equal(load_omniglot(root=place, cache_dir=tmp_path), packed)
        # A damaged cache is not believed: the tree is read again.
        stored.write_bytes(stored.read_bytes()[:100_000])
        with pytest.raises(AssertionError, match="was read again"):
            load_omniglot(root=real_tree, cache_dir=tmp_path)
        # Neither is it where a drawing changed.
        drawing = next((real_tree / "omniglot-py" / "images_background").rglob("*.png"))
        os.utime(drawing, ns=(0, 0))
        with pytest.raises(AssertionError, match="was read again"):
            load_omniglot(root=real_tree, cache_dir=tmp_path)


# ---- Omniglot: what is missing or damaged ---------------------------------------------------------------------------


def test_missing_omniglot_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_root: None) -> None:
    advice = "give the folder that has it as root or in IMAML_DATA_ROOT, or pass download=True"
    with pytest.raises(
        DataError, match=f"root {tmp_path} holds neither omniglot28.npz nor images_background/; {advice}"
    ):
        load_omniglot(root=tmp_path)
    monkeypatch.setenv("IMAML_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"the cache .*cache is not a folder"):
        load_omniglot()
    monkeypatch.setenv("IMAML_DATA_ROOT", str(tmp_path / "data"))
    with pytest.raises(DataError, match=r"IMAML_DATA_ROOT .*data is not a folder"):
        load_omniglot()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DataError, match="is not a folder"):
        load_omniglot(root=file)


@pytest.mark.parametrize("keep", [0, 1, 1000, -200])
def test_truncated_packed_file(keep: int, packed_file: Path, tmp_path: Path) -> None:
    (tmp_path / "omniglot28.npz").write_bytes(packed_file.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"omniglot28.npz is (damaged or )?not an .npz|omniglot28.npz is damaged"):
        load_omniglot(root=tmp_path)


def test_packed_file_with_flipped_bytes(packed_file: Path, tmp_path: Path) -> None:
    content = bytearray(packed_file.read_bytes())
    content[2000:2050] = bytes(50)
    (tmp_path / "omniglot28.npz").write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"omniglot28.npz is damaged"):
        load_omniglot(root=tmp_path)


def test_packed_file_that_is_something_else(tmp_path: Path) -> None:
    path = tmp_path / "omniglot28.npz"
    path.write_text("<html>not found</html>")
    with pytest.raises(DataError, match=r"is damaged or not an .npz archive"):
        load_omniglot(root=tmp_path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match=r"is not an .npz archive"):
        load_omniglot(root=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("images"), "has no array 'images'"),
        (lambda a: a.update(images=a["images"][:-1]), r"'images' must be uint8 \(32460, 28, 28\), got uint8 \(32459"),
        (lambda a: a.update(images=a["images"].astype(np.int8)), r"'images' must be uint8 .* got int8"),
        (lambda a: a.update(images=a["images"].reshape(32460, 784)), r"got uint8 \(32460, 784\)"),
        (lambda a: a.update(alphabet=a["alphabet"].astype(float)), "'alphabet' must be an unsigned integer"),
        (lambda a: a.update(alphabet=a["alphabet"] + np.uint8(1)), "'alphabet' does not go through Omniglot"),
        (lambda a: a["alphabet"].__setitem__(0, 50), "'alphabet' does not go through Omniglot"),
        (lambda a: a.update(character=a["character"][::-1]), "'character' does not go through Omniglot"),
        (lambda a: a.update(drawer=a["drawer"][::-1]), "'drawer' does not go through Omniglot"),
        (lambda a: a.update(alphabet_names=np.array([None] * 50)), "is damaged"),  # would need pickle
    ],
)
def test_packed_file_with_wrong_arrays(change, message: str, tmp_path: Path) -> None:
    arrays = packed_omniglot()
    change(arrays)
    np.savez(tmp_path / "omniglot28.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_omniglot(root=tmp_path)


def test_incomplete_tree(tmp_path: Path) -> None:
    (tmp_path / "images_background" / "Alphabet_of_the_Magi" / "character01").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"images_background/Alphabet_of_the_Magi/character01 must hold 20 drawings, found 0"
    ):
        load_omniglot(root=tmp_path, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_drawings_that_are_not_drawings(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "0001_01.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(DataError, match=r"0001_01.png is damaged or not a picture"):
        omniglot._read_drawing(path)
    Image.new("L", (28, 28)).save(path)
    with pytest.raises(DataError, match=r"0001_01.png must be 105 × 105 pixels, got 28 × 28"):
        omniglot._read_drawing(path)
    drawing = np.full((105, 105), 255, np.uint8)
    drawing[40:60, 40:60] = 0  # black ink on white
    Image.fromarray(drawing).save(path)
    read = omniglot._read_drawing(path)
    assert read[13, 13] > 250
    assert read[2, 2] == 0


# ---- Omniglot: download ---------------------------------------------------------------------------------------------


def test_download_without_torchvision_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(
        DataError, match=r"torchvision, which cannot be imported here \(ModuleNotFoundError: .*give it as root"
    ):
        load_omniglot(root=tmp_path, download=True)
    assert not any(tmp_path.iterdir())


def fake_torchvision(monkeypatch: pytest.MonkeyPatch, download) -> None:
    datasets = types.ModuleType("torchvision.datasets")
    datasets.Omniglot = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


def test_download_fetches_both_halves_once(
    tmp_path: Path, packed_file: Path, monkeypatch: pytest.MonkeyPatch, no_root: None
) -> None:
    asked = []

    def download(root: str, *, background: bool, download: bool) -> None:
        asked.append((root, background, download))
        (Path(root) / "omniglot").mkdir(exist_ok=True)
        if not background:
            (Path(root) / "omniglot" / "omniglot28.npz").symlink_to(packed_file)

    fake_torchvision(monkeypatch, download)
    for _ in range(2):
        assert load_omniglot(cache_dir=tmp_path / "new", download=True).shape == (1623, 20, 28, 28)
    assert asked == [(str(tmp_path / "new"), True, True), (str(tmp_path / "new"), False, True)]


def test_download_completes_an_interrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "omniglot-py" / "images_background" / "Greek" / "character01").mkdir(parents=True)
    asked = []
    fake_torchvision(monkeypatch, lambda root, *, background, download: asked.append(background))
    with pytest.raises(DataError, match="is incomplete"):
        load_omniglot(root=tmp_path, download=True)
    assert asked == [True, False]


def test_download_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(root: str, **options: bool) -> None:
        raise OSError("no route to host")

    fake_torchvision(monkeypatch, download)
    with pytest.raises(DataError, match=r"downloading Omniglot into .* failed \(OSError: no route to host\)"):
        load_omniglot(root=tmp_path, download=True)


# ---- the cache ------------------------------------------------------------------------------------------------------


def test_interrupted_write_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "a.npz"

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    for before in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cache.save_arrays(path, {"a": np.arange(4)})
        assert path.exists() == before
        if not before:
            cache.save_arrays(path, {"a": np.arange(3)})
    assert cache.load_arrays(path, {"a": ("i", (3,))})["a"].tolist() == [0, 1, 2]


def test_unwritable_cache_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cache .*a.npz could not be written \(.*exists\); set IMAML_CACHE"):
        cache.save_arrays(tmp_path / "file" / "a.npz", {"a": np.arange(3)})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"a.npz could not be written \(No space left on device\); set IMAML_CACHE"):
        cache.save_arrays(tmp_path / "new" / "a.npz", {"a": np.arange(3)})
    assert list((tmp_path / "new").iterdir()) == []


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAML_CACHE", str(tmp_path / "a"))
    assert cache.cache_folder(None) == tmp_path / "a"
    monkeypatch.delenv("IMAML_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache.cache_folder(None) == tmp_path / "b" / "imaml_ext"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache.cache_folder(None) == tmp_path / "c" / ".cache" / "imaml_ext"


# ---- glyphs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def glyph_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glyph-cache")
    data.load_glyphs(cache_dir=folder)
    return folder


def fonts_are_known() -> bool:
    folder = glyphs.font_folder()
    return all(glyphs._sha256(folder / name) == digest for name, digest in glyphs.glyph_table().fonts)


def test_glyphs_are_the_same_bytes_everywhere(glyph_cache: Path) -> None:
    if not fonts_are_known():
        pytest.skip("the font files of this matplotlib are not those that the hash was made with")
    images = data.load_glyphs(cache_dir=glyph_cache)
    assert images.shape == (1937, 20, 28, 28)
    assert hashlib.sha256(images.tobytes()).hexdigest() == GLYPHS_SHA256


def test_glyphs_are_drawn_once(glyph_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*args: object) -> np.ndarray:
        raise AssertionError("drawn again")

    monkeypatch.setattr(glyphs, "render_glyphs", unexpected)
    assert len(list((glyph_cache / "glyphs").iterdir())) == 1
    data.load_glyphs(cache_dir=glyph_cache)
    # Other fonts are another data set: another file, and a warning.
    original = glyphs._sha256
    monkeypatch.setattr(glyphs, "_sha256", lambda path: "0" * 64 if path.stem == "cmb10" else original(path))
    with pytest.warns(UserWarning, match=r"font files cmb10.ttf in .* are not those"), pytest.raises(AssertionError):
        data.load_glyphs(cache_dir=glyph_cache)


def test_damaged_glyph_cache_is_drawn_again(glyph_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (good,) = (glyph_cache / "glyphs").iterdir()
    bad = tmp_path / "glyphs" / good.name
    bad.parent.mkdir()
    bad.write_bytes(good.read_bytes()[:5000])
    marked = np.full((len(glyphs.glyph_table().classes), 20, 28, 28), 7, np.uint8)
    monkeypatch.setattr(glyphs, "render_glyphs", lambda table, folder: marked)
    assert (data.load_glyphs(cache_dir=tmp_path) == 7).all()
    monkeypatch.undo()
    assert (data.load_glyphs(cache_dir=tmp_path) == 7).all()  # what was drawn again has been stored


def test_glyph_splits_share_no_script_and_no_character() -> None:
    splits = data.glyph_split()
    classes = glyphs.glyph_table().classes
    scripts = [{classes[i].script for i in members} for members in splits.values()]
    points = [
        {p for i in members for p in (classes[i].code_point, *classes[i].look_alikes)} for members in splits.values()
    ]
    for sets in (scripts, points):
        assert all(sets)
        assert sum(map(len, sets)) == len(set().union(*sets))
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(len(classes)))
    assert scripts[2] == {"Georgian", "Hebrew", "N'Ko", "Tifinagh"}
    for script in scripts[2]:
        assert sum(c.script == script for c in classes) >= 5


def test_glyph_classes_do_not_look_alike() -> None:
    from imaml_ext.data.raster import FontFile

    table = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "make_glyph_table.py"))
    MERGE, _features, _plain = table["MERGE"], table["_features"], table["_plain"]
    fonts = [FontFile(glyphs.font_folder() / name) for name in table["BASE_FACES"]]
    pictures = []
    for glyph in glyphs.glyph_table().classes:
        outline = next(o for font in fonts if (o := font.outline(glyph.code_point)) is not None)
        pictures.append(_plain(outline))
    features = _features(np.stack(pictures))
    similarity = features @ features.T
    np.fill_diagonal(similarity, 0)
    assert similarity.max() < MERGE
    latin = {c.code_point: c for c in glyphs.glyph_table().classes}[ord("A")]
    assert {0x391, 0x410} <= set(latin.look_alikes)  # Greek Alpha and Cyrillic А are the class of Latin A
    # A turned training character that is a class resembles no training character and no other turned one.
    train = [i for i, c in enumerate(glyphs.glyph_table().classes) if c.split == "train"]
    turned = [
        np.rot90(pictures[i], turn)
        for i in train
        for turn in (1, 2, 3)
        if glyphs.glyph_table().classes[i].orientations[turn]
    ]
    every = np.concatenate([features[train], _features(np.stack(turned))])
    highest = max(float(np.triu(every[i : i + 500] @ every.T, i + 1).max()) for i in range(0, len(every), 500))
    assert highest < MERGE + 1e-12


def test_glyph_drawings_vary_and_hold_ink(glyph_cache: Path) -> None:
    images = data.load_glyphs(cache_dir=glyph_cache)
    assert (images.max((2, 3)) >= 128).all()
    assert all(len({drawing.tobytes() for drawing in drawings}) == 20 for drawings in images)


def test_glyph_dataset(glyph_cache: Path) -> None:
    dataset = load_dataset("glyphs", cache_dir=glyph_cache)
    train, val, test = (dataset.images(s) for s in ("train", "val", "test"))
    assert dataset.input_shape == (1, 28, 28)
    assert (train.num_characters, train.num_classes) == (1681, 5192)
    assert val.num_classes == val.num_characters == 88
    assert test.num_classes == test.num_characters == 168
    assert train.images is test.images  # one copy
    assert load_dataset("glyphs", cache_dir=glyph_cache, rotations=False).images("train").num_classes == 1681
    batch = dataset.sampler("test", ways=20, shots=5, queries=15, meta_batch=2, seed=0).sample(0)
    assert batch.query_x.shape == (2, 300, 1, 28, 28)
    names = {test.name(i) for i in range(168)}
    assert "tifinagh letter yaz" in names
    assert len(names) == 168


def test_missing_or_damaged_fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "font_folder", lambda: tmp_path)
    with pytest.raises(DataError, match=r"font file .*DejaVuSans.ttf cannot be read \(No such file or directory\)"):
        data.load_glyphs(cache_dir=tmp_path / "cache")
    for name, _ in glyphs.glyph_table().fonts:
        (tmp_path / name).write_bytes(b"not a font")
    with pytest.warns(UserWarning, match="font files"), pytest.raises(DataError, match=r"DejaVuSans.ttf is damaged"):
        data.load_glyphs(cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_missing_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DataError, match="glyphs is drawn from matplotlib's font files: pip install matplotlib"):
        data.load_glyphs(cache_dir=tmp_path)


# ---- the rasteriser -------------------------------------------------------------------------------------------------


def test_rasteriser_covers_exact_areas() -> None:
    from imaml_ext.data.raster import SUB, draw

    def polygon(*points: tuple[float, float]) -> np.ndarray:
        corners = np.array([[round(x * SUB), round(y * SUB)] for x, y in points], dtype=np.int64)
        return np.concatenate([corners, np.roll(corners, -1, axis=0)], axis=1)

    box = polygon((2.25, 3), (10.5, 3), (10.5, 7.5), (2.25, 7.5))
    ring = np.concatenate([box, polygon((4, 4), (4, 6), (6, 6), (6, 4))])  # a hole: the other way round
    left, right = polygon((2.25, 3), (8, 3), (8, 7.5), (2.25, 7.5)), polygon((5, 3), (10.5, 3), (10.5, 7.5), (5, 7.5))
    overlapping = np.concatenate([left, right])  # what two contours share is filled once
    triangle = polygon((0, 0), (28, 0), (0, 28))
    outside = polygon((-5, -5), (40, -5), (40, 40), (-5, 40))
    pictures = [box, ring, overlapping, box[::-1, [2, 3, 0, 1]], triangle, outside]
    images = draw(np.concatenate(pictures), np.repeat(np.arange(6), [len(p) for p in pictures]), 6)
    expected = np.zeros((28, 28))
    expected[3:8, 2:11] = 1
    expected[7] *= 0.5
    expected[:, 2] *= 0.75
    expected[:, 10] *= 0.5
    assert np.abs(images[0] / 255 - expected).max() <= 0.5 / 255 + 1e-9
    hole = expected.copy()
    hole[4:6, 4:6] = 0
    assert np.abs(images[1] / 255 - hole).max() <= 0.5 / 255 + 1e-9
    assert np.array_equal(images[2][:7], images[0][:7])
    assert np.array_equal(images[3], images[0])
    assert abs(images[4].sum() / 255 - 28 * 28 / 2) < 2
    assert (images[5] == 255).all()


def test_outlines_agree_with_matplotlibs() -> None:
    """The curves we flatten enclose the area that matplotlib's own reading of the font does."""
    from matplotlib import ft2font

    from imaml_ext.data.raster import HALF, FontFile

    path = glyphs.font_folder() / "DejaVuSans.ttf"
    ours, theirs = FontFile(path), ft2font.FT2Font(str(path))
    no_hinting = ft2font.LoadFlags.NO_HINTING if hasattr(ft2font, "LoadFlags") else ft2font.LOAD_NO_HINTING
    theirs.set_size(1000, 72)
    for character in "AOgé&ß8ლⵥᐊ":
        edges = ours.outline(ord(character))
        assert edges is not None
        x0, y0, x1, y1 = edges.astype(np.float64).T
        area = abs((x0 * y1 - x1 * y0).sum()) / 2
        assert np.abs(edges).max() == HALF
        theirs.load_char(ord(character), flags=no_hinting)
        vertices, codes = theirs.get_path()
        expected, extent = _path_area(np.asarray(vertices), np.asarray(codes))
        assert area * (extent / (2 * HALF)) ** 2 == pytest.approx(expected, rel=0.01), character


def _path_area(vertices: np.ndarray, codes: np.ndarray) -> tuple[float, float]:
    """Signed area and longer side of the bounding box of a path of lines and quadratic curves, curves cut in 50."""
    total, polygon, everything, i = 0.0, [], [], 0

    def close() -> float:
        if not polygon:
            return 0.0
        p = np.array(polygon)
        q = np.roll(p, -1, axis=0)
        everything.append(p)
        return float((p[:, 0] * q[:, 1] - q[:, 0] * p[:, 1]).sum() / 2)

    while i < len(codes):
        if codes[i] == 1:
            total += close()
            polygon = [vertices[i]]
        elif codes[i] == 2:
            polygon.append(vertices[i])
        elif codes[i] == 3:
            a, b, c = polygon[-1], vertices[i], vertices[i + 1]
            t = np.linspace(0, 1, 51)[1:, None]
            polygon.extend((1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c)
            i += 1
        i += 1
    total += close()
    points = np.concatenate(everything)
    return abs(total), float((points.max(0) - points.min(0)).max())


# ---- the registry ---------------------------------------------------------------------------------------------------


def test_data_sets_by_name() -> None:
    for name in data.DataSource.kinds:
        source = data.DataSource.kind(name)()
        assert source.kind_name == name
        assert source.kind_of_task == ("regression" if name in ("sinusoid", "linear") else "classification")
        assert from_json(data.DataSource, to_json(source)) == source
    with pytest.raises(ConfigTypeError, match="features is no option of sinusoid, which has none"):
        load_dataset("sinusoid", features=3)
    with pytest.raises(
        ConfigTypeError, match="rotations is no option of cifar-fs, which has cache_dir, root, download"
    ):
        load_dataset("cifar-fs", rotations=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'image_size'"):
        data.Glyphs(image_size=32)
    with pytest.raises(ConfigTypeError, match=r"Linear.features must be an integer, got 'many'"):
        load_dataset("linear", features="many")


@pytest.mark.parametrize("name", ["sinusoid", "linear"])
def test_regression_datasets(name: str) -> None:
    dataset = load_dataset(name, **({"features": 3} if name == "linear" else {}))
    assert dataset.kind == "regression"
    train, test = (dataset.sampler(s, shots=5, queries=6, meta_batch=2, seed=0) for s in ("train", "test"))
    batch = train.sample(0)
    assert batch.support_x.shape == (2, 5, *dataset.input_shape)
    assert batch.query_y.shape == (2, 6, 1)
    assert batch.query_y.dtype == torch.float32
    assert not torch.equal(batch.support_y, test.sample(0).support_y)
    with pytest.raises(ValueError, match=f"ways must be None for {name}, which is regression, got 5"):
        dataset.sampler("train", ways=5, shots=5, queries=6, meta_batch=2, seed=0)
    with pytest.raises(ValueError, match=f"split of {name} must be one of 'train', 'val', 'test', got 'dev'"):
        dataset.sampler("dev", shots=5, queries=6, meta_batch=2, seed=0)
    with pytest.raises(DataError, match=f"{name} has no images to show"):
        data.sample_sheet(dataset, "train")


def test_omniglot_without_validation_has_no_val(packed_file: Path) -> None:
    options = {"ways": 5, "shots": 1, "queries": 1, "meta_batch": 1, "seed": 0}
    with pytest.raises(ValueError, match="split of omniglot must be one of 'train', 'test', got 'val'"):
        load_dataset("omniglot", root=packed_file.parent).sampler("val", **options)
    dataset = load_dataset("omniglot", root=packed_file.parent, validation=100, orientations="upright")
    assert dataset.images("val").num_classes == 100
    with pytest.raises(ValueError, match="ways must not exceed the 100 classes there are, got 101"):
        dataset.sampler("val", **(options | {"ways": 101}))
    with pytest.raises(TypeError, match="ways must be an integer, got None"):
        dataset.sampler("val", **(options | {"ways": None}))


def test_summary_counts_what_there_is(packed_file: Path) -> None:
    text = data.summary(load_dataset("omniglot", root=packed_file.parent, split="vinyals"))
    lines = text.splitlines()
    assert "classification, one example: 1 × 28 × 28" in lines
    table = [line.split()[:4] for line in lines if line.split()[:1] in (["train"], ["val"], ["test"])]
    assert table == [["train", "1,028", "4,112", "20"], ["val", "172", "688", "20"], ["test", "423", "1,692", "20"]]
    assert "sin(x" in data.summary(load_dataset("sinusoid"))


def test_image_grid_places_every_image() -> None:
    images = torch.rand(5, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    grid = data.image_grid(images, columns=3, padding=2, background=0.5)
    assert grid.shape == (2 * 5 + 2, 3 * 6 + 2)
    assert grid.dtype == np.float32
    for i in range(5):
        top, left = 2 + i // 3 * 5, 2 + i % 3 * 6
        assert np.array_equal(grid[top : top + 3, left : left + 4], images[i, 0].numpy())
    assert (grid == 0.5).sum() == grid.size - 5 * 12
    colour = data.image_grid(np.full((2, 3, 4, 4), 255, np.uint8), columns=2, padding=0)
    assert colour.shape == (4, 8, 3)
    assert (colour == 1).all()
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        data.image_grid(images, columns=0)
    with pytest.raises(ValueError, match="images must be non-empty"):
        data.image_grid(images[:0], columns=1)


def test_sample_sheet(packed_file: Path) -> None:
    sheet = data.sample_sheet(load_dataset("omniglot", root=packed_file.parent), "test", classes=4, drawings=6)
    assert sheet.shape == (4 * 30 + 2, 6 * 30 + 2)


def test_nearest_neighbour_baseline() -> None:
    noise = torch.randint(0, 4, (30, 20, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options = {"ways": 5, "shots": 1, "queries": 4, "meta_batch": 10, "seed": 0}
    blind = data.EpisodeSampler(data.ClassImages(noise), **options)
    mean, interval = data.nearest_neighbour_accuracy(blind, tasks=95)
    assert abs(mean - 0.2) < 0.05  # chance
    assert 0.005 < interval < 0.05
    told = noise + 8 * torch.arange(30, dtype=torch.uint8)[:, None, None, None]
    sure = data.EpisodeSampler(data.ClassImages(told), **options)
    assert data.nearest_neighbour_accuracy(sure, tasks=20) == (1.0, 0.0)
