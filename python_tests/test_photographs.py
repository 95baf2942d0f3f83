"""mini-ImageNet, tiered-ImageNet, CUB, CIFAR-FS and FC100: every form they are read from, and what is damaged."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imaml_ext.data import (
    Folder,
    ImageDataset,
    MiniImageNet,
    cifar_split,
    load_dataset,
    packing,
    summary,
    tiered_imagenet,
)
from imaml_ext.data.cifar import class_names
from imaml_ext.data.mini_imagenet import NUM_CLASSES
from imaml_ext.data.pickles import load_pickle
from imaml_ext.errors import DataError
from imaml_ext.pictures import Reading

CATEGORY_FILES = {"train": "train_phase_train", "val": "val", "test": "test"}


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# ---- pickles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_containers_come_back(protocol: int, tmp_path: Path) -> None:
    content = {
        b"array": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "scalar": np.int64(7),
        "plain": [1, 2.5, None, ("text", b"bytes"), {"a": True}],
    }
    (tmp_path / "file").write_bytes(pickle.dumps(content, protocol=protocol))
    found = load_pickle(tmp_path / "file", "array")
    assert np.array_equal(found["array"], content[b"array"])
    assert np.array_equal(found["fortran"], content["fortran"])
    assert found["scalar"] == 7
    assert found["plain"] == content["plain"]


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    """Protocol 2 with byte strings, as `cPickle.dump({'data': numpy.zeros(2, 'u1'), 'labels': [3]})` wrote them."""
    stream = (
        b"\x80\x02}q\x01(U\x06labelsq\x02]q\x03K\x03aU\x04dataq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\n"
        b"ndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x02\x85cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01\x87Rq\t(K\x03U\x01|"
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\xfe\x80tbu."
    )
    (tmp_path / "file").write_bytes(stream)
    found = load_pickle(tmp_path / "file")
    assert found["labels"] == [3]
    assert found["data"].tolist() == [254, 128]


class _Runs:
    def __reduce__(self) -> tuple:
        return (os.system, ("touch run-by-the-pickle",))


@pytest.mark.parametrize("content", [_Runs(), {"data": _Runs()}, {"data": np.array([_Runs()], dtype=object)}])
def test_a_pickle_cannot_run_anything(content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(pickle.dumps(content))
    with pytest.raises(
        DataError, match=r"it names (posix|nt)\.system, which is neither an array nor a plain container"
    ):
        load_pickle(tmp_path / "file", "data")
    assert files_of(tmp_path) == ["file"]


def test_pickles_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    whole = pickle.dumps({"data": np.arange(1000)})
    for content in (b"", b"<html>", whole[:200], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is damaged or not a pickle of arrays"):
            load_pickle(path, "data")
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(DataError, match="must hold a dictionary, got list"):
        load_pickle(path)
    path.write_bytes(pickle.dumps({"other": 1}))
    with pytest.raises(DataError, match=r"has no entry 'data' \(it holds other\)"):
        load_pickle(path, "data")
    with pytest.raises(DataError, match="cannot be read"):
        load_pickle(tmp_path / "missing")


# ---- mini-ImageNet --------------------------------------------------------------------------------------------------


def pixels(class_number: int, image: int) -> np.ndarray:
    """What image `image` of class `class_number` is filled with."""
    return np.array([class_number, 10 * image, 200], np.uint8)


def mini_classes() -> dict[str, list[int]]:
    numbers, first = {}, 0
    for split, count in NUM_CLASSES.items():
        numbers[split] = list(range(first, first + count))
        first += count
    return numbers


def class_name(number: int) -> str:
    return f"n{number:08d}"


def write_cache_files(folder: Path) -> None:
    """Two images per class; rows are dealt out in turn, not one class after another."""
    for split, numbers in mini_classes().items():
        images = np.zeros((2 * len(numbers), 84, 84, 3), np.uint8)
        rows = {}
        for position, number in enumerate(numbers):
            rows[class_name(number)] = [position, position + len(numbers)]
            for image, row in enumerate(rows[class_name(number)]):
                images[row] = pixels(number, image)
        content = {"image_data": images, "class_dict": rows}
        (folder / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content, protocol=2))


def write_category_files(folder: Path) -> None:
    for split, numbers in mini_classes().items():
        labels = [number for image in range(2) for number in numbers]
        images = np.stack([np.broadcast_to(pixels(n, image), (84, 84, 3)) for image in range(2) for n in numbers])
        names = {class_name(number): number for number in numbers}
        content = {"data": images, "labels": labels, "catname2label": names}
        path = folder / f"miniImageNet_category_split_{CATEGORY_FILES[split]}.pickle"
        path.write_bytes(pickle.dumps(content, protocol=2))


def save_picture(path: Path, number: int, image: int) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.broadcast_to(pixels(number, image), (30, 40, 3))).save(path)


def write_csv_files(folder: Path) -> None:
    (folder / "images").mkdir()
    for split, numbers in mini_classes().items():
        lines = ["filename,label"]
        for number in numbers:
            for image in range(2):
                name = f"{class_name(number)}{image:08d}.png"
                save_picture(folder / "images" / name, number, image)
                lines.append(f"{name},{class_name(number)}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")


def write_tree(folder: Path) -> None:
    for split, numbers in mini_classes().items():
        for number in numbers:
            (folder / split / class_name(number)).mkdir(parents=True)
            for image in range(2):
                save_picture(folder / split / class_name(number) / f"{image}.png", number, image)


def write_learn2learn_files(folder: Path) -> None:
    write_cache_files(folder)
    (folder / "mini-imagenet-cache-val.pkl").rename(folder / "mini-imagenet-cache-validation.pkl")


def write_csv_files_with_mark(folder: Path) -> None:
    write_csv_files(folder)
    for split in NUM_CLASSES:
        path = folder / f"{split}.csv"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


def write_hdf5_files(folder: Path) -> None:
    h5py = pytest.importorskip("h5py")
    for split, numbers in mini_classes().items():
        with h5py.File(folder / f"{split}_data.hdf5", "w") as file:
            group = file.create_group("datasets")
            for number in numbers:
                images = np.stack([np.broadcast_to(pixels(number, image), (84, 84, 3)) for image in range(2)])
                group.create_dataset(class_name(number), data=images)


def png(number: int, image: int, size: tuple[int, int] = (40, 30)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, tuple(pixels(number, image).tolist())).save(content, "PNG")
    return content.getvalue()


def write_parquet(path: Path, pictures: list[tuple[int, int]], names: list[str] | None) -> None:
    """Columns and metadata as the library `datasets` writes them."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": png(number, image), "path": f"{number}-{image}.png"} for number, image in pictures]
    table = pyarrow.table({"image": images, "label": [number for number, _ in pictures]})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=7)


