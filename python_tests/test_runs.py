"""`imaml runs`: the table, the comparison and the picture, against the files that the runs have left."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_tools import assert_one_sentence, files_of, glyphs_config, imaml, small_config

from imaml_ext.errors import RunError
from imaml_ext.settings import changed
from imaml_ext.train import (
    Recipe,
    Stage,
    train,
    train_recipe,
)
from imaml_ext.train.run_directory import RunDirectory, read_metrics

_VALIDATED = {"evaluation.every": 4, "evaluation.validation_tasks": 10}


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with finished runs, one in two stages, and one that an error has stopped."""
    folder = tmp_path_factory.mktemp("work") / "runs"
    train(changed(small_config(), _VALIDATED), folder / "sine", recipe="sine")
    train(small_config(lr=0.5), folder / "deep" / "er" / "fast", recipe="sine")
    train(glyphs_config(), folder / "glyphs", recipe="glyphs")
    stages = Recipe(small_config(steps=2), tuple(Stage(name) for name in "abcdefghij"))
    train_recipe(replace(stages, stages=stages.stages[:2]), folder / "staged", name="staged")
    shutil.copytree(folder / "staged" / "2-b", folder / "staged" / "10-j")

    def fail(row: dict[str, Any]) -> None:
        if row["step"] == 8:
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        train(changed(small_config(), _VALIDATED), folder / "broken off", recipe="sine", on_log=fail)
    return folder


def listed(*arguments: object) -> list[dict[str, Any]]:
    shown = imaml("runs", *arguments, "--json")
    assert shown.returncode == 0, shown.stderr
    return json.loads(shown.stdout)


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def test_the_list_says_what_runs_have_reached(runs: Path) -> None:
    names = ["broken off", "deep/er/fast", "glyphs", "sine", "staged/1-a", "staged/2-b", "staged/10-j"]
    found = {each["path"].removeprefix(f"{runs}/"): each for each in listed(runs)}
    assert list(found) == names  # in the order of their names and numbers
    assert [each["recipe"] for each in found.values()] == ["sine", "sine", "glyphs", "sine", *["staged"] * 3]
    assert [each["state"] for each in found.values()] == ["stopped", *["finished"] * 6]
    assert [(each["step"], each["steps"]) for each in found.values()] == [
        (8, 12),
        (12, 12),
        (6, 6),
        (12, 12),
        *[(2, 2)] * 3,
    ]
    for name in names[1:]:
        result, quantity = result_of(runs / name), "accuracy" if name == "glyphs" else "loss"
        step = result["best"]["step"] if name == "glyphs" else result["steps"]
        figures = {"value": result["test"][quantity], "interval": result["test"][f"{quantity}_interval"]}
        assert found[name]["test"] == {"quantity": quantity, "step": step, **figures}
        assert found[name]["seconds"] == result["train_seconds"]
    assert found["broken off"]["test"] is None
    assert found["deep/er/fast"]["validation"] is None

    last = [row for row in read_metrics(runs / "sine" / "metrics.jsonl") if "val_loss" in row][-1]
    of_last = {"value": last["val_loss"], "interval": last["val_loss_interval"], "step": 12, "quantity": "loss"}
    assert found["sine"]["validation"] == of_last
    best = result_of(runs / "glyphs")["best"]
    assert found["glyphs"]["validation"]["value"] == best["val_accuracy"]
    assert found["glyphs"]["validation"]["step"] == best["step"]


