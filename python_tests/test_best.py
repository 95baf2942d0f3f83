"""The best checkpoint by validation, early stopping, more steps for a run that has ended, and a function per row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from training_tools import SMALL, assert_one_sentence, files_of, glyphs_config, imaml, small_config, stopped_in

from imaml_ext import _native
from imaml_ext.data import Folder
from imaml_ext.errors import CheckpointError, ConfigError, Interrupted, NativeUnavailableError
from imaml_ext.inner import GradientDescent
from imaml_ext.meta import IMAML
from imaml_ext.models import Conv4
from imaml_ext.settings import changed
from imaml_ext.train import (
    EvaluationSettings,
    Outer,
    Recipe,
    RunSettings,
    Stage,
    Tasks,
    TrainConfig,
    build,
    evaluate_run,
    export_run,
    train,
    train_recipe,
)
from imaml_ext.train.checkpoint import Checkpoint, chosen_checkpoint, list_checkpoints, load_checkpoint
from imaml_ext.train.run_directory import RunDirectory, read_config, read_metrics

STEPS, EVERY, PATIENCE = 40, 2, 3
_TIMES = {"seconds", "tasks_per_second"}


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def config_of(steps: int = STEPS, **evaluation: Any) -> TrainConfig:
    """A rate so large that the validation loss falls and rises."""
    config = small_config(steps=steps, lr=0.2, schedule="constant")
    settings = {"every": EVERY, "validation_tasks": 10, **evaluation}
    return changed(config, {f"evaluation.{name}": value for name, value in settings.items()})


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics without the times, which differ from run to run."""
    return [{k: v for k, v in row.items() if k not in _TIMES} for row in read_metrics(run / "metrics.jsonl")]


def names(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run / "checkpoints")]


def newest(run: Path) -> Checkpoint:
    return load_checkpoint(list_checkpoints(run / "checkpoints")[-1])


