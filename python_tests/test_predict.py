"""`imaml predict`: folders of examples by class in, names and probabilities out."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_tools import assert_one_sentence, imaml, small_config

from imaml_ext.data import Folder, load_dataset, omniglot_split
from imaml_ext.models import Conv4
from imaml_ext.pictures import Reading
from imaml_ext.pretrained import learn_pictures, load_adapted, load_pretrained, read_images, read_weights
from imaml_ext.train import Tasks, export_run, train

NAMES = ("ant", "bee", "cat", "dog")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans of four symbols: `examples/` with one to three of each, `new/` with five others, all called 0.png, …"""
    folder = tmp_path_factory.mktemp("drawn")
    images = load_dataset("glyphs").images("test")
    chosen = np.random.default_rng(torch.randint(1 << 30, ()).item()).choice(images.num_classes, 4, replace=False)
    for number, (name, glyph) in enumerate(zip(NAMES, chosen, strict=True)):
        each = images.gather(np.full(8, glyph), np.arange(8))[:, 0]  # [8, 28, 28], ink 1
        few = 1 + number % 3
        for drawing, pixels in enumerate(each):
            place = folder / ("examples" if drawing < few else "new") / name
            place.mkdir(parents=True, exist_ok=True)
            if drawing < few + 5:
                grey = Image.fromarray((235 - 200 * pixels).to(torch.uint8).numpy())
                path = place / f"{drawing if drawing < few else drawing - few}.png"
                grey.resize((112, 112), Image.Resampling.BICUBIC).save(path)
    return folder


