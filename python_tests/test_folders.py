"""Folders of pictures of one's own: which class is in which split, what is left out, and what is damaged."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tarfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_tools import imaml

from imaml_ext import progress
from imaml_ext.data import Folder, ImageDataset, RecordedClasses, load_dataset, packing, summary
from imaml_ext.data.splits import hashed_splits
from imaml_ext.errors import DataError, option_prefix
from imaml_ext.inner import GradientDescent
from imaml_ext.meta import MAML
from imaml_ext.models import MLP
from imaml_ext.pictures import Reading
from imaml_ext.pretrained.weights import read_weights
from imaml_ext.settings import from_json, to_json
from imaml_ext.train import EvaluationSettings, Outer, RunSettings, Tasks, TrainConfig, train
from imaml_ext.train.config import Theta
from imaml_ext.train.evaluation import evaluate_pretrained, evaluate_run
from imaml_ext.train.export import export_run

SMALL = Reading(size=4)


@pytest.fixture(autouse=True)
def said_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, and every line is said again."""
    monkeypatch.setenv("IMAML_CACHE", str(tmp_path / "cache"))
    progress.say_once.cache_clear()
    yield
    option_prefix.set(None)


def split_by_hash(name: str, val: float = 0.16, test: float = 0.2) -> str:
    """The rule, in whole numbers: the first 15 hexadecimal digits of the SHA-256, over 16¹⁵."""
    place = int(hashlib.sha256(name.encode()).hexdigest()[:15], 16) / 16**15
    return "test" if place >= 1 - test else "val" if place >= 1 - test - val else "train"


def names_of(split: str, count: int) -> list[str]:
    """Names of classes that fall into a split."""
    found = (f"class-{i}" for i in range(10_000) if split_by_hash(f"class-{i}") == split)
    return [next(found) for _ in range(count)]


COUNTS = {name: 3 + i % 4 for i, name in enumerate([*names_of("train", 6), *names_of("val", 2), *names_of("test", 2)])}


def picture(path: Path, colour: tuple[int, int, int] = (0, 0, 0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), colour).save(path)


def write_folder(folder: Path, counts: dict[str, int]) -> None:
    """Pictures of 20 × 10 pixels, a colour a picture: red says which class, green which picture."""
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for image in range(count):
            picture(folder / name / f"{image:03d}.PNG", (number * 10, image * 10, 50))


def splits_of(root: Path, **options: object) -> dict[str, list[str]]:
    found = Folder(root=root, **({"pictures": SMALL} | options)).read()
    return {split: [found.names[i] for i in members] for split, members in found.splits.items()}


def kept(root: Path, **options: object) -> set[str]:
    return {name for members in splits_of(root, **options).values() for name in members}


# ---- splits ---------------------------------------------------------------------------------------------------------