def write_parquet_files(folder: Path) -> None:
    """Two files of the training classes, one of the others; pictures in any order."""
    names = [class_name(number) for number in range(100)]
    for split, numbers in mini_classes().items():
        pictures = [(number, image) for image in range(2) for number in numbers]
        parts = [pictures[:40], pictures[40:]] if split == "train" else [pictures]
        for part, some in enumerate(parts):
            alias = "validation" if split == "val" else split
            write_parquet(folder / "data" / f"{alias}-{part:05d}-of-{len(parts):05d}.parquet", some, names)


def write_tree_with_valid(folder: Path) -> None:
    write_tree(folder)
    (folder / "val").rename(folder / "valid")


FORMS = {
    "cache": write_cache_files,
    "learn2learn": write_learn2learn_files,
    "category": write_category_files,
    "hdf5": write_hdf5_files,
    "csv": write_csv_files,
    "csv with a mark": write_csv_files_with_mark,
    "parquet": write_parquet_files,
    "tree": write_tree,
    "tree with valid": write_tree_with_valid,
}
PACKED = {"csv", "csv with a mark", "parquet", "tree", "tree with valid"}


@pytest.mark.parametrize("form", FORMS)
def test_mini_imagenet_is_the_same_from_every_form(form: str, tmp_path: Path) -> None:
    place = tmp_path / "data" / ("mini-imagenet" if form in ("cache", "tree") else ".")
    place.mkdir(parents=True)
    FORMS[form](place)
    found = MiniImageNet(root=tmp_path / "data", cache_dir=tmp_path / "cache").read()
    assert found.images.shape == (200, 84, 84, 3)
    assert found.names == tuple(class_name(n) for n in range(100))
    assert found.counts.tolist() == [2] * 100
    assert {s: c.tolist() for s, c in found.splits.items()} == mini_classes()
    expected = np.stack([pixels(n, image) for n in range(100) for image in range(2)])
    assert np.array_equal(found.images, np.broadcast_to(expected[:, None, None], found.images.shape))
    packed = files_of(tmp_path / "cache") if (tmp_path / "cache").exists() else []
    assert len(packed) == (form in PACKED)
    with tarfile.open(tmp_path / "data.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.add(tmp_path / "data", "data")
    again = MiniImageNet(root=tmp_path / "data.tar.gz", cache_dir=tmp_path / "cache").read()
    assert np.array_equal(again.images, found.images)
    assert again.names == found.names


def test_mini_imagenet_dataset(tmp_path: Path) -> None:
    write_cache_files(tmp_path)
    dataset = load_dataset("mini-imagenet", root=tmp_path)
    assert dataset.input_shape == (3, 84, 84)
    assert dataset.splits == ("train", "val", "test")
    batch = dataset.sampler("test", ways=20, shots=1, queries=1, meta_batch=1, seed=0).sample(0)
    both = torch.cat([batch.support_x, batch.query_x], 1)[0] * 255  # [40, 3, 84, 84]
    assert sorted(both[:20, 0, 0, 0].round().int().tolist()) == mini_classes()["test"]
    assert torch.equal(both[:20, 0], both[20:, 0])  # the same classes,
    assert ((both[:20, 1, 5, 5] - both[20:, 1, 5, 5]).abs().round() == 10).all()  # other images
    assert "2 images per class of the published 600: results do not compare" in summary(dataset)
    with pytest.raises(ValueError, match=r"shots \+ queries must not exceed the 2 drawings a class has, got 1 \+ 2"):
        dataset.sampler("test", ways=5, shots=1, queries=2, meta_batch=1, seed=0)


def test_pictures_are_packed_once_and_a_changed_one_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv_files(tmp_path)
    cache = tmp_path / "cache"
    first = MiniImageNet(root=tmp_path, cache_dir=cache).read()
    (packed,) = (cache / "pictures").iterdir()

    def unexpected(*args: object) -> np.ndarray:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_read", unexpected)
        assert np.array_equal(MiniImageNet(root=tmp_path, cache_dir=cache).read().images, first.images)
        packed.write_bytes(packed.read_bytes()[:1000])  # a damaged cache is not believed
        with pytest.raises(AssertionError, match="read again"):
            MiniImageNet(root=tmp_path, cache_dir=cache).read()
    save_picture(tmp_path / "images" / f"{class_name(3)}00000001.png", 77, 1)
    again = MiniImageNet(root=tmp_path, cache_dir=cache).read()
    assert (again.images[7, ..., 0] == 77).all()


def _without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _rewrite(folder: Path, name: str, **changes: object) -> None:
    content = pickle.loads((folder / name).read_bytes()) | changes
    (folder / name).write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    ("form", "spoil", "message"),
    [
        ("cache", lambda f: _without(f, "mini-imagenet-cache-val.pkl"), "mini-imagenet-cache-val.pkl is missing"),
        (
            "cache",
            lambda f: _rewrite(f, "mini-imagenet-cache-val.pkl", image_data=np.zeros((32, 28, 28, 3), np.uint8)),
            r"'image_data' must be uint8 \(any, 84, 84, 3\), got uint8 \(32, 28, 28, 3\)",
        ),
        (
            "cache",
            lambda f: _rewrite(f, "mini-imagenet-cache-val.pkl", class_dict={"a": [0, 1], "b": [1, 2]}),
            "the classes must name each of the 32 images once",
        ),
        (
            "cache",
            lambda f: _rewrite(f, "mini-imagenet-cache-val.pkl", class_dict=[1]),
            "must be a dictionary, got list",
        ),
        (
            "cache",
            lambda f: _rewrite(f, "mini-imagenet-cache-test.pkl", class_dict={class_name(0): list(range(40))}),
            "class 'n00000000' is in test and in another split",
        ),
        (
            "cache",
            lambda f: _rewrite(f, "mini-imagenet-cache-val.pkl", class_dict={"a": list(range(32))}),
            "must have 16 classes in 'val', found 1",
        ),
        (
            "category",
            lambda f: _rewrite(f, "miniImageNet_category_split_val.pickle", labels=[64] * 31),
            r"'labels' must hold one label per image \(32\), got 31",
        ),
        ("csv", lambda f: _without(f, "test.csv"), "test.csv is missing"),
        ("csv", lambda f: (f / "val.csv").write_text("name,class\n"), "the line 'filename,label', got 'name,class'"),
        (
            "csv",
            lambda f: (f / "val.csv").write_text("filename,label\n../../secret.png,a\n"),
            "row 2 must be the name of a file in images/ and a label, got '../../secret.png'",
        ),
        ("csv", lambda f: _without(f, f"images/{class_name(9)}00000000.png"), "the picture .* does not exist"),
        (
            "csv",
            lambda f: (f / f"images/{class_name(9)}00000000.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing"),
            "n0000000900000000.png is damaged or not a picture",
        ),
    ],
)
def test_spoilt_mini_imagenet(form: str, spoil, message: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    FORMS[form](tmp_path / "data")
    spoil(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        MiniImageNet(root=tmp_path / "data", cache_dir=tmp_path / "cache").read()
    assert not (tmp_path / "cache").exists()


def test_errors_advise_no_option_that_there_is_not(tmp_path: Path) -> None:
    write_tree(tmp_path)
    (tmp_path / "test" / class_name(99) / "2.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"is damaged or not a picture .*; mend it$"):
        MiniImageNet(root=tmp_path, cache_dir=tmp_path / "cache").read()
    for path in (tmp_path / "test" / class_name(99)).iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"class 'n00000099' has no pictures; add pictures \([^)]*\)$"):
        MiniImageNet(root=tmp_path, cache_dir=tmp_path / "cache").read()


def test_missing_mini_imagenet_says_what_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"root .* holds neither mini-imagenet-cache-train.pkl, .* nor train/; give"):
        MiniImageNet(root=tmp_path).read()


def test_splits_that_share_classes_are_no_few_shot_splits(tmp_path: Path) -> None:
    """As in timm/mini-imagenet: every class is in each of its files. A folder of one's own splits them by class."""
    names = [class_name(number) for number in range(12)]
    for image, split in enumerate(("train", "validation", "test")):
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", [(n, image) for n in range(12)], names)
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=r"share 12 classes, so that they are none of few-shot learning; .* `folder`"):
        MiniImageNet(root=tmp_path, cache_dir=cache).read()
    (tmp_path / "splits.json").write_text(json.dumps({"train": names[:8], "val": names[8:10], "test": names[10:]}))
    folder = Folder(root=tmp_path, cache_dir=cache, pictures=Reading(size=84), splits=tmp_path / "splits.json")
    found = folder.read()
    assert found.names == tuple(names)
    assert found.counts.tolist() == [3] * 12
    expected = np.stack([pixels(number, image) for number in range(12) for image in (2, 0, 1)])
    assert np.array_equal(found.images[:, 40, 40], expected)  # the files in order of their names


