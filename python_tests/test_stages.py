"""Recipes: files, stages that build on each other, and what a run can begin with."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_tools import files_of, glyphs_config, packed_omniglot, small_config, stopped_in

from imaml_ext.data import Glyphs, Omniglot
from imaml_ext.data.cache import save_arrays
from imaml_ext.errors import ConfigError, Interrupted, RunError
from imaml_ext.inner import GradientDescent
from imaml_ext.meta import IMAML, MAML
from imaml_ext.models import Conv4
from imaml_ext.pretrained import read_weights
from imaml_ext.settings import changed
from imaml_ext.train import (
    EvaluationSettings,
    Outer,
    Recipe,
    RunSettings,
    Stage,
    Tasks,
    Theta,
    TrainConfig,
    build,
    evaluate_pretrained,
    evaluate_run,
    export_run,
    load_recipe,
    recipe_names,
    train,
    train_recipe,
)
from imaml_ext.train.checkpoint import list_checkpoints, load_checkpoint
from imaml_ext.train.recipe import recipe_summaries
from imaml_ext.train.run_directory import RunDirectory, read_config
from imaml_ext.train.stages import take_finished_stages


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _final(path: Path) -> Any:
    return load_checkpoint(list_checkpoints(path / "checkpoints")[-1])


def _recipe() -> Recipe:
    """Five ways, then seven by a shared head, then learnt lambdas as well; features are scaled at the beginning."""
    config = TrainConfig(
        data=Glyphs(),
        tasks=Tasks(ways=5, shots=1, queries=2),
        model=Conv4(filters=4),
        theta=Theta(shared_head=True, feature_scale=2.0),
        algorithm=IMAML(lam=0.5, inner=GradientDescent(steps=2), curvature="gauss_newton"),
        outer=Outer(steps=4, meta_batch=2, lr=1e-2, average=0.9),
        evaluation=EvaluationSettings(tasks=6),
        run=RunSettings(device="cpu", threads=1, log_every=2, checkpoint_every=2, tensorboard=False),
    )
    learn = {"algorithm.learn": {"lam": "tensor"}, "run.seed": 2}
    return Recipe(config, (Stage("few"), Stage("many", {"tasks.ways": 7, "run.seed": 1}), Stage("learnt", learn)))


def test_each_stage_begins_where_the_one_before_has_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train_recipe(_recipe(), tmp_path / "run", name="mine", command="imaml train mine")
    assert [path.name for path in sorted((tmp_path / "run").iterdir())] == ["1-few", "2-many", "3-learnt"]
    assert result == json.loads((tmp_path / "run" / "3-learnt" / "result.json").read_text())
    told = capsys.readouterr().err
    for number, name in enumerate(("few", "many", "learnt"), start=1):
        assert f"stage {number} of 3 ({name}), in {tmp_path / 'run'}" in told
        assert f"training, stage {number} of 3 ({name}) 4/4" in told

    first, second, third = (tmp_path / "run" / name for name in ("1-few", "2-many", "3-learnt"))
    configs = [read_config(RunDirectory(path)).config for path in (first, second, third)]
    assert [config.tasks.ways for config in configs] == [5, 7, 7]
    assert [config.theta.feature_scale for config in configs] == [2.0, 1.0, 1.0]
    assert {read_config(RunDirectory(path)).recipe for path in (first, second, third)} == {"mine"}

    before, experiment = build(configs[0]), build(configs[1])
    old, new = before.model.layout, experiment.model.layout
    ended = old.views(_final(first).averages["theta"])  # which was tested
    begun = new.views(experiment.initial_params()["theta"])
    for name in ended:
        expected = ended[name] if "linear" not in name else ended[name].mean(-1, keepdim=True).expand_as(begun[name])
        torch.testing.assert_close(begun[name], expected, rtol=1e-6, atol=1e-7)
    begun, ended = build(configs[2]).initial_params(), _final(second).averages
    torch.testing.assert_close(begun["theta"], ended["theta"], rtol=1e-6, atol=1e-7)
    assert torch.equal(begun["log_lam"], torch.full_like(begun["log_lam"], math.log(0.5)))
    assert list(_final(third).params) == ["theta", "log_lam"]
    assert evaluate_run(tmp_path / "run").to_json() == result["test"]  # the last stage

    card = export_run(tmp_path / "run", tmp_path / "mine.safetensors").card
    assert card.trained_from is None
    assert read_weights(tmp_path / "mine.safetensors").card == card
    page = (tmp_path / "mine.md").read_text()
    assert "| trained | in 3 stages, 0 minutes |" in page
    assert "| stage 2-many | 7-way 1-shot, 4 meta-steps of 2 tasks, 0 minutes |" in page
    assert "| last stage | 4 meta-steps of 2 tasks, 0 minutes |" in page


def test_what_is_learnt_beside_theta_goes_on(tmp_path: Path) -> None:
    config = changed(small_config(steps=3, learnt_lr=0.1), {"algorithm.learn": {"lam": "tensor"}})
    train(config, tmp_path / "run")
    on = changed(config, {"theta.weights": str(tmp_path / "run")})
    begun, ended = build(on).initial_params(), _final(tmp_path / "run").params
    assert torch.equal(begun["theta"], ended["theta"])
    assert torch.equal(begun["log_lam"], ended["log_lam"])
    anew = build(changed(on, {"algorithm.learn": {"lam": "global"}})).initial_params()
    assert torch.equal(anew["log_lam"], torch.zeros(1))  # of algorithm.lam, 1: the run has learnt other groups
    export_run(tmp_path / "run", tmp_path / "mine.safetensors")
    exported = build(changed(on, {"theta.weights": str(tmp_path / "mine.safetensors")})).initial_params()
    assert torch.equal(exported["log_lam"], ended["log_lam"])
    assert torch.equal(exported["theta"], ended["theta"])


@pytest.mark.parametrize("calls", [3, 6, 11])  # in the first stage, the second, the third
def test_stages_are_resumed_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    recipe, changes = _recipe(), {"outer.lr": 2e-2}
    straight = train_recipe(recipe, tmp_path / "straight", changes=changes)
    with stopped_in(monkeypatch, calls) as begun:
        with pytest.raises(Interrupted):
            train_recipe(recipe, tmp_path / "stopped", changes=changes)
        with pytest.raises(RunError, match="is not empty: continue its run with --resume"):
            train_recipe(recipe, tmp_path / "stopped", changes=changes)
        complete = [path for path in (tmp_path / "stopped").iterdir() if (path / "result.json").exists()]
        finished = {path: files_of(path) for path in complete}
        shutil.move(tmp_path / "stopped", tmp_path / "moved")
        stopped = train_recipe(recipe, tmp_path / "moved", resume=True)  # with the changes that it was begun with
    assert len(begun) == 12
    assert stopped["test"] == straight["test"]
    for name in ("1-few", "2-many", "3-learnt"):
        ends = [_final(tmp_path / folder / name) for folder in ("straight", "moved")]
        assert all(torch.equal(value, ends[1].params[key]) for key, value in ends[0].params.items())
    for path, files in finished.items():
        assert files_of(tmp_path / "moved" / path.name) == files
    assert read_config(RunDirectory(tmp_path / "moved" / "3-learnt")).config.outer.lr == 2e-2
    with pytest.raises(ConfigError, match=r"a resumed run keeps its settings: outer.lr was 0.02 in .*1-few, now 0.5"):
        train_recipe(recipe, tmp_path / "moved", changes={"outer.lr": 0.5}, resume=True)


def test_stages_that_recipes_share_are_trained_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, changes, cells = _recipe(), {"outer.lr": 2e-2}, tmp_path / "cells"
    train_recipe(recipe, cells / "whole", changes=changes)
    train_recipe(replace(recipe, stages=recipe.stages[:1]), cells / "one", changes=changes)
    train_recipe(recipe, cells / "other-seed", changes=changes | {"run.seed": 7})
    shutil.copytree(cells / "whole", cells / "unfinished")
    (cells / "unfinished" / "1-few" / "result.json").unlink()
    shutil.copytree(cells / "whole", cells / "damaged")
    (cells / "damaged" / "1-few" / "config.json").write_text("{")
    (cells / "empty").mkdir()
    ending = replace(recipe, stages=(*recipe.stages[:2], Stage("shots", {"tasks.shots": 2})))
    before = {path: files_of(path) for path in cells.iterdir()}

    def shared(recipe: Recipe, name: str, changes: dict[str, Any]) -> list[str]:
        take_finished_stages(recipe, tmp_path / name, changes, others=sorted(cells.iterdir()))
        return sorted(path.name for path in (tmp_path / name).glob("*"))

    assert shared(ending, "shots", changes) == ["1-few", "2-many"]
    assert f"shots begins with 2 of 3 stages of {cells / 'whole'}" in capsys.readouterr().err
    assert shared(ending, "another-lr", {"outer.lr": 3e-2}) == []
    assert shared(ending, "judged-otherwise", changes | {"evaluation.tasks": 7}) == []
    assert shared(ending, "elsewhere", changes | {"run.log_every": 1}) == ["1-few", "2-many"]
    changed_second = replace(ending, stages=(ending.stages[0], Stage("many", {"tasks.ways": 6}), ending.stages[2]))
    assert shared(changed_second, "six-ways", changes) == ["1-few"]
    assert shared(Recipe(small_config()), "no-stages", changes) == []
    (tmp_path / "begun").mkdir()
    assert shared(ending, "begun", changes) == []
    assert not list(tmp_path.glob(".*"))

    taken = train_recipe(ending, tmp_path / "shots", changes=changes, resume=True)
    alone = train_recipe(ending, tmp_path / "alone", changes=changes)
    assert taken["test"] == alone["test"]
    assert {path: files_of(path) for path in cells.iterdir()} == before


def test_stages_are_shared_whichever_way_their_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        folder.mkdir()
        save_arrays(folder / "omniglot28.npz", packed_omniglot())
    short = {"outer.steps": 1, "evaluation": EvaluationSettings(tasks=4)}
    config = changed(glyphs_config(), {"data": Omniglot(cache_dir=tmp_path / "cache")} | short)
    recipe, given = Recipe(config, (Stage("first"), Stage("second"))), {"data.root": folders[0]}

    def shared(name: str, changes: dict[str, Any]) -> int:
        place = Path(tempfile.mkdtemp(dir=tmp_path)) / "taken"
        take_finished_stages(recipe, place, changes, others=[tmp_path / name])
        return len(list(place.glob("*")))

    train_recipe(recipe, tmp_path / "by-option", changes=given)
    monkeypatch.setenv("IMAML_DATA_ROOT", str(folders[0]))
    train_recipe(recipe, tmp_path / "by-variable")
    assert [shared("by-option", {}), shared("by-variable", given), shared("by-variable", {})] == [2, 2, 2]
    monkeypatch.setenv("IMAML_DATA_ROOT", str(folders[1]))
    assert [shared("by-option", {}), shared("by-variable", given), shared("by-option", given)] == [0, 0, 2]


def test_a_stage_that_has_not_begun_is_begun(tmp_path: Path) -> None:
    recipe = _recipe()
    (tmp_path / "run" / "1-few" / "checkpoints").mkdir(parents=True)  # killed before config.json was there
    (tmp_path / "run" / "1-few" / "lock").touch()
    train_recipe(replace(recipe, stages=recipe.stages[:1]), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "1-few" / "result.json").exists()


def test_a_recipe_without_stages_is_one_run(tmp_path: Path) -> None:
    train_recipe(Recipe(small_config()), tmp_path / "recipe", changes={"outer.steps": 5})
    train(small_config(steps=5), tmp_path / "run")
    assert torch.equal(_final(tmp_path / "recipe").params["theta"], _final(tmp_path / "run").params["theta"])
    with pytest.raises(RunError, match=r"holds a run, and not the stages of a recipe"):
        train_recipe(_recipe(), tmp_path / "run", resume=True)


def test_changes_of_every_stage_and_of_the_first() -> None:
    recipe = _recipe()
    changes = {"algorithm.inner.steps": 9, "theta.weights": "omniglot-5w1s", "theta.feature_scale": 3.0}
    configs = recipe.staged(changes)
    assert [config.algorithm.inner.steps for config in configs] == [9, 9, 9]
    assert [config.theta.weights for config in configs] == ["omniglot-5w1s", None, None]
    assert [config.theta.feature_scale for config in configs] == [3.0, 1.0, 1.0]
    bad = replace(recipe, stages=(Stage("few"), Stage("odd", {"algorithm": MAML(), "algorithm.damping": 1.0})))
    with pytest.raises(ConfigError, match=r"stage odd: there is no setting algorithm\.damping"):
        bad.staged({})


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    train(small_config(steps=2), tmp_path / "run")
    other = changed(small_config(), {"model.hidden": (9,), "theta.weights": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"theta.weights must have the parameters of the model, .*\[1, 9\].* got"):
        train(other, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(RunError, match="is not finished: export it, and give the file"):
        train(changed(small_config(), {"theta.weights": str(tmp_path / "run")}), tmp_path / "other")


def test_an_exported_run_is_judged_as_the_run_was(tmp_path: Path) -> None:
    config = changed(_recipe().config, {"evaluation.inner_steps": 4, "evaluation.seed": 3})
    result = train(config, tmp_path / "run", recipe="mine", command="imaml train mine")
    weights = export_run(tmp_path / "run", tmp_path / "mine.safetensors", commit="abc")
    assert (weights.card.recipe, weights.card.commit, weights.card.steps) == ("mine", "abc", 4)
    assert weights.algorithm.inner.steps == 4
    assert weights.shared_head
    here = {"run.device": "cpu"}
    assert evaluate_pretrained(tmp_path / "mine.safetensors", here).to_json() == result["test"]
    seven = evaluate_pretrained(tmp_path / "mine.safetensors", {**here, "tasks.ways": 7, "evaluation.tasks": 4})
    assert seven.tasks == 4
    assert seven.accuracy is not None
    with pytest.raises(RunError, match=r"output must be a file NAME.safetensors"):
        export_run(tmp_path / "run", tmp_path / "mine.pt")


class TestRecipeFiles:
    def test_those_of_the_package(self) -> None:
        summaries = recipe_summaries()
        assert list(summaries) == recipe_names()
        assert summaries["glyphs-5w1s"].startswith("5-way 1-shot on the built-in glyphs")
        recipe = load_recipe("glyphs-5w1s")
        assert recipe.config.data == Glyphs()
        assert "Command: imaml train glyphs-5w1s" in recipe.description

    def test_of_another_folder_and_by_path(self, tmp_path: Path) -> None:
        text = '"""Mine."""\nfrom imaml_ext.recipes import glyphs_5w1s\nrecipe = glyphs_5w1s.recipe\n'
        (tmp_path / "my_own.py").write_text(text)
        (tmp_path / "empty.py").write_text("")
        (tmp_path / "_helper.py").write_text("")
        assert recipe_summaries([tmp_path]) == {"empty": "", "my-own": "Mine."}
        for recipe in (load_recipe("my-own", [tmp_path]), load_recipe(tmp_path / "my_own.py")):
            assert recipe.config == load_recipe("glyphs-5w1s").config
            assert recipe.description == "Mine."
        with pytest.raises(ConfigError, match=r"empty.py must have a variable `recipe`"):
            load_recipe("empty", [tmp_path])
        with pytest.raises(ConfigError, match=r"there is no recipe 'other'; there are: empty, my-own, or a file"):
            load_recipe("other", [tmp_path])
        with pytest.raises(ConfigError, match=r"there is no recipe '.*none.py'"):
            load_recipe(tmp_path / "none.py")

    def test_of_a_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = tmp_path / "runs" / "mine"
        train(small_config(steps=2), run, recipe="sine")
        for source in (run, str(run), run / "config.json"):
            recipe = load_recipe(source)
            assert (recipe.config, recipe.stages, recipe.name) == (small_config(steps=2), (), "sine")
            assert str(run) in recipe.description
        shutil.copy(run / "config.json", tmp_path / "kept.json")
        assert load_recipe(tmp_path / "kept.json").config == small_config(steps=2)
        (tmp_path / "other.json").write_text('{"model_type": "bert"}')
        with pytest.raises(RunError, match=r"other\.json cannot be read: it has no 'recipe'"):
            load_recipe(tmp_path / "other.json")
        with pytest.raises(ConfigError, match=r"there is no recipe '.*none.json'; .* or a run's config\.json"):
            load_recipe(tmp_path / "none.json")

        train_recipe(load_recipe(run), tmp_path / "again")
        assert read_config(RunDirectory(tmp_path / "again")).recipe == "sine"
        ends = [_final(path).params["theta"] for path in (run, tmp_path / "again")]
        assert torch.equal(*ends)
        run.rename(tmp_path / "runs" / "glyphs-5w1s")
        monkeypatch.chdir(tmp_path / "runs")
        assert load_recipe("glyphs-5w1s").config.data == Glyphs()  # a recipe's name is the recipe


@pytest.mark.parametrize("newton", [False, True])
@pytest.mark.parametrize(("ways", "shots"), [(5, 1), (5, 5), (20, 1), (20, 5)])
def test_a_recipe_of_the_table_begins_at_random_and_ends_with_its_own_tasks(
    ways: int, shots: int, newton: bool
) -> None:
    recipe = load_recipe(f"omniglot-{ways}w{shots}s{'-newton' if newton else ''}")
    between = [*(["newton"] if newton else []), *(["longer"] if shots == 5 else [])]
    assert [stage.name for stage in recipe.stages] == ["five-ways", "twenty-ways", *between, "own-tasks"]
    configs = recipe.staged({})
    assert configs[0].theta.weights is None
    assert len({config.run.seed for config in configs}) == len(configs)  # no stage sees the tasks of another
    for config in configs[:-1]:
        assert config.evaluation.split == "val"
        assert config.tasks.shots == 1
    last = configs[-1]
    assert (last.tasks.ways, last.tasks.shots, last.evaluation.split) == (ways, shots, "test")
    assert last.evaluation.tasks == (3000 if ways == 5 else 1000)
    assert last.algorithm.inner.kind_name == ("newton_cg" if newton else "gradient_descent")
    for config in configs:
        assert (config.tasks.queries, config.data.orientations, config.data.validation) == (None, "one_per_task", 100)  # type: ignore[attr-defined]
    vinyals = recipe.staged({"data.split": "vinyals", "data.validation": 0})
    assert all(config.data.split == "vinyals" for config in vinyals)  # type: ignore[attr-defined]


def test_a_stage_before_the_last_is_judged_on_validation_classes(tmp_path: Path) -> None:
    recipe = _recipe()
    stages = (Stage("first", {"evaluation.split": "val"}), Stage("last", {"evaluation.split": "test", "run.seed": 1}))
    result = train_recipe(Recipe(changed(recipe.config, {"outer.steps": 2}), stages), tmp_path / "run")
    first = json.loads((tmp_path / "run/1-first/result.json").read_text())
    assert (first["test"]["split"], result["test"]["split"]) == ("val", "test")
    config = read_config(RunDirectory(tmp_path / "run/1-first")).config
    again = evaluate_run(tmp_path / "run/1-first", {"evaluation.tasks": config.evaluation.tasks}, split="val")
    assert again.accuracy == first["test"]["accuracy"]