def test_folder_of_ragged_classes(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    write_folder(root, COUNTS)
    dataset = load_dataset("folder", root=root, pictures=Reading(size=16))
    assert isinstance(dataset, ImageDataset)
    assert dataset.input_shape == (3, 16, 16)
    assert {split: set(names) for split, names in dataset.classes().items()} == {
        split: {name for name in COUNTS if split_by_hash(name) == split} for split in ("train", "val", "test")
    }
    train = dataset.images("train")
    assert {train.name(i): int(n) for i, n in enumerate(train.drawings)} == {
        name: count for name, count in COUNTS.items() if split_by_hash(name) == "train"
    }
    batch = dataset.sampler("train", ways=6, shots=1, queries=2, meta_batch=3, seed=0).sample(0)
    colours = (batch.support_x[..., 0, 0] * 255).round().long()  # [3, 6, 3]
    assert {int(c) // 10 for c in colours[0, :, 0]} == set(range(6))
    assert "3 to 6" in summary(dataset)
    assert str(tmp_path) not in dataset.description
    assert dataset.description.startswith("pictures in mine, 10 classes, 16×16 in colour")


def test_all_classes_that_are_too_small_for_a_task_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "mine", COUNTS)
    dataset = load_dataset("folder", root=tmp_path / "mine", pictures=SMALL)
    small = [name for name, count in COUNTS.items() if split_by_hash(name) == "train" and count < 5]
    assert len(small) == 4
    with pytest.raises(
        ValueError, match=r"must not exceed the 3 to 4 drawings that 4 classes have \(.*\), got 3 \+ 2"
    ) as e:
        dataset.sampler("train", ways=2, shots=3, queries=2, meta_batch=1, seed=0)
    assert all(repr(name) in str(e.value) for name in small)
    with pytest.raises(ValueError, match=r"must not exceed the 3 drawings class 'class-\d+' has, got 2 \+ 2"):
        dataset.sampler("test", ways=2, shots=2, queries=2, meta_batch=1, seed=0)


def test_no_class_of_a_thousand_folders_moves_when_ten_are_added() -> None:
    words = random.Random(random.random())

    def name() -> str:
        return "".join(words.choices("abcdefghijklmnopqrstuvwxyz äß字-_0123456789", k=words.randint(1, 12)))

    for _ in range(1000):
        before = {name() for _ in range(words.randint(1, 60))}
        after = before | {name() for _ in range(10)}
        val, test = words.choice([(0.16, 0.2), (0.0, 0.3), (0.25, 0.25), (0.1, 0.5)])
        old, new = hashed_splits(before, val, test), hashed_splits(after, val, test)
        for split, members in old.items():
            assert set(members) <= set(new[split])
        assert sorted(n for members in new.values() for n in members) == sorted(after)
        assert all(split_by_hash(n, val, test) == split for split, members in new.items() for n in members)


def test_fractions_are_those_of_many_classes() -> None:
    splits = hashed_splits((f"class-{i}" for i in range(20_000)), 0.16, 0.2)
    assert {split: round(len(members) / 20_000, 2) for split, members in splits.items()} == {
        "train": 0.64,
        "val": 0.16,
        "test": 0.2,
    }


def test_accents_are_one_name_however_they_are_written() -> None:
    for name in ("Käfer", "été", "ñandú"):
        both = {unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
        splits = hashed_splits(both, 0.3, 0.3)
        assert len(both) == 2
        assert sorted(len(members) for members in splits.values()) == [0, 0, 2]


def test_a_file_and_a_record_name_accents_in_either_form(tmp_path: Path) -> None:
    write_folder(tmp_path / "mine", {unicodedata.normalize("NFD", "Käfer"): 1, "bee": 1})
    (tmp_path / "splits.csv").write_text(f"class,split\n{unicodedata.normalize('NFC', 'Käfer')},test\nbee,train\n")
    dataset = load_dataset("folder", root=tmp_path / "mine", pictures=SMALL, splits=tmp_path / "splits.csv")
    assert dataset.classes() == {"train": ("bee",), "test": (unicodedata.normalize("NFD", "Käfer"),)}
    for form in ("NFC", "NFD"):
        with pytest.raises(DataError, match="which would be in test now"):
            RecordedClasses("folder", {"train": [unicodedata.normalize(form, "Käfer")]}).check(dataset, what="the run")


def test_a_split_without_a_class_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = names_of("train", 4)
    write_folder(tmp_path / "mine", dict.fromkeys(names, 2))
    with pytest.raises(
        DataError, match=r"holds 4 classes, .* leave none for 'test' with val_fraction=0\.16 and"
    ) as error:
        splits_of(tmp_path / "mine")
    assert "name a file of splits (splits=FILE), split by rank (split_by=rank), make folders" in str(error.value)
    (advised,) = [word for word in str(error.value).split() if word.startswith("(test_fraction=")]
    advised = float(advised.removeprefix("(test_fraction="))
    assert len(splits_of(tmp_path / "mine", val_fraction=0, test_fraction=advised)["test"]) == 1
    with pytest.raises(DataError, match="leave none for 'test'"):
        splits_of(tmp_path / "mine", val_fraction=0, test_fraction=advised - 0.001)
    option_prefix.set("--data.")
    with pytest.raises(DataError, match=r"\(--data\.splits FILE\).*--data\.test-fraction 0\.\d+"):
        splits_of(tmp_path / "mine")
    option_prefix.set(None)
    # Without validation a run can still be trained and tested.
    write_folder(tmp_path / "more", dict.fromkeys([*names, *names_of("test", 1)], 2))
    capsys.readouterr()
    assert set(splits_of(tmp_path / "more")) == {"train", "test"}
    assert "leave none for 'val'" in capsys.readouterr().err


def test_runs_of_before_keep_their_splits_by_rank(tmp_path: Path) -> None:
    write_folder(tmp_path / "mine", COUNTS)
    old = {"kind": "folder", "cache_dir": None, "root": str(tmp_path / "mine"), "pictures": to_json(SMALL)}
    source = from_json(Folder, old | {"val_fraction": 0.3, "test_fraction": 0.1})
    ranked = sorted(COUNTS, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    found = source.read()
    names = {split: {found.names[i] for i in members} for split, members in found.splits.items()}
    assert names == {"train": set(ranked[:6]), "val": set(ranked[6:9]), "test": set(ranked[9:])}
    assert from_json(Folder, to_json(source)) == source
    assert to_json(Folder())["split_by"] == "hash"


@pytest.mark.parametrize("val", ["val", "valid", "validation", None])
def test_folder_with_splits_of_its_own(val: str | None, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    for split, counts in {"train": {"a": 2, "b": 3}, "test": {"c": 4}}.items():
        write_folder(root / split, counts)
    if val:
        write_folder(root / val, {"d": 2})
    found = Folder(root=root, pictures=Reading(size=8, colours="grey")).read()
    assert found.images.shape == (11 if val else 9, 8, 8)
    assert found.images[1].tolist() == [[round(10 * 0.587 + 50 * 0.114)] * 8] * 8  # luma of (0, 10, 50)
    names = {split: [found.names[i] for i in m] for split, m in found.splits.items()}
    assert names == {"train": ["a", "b"], **({"val": ["d"]} if val else {}), "test": ["c"]}


def test_folders_of_splits_that_do_not_fit(tmp_path: Path) -> None:
    for split, counts in {"train": {"a": 2, "b": 3}, "test": {"c": 4}, "val": {"a": 1}}.items():
        write_folder(tmp_path / split, counts)
    with pytest.raises(DataError, match="class 'a' is in two splits; splits share no class"):
        Folder(root=tmp_path).read()
    shutil.rmtree(tmp_path / "val")
    for alias in ("valid", "validation"):
        write_folder(tmp_path / alias, {"d": 1})
    with pytest.raises(DataError, match="holds valid/ and validation/, which are the same split"):
        Folder(root=tmp_path).read()
    shutil.rmtree(tmp_path / "valid")
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(DataError, match="test/ is missing"):
        Folder(root=tmp_path).read()


def test_a_class_may_be_called_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Railways: pictures lie in it, so it is no split; not even with a folder inside."""
    root = tmp_path / "mine"
    write_folder(root, dict.fromkeys(["train", *COUNTS], 2))
    assert "train" in kept(root)
    picture(root / "train" / "blurred" / "1.png")
    assert "train" in kept(root)
    assert "pictures in folders inside a class 1 (train/blurred/1.png)" in capsys.readouterr().err
    for path in (root / "train").glob("*.PNG"):
        path.unlink()
    with pytest.raises(DataError, match=r"class 'train' has no pictures \(.*train/blurred/1.png\)"):
        splits_of(root)


# ---- a file of splits -----------------------------------------------------------------------------------------------

TEXTS = {
    "classes.csv": "class,split\nb,train\na,train\nc,test\nd,validation\n",
    "order.csv": "split,class\ntrain,b\ntrain,a\ntest,c\nval,d\n",
    "splits.json": json.dumps({"train": ["b", "a"], "test": ["c"], "valid": ["d"]}),
    "files.csv": "filename,label,split\n"
    + "".join(
        f"{c}/{i:03d}.PNG,{c},{s}\n"
        for c, s in zip("bacd", ("train", "train", "test", "val"), strict=True)
        for i in range(2)
    ),
}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", TEXTS)
def test_a_file_says_the_splits(name: str, mark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mine"
    write_folder(root, dict.fromkeys("abcde", 2))
    (root / name).write_text(mark + TEXTS[name], encoding="utf-8")
    assert splits_of(root, splits=root / name) == {"train": ["a", "b"], "val": ["d"], "test": ["c"]}
    said = capsys.readouterr().err
    assert (f"classes that {name} does not name 1 (e)" in said) == (name != "files.csv")
    assert "beside the classes" not in said
    # Nothing is read again for other splits.
    assert len(list((tmp_path / "cache" / "pictures").iterdir())) == 1


def test_splits_of_exact_sizes_are_written_once_and_stay(tmp_path: Path) -> None:
    root, file = tmp_path / "mine", tmp_path / "splits.csv"
    write_folder(root, dict.fromkeys((f"{letter}, or so" for letter in "abcdefghij"), 1))
    options = ["--root", root, "--pictures.size", 4, "--split-by", "rank", "--val-fraction", 0.3]
    described = imaml("data", "folder", *options, "--write-splits", file)
    assert described.returncode == 0, described.stderr
    before = splits_of(root, splits=file)
    assert {split: len(members) for split, members in before.items()} == {"train": 5, "val": 3, "test": 2}
    write_folder(root, dict.fromkeys("klmno", 1))
    assert splits_of(root, splits=file) == before
    refused = imaml("data", "sinusoid", "--write-splits", tmp_path / "none.csv")
    assert refused.returncode == 1
    assert "sinusoid has no classes to write" in refused.stderr
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "class;split\n", "must begin with the line 'class,split' or .* got 'class;split'"),
        ("a.csv", "class,split\na,train\nb\n", "row 3 must have a value for each of class,split, got 'b'"),
        ("a.csv", "class,split\na,training\n", "row 2: split must be one of train, val, .* got 'training'"),
        ("a.csv", "class,split\na,train\na,test\n", "row 3: class 'a' is in train and in test"),
        ("a.csv", "class,split\na,train\na,train\n", "row 3: class 'a' is twice in train"),
        ("a.csv", "class,split\na,train\n", "must name classes of train and of test, has none of test"),
        ("a.csv", "class,split\na,train\nz,test\n", "names 1 classes that the folder does not hold: z"),
        ("a.csv", "filename,label,split\n../a/0.png,a,train\n", "row 2: filename must be a path below the folder"),
        ("a.json", "[]", r"must be \{\"train\": \[classes\].*, got list"),
        ("a.json", '{"train": ["a"], "dev": ["b"]}', "got 'dev': "),
        ("a.json", '{"train": ["a"], "test": "b"}', "got 'test': \"b\""),
        ("a.json", '{"train": ["a"], "test": ["a"]}', "class 'a' is in train and in test"),
        ("a.json", "{", "cannot be read"),
        ("a.csv", None, r"a\.csv cannot be read \(No such file or directory\)"),
    ],
)
def test_a_file_of_splits_is_read_strictly(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "mine", dict.fromkeys("abc", 2))
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        splits_of(tmp_path / "mine", splits=tmp_path / name)


# ---- what is recorded -----------------------------------------------------------------------------------------------


def test_a_class_that_was_learnt_from_is_not_tested(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    write_folder(root, dict.fromkeys("abcdef", 2))
    (tmp_path / "now.json").write_text(json.dumps({"train": ["a", "b", "f"], "val": ["c"], "test": ["d", "e"]}))
    dataset = load_dataset("folder", root=root, pictures=SMALL, splits=tmp_path / "now.json")

    def check(**classes: list[str]) -> list[str]:
        return RecordedClasses("folder", classes).check(dataset, what="the run x")

    assert check(train=["a", "b"], val=["c"], test=["d"]) == ["f", "e"]
    assert check(train=["a", "gone"], test=["b", "c"], val=["f"]) == ["d", "e"]  # none of these were learnt from
    with pytest.raises(
        DataError, match=r"the run x trained on classes 'd', 'e', which would be in test now; name a file"
    ):
        check(train=["a", "d", "e"])
    with pytest.raises(DataError, match=r"trained on classes 'c', 'd', which would be in val and test now"):
        check(train=["c", "d"])
    with pytest.raises(DataError, match=r"validated with class 'e', which would be in test now"):
        check(train=["a"], val=["e"])
    assert RecordedClasses("omniglot", {"train": ["d"]}).check(dataset, what="other") == []


def config_of(root: Path, splits: Path | None = None, **theta: object) -> TrainConfig:
    """A run of two meta-steps."""
    return TrainConfig(
        data=Folder(root=root, pictures=SMALL, splits=splits),
        tasks=Tasks(ways=2, shots=1, queries=1),
        model=MLP(hidden=(4,)),
        theta=Theta(**theta),
        algorithm=MAML(inner=GradientDescent(steps=1, lr=0.1)),
        outer=Outer(steps=2, meta_batch=2, lr=1e-3),
        evaluation=EvaluationSettings(tasks=4),
        run=RunSettings(device="cpu", tensorboard=False),
    )


def write_splits(path: Path, **classes: str) -> Path:
    path.write_text(json.dumps({split: list(names) for split, names in classes.items()}))
    return path


def test_a_run_and_its_card_keep_the_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, run = tmp_path / "mine", tmp_path / "run"
    write_folder(root, dict.fromkeys("abcdefg", 2))
    before = {"train": ["a", "b", "c"], "val": ["f"], "test": ["d", "e"]}
    splits = write_splits(tmp_path / "splits.json", train="abc", val="f", test="de")
    config = config_of(root, splits)
    train(config, run)
    assert json.loads((run / "classes.json").read_text()) == {"data": "folder", "classes": before}
    export_run(run, tmp_path / "mine.safetensors")
    card = read_weights(tmp_path / "mine.safetensors").card
    assert card.classes == before
    assert not any(str(tmp_path) in str(part) for part in (card.description, card.data))

    # The folder has grown by a class, and the file of splits with it.
    write_splits(splits, train="abc", val="f", test="deg")
    capsys.readouterr()
    assert evaluate_run(run).tasks == 4
    assert train(config, run, resume=True)["steps"] == 2
    assert "1 classes are new since" in capsys.readouterr().err

    # What was trained on is tested now: every way to do so is refused, and names the classes.
    write_splits(splits, train="adf", test="bceg")
    moved = r"trained on classes 'b', 'c', which would be in test now"
    with pytest.raises(DataError, match=rf"the run .*run {moved}"):
        evaluate_run(run)
    with pytest.raises(DataError, match=rf"the run .*run {moved}"):
        train(config, run, resume=True)
    for weights in (tmp_path / "mine.safetensors", run):
        with pytest.raises(DataError, match=rf"theta\.weights .* {moved}"):
            train(config_of(root, splits, weights=str(weights)), tmp_path / "next")
    assert not (tmp_path / "next").exists()
    with pytest.raises(DataError, match=rf"the weights mine {moved}"):
        evaluate_pretrained(tmp_path / "mine.safetensors", {"data.root": root, "data.splits": splits})
    write_splits(splits, train="abcd", test="efg")
    with pytest.raises(DataError, match=r"the run .*run validated with class 'f', which would be in test now"):
        evaluate_run(run)


# ---- what is in a folder beside pictures of classes -----------------------------------------------------------------


def test_what_is_left_out_is_counted_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mine"
    write_folder(root, COUNTS)
    first = next(iter(COUNTS))
    read = [f"{first}/a.webp", f"{first}/b.bmp", f"{first}/c.tif", f"{first}/d.gif"]
    for number, name in enumerate(read):
        picture(root / name, (200, number, 0))
    shutil.copy(root / first / "000.PNG", root / first / "e.jfif")
    for name in (
        f"{first}/notes.txt",
        f"{first}/video.mp4",
        f"{first}/.DS_Store",
        "README.md",
        ".cache/x",
        "stray.png",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("")
    for name in (f"{first}/more/1.png", f"{first}/more/deep/2.png"):
        picture(root / name)
    os.mkfifo(root / first / "pipe.png")  # opening it would wait for ever
    found = Folder(root=root, pictures=SMALL).read()
    assert dict(zip(found.names, found.counts.tolist(), strict=True))[first] == COUNTS[first] + 5
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == 1
    assert "files of other kinds 3 (" in lines[0]
    assert f"pictures in folders inside a class 2 ({first}/more/" in lines[0]
    assert "hidden entries 2 (" in lines[0]
    assert "files beside the classes 2 (README.md, stray.png)" in lines[0]


def test_equal_pictures_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mine"
    write_folder(root, COUNTS)
    train, test = names_of("train", 2), names_of("test", 1)[0]
    shutil.copy(root / train[0] / "000.PNG", root / test / "leak.png")
    Image.open(root / train[0] / "001.PNG").save(root / train[1] / "same.bmp")  # of equal pixels, in another form
    for i in range(3):
        shutil.copy(root / test / "001.PNG", root / test / f"again-{i}.png")
    splits_of(root)
    said = capsys.readouterr().err
    assert "1 picture is in two splits, which must share none, such as " in said
    assert f"{train[0]}/000.PNG" in said
    assert f"{test}/leak.png" in said
    assert f"1 picture is in two classes, such as {train[0]}/001.PNG and {train[1]}/same.bmp" in said
    assert f"3 pictures are in a class more than once, such as {test}/001.PNG and {test}/again-0.png" in said


def test_small_classes_are_left_out_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "mine", COUNTS)
    empty = ["nothing", "void"]
    for name in empty:
        (tmp_path / "mine" / name).mkdir()
    with pytest.raises(
        DataError, match=r"2 classes \(nothing, void\) have no pictures; .* give min_per_class=1 to leave"
    ):
        splits_of(tmp_path / "mine")
    assert kept(tmp_path / "mine", min_per_class=1) == set(COUNTS)
    capsys.readouterr()
    left = kept(tmp_path / "mine", min_per_class=4)
    assert left == {name for name, count in COUNTS.items() if count >= 4}
    assert f"classes of fewer than 4 pictures {2 + len(COUNTS) - len(left)} (" in capsys.readouterr().err
    with pytest.raises(DataError, match="leave none for"):
        splits_of(tmp_path / "mine", min_per_class=7)


# ---- damaged pictures -----------------------------------------------------------------------------------------------


def bad_files(words: random.Random) -> dict[str, bytes]:
    """A file of each of twelve kinds of damage, {what: content}."""
    import io

    noise = np.frombuffer(words.randbytes(32 * 32 * 3), np.uint8).reshape(32, 32, 3)

    def encoded(kind: str) -> bytes:
        content = io.BytesIO()
        Image.fromarray(noise).save(content, kind)
        return content.getvalue()

    png, jpeg, gif, tiff, webp = (encoded(kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP"))
    half = words.randint(40, 200)
    header = bytearray(png)
    header[16:24] = (2**31 - 1).to_bytes(4, "big") * 2  # a picture of 2³¹ × 2³¹ pixels
    flipped = bytearray(png)
    flipped[60:80] = words.randbytes(20)
    return {
        "empty.png": b"",
        "half.png": png[: 40 + half],
        "half.jpg": jpeg[: len(jpeg) // 2 - half],
        "half.gif": gif[: 20 + half % 20],
        "half.tif": tiff[: len(tiff) // 2],
        "half.webp": webp[: len(webp) // 2],
        "signature.png": png[:8],
        "noise.jpg": words.randbytes(half),
        "text.png": b"<html>not found</html>" * 3,
        "huge.png": bytes(header),
        "flipped.png": bytes(flipped),
        "pickle.bmp": b"BM" + words.randbytes(half),
    }


def test_every_damaged_picture_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, words = tmp_path / "mine", random.Random(random.random())
    write_folder(root, COUNTS)
    bad = []
    for number in range(100):
        kinds = bad_files(words)
        kind = list(kinds)[number % len(kinds)]
        path = root / words.choice(list(COUNTS)) / f"bad-{number:03d}-{kind}"
        path.write_bytes(kinds[kind])
        bad.append(path)
    (root / next(iter(COUNTS)) / "link.png").symlink_to(root / "nowhere.png")
    with pytest.raises(DataError, match=r"101 of \d+ pictures cannot be read; .*give skip_damaged=True") as error:
        splits_of(root)
    assert all(str(path) in str(error.value) for path in bad)
    assert len(str(error.value).splitlines()) == 102
    assert not (tmp_path / "cache").exists()
    found = Folder(root=root, pictures=SMALL, skip_damaged=True).read()
    assert dict(zip(found.names, found.counts.tolist(), strict=True)) == COUNTS
    assert "damaged pictures 101 (" in capsys.readouterr().err
    # They are not forgotten where the rest has been packed.
    with pytest.raises(DataError, match="101 of"):
        splits_of(root)
    for path in [*bad, root / next(iter(COUNTS)) / "link.png"]:
        path.unlink()
    assert np.array_equal(Folder(root=root, pictures=SMALL).read().images, found.images)


def test_one_damaged_picture_is_one_sentence(tmp_path: Path) -> None:
    write_folder(tmp_path / "mine", COUNTS)
    victim = tmp_path / "mine" / next(iter(COUNTS)) / "001.jpg"
    Image.effect_noise((64, 64), 50).save(victim)
    victim.write_bytes(victim.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"001\.jpg is damaged or not a picture.*skip_damaged=True") as error:
        splits_of(tmp_path / "mine")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


# ---- names ----------------------------------------------------------------------------------------------------------


def test_names_that_are_long_or_not_utf_8(tmp_path: Path) -> None:
    root = tmp_path / ("long" * 60)
    write_folder(root, COUNTS | {"wide" * 60: 2})
    strange = os.fsencode(root) + b"/caf\xe9 \xff"
    os.mkdir(strange)
    for number in range(2):
        picture(Path(os.fsdecode(strange)) / os.fsdecode(b"b\xe9b\xe9-%d.png" % number), (250, number, 0))
    first = Folder(root=root, pictures=SMALL).read()
    assert r"caf\xe9 \xff" in first.names
    description = summary(load_dataset("folder", root=root, pictures=SMALL))
    description.encode()  # can be printed
    json.dumps(load_dataset("folder", root=root, pictures=SMALL).classes()).encode()
    again = Folder(root=root, pictures=SMALL).read()  # from the cache
    assert np.array_equal(again.images, first.images)
    assert len(list((tmp_path / "cache" / "pictures").iterdir())) == 1
    bad = Path(os.fsdecode(strange)) / os.fsdecode(b"b\xe9d.png")
    bad.write_bytes(b"")
    with pytest.raises(DataError, match="damaged or not a picture"):
        Folder(root=root, pictures=SMALL).read()


def test_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="root must be given: a folder that holds one folder of pictures per class"):
        load_dataset("folder")
    with pytest.raises(DataError, match="is not a folder"):
        load_dataset("folder", root=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="must hold one folder of pictures per class, found none"):
        load_dataset("folder", root=tmp_path / "empty")
    write_folder(tmp_path / "half" / "train", {"a": 1})
    with pytest.raises(DataError, match="test/ is missing"):
        load_dataset("folder", root=tmp_path / "half")

    def unreadable(path: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", unreadable)
        with pytest.raises(DataError, match=r"half cannot be read \(Permission denied\)"):
            load_dataset("folder", root=tmp_path / "half")
    option_prefix.set("--")
    with pytest.raises(ValueError, match="--root must be given"):
        load_dataset("folder")


# ---- archives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz")])
def test_a_folder_in_an_archive(suffix: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "mine", COUNTS)
    path = tmp_path / f"mine.{suffix}"
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        archive.add(tmp_path / "mine", "mine")
    assert splits_of(path) == splits_of(tmp_path / "mine")
    with monkeypatch.context() as patch:  # it is unpacked and read once
        patch.setattr(packing, "_read", None)
        patch.setattr(tarfile.TarFile, "extractall", None)
        assert splits_of(path) == splits_of(tmp_path / "mine")


def test_an_archive_cannot_write_elsewhere(tmp_path: Path) -> None:
    picture(tmp_path / "evil.png")
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "evil.png", "../../../evil-2.png")
    with pytest.raises(DataError, match=r"the archive .*evil\.tar\.gz is damaged, or not one of data"):
        splits_of(tmp_path / "evil.tar.gz")
    assert not list(tmp_path.rglob("evil-2.png"))
    write_folder(tmp_path / "mine", COUNTS)
    for kind in ("gz", "bz2", "xz"):
        path = tmp_path / f"half.tar.{kind}"
        with tarfile.open(path, f"w:{kind}") as archive:  # type: ignore[call-overload]
            archive.add(tmp_path / "mine", "mine")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match=rf"half\.tar\.{kind} (is damaged|is not a folder|could not be unpacked)"):
            splits_of(path)
    assert not list((tmp_path / "cache" / "unpacked").iterdir())