def test_labels_without_names_are_classes_by_their_numbers(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [(number, 0) for number in range(30)], None)
    found = Folder(root=tmp_path, cache_dir=tmp_path / "cache", pictures=Reading(size=4)).read()
    assert sorted(found.names) == sorted(map(str, range(30)))
    # A table beside folders of pictures is no data set of pictures.
    for name in ("cat", "dog"):
        save_picture(tmp_path / name / "0.png", 1, 1)
    (tmp_path / "splits.csv").write_text("class,split\ncat,train\ndog,test\n")
    options = {"root": tmp_path, "cache_dir": tmp_path / "cache", "splits": tmp_path / "splits.csv"}
    assert Folder(**options, pictures=Reading(size=4), min_per_class=1).read().names == ("cat", "dog")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:500]), r"is damaged or not a \.parquet file"),
        (lambda path: rewrite_parquet(path, drop="label"), "must have the columns image and label, it has image"),
        (lambda path: rewrite_parquet(path, replace="image"), "image must hold the bytes of a picture, got NoneType"),
        (lambda path: rewrite_parquet(path, damage=True), r"a\.parquet:3 is damaged or not a picture"),
    ],
)
def test_spoilt_parquet(spoil, message: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [(number, 0) for number in range(30)], None)
    spoil(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        Folder(root=tmp_path, cache_dir=tmp_path / "cache", pictures=Reading(size=4)).read()


def rewrite_parquet(path: Path, *, drop: str = "", replace: str = "", damage: bool = False) -> None:
    import pyarrow
    from pyarrow import parquet

    table = parquet.read_table(path)
    rows = table.column("image").to_pylist()
    if replace:
        rows[5]["bytes"] = None
    if damage:
        rows[3]["bytes"] = b"nothing"
    columns = {"image": pyarrow.array(rows), "label": table.column("label")}
    columns.pop(drop, None)
    parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(("module", "form"), [("h5py", "hdf5"), ("pyarrow.parquet", "parquet")])
def test_a_missing_package_is_named(module: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train_data.hdf5", "val_data.hdf5", "test_data.hdf5") if form == "hdf5" else ("train-0.parquet",):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    with pytest.raises(DataError, match=rf"is read with {package}, .*: pip install {package}, or .* extra '{form}'"):
        MiniImageNet(root=tmp_path).read()


@pytest.mark.parametrize("content", [b"", b"no hdf5 file", None])
def test_spoilt_hdf5(content: bytes | None, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    write_hdf5_files(tmp_path)
    if content is None:
        h5py.File(tmp_path / "val_data.hdf5", "w").close()
    else:
        (tmp_path / "val_data.hdf5").write_bytes(content)
    message = "must hold a group 'datasets'" if content is None else "is damaged or not an .hdf5 file"
    with pytest.raises(DataError, match=rf"val_data\.hdf5 {message}"):
        MiniImageNet(root=tmp_path, cache_dir=tmp_path / "cache").read()


# ---- tiered-ImageNet ------------------------------------------------------------------------------------------------


def tiered_classes() -> dict[str, list[int]]:
    numbers, first = {}, 0
    for split, count in tiered_imagenet.NUM_CLASSES.items():
        numbers[split] = list(range(first, first + count))
        first += count
    return numbers


def tiered_pixels(number: int) -> tuple[int, int, int]:
    return (number % 256, number // 256, 77)


def write_tiered_labels(folder: Path, *, named: bool = True) -> dict[str, list[int]]:
    """Writes the labels of a picture per class, two of the first class of each split; returns the classes in order."""
    rows = {}
    for split, numbers in tiered_classes().items():
        order = [*reversed(numbers), numbers[0]]
        content = {"label_specific": np.array([number - numbers[0] for number in order]), "label_general": [0]}
        if named:
            content["label_specific_str"] = [class_name(number) for number in numbers]
        (folder / f"{split}_labels.pkl").write_bytes(pickle.dumps(content, protocol=2))
        rows[split] = order
    return rows


def tiered_png(number: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (84, 84), tiered_pixels(number)).save(content, "PNG", compress_level=1)
    return content.getvalue()


def write_tiered_png(folder: Path) -> None:
    for split, order in write_tiered_labels(folder).items():
        pictures = [np.frombuffer(tiered_png(number), np.uint8)[:, None] for number in order]  # as cv2 encodes them
        (folder / f"{split}_images_png.pkl").write_bytes(pickle.dumps(pictures, protocol=2))


def write_tiered_npz(folder: Path) -> None:
    for split, order in write_tiered_labels(folder).items():
        images = np.stack([np.broadcast_to(np.uint8(tiered_pixels(number)), (84, 84, 3)) for number in order])
        np.savez_compressed(folder / f"{split}_images.npz", images=images)


def write_tiered_hdf5(folder: Path) -> None:
    h5py = pytest.importorskip("h5py")
    for split, numbers in tiered_classes().items():
        with h5py.File(folder / f"{split}_data.hdf5", "w") as file:
            group = file.create_group("datasets")
            for number in numbers:
                count = 2 if number == numbers[0] else 1
                entry = group.create_dataset(class_name(number), (count,), dtype=h5py.vlen_dtype(np.uint8))
                for image in range(count):
                    entry[image] = np.frombuffer(tiered_png(number), np.uint8)


@pytest.mark.parametrize("write", [write_tiered_png, write_tiered_npz, write_tiered_hdf5])
def test_tiered_imagenet_is_the_same_from_every_form(write, tmp_path: Path) -> None:
    place = tmp_path / "data" / "tiered-imagenet"
    place.mkdir(parents=True)
    write(place)
    dataset = load_dataset("tiered-imagenet", root=tmp_path / "data", cache_dir=tmp_path / "cache")
    assert dataset.description == "tiered-ImageNet, 608 classes, 611 photographs, 84×84 in colour"
    assert {s: list(names) for s, names in dataset.classes().items()} == {
        split: [class_name(number) for number in numbers] for split, numbers in tiered_classes().items()
    }
    for split, numbers in tiered_classes().items():
        images = dataset.images(split)
        assert images.drawings.tolist() == [2] + [1] * (len(numbers) - 1)
        seen = (images.gather(np.arange(len(numbers)), np.zeros(len(numbers), int)) * 255).round().int()
        assert torch.equal(seen[:, :, 41, 7], torch.tensor([tiered_pixels(number) for number in numbers]).int())


def test_spoilt_tiered_imagenet(tmp_path: Path) -> None:
    write_tiered_npz(tmp_path)

    def read() -> None:
        load_dataset("tiered-imagenet", root=tmp_path, cache_dir=tmp_path / "cache")

    write_tiered_labels(tmp_path, named=False)
    read()  # classes without names are numbered
    labels = tmp_path / "val_labels.pkl"
    for content, message in (
        ({"label_specific": list(range(97))}, "must hold 97 images, as its labels do, got 98"),
        ({"label_specific": [0] * 98}, "must have 97 classes in 'val', found 1"),
        (
            {"label_specific": [*range(97), 0], "label_specific_str": ["a"]},
            "names 1 classes, the labels go to 96",
        ),
        ({"labels": 3}, "has no entry 'label_specific'"),
    ):
        labels.write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=message):
            read()
    labels.unlink()
    with pytest.raises(DataError, match=r"tiered-ImageNet in .* is incomplete: val_labels\.pkl is missing"):
        read()
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"tiered-ImageNet was not found: root .* holds neither train_images_png\.pkl"):
        load_dataset("tiered-imagenet", root=empty)


# ---- CUB-200-2011 ---------------------------------------------------------------------------------------------------


def write_cub(folder: Path) -> list[str]:
    """Two pictures per class, listed in another order than that of the classes; returns the names of the classes."""
    folder.mkdir(parents=True)
    names = [f"{i + 1:03d}.Bird_{(i * 37) % 200}" for i in range(200)]
    pictures = [(i, image) for image in range(2) for i in reversed(range(200))]
    (folder / "classes.txt").write_text("".join(f"{i + 1} {name}\n" for i, name in enumerate(names)))
    paths = [f"{names[i]}/{names[i]}_{image}.jpg" for i, image in pictures]
    (folder / "images.txt").write_text("".join(f"{row + 1} {path}\n" for row, path in enumerate(paths)))
    labels = "".join(f"{row + 1} {i + 1}\n" for row, (i, _) in enumerate(pictures))
    (folder / "image_class_labels.txt").write_text(labels)
    for (i, image), path in zip(pictures, paths, strict=True):
        (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 9), (i, 100 * image, 0)).save(folder / "images" / path, "BMP")  # exact, whatever its name
    return names


def test_cub(tmp_path: Path) -> None:
    names = write_cub(tmp_path / "CUB_200_2011")
    dataset = load_dataset("cub", root=tmp_path, cache_dir=tmp_path / "cache")
    classes = dataset.classes()
    assert {split: len(members) for split, members in classes.items()} == {"train": 100, "val": 50, "test": 50}
    for i, name in enumerate(names):
        assert name in classes["train" if i % 2 == 0 else "val" if i % 4 == 1 else "test"]
    test = dataset.images("test")
    seen = (test.gather(np.arange(50), np.ones(50, int)) * 255).round().int()
    assert seen[:, :2, 3, 3].tolist() == [[i, 100] for i in range(3, 200, 4)]
    assert "400 photographs of the published 11,788: results do not compare" in summary(dataset)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("classes.txt", lambda text: text.replace("7 007", "8 007"), "line 8 must be a number, used once, and a word"),
        ("classes.txt", lambda text: text.partition("\n")[2], "must name 200 classes, 1 to 200, got 199"),
        ("images.txt", lambda text: text.partition("\n")[2], "must label the 399 pictures of images.txt"),
        ("image_class_labels.txt", lambda text: text.replace("1 200\n", "1 201\n", 1), "have a class, got '201'"),
        ("images.txt", lambda text: text.replace("1 200.", "1 ../200."), "must lie in images/"),
        ("images.txt", None, "holds neither images.txt nor"),
        ("image_class_labels.txt", None, "cannot be read"),
    ],
)
def test_spoilt_cub(file: str, change, message: str, tmp_path: Path) -> None:
    write_cub(tmp_path / "CUB_200_2011")
    path = tmp_path / "CUB_200_2011" / file
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        load_dataset("cub", root=tmp_path, cache_dir=tmp_path / "cache")