def best_of(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first of the lowest validation losses."""
    validations = [row for row in found if "val_loss" in row]
    row = min(validations, key=lambda row: row["val_loss"])
    return {"step": row["step"], "val_loss": row["val_loss"]}


def same_end(one: Path, other: Path) -> None:
    """Both runs ended with the same bits, took the same decisions and logged the same."""
    ends = [newest(one), newest(other)]
    assert ends[0].step == ends[1].step
    assert torch.equal(ends[0].params["theta"], ends[1].params["theta"])
    for name, value in ends[0].optimizer["state"][0].items():
        assert torch.equal(value, ends[1].optimizer["state"][0][name]), name
    assert (ends[0].best, ends[0].misses) == (ends[1].best, ends[1].misses)
    assert rows(one) == rows(other)
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    assert results[0]["test"] == results[1]["test"]
    assert results[0].get("best") == results[1].get("best")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that neither keeps the best nor stops."""
    run = tmp_path_factory.mktemp("plain") / "run"
    train(config_of(), run)
    return run


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, which keeps its best and stops."""
    run = tmp_path_factory.mktemp("kept") / "run"
    train(config_of(keep_best=True, patience=PATIENCE), run)
    return run


def train_until(monkeypatch: pytest.MonkeyPatch, calls: int, config: TrainConfig, run: Path) -> None:
    """Begins or continues a run that gets SIGTERM in that meta-step from now on."""
    with stopped_in(monkeypatch, calls), pytest.raises(Interrupted):
        train(config, run, resume=True)


def test_the_best_is_kept_and_judged(tmp_path: Path, plain: Path) -> None:
    run = tmp_path / "run"
    result = train(config_of(keep_best=True), run)
    best = best_of(rows(plain))
    assert EVERY < best["step"] < STEPS - 15  # older than the newest three checkpoints
    assert (result["best"], result["steps"]) == (best, STEPS)
    assert rows(run) == rows(plain)
    assert torch.equal(newest(run).params["theta"], newest(plain).params["theta"])
    assert names(run) == [f"step-{step:08d}.pt" for step in (best["step"], 30, 35, 40)]

    of_best = run / "checkpoints" / names(run)[0]
    assert result["test"] == evaluate_run(run).to_json() == evaluate_run(run, checkpoint=of_best).to_json()
    assert result["test"] != json.loads((plain / "result.json").read_text())["test"]
    chosen = chosen_checkpoint(RunDirectory(run))
    assert chosen.step == best["step"]
    weights = export_run(run, tmp_path / "best.safetensors")
    assert torch.equal(weights.params["theta"], chosen.params["theta"])
    assert weights.card.steps == best["step"]
    begun = build(changed(config_of(), {"theta.weights": str(run)})).initial_params()
    assert torch.equal(begun["theta"], chosen.params["theta"])

    of_best.rename(tmp_path / "away.pt")
    with pytest.raises(CheckpointError, match=rf"step-0*{best['step']}\.pt does not exist"):
        evaluate_run(run)
    latest = changed(read_config(RunDirectory(run)).config, {"evaluation.keep_best": False})
    retested = train(latest, run, resume=True)  # the settings of an evaluation may be set anew
    assert retested["test"] == json.loads((plain / "result.json").read_text())["test"] == evaluate_run(run).to_json()
    assert "best" not in retested
    for path in list_checkpoints(run / "checkpoints"):
        path.unlink()
    with pytest.raises(CheckpointError, match="run has no checkpoint yet"):
        chosen_checkpoint(RunDirectory(run))


@pytest.mark.parametrize("keep_best", [False, True])
def test_training_stops_when_validations_get_no_better(tmp_path: Path, plain: Path, keep_best: bool) -> None:
    run, best, misses = tmp_path / "run", float("inf"), 0
    for row in rows(plain):
        if "val_loss" in row:
            best, misses = (row["val_loss"], 0) if row["val_loss"] < best else (best, misses + 1)
            if misses == PATIENCE:
                break
    assert row["step"] < STEPS
    config = config_of(keep_best=keep_best, patience=PATIENCE)
    result = train(config, run)
    assert result["steps"] == newest(run).step == row["step"]
    assert result.get("best", {}).get("val_loss") == (best if keep_best else None)
    assert rows(run) == [other for other in rows(plain) if other["step"] <= row["step"]]

    before = files_of(run / "checkpoints")
    assert train(config, run, resume=True)["test"] == result["test"]  # it has ended
    assert files_of(run / "checkpoints") == before
    further = train(config_of(keep_best=keep_best, patience=STEPS), run, resume=True)
    assert further["steps"] == STEPS
    assert torch.equal(newest(run).params["theta"], newest(plain).params["theta"])
    assert rows(run) == rows(plain)
    assert read_config(RunDirectory(run)).config.evaluation.patience == STEPS


def test_what_is_only_as_good_is_not_better(tmp_path: Path) -> None:
    """Steps below the rounding of the parameters: all validations are the same."""
    config = changed(config_of(keep_best=True, patience=PATIENCE), {"outer.optimizer": "sgd", "outer.lr": 1e-30})
    result = train(config, tmp_path / "run")
    assert (result["best"]["step"], result["steps"]) == (EVERY, EVERY * (1 + PATIENCE))


def test_a_validation_because_the_run_ends_is_no_miss(tmp_path: Path) -> None:
    train(config_of(31, patience=STEPS), tmp_path / "run")
    losses = {row["step"]: row["val_loss"] for row in rows(tmp_path / "run") if "val_loss" in row}
    assert list(losses)[-2:] == [30, 31]
    best = min(losses, key=lambda step: losses[step])
    assert best < 30
    assert newest(tmp_path / "run").misses == (30 - best) / EVERY


def test_a_resumed_run_takes_the_same_decisions(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at steps 3, 5, 12, 23 and 27: before and after validations, better ones and others."""
    config = config_of(keep_best=True, patience=PATIENCE)
    for calls in (3, 2, 7, 11, 4):
        train_until(monkeypatch, calls, config, tmp_path / "run")
    assert newest(tmp_path / "run").step == 27 < newest(kept).step
    train(config, tmp_path / "run", resume=True)
    same_end(tmp_path / "run", kept)


def test_a_best_that_is_not_there_any_more_is_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, best = tmp_path / "run", 22
    config = changed(config_of(best, keep_best=True), {"run.keep_checkpoints": 2, "run.checkpoint_every": 1})
    straight = train(config, run)
    assert straight["best"]["step"] == best
    older = list_checkpoints(run / "checkpoints")[-2]
    assert load_checkpoint(older).best["step"] == best - 2  # pruned since
    again = train(config, run, resume=True, checkpoint=older)
    assert "of step 20, is not kept any more" in capsys.readouterr().err
    assert again["best"] == straight["best"]
    assert again["test"] == straight["test"]


def test_accuracy_is_best_where_it_is_highest(tmp_path: Path) -> None:
    result = train(glyphs_config(), tmp_path / "run")
    figures = {row["step"]: row["val_accuracy"] for row in rows(tmp_path / "run")}
    best = max(figures.values())
    assert len(set(figures.values())) > 1
    assert result["best"] == {"step": min(step for step in figures if figures[step] == best), "val_accuracy": best}


def test_a_stage_begins_with_the_best_of_the_one_before(tmp_path: Path, kept: Path) -> None:
    recipe = Recipe(config_of(keep_best=True, patience=PATIENCE), (Stage("first"), Stage("second", {"outer.steps": 2})))
    result = train_recipe(recipe, tmp_path / "run")
    first, second = tmp_path / "run" / "1-first", tmp_path / "run" / "2-second"
    same_end(first, kept)
    begun = build(read_config(RunDirectory(second)).config).initial_params()["theta"]
    assert torch.equal(begun, chosen_checkpoint(RunDirectory(first)).params["theta"])
    assert train_recipe(recipe, tmp_path / "run", resume=True)["test"] == result["test"]  # the first stage is finished
    with pytest.raises(ConfigError, match=r"outer.steps was 40 in .*1-first, now 80"):
        train_recipe(recipe, tmp_path / "run", resume=True, changes={"outer.steps": 80})


@pytest.mark.parametrize("settings", [{"keep_best": True}, {"patience": 2}])
def test_both_need_validations(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"every must be above 0 with keep_best or patience, .* got 0"):
        EvaluationSettings(**settings)
    assert not EvaluationSettings(every=1).tracks_best


class TestMoreSteps:
    @pytest.mark.parametrize("first", [20, 21])  # the last step of the first part: validated and logged anyway, or not
    def test_it_ends_as_if_it_had_had_them_from_the_beginning(self, tmp_path: Path, plain: Path, first: int) -> None:
        run = tmp_path / "run"
        train(config_of(first), run)
        recorded = json.loads((run / "config.json").read_text())
        recorded["environment"]["threads"] = 99  # of where it was begun
        (run / "config.json").write_text(json.dumps(recorded))
        result = train(config_of(), run, resume=True)
        assert result["steps"] == STEPS
        recorded["config"]["outer"]["steps"] = STEPS  # the one thing that is recorded anew
        assert json.loads((run / "config.json").read_text()) == recorded
        if first == 20:
            same_end(run, plain)
        else:
            assert torch.equal(newest(run).params["theta"], newest(plain).params["theta"])
            assert result["test"] == json.loads((plain / "result.json").read_text())["test"]

    def test_while_it_goes_on_it_is_not_finished(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = tmp_path / "run"
        train(config_of(4), run)
        train_until(monkeypatch, 2, config_of(8), run)
        assert not (run / "result.json").exists()
        assert train(read_config(RunDirectory(run)).config, run, resume=True)["steps"] == 8

    def test_where_the_rates_depend_on_the_number_it_is_refused(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        train(small_config(steps=4), run)
        before = files_of(run)
        with pytest.raises(
            ConfigError, match=r"of outer.schedule 'cosine' takes no more than its 4 steps.*--theta.wei"
        ):
            train(small_config(steps=8), run, resume=True)
        with pytest.raises(ConfigError, match=r"outer.steps was 4 in .*run, now 3"):
            train(small_config(steps=3), run, resume=True)
        assert files_of(run) == before

    def test_from_the_command_line(self, tmp_path: Path) -> None:
        run, knobs = tmp_path / "run", [*SMALL, "--outer.schedule", "constant"]
        assert imaml("train", "sinusoid", *knobs, "--outer.steps", 3, "--run-dir", run).returncode == 0
        more = imaml("train", "sinusoid", "--run-dir", run, "--resume", "--outer.steps", 5)
        assert more.returncode == 0, more.stderr
        assert json.loads((run / "result.json").read_text())["steps"] == 5
        fewer = imaml("train", "sinusoid", "--run-dir", run, "--resume", "--outer.steps", 4)
        assert_one_sentence(fewer, "outer.steps was 5 in", "now 4")


class TestOnLog:
    def test_it_gets_the_rows_and_can_end_the_run(
        self, tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run, seen = tmp_path / "run", []

        def look(row: dict[str, Any]) -> bool:
            seen.append(dict(row))
            row.clear()  # its own copy
            return seen[-1]["step"] == 6

        result = train(config_of(), run, on_log=look)
        assert seen == read_metrics(run / "metrics.jsonl")
        told = capsys.readouterr().err
        assert "training 2/40  loss " in told
        assert "training ended after step 6 of 40: as asked" in told
        assert [row["step"] for row in seen] == [2, 4, 6]
        assert result["steps"] == newest(run).step == 6
        train(config_of(), run, resume=True)  # nobody asks it to stop now
        same_end(run, plain)

    def test_what_it_raises_ends_the_run(self, tmp_path: Path, plain: Path) -> None:
        class Pruned(Exception):
            pass

        def prune(row: dict[str, Any]) -> None:
            if row["step"] == 12:
                raise Pruned

        recipe = Recipe(config_of())
        with pytest.raises(Pruned):
            train_recipe(recipe, tmp_path / "run", on_log=prune)
        assert newest(tmp_path / "run").step == 10
        assert not (tmp_path / "run" / "result.json").exists()
        train_recipe(recipe, tmp_path / "run", resume=True)
        same_end(tmp_path / "run", plain)


def test_a_run_of_before_there_was_a_best_goes_on(tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    train_until(monkeypatch, 7, config_of(), run)
    recorded = json.loads((run / "config.json").read_text())
    del recorded["config"]["evaluation"]["keep_best"], recorded["config"]["evaluation"]["patience"]
    (run / "config.json").write_text(json.dumps(recorded))
    for path in list_checkpoints(run / "checkpoints"):
        values = torch.load(path, weights_only=True)
        del values["best"], values["misses"]
        torch.save(values, path)
    config = read_config(RunDirectory(run)).config
    assert config == config_of()
    assert chosen_checkpoint(RunDirectory(run)).step == 7
    train(config, run, resume=True)
    same_end(run, plain)


def test_without_the_compiled_part_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "error", NativeUnavailableError("the compiled part of imaml_ext does not load"))
    with pytest.raises(NativeUnavailableError, match="the compiled part of imaml_ext does not load"):
        train(config_of(), tmp_path / "run")
    assert_one_sentence(imaml("train", "glyphs-5w1s", "--run-dir", tmp_path / "run"), "the compiled part of imaml_ext")
    assert not (tmp_path / "run").exists()


def test_relative_paths_are_recorded_as_absolute_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    for name in ("ant", "bee", "cat", "dog", "elk", "fox"):
        for split in ("train", "test"):
            (tmp_path / "here" / "mine" / split / f"{name}-{split}").mkdir(parents=True)
            for number in range(3):
                image = Image.effect_noise((12, 12), 50 + number)
                image.save(tmp_path / "here" / "mine" / split / f"{name}-{split}" / f"{number}.png")
    config = TrainConfig(
        data=changed(Folder(root=Path("mine"), cache_dir=Path("cache")), {"pictures.size": 12}),
        tasks=Tasks(ways=3, shots=1, queries=1),
        model=Conv4(filters=2),
        algorithm=IMAML(inner=GradientDescent(steps=1), curvature="gauss_newton"),
        outer=Outer(steps=1, meta_batch=2),
        evaluation=EvaluationSettings(tasks=4),
        run=RunSettings(device="cpu", threads=1, tensorboard=False),
    )
    monkeypatch.chdir(tmp_path / "here")
    train(config, Path("first"))
    result = train(changed(config, {"theta.weights": "first"}), Path("run"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = tmp_path / "here" / "run"
    recorded = read_config(RunDirectory(run)).config
    assert (recorded.data.root, recorded.data.cache_dir) == (tmp_path / "here" / "mine", tmp_path / "here" / "cache")
    assert recorded.theta.weights == str(tmp_path / "here" / "first")
    assert evaluate_run(run).to_json() == result["test"] == train(recorded, run, resume=True)["test"]
    assert not list((tmp_path / "elsewhere").iterdir())