def answers(*arguments: object) -> dict:
    """What `imaml predict … --json` says; nothing else is on stdout."""
    done = imaml("predict", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_new_pictures_are_named(drawn: Path) -> None:
    done = imaml("predict", drawn / "examples", drawn / "new")
    assert done.returncode == 0, done.stderr
    head, *lines, blank, last = done.stdout.splitlines()
    assert head.split() == ["picture", "class", "probability", "second"]
    assert (len(lines), blank) == (20, "")
    found = answers(drawn / "examples", drawn / "new")
    assert found["classes"] == list(NAMES)
    assert found["weights"] == "omniglot-5w1s-newton"
    assert [row["file"] for row in found["pictures"]] == sorted(str(path) for path in (drawn / "new").rglob("*.png"))
    right = 0
    for line, row in zip(lines, found["pictures"], strict=True):
        probabilities = row["probabilities"]
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        best, second = sorted(probabilities, key=probabilities.get, reverse=True)[:2]
        assert line.split()[:4] == [row["file"], best, f"{100 * probabilities[best]:.1f}", "%"]
        assert line.split()[4] == second
        assert row["class"] == best
        assert row["expected"] == Path(row["file"]).parent.name
        right += best == row["expected"]
    assert last == f"accuracy {5 * right:.1f} % of 20 pictures"
    assert found["accuracy"] == right / 20
    assert right >= 11  # by chance 5; of 120 draws of four symbols, some of which look alike, the least was 14


def test_the_answer_for_a_picture_does_not_depend_on_the_others(drawn: Path) -> None:
    every = {row["file"]: row for row in answers(drawn / "examples", drawn / "new")["pictures"]}
    some = sorted(every)[3:9:5]
    few = answers(drawn / "examples", *reversed(some))
    assert "accuracy" not in few
    assert [row["file"] for row in few["pictures"]] == list(reversed(some))
    for row in few["pictures"]:
        assert row["probabilities"] == every[row["file"]]["probabilities"]
    together = answers(drawn / "examples", drawn / "new", "--transductive")["pictures"]
    assert all(row["probabilities"] != every[row["file"]]["probabilities"] for row in together)


def test_it_is_what_the_library_computes(drawn: Path) -> None:
    classes = {name: sorted((drawn / "examples" / name).glob("*.png")) for name in NAMES}
    learner = load_pretrained("omniglot-5w1s", ways=4)
    x = read_images([path for paths in classes.values() for path in paths], learner.reading)
    y = torch.tensor([label for label, paths in enumerate(classes.values()) for _ in paths])
    new = sorted((drawn / "new").rglob("*.png"))
    expected = learner.adapt(x, y).predict(read_images(new, learner.reading))
    learnt = learn_pictures(read_weights("omniglot-5w1s"), classes)
    assert torch.equal(learnt.predict(learnt.read(new)), expected)
    found = answers(drawn / "examples", drawn / "new", "--weights", "omniglot-5w1s")["pictures"]
    assert torch.equal(torch.tensor([[row["probabilities"][name] for name in NAMES] for row in found]), expected)


def test_a_learner_is_saved_and_asked_later(drawn: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    options = ["--pictures.margin", 0.2, "--weights", "omniglot-5w1s"]
    only = imaml("predict", drawn / "examples", "--save", file, *options)
    assert (only.returncode, only.stdout) == (0, ""), only.stderr
    at_once = answers(drawn / "examples", drawn / "new", *options)
    moved = shutil.copytree(drawn / "new", tmp_path / "new")
    later = answers(file, moved)
    for before, after in zip(at_once["pictures"], later["pictures"], strict=True):
        assert before["probabilities"] == after["probabilities"]
    assert later["accuracy"] == at_once["accuracy"]
    assert load_adapted(file).reading.margin == 0.2
    assert str(drawn).encode() not in file.read_bytes()
    for option in (["--weights", "omniglot-5w1s"], ["--pictures.margin", 0.3]):
        assert_one_sentence(imaml("predict", file, moved, *option), "reads pictures as it read its examples")


def test_the_answers_are_written(drawn: Path, tmp_path: Path) -> None:
    found = answers(drawn / "examples", drawn / "new", "--output", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == found
    assert imaml("predict", drawn / "examples", drawn / "new", "--output", tmp_path / "a.csv").returncode == 0
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, answer in zip(rows, found["pictures"], strict=True):
        assert (row["file"], row["class"], row["expected"]) == (answer["file"], answer["class"], answer["expected"])
        assert float(row["probability"]) == answer["probabilities"][row["class"]]
        assert float(row["second_probability"]) == answer["probabilities"][row["second"]]


def test_the_others_are_named_where_pictures_cannot_be_read(drawn: Path, tmp_path: Path) -> None:
    new, answered = shutil.copytree(drawn / "new", tmp_path / "new"), tmp_path / "a.json"
    expected = answers(drawn / "examples", new)
    assert expected["unreadable"] == {}
    blank, damaged, absent = new / "ant" / "blank.png", new / "cat" / "damaged.png", tmp_path / "absent.png"
    Image.new("L", (112, 112), 235).save(blank)
    damaged.write_bytes((new / "cat" / "0.png").read_bytes()[:60])
    done = imaml("predict", drawn / "examples", new, absent, "--json", "--output", answered)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert json.loads(answered.read_text()) == found
    assert list(found["unreadable"]) == [str(blank), str(damaged), str(absent)]
    assert found | {"unreadable": {}} == expected
    head, *lines = done.stderr.splitlines()
    assert head == "imaml: 3 of 23 pictures cannot be read:"
    assert [line.strip() for line in lines] == list(found["unreadable"].values())
    assert all(str(path) in line for path, line in zip((blank, damaged, absent), lines, strict=True))
    assert_one_sentence(imaml("predict", drawn / "examples", blank, "--output", tmp_path / "b.csv"), "is blank")
    assert not (tmp_path / "b.csv").exists()


def test_what_is_left_out_of_the_new_pictures_is_said(drawn: Path, tmp_path: Path) -> None:
    new = shutil.copytree(drawn / "new" / "ant", tmp_path / "new" / "ant").parent
    (new / "ant" / "phone.heic").write_bytes(b"a format that is not read")
    shutil.copytree(new / "ant", new / ".thumbnails")
    done = imaml("predict", drawn / "examples", new)
    assert done.returncode == 0
    assert f"left out of {new}: hidden entries 1 (.thumbnails), files of other kinds 1 (ant/phone.heic)" in done.stderr
    assert "5 pictures" in done.stdout
    for picture in new.rglob("*.png"):
        picture.unlink()
    assert_one_sentence(imaml("predict", drawn / "examples", new), "holds no pictures", "phone.heic")


@pytest.mark.parametrize("ways", [2, 7])
def test_another_number_of_classes_than_in_training(ways: int, drawn: Path, tmp_path: Path) -> None:
    pictures = sorted((drawn / "new").rglob("*.png"))
    for number in range(ways):
        (tmp_path / f"class{number}").mkdir()
        shutil.copy(pictures[2 * number], tmp_path / f"class{number}")
    found = answers(tmp_path, tmp_path)
    assert len(found["classes"]) == ways
    assert all(len(row["probabilities"]) == ways for row in found["pictures"])
    assert found["accuracy"] > 0.5  # these are the examples themselves, two of most symbols


def test_weights_of_a_run_and_how_they_read_pictures(drawn: Path, tmp_path: Path) -> None:
    """A run, and the file that is exported from it, read new pictures as the run has read those it was trained on."""
    reading = Reading(size=20, colours="grey", square="pad")
    data = Folder(
        root=drawn / "new", cache_dir=tmp_path, pictures=reading, val_fraction=0.0, test_fraction=0.5, split_by="rank"
    )
    changes = {"data": data, "tasks": Tasks(ways=2, shots=1, queries=2), "model": Conv4(filters=3)}
    train(replace(small_config(steps=2), **changes), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "mine.safetensors")
    of_run = answers(drawn / "examples", drawn / "new", "--weights", tmp_path / "run")
    assert of_run["weights"] == "run"
    of_file = answers(drawn / "examples", drawn / "new", "--weights", tmp_path / "mine.safetensors")
    assert of_run["pictures"] == of_file["pictures"]
    classes = {name: sorted((drawn / "examples" / name).glob("*.png")) for name in NAMES}
    learnt = learn_pictures(read_weights(tmp_path / "mine.safetensors"), classes)
    assert learnt.reading == reading
    new = sorted((drawn / "new").rglob("*.png"))
    pixels = [np.asarray(Image.open(path).resize((20, 20), Image.Resampling.LANCZOS)) for path in new]
    expected = learnt.predict(torch.from_numpy(np.stack(pixels)).unsqueeze(1))
    given = [[row["probabilities"][name] for name in NAMES] for row in of_file["pictures"]]
    torch.testing.assert_close(torch.tensor(given), expected)


def test_what_is_wrong_is_said(drawn: Path, tmp_path: Path) -> None:
    examples, new = drawn / "examples", drawn / "new"

    def refused(*arguments: object, words: str) -> None:
        assert_one_sentence(imaml("predict", *arguments), words)

    shutil.copytree(examples / "ant", tmp_path / "one" / "ant")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "one", new, words="at least two classes of pictures are needed, got ant")
    refused(tmp_path / "none", new, words="one folder of pictures per class")
    refused(tmp_path / "absent", new, words="must be a folder of folders of pictures")
    refused(tmp_path / "absent.safetensors", new, words="cannot be read")
    refused(examples, words="name pictures to tell apart")
    refused(examples, tmp_path / "none", words="holds no pictures")
    refused(examples, tmp_path / "absent.png", words="does not exist")
    refused(examples, new, "--output", "a.txt", words="NAME.csv or NAME.json")
    refused(examples, new, "--weights", "nothing", words="no pretrained weights are called 'nothing'")
    refused(examples, new, "--pictures.size", 20, words="take pictures of 1 × 28 × 28 numbers")
    refused(examples, new, "--save", tmp_path / "a.pt", words="NAME.safetensors")
    published = Path(__file__).parents[1] / "imaml_ext" / "pretrained" / "weights" / "omniglot-5w1s.safetensors"
    refused(published, new, words="is no adapted learner")
    assert imaml("predict").returncode == 2


@pytest.mark.long
@pytest.mark.skipif(not os.environ.get("IMAML_DATA_ROOT"), reason="IMAML_DATA_ROOT names the folder of the real data")
def test_photographs_of_hand_drawn_symbols(tmp_path: Path) -> None:
    """Twenty photographs in four folders are learnt from, and as many by other drawers named."""
    import drawn_photographs as photographs  # needs the real data

    rng = np.random.default_rng(torch.randint(1 << 30, ()).item())
    conditions = ["clean", "shading", "squared paper", "coloured paper and ink"]
    rights = []
    for trial in range(3):  # one trial alone may have two symbols that look alike
        symbols = rng.choice(omniglot_split()["test"], 4, replace=False)
        folder = tmp_path / str(trial)
        written = photographs.save_photographs(folder / "new", symbols, conditions, rng, each=10)
        for name, paths in written.items():
            (folder / "examples" / name).mkdir(parents=True)
            for path in paths[:5]:
                path.rename(folder / "examples" / name / path.name)
        rights.append(answers(folder / "examples", folder / "new")["accuracy"])
    assert np.mean(rights) >= 0.75  # 0.95 or 1 in nine trials; by chance 0.25