# ---- CIFAR-FS and FC100 ---------------------------------------------------------------------------------------------


def real_root() -> Path:
    root = os.environ.get("IMAML_DATA_ROOT")
    if not root:
        pytest.skip("IMAML_DATA_ROOT is not set: it names the folder of the real data")
    if not (Path(root) / "cifar100" / "cifar100_100_per_class.npz").is_file():
        pytest.skip(f"IMAML_DATA_ROOT {root} holds no cifar100/cifar100_100_per_class.npz")
    return Path(root)


@pytest.mark.parametrize(("name", "sizes"), [("cifar-fs", (64, 16, 20)), ("fc100", (60, 20, 20))])
def test_cifar_splits_are_disjoint_and_complete(name: str, sizes: tuple[int, ...]) -> None:
    splits = cifar_split(name)
    assert tuple(splits) == ("train", "val", "test")
    assert tuple(s.size for s in splits.values()) == sizes
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(100))


def test_cifar_splits_are_the_published_ones() -> None:
    import json

    folder = real_root() / "cifar100" / "splits"
    superclass = json.loads((folder / "fine_to_coarse.json").read_text())
    for split, members in cifar_split("cifar-fs").items():
        published = {name for _, name in json.loads((folder / f"cifar-fs-{split}.json").read_text())}
        assert {class_names()[i] for i in members} == published
    for split, members in cifar_split("fc100").items():
        published = set(json.loads((folder / f"fc100-{split}.json").read_text()))
        assert {superclass[class_names()[i]] for i in members} == published