def test_the_table_has_a_line_per_run(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    shown = imaml("runs")  # those below runs/
    assert shown.returncode == 0, shown.stderr
    head, *lines = shown.stdout.splitlines()
    assert head.split() == ["run", "recipe", "state", "step", "validation", "test", "time"]
    assert len(lines) == 7
    test = result_of(runs / "glyphs")["test"]
    words = f"{100 * test['accuracy']:.2f} ± {100 * test['accuracy_interval']:.2f} %"
    assert all(word in lines[2] for word in ("runs/glyphs ", "finished", "6/6", words))
    loss = result_of(runs / "sine")["test"]["loss"]
    assert f"MSE {loss:.4f} ± " in lines[3]
    some = imaml("runs", "runs/sine", "runs/deep", "runs/deep/er")  # one of them twice
    assert len(some.stdout.splitlines()) == 3


def test_a_run_that_is_being_trained(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "sine", tmp_path / "sine")
    with RunDirectory(tmp_path / "sine").opened():
        assert [each["state"] for each in listed(tmp_path)] == ["running"]
        with (tmp_path / "sine" / "metrics.jsonl").open("a") as log:
            log.write('{"step": 13, "query')  # half a line, as it may be read while it is written
        assert listed(tmp_path)[0]["step"] == 12
        with pytest.raises(RunError, match="another process is training"), RunDirectory(tmp_path / "sine").opened():
            pass
    assert [each["state"] for each in listed(tmp_path)] == ["finished"]
    with RunDirectory(tmp_path / "sine").opened():  # to have looked at it holds nothing
        pass


def test_what_cannot_be_read_is_named_and_the_rest_is_listed(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "sine", tmp_path / "sine")
    damage = {
        "config.json": ('{"recipe": ', "cannot be read"),
        "metrics.jsonl": ("no metrics\n", "line 1 is not a metrics line"),
        "result.json": ("{}", "lacks "),
    }
    for file, (text, _) in damage.items():
        shutil.copytree(runs / "sine", tmp_path / f"of {file}")
        (tmp_path / f"of {file}" / file).write_text(text)
    result = result_of(runs / "sine") | {"test": {}}
    shutil.copytree(runs / "sine", tmp_path / "untested")
    (tmp_path / "untested" / "result.json").write_text(json.dumps(result))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')  # hides nothing that is below it
    before = files_of(tmp_path)
    shown = imaml("runs", tmp_path)
    assert shown.returncode == 0
    assert len(shown.stdout.splitlines()) == 2
    for file, (_, words) in damage.items():
        assert [line for line in shown.stderr.splitlines() if file in line and words in line], shown.stderr
    assert "cannot be read: it has no 'recipe', as that of a run has" in shown.stderr
    assert "untested is damaged: its figures cannot be read" in shown.stderr
    states = [each["state"] for each in listed(tmp_path)]
    assert sorted(states) == ["finished", *["unreadable"] * 5]
    assert files_of(tmp_path) == before
    assert_one_sentence(imaml("runs", tmp_path / "none"), "folders must exist, got", "none")
    (tmp_path / "empty").mkdir()
    empty = imaml("runs", tmp_path / "empty")
    assert (empty.returncode, empty.stdout) == (0, "")
    assert "there are no runs below" in empty.stderr
    assert listed(tmp_path / "empty") == []


def test_before_the_first_run_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = imaml("runs")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "there are no runs below runs\n")


def test_a_folder_that_may_not_be_read(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.scandir

    def guarded(path: str) -> Any:  # root may read everything
        if str(path).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", guarded)
    shown = imaml("runs", runs)
    assert shown.returncode == 0
    assert f"not listed: {runs / 'deep'} cannot be read: Permission denied" in shown.stderr
    assert len(shown.stdout.splitlines()) == 7  # the head and the six others


def test_a_comparison_shows_what_differs(runs: Path, tmp_path: Path) -> None:
    pair = (runs / "sine", runs / "deep" / "er" / "fast")
    compared = listed("compare", *pair)
    expected = [
        {"outer.lr": 0.01, **_VALIDATED},
        {"outer.lr": 0.5, "evaluation.every": 0, "evaluation.validation_tasks": 100},
    ]
    assert [each.pop("settings") for each in compared] == expected
    assert compared == listed(*pair)
    shown = imaml("runs", "compare", *pair)
    lines = {line.split()[0]: line.split()[1:] for line in shown.stdout.splitlines()[1:]}
    assert lines["outer.lr"] == ["0.01", "0.5"]
    assert lines["step"] == ["12/12", "12/12"]
    assert "outer.steps" not in lines
    kinds = listed("compare", runs / "staged", runs / "glyphs")  # of a recipe of stages the last
    assert [each["path"] for each in kinds] == [str(runs / "staged" / "10-j"), str(runs / "glyphs")]
    assert [each["settings"]["data"] for each in kinds] == ["sinusoid", "glyphs"]
    assert "model.filters" in kinds[1]["settings"].keys() - kinds[0]["settings"].keys()
    shutil.copytree(runs / "glyphs", tmp_path / "moved")
    recorded = json.loads((tmp_path / "moved" / "config.json").read_text())
    recorded["config"]["data"]["cache_dir"] = "/scratch/cache"
    (tmp_path / "moved" / "config.json").write_text(json.dumps(recorded))
    moved = listed("compare", runs / "glyphs", tmp_path / "moved")
    assert [each["settings"] for each in moved] == [{"data.cache_dir": None}, {"data.cache_dir": "/scratch/cache"}]
    assert_one_sentence(imaml("runs", "compare", runs / "sine"), "runs must be two or more directories", "got 1")
    assert_one_sentence(imaml("runs", "compare", runs / "sine", runs / "none"), "none holds no run")


def test_a_picture_of_several_runs(runs: Path, tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    drawn = imaml("runs", "plot", runs / "sine", runs / "broken off", runs / "glyphs", "--output", picture)
    assert drawn.returncode == 0, drawn.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    two = imaml("runs", "plot", runs / "sine", runs / "staged", "--output", tmp_path / "two.png")
    assert two.returncode == 0, two.stderr
    assert (tmp_path / "two.png").read_bytes() != picture.read_bytes()
    assert_one_sentence(imaml("runs", "plot", runs / "sine", "--output", "x.pdf"), "NAME.png, got x.pdf")
    assert_one_sentence(imaml("runs", "plot"), "one or more directories")
    shutil.copytree(runs / "sine", tmp_path / "sine")
    (tmp_path / "sine" / "metrics.jsonl").unlink()
    assert_one_sentence(imaml("runs", "plot", tmp_path / "sine"), "nothing is logged yet in")