@pytest.mark.parametrize("name", ["cifar-fs", "fc100"])
def test_real_cifar(name: str) -> None:
    root = real_root()
    dataset = load_dataset(name, root=root)
    assert isinstance(dataset, ImageDataset)
    assert dataset.input_shape == (3, 32, 32)
    test = dataset.images("test")
    assert (test.num_classes, test.num_drawings) == (20, 100)
    assert "100 images per class of the published 600: results do not compare" in summary(dataset)
    with np.load(root / "cifar100" / "cifar100_100_per_class.npz") as packed:
        where = np.nonzero(packed["fine_label"] == list(class_names()).index(test.name(3)))[0]
        expected = torch.from_numpy(packed["images"][where[[0, 99]]]).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(test.gather(np.array([3, 3]), np.array([0, 99])), expected)
    batch = dataset.sampler("test", ways=5, shots=5, queries=15, meta_batch=40, seed=0).sample(0)
    # Images of one class resemble each other more than those of others do: labels mean something.
    nearest = torch.cdist(batch.query_x.flatten(2), batch.support_x.flatten(2)).argmin(-1)
    assert (batch.support_y.gather(1, nearest) == batch.query_y).float().mean() > 0.23  # 0.2 by chance


def write_batches(folder: Path, *, each: tuple[int, int] = (3, 2)) -> np.ndarray:
    """The published files with `each` images of every class in train and test; returns the images by class."""
    folder.mkdir(parents=True)
    order = np.random.RandomState(0)
    rows = []
    for file, count in zip(("train", "test"), each, strict=True):
        labels = order.permutation(np.repeat(np.arange(100), count))
        data = order.randint(0, 256, (labels.size, 3072)).astype(np.uint8)
        (folder / file).write_bytes(pickle.dumps({b"data": data, b"fine_labels": labels.tolist()}, protocol=2))
        rows.append((labels, data))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": list(class_names())}, protocol=2))
    by_class = [np.concatenate([data[labels == c] for labels, data in rows]) for c in range(100)]
    return np.stack(by_class).reshape(100, sum(each), 3, 32, 32)


def test_cifar_from_the_published_files(tmp_path: Path) -> None:
    images = write_batches(tmp_path / "cifar-100-python")
    dataset = load_dataset("fc100", root=tmp_path)
    assert isinstance(dataset, ImageDataset)
    val = dataset.images("val")
    assert val.num_drawings == 5
    number = class_names().index(val.name(7))
    gathered = val.gather(np.full(5, 7), np.arange(5), dtype=torch.float64)
    assert torch.equal(gathered, torch.from_numpy(images[number]).double() / 255)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train", b"", "train is damaged or not a pickle"),
        ("test", None, "test cannot be read"),
        ("meta", None, "meta cannot be read"),
        ("meta", {"fine_label_names": ["apple"]}, "does not name the 100 classes of CIFAR-100"),
        (
            "train",
            {"data": np.zeros((5, 3072)), "fine_labels": [0] * 5},
            r"'data' must be uint8 \(any, 3072\), got float",
        ),
        (
            "train",
            {"data": np.zeros((5, 3072), np.uint8), "fine_labels": [0] * 4},
            "'fine_labels' must hold one integer per image, of which there are 5",
        ),
        (
            "train",
            {"data": np.zeros((5, 3072), np.uint8), "fine_labels": [0, 1, 2, 3, 100]},
            "must hold one label from 0 to 99 per image",
        ),
    ],
)
def test_spoilt_cifar_files(file: str, content: object, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    write_batches(folder, each=(1, 1))
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    before = files_of(tmp_path)
    with pytest.raises(DataError, match=message):
        load_dataset("cifar-fs", root=tmp_path)
    assert files_of(tmp_path) == before


def test_spoilt_packed_cifar(tmp_path: Path) -> None:
    path = tmp_path / "cifar100_100_per_class.npz"
    arrays = {
        "images": np.zeros((100, 32, 32, 3), np.uint8),
        "fine_label": np.arange(100, dtype=np.uint8),
        "class_names": np.array(class_names()),
    }
    np.savez(path, **arrays)
    assert load_dataset("cifar-fs", root=tmp_path).rows()[0]["images per class"] == 1
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"is damaged or not an \.npz archive"):
        load_dataset("cifar-fs", root=tmp_path)
    for change, message in (
        ({"class_names": np.array(class_names()[::-1])}, "does not name the 100 classes"),
        ({"fine_label": np.zeros(100, np.uint8)}, "holds no image of the class 'aquarium_fish'"),
        ({"fine_label": np.zeros(99, np.uint8)}, "must hold one label from 0 to 99 per image, of which it has 100"),
        ({"images": np.zeros((100, 3072), np.uint8)}, r"'images' must be uint8 \(any, 32, 32, 3\)"),
    ):
        np.savez(path, **(arrays | change))
        with pytest.raises(DataError, match=message):
            load_dataset("cifar-fs", root=tmp_path)


def test_cifar_is_downloaded_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(root: str, *, train: bool, download: bool) -> None:
        asked.append((root, train, download))
        if train:
            write_batches(Path(root) / "cifar-100-python", each=(1, 1))

    datasets = types.ModuleType("torchvision.datasets")
    datasets.CIFAR100 = download  # type: ignore[attr-defined]
    package = types.ModuleType("torchvision")
    package.datasets = datasets  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    with pytest.raises(DataError, match=r"CIFAR-100 was not found: root .* holds neither cifar-100-python/ nor"):
        load_dataset("cifar-fs", root=tmp_path)
    for _ in range(2):
        assert load_dataset("cifar-fs", root=tmp_path, download=True).rows()[0]["images per class"] == 2
    assert asked == [(str(tmp_path), True, True), (str(tmp_path), False, True)]
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(DataError, match=r"CIFAR-100 is downloaded through torchvision, which cannot be imported here"):
        load_dataset("cifar-fs", root=tmp_path / "empty", download=True)
    assert not (tmp_path / "empty").exists()
