"""Weights files, published weights, and the learner that is made from them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from training_tools import imaml, small_config

from imaml_ext.data import Folder, Glyphs
from imaml_ext.errors import CheckpointError, ConfigError, DataError, RunError, WeightsError
from imaml_ext.inner import GradientDescent, NewtonCG
from imaml_ext.meta import IMAML
from imaml_ext.models import Conv4
from imaml_ext.pictures import Reading
from imaml_ext.pretrained import (
    FewShotLearner,
    load_adapted,
    load_pretrained,
    pretrained_names,
    read_images,
    read_weights,
    save_weights,
)
from imaml_ext.pretrained.state_dict import torch_state_dict
from imaml_ext.settings import changed
from imaml_ext.solvers import CG, Neumann
from imaml_ext.train.checkpoint import list_checkpoints, load_checkpoint
from imaml_ext.train.config import Tasks, TrainConfig
from imaml_ext.train.evaluation import evaluate_pretrained
from imaml_ext.train.experiment import build
from imaml_ext.train.export import export_run
from imaml_ext.train.run_directory import read_metrics
from imaml_ext.train.trainer import train


def glyphs_config(*, ways: int = 3, **theta: object) -> TrainConfig:
    """2-shot tasks of glyphs, a small network, two meta-steps."""
    changes = {"data": Glyphs(), "tasks": Tasks(ways=ways, shots=2, queries=4), "model": Conv4(filters=4)}
    # The sinusoid's model does not fit the images, nor its data the new model: both change at once.
    config = replace(small_config(steps=2), **changes)
    return changed(config, {f"theta.{name}": value for name, value in theta.items()})


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    """A finished run on the sinusoid with a learnt λ: its directory and its result."""
    path = tmp_path_factory.mktemp("regression") / "run"
    config = changed(small_config(), {"algorithm.learn": {"lam": "tensor"}})
    return path, train(config, path, recipe="sinusoid", command="imaml train sinusoid")


@pytest.fixture(scope="module")
def classification(tmp_path_factory):
    """A finished run on glyphs, 3-way 2-shot, with a small network."""
    path = tmp_path_factory.mktemp("classification") / "run"
    return path, train(glyphs_config(), path, recipe="glyphs-5w1s", command="imaml train glyphs-5w1s")


def test_exported_weights_are_those_of_the_run(regression, tmp_path):
    run, result = regression
    written = export_run(run, tmp_path / "sine.safetensors", commit="0123abc")
    weights = read_weights(tmp_path / "sine.safetensors")

    assert weights.params.keys() == written.params.keys() == {"theta", "log_lam"}
    assert all(torch.equal(weights.params[name], written.params[name]) for name in weights.params)
    assert weights.params["log_lam"].shape == (6,)
    assert replace(weights, params={}) == replace(written, params={}, name="sine")
    assert weights.card.test == result["test"]
    assert evaluate_pretrained(tmp_path / "sine.safetensors").to_json() == result["test"]
    fewer = evaluate_pretrained(tmp_path / "sine.safetensors", {"evaluation.tasks": 7, "evaluation.inner_steps": 1})
    assert (fewer.tasks, fewer.inner_steps) == (7, 1)


def test_any_program_can_read_the_tensors(regression, tmp_path):
    export_run(regression[0], tmp_path / "sine.safetensors")
    tensors = load_file(tmp_path / "sine.safetensors")
    layout = read_weights(tmp_path / "sine.safetensors").model.layout
    assert set(tensors) == {*layout.names, "log_lam"}
    assert [tensors[name].shape for name in layout.names] == list(layout.shapes)


def test_the_card_says_where_they_come_from_and_nothing_of_the_machine(regression, tmp_path):
    export_run(regression[0], tmp_path / "sine.safetensors", commit="0123abc")
    card = (tmp_path / "sine.md").read_text()
    test = regression[1]["test"]
    for words in ("imaml train sinusoid", "0123abc", "12 meta-steps of 4 tasks", f"{test['loss']:.4f}"):
        assert words in card
    assert card.endswith("    imaml evaluate --pretrained sine.safetensors\n")
    assert str(regression[0]) not in card
    assert str(regression[0]).encode() not in (tmp_path / "sine.safetensors").read_bytes()


def test_a_result_of_before_there_were_figures_of_the_first_tasks(regression, tmp_path):
    run = shutil.copytree(regression[0], tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    del result["test"]["first"]
    (run / "result.json").write_text(json.dumps(result))
    weights = export_run(run, tmp_path / "sine.safetensors")
    assert read_weights(tmp_path / "sine.safetensors").card == weights.card
    assert "| check |" not in (tmp_path / "sine.md").read_text()


def test_commands(classification, tmp_path):
    run, result = classification
    file = tmp_path / "small.safetensors"
    exported = imaml("export", run, file)
    assert exported.returncode == 0
    assert "accuracy" in exported.stdout
    done = imaml("evaluate", "--pretrained", file, "--output", tmp_path / "out.json")
    assert done.returncode == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written.pop("command").startswith("imaml evaluate --pretrained")
    assert written.pop("environment") == result["environment"]
    assert written == result["test"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a run directory or --pretrained"),
        (["RUN", "--pretrained", "x"], "needs a run directory or --pretrained"),
        (["--pretrained", "x", "--checkpoint", "y"], "--checkpoint is of a run directory"),
        (["--pretrained", "no-such-weights"], "no pretrained weights are called 'no-such-weights'"),
        (["--pretrained", "absent.safetensors"], "absent.safetensors cannot be read"),
    ],
)
def test_evaluate_says_what_is_wrong(arguments, message):
    done = imaml("evaluate", *arguments)
    assert done.returncode == 1
    assert message in done.stderr


def test_damaged_and_foreign_files(regression, tmp_path):
    file = tmp_path / "sine.safetensors"
    export_run(regression[0], file)
    whole = file.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"sine\.safetensors"):
            read_weights(file)
    save_file({"w": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="not written by `imaml export`"):
        read_weights(tmp_path / "other.safetensors")


def _old_metadata(**changes: object) -> dict[str, str]:
    """What a file of before version 0.2 says of itself: a network for glyphs, 3-way 2-shot."""
    config = {
        "data": {
            **{"name": "glyphs", "root": None, "cache_dir": None, "download": False, "split_protocol": "1200/423"},
            **{"validation": 0, "rotations": True, "features": 20, "condition_number": 10.0, "noise": 0.1},
            **{"ways": 3, "shots": 2, "train_shots": None, "queries": 4},
        },
        "model": {
            **{"name": "conv4", "filters": 4, "pooling": "stride", "hidden": [40, 40], "activation": "relu"},
            **{"weights": "/somewhere/a.safetensors", "head": "shared"},
        },
        "inner": {
            **{"lam": 0.5, "solver": "gradient_descent", "steps": 3, "lr": 0.02, "optimizer": "sgd", "momentum": 0.9},
            **{"proximal": "pullback", "cg_steps": 4, "curvature": "gauss_newton", "damping": 0.0, "backtracks": 10},
        },
        "meta": {
            **{"algorithm": "imaml", "solver": "neumann", "cg_steps": 7, "cg_rtol": 1e-5, "solver_lr": None},
            **{"damping": 0.25, "curvature": "gauss_newton", "negative_curvature": "skip", "learn_lam": "layer"},
        },
        "evaluation": {"inner_steps": 5},
    }
    for path, value in changes.items():
        group, _, name = path.partition("__")
        config[group][name] = value
    test = {"accuracy": 0.9, "accuracy_interval": 0.01, "loss": 0.3, "loss_interval": 0.02, "tasks": 20, "seed": 0}
    card = {
        **{"preset": "glyphs-5w1s", "command": "imaml train glyphs-5w1s", "commit": "", "data": "glyphs"},
        **{"kind": "classification", "input_shape": [1, 28, 28], "steps": 2, "meta_batch": 4, "train_seconds": 1.0},
        **{"test": test, "environment": {}},
    }
    return {"format": "imaml_ext 1", "config": json.dumps(config), "card": json.dumps(card)}


def test_a_file_of_before_is_read(classification, tmp_path):
    weights = export_run(classification[0], tmp_path / "new.safetensors")
    tensors = load_file(tmp_path / "new.safetensors") | {"log_lam": torch.zeros(14)}
    save_file(tensors, tmp_path / "old.safetensors", _old_metadata())
    old = read_weights(tmp_path / "old.safetensors")
    assert torch.equal(old.params["theta"], weights.params["theta"])
    assert torch.equal(old.params["log_lam"], torch.zeros(14))
    assert (old.model, old.criterion, old.shared_head) == (weights.model, "cross_entropy", True)
    inner = GradientDescent(steps=5, lr=0.02, proximal="after")
    assert old.algorithm == IMAML(
        lam=0.5,
        inner=inner,
        linear_solver=Neumann(max_iterations=7),
        damping=0.25,
        curvature="gauss_newton",
        on_breakdown="skip",
        learn={"lam": "tensor"},
        lam_preconditioner=False,  # which is newer, and would change what a run with λ per tensor does
    )
    assert (old.card.recipe, old.card.description, old.card.trained_from) == ("glyphs-5w1s", "glyphs", "a.safetensors")
    assert old.card.tasks | {"train_queries": None} == weights.card.tasks
    assert old.card.data == weights.card.data

    save_file(tensors, tmp_path / "newton.safetensors", _old_metadata(inner__solver="hessian_free"))
    newton = read_weights(tmp_path / "newton.safetensors").algorithm.inner
    solver = CG(max_iterations=4, rtol=0.0)
    assert newton == NewtonCG(steps=5, linear_solver=solver, curvature="gauss_newton")
    save_file(tensors, tmp_path / "bad.safetensors", _old_metadata(inner__steps="3"))
    with pytest.raises(WeightsError, match=r"bad\.safetensors cannot be used: .*steps must be an integer"):
        read_weights(tmp_path / "bad.safetensors")


def test_weights_are_written_as_they_were_read(tmp_path):
    def content(path: Path) -> tuple[dict[str, str], dict[str, bytes], str]:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = {name: value.numpy().tobytes() for name, value in load_file(path).items()}
        return metadata, tensors, path.with_suffix(".md").read_text()

    for name in ("omniglot-20w1s-newton", "omniglot-5w1s"):
        save_weights(tmp_path / f"{name}.safetensors", read_weights(name))
        published = Path(__file__).parents[1] / "imaml_ext" / "pretrained" / "weights" / f"{name}.safetensors"
        assert content(tmp_path / published.name) == content(published)


def test_a_file_that_lacks_a_parameter(regression, tmp_path):
    file = tmp_path / "sine.safetensors"
    export_run(regression[0], file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    dropped = next(name for name in tensors if name != "log_lam")
    del tensors[dropped]
    save_file(tensors, file, metadata)
    with pytest.raises(WeightsError, match=f"missing .*{dropped}"):
        read_weights(file)


def test_training_begins_with_weights(regression, tmp_path):
    file = tmp_path / "sine.safetensors"
    weights = export_run(regression[0], file)
    config = changed(small_config(steps=3), {"theta.weights": str(file)})
    assert torch.equal(build(config).initial_params()["theta"], weights.params["theta"])
    train(config, tmp_path / "run")
    run = tmp_path / "run"
    export_run(run, tmp_path / "more.safetensors")
    more = read_weights(tmp_path / "more.safetensors")
    assert not torch.equal(more.params["theta"], weights.params["theta"])
    assert more.card.trained_from == "sine.safetensors"  # the folder stays here
    assert "from the weights sine.safetensors" in (tmp_path / "more.md").read_text()

    file.unlink()  # a run that has begun needs them no more
    assert train(config, run, resume=True)["steps"] == 3
    assert evaluate_pretrained(tmp_path / "more.safetensors").loss > 0
    with pytest.raises(WeightsError, match=r"sine\.safetensors cannot be read"):
        train(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("ways", [2, 3, 5])
def test_a_shared_head_begins_with_weights_of_any_number_of_ways(classification, ways, tmp_path):
    file = tmp_path / "small.safetensors"
    weights = export_run(classification[0], file)
    config = glyphs_config(ways=ways, weights=str(file), shared_head=True)
    experiment = build(config)
    theirs = weights.parameters()
    for name, ours in experiment.model.layout.views(experiment.initial_params()["theta"]).items():
        if name.startswith("linear."):
            assert ours.shape[-1] == ways
            torch.testing.assert_close(ours, theirs[name].mean(-1, keepdim=True).expand_as(ours), rtol=0, atol=0)
        else:
            assert torch.equal(ours, theirs[name])
    train(config, tmp_path / "run")
    more = export_run(tmp_path / "run", tmp_path / "more.safetensors")
    assert "shared head" in (tmp_path / "more.md").read_text()
    for name, ours in more.parameters().items():
        assert torch.equal(ours, more.parameters(ways=ways)[name])
        if name.startswith("linear."):
            assert torch.equal(ours, ours[..., :1].expand_as(ours))
            wider = more.parameters(ways=ways + 1)[name]
            torch.testing.assert_close(wider, ours[..., :1].expand_as(wider), rtol=1e-6, atol=0)

    own = changed(config, {"theta.shared_head": False})
    if ways == 3:
        assert torch.equal(build(own).initial_params()["theta"], weights.params["theta"])
    else:
        with pytest.raises(ConfigError, match=rf"linear\.weight \[4, {ways}\].*, got .*linear\.weight \[4, 3\]"):
            build(own).initial_params()
    wider = changed(config, {"model.filters": 5})
    with pytest.raises(ConfigError, match=r"must have the parameters of the model, .*\[3, 3, 5, 5\]"):
        build(wider).initial_params()


def test_features_are_scaled_once(classification, tmp_path):
    """As a training begins, be it with weights or random parameters; not when it goes on, nor at an evaluation."""
    file = tmp_path / "small.safetensors"
    export_run(classification[0], file)
    for weights in (str(file), None):
        plain = glyphs_config(weights=weights, shared_head=True)
        scaled = changed(plain, {"theta.feature_scale": 2.5})
        ours, theirs = (build(config) for config in (scaled, plain))
        views = theirs.model.layout.views(theirs.initial_params()["theta"])
        for name, value in ours.model.layout.views(ours.initial_params()["theta"]).items():
            torch.testing.assert_close(value, (2.5 if name.startswith("norm4.") else 1) * views[name], rtol=0, atol=0)

    result = train(scaled, tmp_path / "run")
    assert train(scaled, tmp_path / "run", resume=True)["test"]["loss"] == result["test"]["loss"]
    export_run(tmp_path / "run", tmp_path / "more.safetensors")
    assert evaluate_pretrained(tmp_path / "more.safetensors").loss == pytest.approx(result["test"]["loss"], rel=1e-6)


def test_weights_tell_more_classes_apart_than_they_were_trained_with(classification, regression, tmp_path):
    """The learner's accuracy over the test tasks is that of the evaluation."""
    file = tmp_path / "small.safetensors"
    export_run(classification[0], file)
    done = imaml("evaluate", "--pretrained", file, "--ways", 7, "--tasks", 4, "--output", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    learner = load_pretrained(file, ways=7)
    assert learner.ways == 7
    episodes = build(glyphs_config(ways=7)).sampler("test", tasks=4, seed=found["seed"]).sample(0)
    right = [
        learner.adapt(x, y).predict(query_x, beside="queries").argmax(-1) == query_y
        for x, y, query_x, query_y in zip(
            episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y, strict=True
        )
    ]
    assert torch.stack(right).double().mean().item() == pytest.approx(found["accuracy"], abs=1e-12)

    with pytest.raises(WeightsError, match="ways must be at least 2, got 1"):
        load_pretrained(file, ways=1)
    export_run(regression[0], tmp_path / "sine.safetensors")
    with pytest.raises(WeightsError, match="sine are of regression: ways must be left out, got 3"):
        load_pretrained(tmp_path / "sine.safetensors", ways=3)
    refused = imaml("evaluate", classification[0], "--ways", 4)
    assert refused.returncode == 1
    assert "export the run" in refused.stderr


def test_classes_keep_rows_of_their_own(classification, tmp_path):
    weights = export_run(classification[0], tmp_path / "small.safetensors")
    rates = torch.linspace(0, 1, weights.model.num_parameters)
    weights = replace(weights, params=weights.params | {"log_lr": rates})  # as where they are learnt per parameter
    for ways in (2, 3, 7):
        other = weights.for_ways(ways)
        for name in ("theta", "log_lr"):
            before, after = (each.model.layout.views(each.params[name]) for each in (weights, other))
            for part in before:
                if not part.startswith("linear."):
                    assert torch.equal(before[part], after[part])
                    continue
                mean = before[part].mean(-1, keepdim=True)
                own = mean + min(1, ways / 3) * (before[part][..., :ways] - mean)
                expected = torch.cat([own, mean.expand(*mean.shape[:-1], max(0, ways - 3))], -1)
                torch.testing.assert_close(after[part], expected)


@pytest.mark.long
@pytest.mark.skipif(not os.environ.get("IMAML_DATA_ROOT"), reason="IMAML_DATA_ROOT names the folder of the real data")
@pytest.mark.parametrize("name", ["omniglot-5w1s", "omniglot-20w1s-newton"])
def test_fewer_ways_than_trained_are_no_harder(name):
    """With the mean alone the first has 96.6 %, with its rows as they are the second has 96.0 %."""
    changes = {"run.device": "cpu", "tasks.ways": 4, "evaluation.tasks": 300, "evaluation.seed": 11}
    assert evaluate_pretrained(name, changes).accuracy >= 0.978


@pytest.mark.parametrize("source", ["omniglot-5w1s", "sine"])
def test_weights_of_another_model_are_refused(source, tmp_path):
    config = changed(small_config(), {"theta.weights": source})
    error, message = (
        (WeightsError, "no pretrained weights are called 'sine'")
        if source == "sine"
        else (
            ConfigError,
            r"theta\.weights must have the parameters of the model, .*\[8, 8\].*, got .*\[3, 3, 64, 64\]",
        )
    )
    with pytest.raises(error, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_exported(classification, tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        export_run(tmp_path / "nothing", tmp_path / "a.safetensors")
    with pytest.raises(RunError, match=r"NAME\.safetensors"):
        export_run(classification[0], tmp_path / "a.pt")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_bytes((classification[0] / "config.json").read_bytes())
    with pytest.raises(RunError, match="has no checkpoint yet"):
        export_run(empty, tmp_path / "a.safetensors")
    theirs = next((classification[0] / "checkpoints").glob("*.pt"))
    with pytest.raises(CheckpointError, match="checkpoint must be one of"):
        export_run(empty, tmp_path / "a.safetensors", checkpoint=theirs)
    assert not (tmp_path / "a.safetensors").exists()


def test_a_run_that_was_stopped_is_exported(tmp_path):
    """With the figures of the validation at that step, where there was one."""
    run, config = tmp_path / "run", changed(small_config(steps=7), {"evaluation.every": 4})
    result = train(config, run, command="imaml train sinusoid")
    steps = {checkpoint.stem: load_checkpoint(checkpoint) for checkpoint in list_checkpoints(run / "checkpoints")}
    assert list(steps) == ["step-00000005", "step-00000007"]
    early = export_run(run, tmp_path / "a.safetensors", checkpoint=run / "checkpoints" / "step-00000005.pt")
    assert (early.card.steps, early.card.test, early.card.figure) == (5, None, "not tested")
    assert torch.equal(early.params["theta"], steps["step-00000005"].params["theta"])
    assert early.card.train_seconds < result["train_seconds"]
    assert "none: the run was not tested at this step" in (tmp_path / "a.md").read_text()
    assert read_weights(tmp_path / "a.safetensors").card == early.card
    assert evaluate_pretrained(tmp_path / "a.safetensors", {"evaluation.tasks": 4}).tasks == 4
    assert export_run(run, tmp_path / "b.safetensors").card.test == result["test"]

    (run / "result.json").unlink()
    stopped = imaml("export", run, tmp_path / "c.safetensors")
    assert stopped.stdout.startswith("validation mean squared error"), stopped.stderr
    assert ", 7 meta-steps: " in stopped.stdout
    card = read_weights(tmp_path / "c.safetensors").card
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert card.test is not None
    assert (card.test["split"], card.test["loss"], card.test["tasks"]) == ("val", row["val_loss"], 100)
    assert card.command == "imaml train sinusoid"
    assert "none: validation mean squared error" in (tmp_path / "c.md").read_text()
    assert evaluate_pretrained(tmp_path / "c.safetensors").tasks == 600


def test_export_needs_no_data_and_names_no_folder(tmp_path):
    mine, rng = tmp_path / "secret-place" / "birds", np.random.default_rng(0)
    for name in ("ant", "bee", "cat", "dog", "elk", "fox"):
        (mine / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (20, 20), dtype=np.uint8)
            Image.fromarray(pixels).save(mine / name / f"{number}.png")
    reading = Reading(size=16, colours="grey", square="pad")
    data = Folder(
        root=mine, cache_dir=tmp_path / "cache", pictures=reading, test_fraction=0.34, val_fraction=0.0, split_by="rank"
    )
    changes = {"data": data, "tasks": Tasks(ways=2, shots=1, queries=2), "model": Conv4(filters=3)}
    config = replace(small_config(steps=2), **changes)
    command = f"imaml train mine.py --data.root {mine} --run-dir={tmp_path}/run --outer.lr 0.1"
    train(config, tmp_path / "run", command=f"{command} --data.split-protocol 1200/423")
    shutil.move(mine, tmp_path / "elsewhere")  # the run has recorded what its data are
    weights = export_run(tmp_path / "run", tmp_path / "mine.safetensors", state_dict=tmp_path / "mine.pt")
    card = weights.card
    assert (card.reading, card.input_shape) == (reading, (1, 16, 16))
    expected = "imaml train mine.py --data.root birds --run-dir=run --outer.lr 0.1 --data.split-protocol 1200/423"
    assert card.command == expected
    for file in ("mine.safetensors", "mine.md", "mine.pt"):
        content = (tmp_path / file).read_bytes()
        for place in (mine, tmp_path, "secret-place", Path.home(), Path.cwd()):
            assert str(place).encode() not in content, (file, place)

    config_file = tmp_path / "run" / "config.json"  # an older run has not
    recorded = json.loads(config_file.read_text())
    del recorded["dataset"], recorded["command"]
    config_file.write_text(json.dumps(recorded))
    with pytest.raises(DataError, match="is not a folder"):
        export_run(tmp_path / "run", tmp_path / "old.safetensors")
    old = export_run(tmp_path / "run", tmp_path / "old.safetensors", data_root=tmp_path / "elsewhere")
    assert (old.card.reading, old.card.input_shape) == (reading, (1, 16, 16))
    assert str(tmp_path).encode() not in (tmp_path / "old.safetensors").read_bytes()


class Block(nn.Module):
    """A layer of the usual Conv4."""

    def __init__(self, channels: int, filters: int, *, strided: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, filters, 3, stride=2 if strided else 1, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(filters, track_running_stats=False)
        self.pool = nn.Identity() if strided else nn.MaxPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(torch.relu(self.norm(self.conv(x))))


class TorchConv4(nn.Module):
    """The network in layers of torch.nn."""

    def __init__(self, channels: int, size: int, filters: int, ways: int, *, strided: bool) -> None:
        super().__init__()
        widths = [channels, *4 * [filters]]
        self.features = nn.Sequential(*(Block(*pair, strided=strided) for pair in pairwise(widths)))
        self.mean = nn.AdaptiveAvgPool2d(1) if strided else nn.Identity()
        self.linear = nn.Linear(filters * (1 if strided else (size // 16) ** 2), ways)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.mean(self.features(x)).flatten(1))


@pytest.mark.parametrize("pooling", ["stride", "max"])
def test_a_module_of_torch_takes_the_parameters(pooling):
    model = Conv4(3, in_channels=2, image_size=37, filters=5, pooling=pooling)
    theta = 0.3 * torch.randn(model.num_parameters, dtype=torch.float64)
    module = TorchConv4(2, 37, 5, 3, strided=pooling == "stride").double()
    module.load_state_dict(torch_state_dict(model, theta))
    x = torch.rand(7, 2, 37, 37, dtype=torch.float64)
    torch.testing.assert_close(module(x), model(theta.unsqueeze(0), x.unsqueeze(0))[0], rtol=1e-9, atol=1e-9)


def test_a_published_network_as_a_module(tmp_path):
    weights = read_weights("omniglot-5w1s")
    module = TorchConv4(1, 28, 64, 5, strided=True)
    module.load_state_dict(torch_state_dict(weights.model, weights.params["theta"]))
    x = torch.rand(9, 1, 28, 28)
    expected = weights.model(weights.params["theta"].unsqueeze(0), x.unsqueeze(0))[0]
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-4)


def test_an_mlp_as_a_module(regression, tmp_path):
    run, file = regression[0], tmp_path / "theta.pt"
    done = imaml("export", run, tmp_path / "sine.safetensors", "--state-dict", file)
    assert done.returncode == 0, done.stderr
    module = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    module.load_state_dict(torch.load(file, weights_only=True))
    weights, x = read_weights(tmp_path / "sine.safetensors"), torch.randn(6, 1)
    torch.testing.assert_close(module(x), weights.model(weights.params["theta"].unsqueeze(0), x.unsqueeze(0))[0])


@pytest.fixture
def learner(classification, tmp_path) -> FewShotLearner:
    export_run(classification[0], tmp_path / "small.safetensors")
    return load_pretrained(tmp_path / "small.safetensors")


def test_a_learner_predicts_as_the_evaluation_does(classification, learner):
    """The accuracy over the test tasks, one at a time, is that of result.json."""
    result = classification[1]["test"]
    experiment = build(glyphs_config())
    episodes = experiment.sampler("test", tasks=result["tasks"], seed=result["seed"]).sample(0)
    right = []
    for x, y, query_x, query_y in zip(
        episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y, strict=True
    ):
        probabilities = learner.adapt(x, y).predict(query_x, beside="queries")
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(query_x)))
        right.append((probabilities.argmax(-1) == query_y).double().mean())
    assert torch.stack(right).mean().item() == pytest.approx(result["accuracy"], abs=1e-12)


def test_what_an_example_is_judged_beside(learner):
    x = torch.rand(6, 1, 28, 28)
    adapted = learner.adapt(x, torch.tensor([0, 0, 1, 1, 2, 2]))
    query = torch.rand(4, 1, 28, 28)
    alone = adapted.predict(query)
    for each in range(4):  # to the bit the same, whatever else is asked
        assert torch.equal(adapted.predict(query[each : each + 1])[0], alone[each])
        beside = adapted.predict(torch.cat([query[each : each + 1], x]), beside="queries")
        torch.testing.assert_close(alone[each], beside[0])
    together = adapted.predict(torch.cat([query, x]), beside="queries")[:4]
    torch.testing.assert_close(adapted.predict(query, beside="all"), together)
    assert not torch.allclose(together, alone)
    as_bytes = (255 * query).round().to(torch.uint8)
    torch.testing.assert_close(adapted.predict(as_bytes), adapted.predict(as_bytes.float() / 255))
    with pytest.raises(ValueError, match="beside must be one of"):
        adapted.predict(query, beside="none")


def test_an_adapted_learner_is_saved(learner, tmp_path):
    adapted = learner.adapt(torch.rand(3, 1, 28, 28), torch.arange(3), classes=["ant", "bee", "cat"])
    adapted.save(tmp_path / "learner.safetensors")
    again = load_adapted(tmp_path / "learner.safetensors")
    query = torch.rand(2, 1, 28, 28)
    assert torch.equal(again.predict(query), adapted.predict(query))
    assert torch.equal(again.predict(query, beside="all"), adapted.predict(query, beside="all"))
    assert (again.classes, again.reading, again.weights) == (("ant", "bee", "cat"), learner.reading, "small")
    with pytest.raises(RunError, match=r"NAME\.safetensors"):
        adapted.save(tmp_path / "learner.pt")
    with pytest.raises(WeightsError, match=r"no adapted learner: .*'imaml_ext 2'"):
        load_adapted(tmp_path / "small.safetensors")
    with pytest.raises(WeightsError, match="not written by `imaml export`: its format is 'imaml_ext learner 1'"):
        read_weights(tmp_path / "learner.safetensors")
    with pytest.raises(WeightsError, match=r"absent\.safetensors cannot be read"):
        load_adapted(tmp_path / "absent.safetensors")
    whole = (tmp_path / "learner.safetensors").read_bytes()
    (tmp_path / "part.safetensors").write_bytes(whole[:-1])
    with pytest.raises(WeightsError, match="are damaged"):
        load_adapted(tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="classes must be 3 different names"):
        learner.adapt(torch.rand(3, 1, 28, 28), torch.arange(3), classes=["ant", "bee", "bee"])


def test_a_regressor_too(regression, tmp_path):
    export_run(regression[0], tmp_path / "sine.safetensors")
    learner = load_pretrained(tmp_path / "sine.safetensors")
    adapted = learner.adapt(torch.linspace(-5, 5, 5).unsqueeze(1), torch.randn(5, 1))
    assert adapted.predict(torch.zeros(3, 1)).shape == (3, 1)
    adapted.save(tmp_path / "adapted.safetensors")
    query = torch.randn(4, 1)
    assert torch.equal(load_adapted(tmp_path / "adapted.safetensors").predict(query), adapted.predict(query))
    with pytest.raises(RunError, match="reads no pictures"):
        adapted.read(["a.png"])
    with pytest.raises(ValueError, match=r"y must have shape \[5, 1\]"):
        learner.adapt(torch.zeros(5, 1), torch.zeros(5))


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        ([1], torch.zeros(1, dtype=torch.int64), TypeError, "x must be a tensor"),
        (torch.zeros(2, 28, 28), torch.zeros(2, dtype=torch.int64), ValueError, r"x must have shape \[S, 1, 28, 28\]"),
        (torch.zeros(0, 1, 28, 28), torch.zeros(0, dtype=torch.int64), ValueError, "S >= 1"),
        (torch.zeros(2, 1, 28, 28), torch.zeros(3, dtype=torch.int64), ValueError, r"y must have shape \[2\]"),
        (torch.zeros(2, 1, 28, 28), torch.zeros(2), TypeError, "integer labels"),
        (torch.zeros(2, 1, 28, 28), torch.tensor([0, 3]), ValueError, r"labels in \[0, 3\), got 0 to 3"),
    ],
)
def test_bad_support(learner, x, y, error, message):
    with pytest.raises(error, match=message):
        learner.adapt(x, y)


def drawn(path: Path, *, ground: int, ink: int, at: tuple[int, int], size: tuple[int, int] = (120, 90)) -> Path:
    image = Image.new("L", size, ground)
    ImageDraw.Draw(image).line([at, (at[0] + 40, at[1]), (at[0] + 20, at[1] + 50)], fill=ink, width=5)
    image.save(path)
    return path


def test_ink_is_found_wherever_and_whatever_it_is(tmp_path):
    paths = [
        drawn(tmp_path / "dark.png", ground=250, ink=10, at=(20, 20)),
        drawn(tmp_path / "light.png", ground=5, ink=245, at=(60, 30)),
        drawn(tmp_path / "grey.png", ground=180, ink=90, at=(10, 12), size=(200, 300)),
    ]
    images = read_images(paths, (1, 28, 28))
    assert images.shape == (3, 1, 28, 28)
    torch.testing.assert_close(images[0], images[1])
    torch.testing.assert_close(images[0], images[2])
    assert images.min() == 0
    assert images.max() > 0.95
    rows, columns = (images[0, 0] > 0.5).nonzero(as_tuple=True)
    assert 2 <= rows.min() <= 4  # a tenth of the ink's side, of 28 pixels, on each side
    assert 23 <= rows.max() <= 25
    assert abs((columns.min() + columns.max()).item() - 27) <= 1


def test_colour_is_cut_to_its_middle(tmp_path):
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, 20:60] = (255, 0, 51)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = read_images([tmp_path / "wide.png"], (3, 32, 32))
    inside = image[..., 3:-3]  # resampling mixes the columns at the cut
    torch.testing.assert_close(inside, torch.tensor([1, 0, 0.2]).view(1, 3, 1, 1).expand_as(inside))


def test_images_that_cannot_be_read(tmp_path):
    Image.new("L", (30, 30), 200).save(tmp_path / "blank.png")
    (tmp_path / "text.png").write_text("not an image")
    for name, message in (
        ("blank.png", "is blank"),
        ("text.png", "is damaged or not a picture"),
        ("none.png", "does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            read_images([tmp_path / name], (1, 28, 28))
    with pytest.raises(ValueError, match="shape must be"):
        read_images([tmp_path / "blank.png"], (2, 28, 28))
    with pytest.raises(ValueError, match="at least one file"):
        read_images([], (1, 28, 28))


@pytest.mark.parametrize(
    "name",
    [name if name == "omniglot-5w1s" else pytest.param(name, marks=pytest.mark.long) for name in pretrained_names()],
)
def test_published_weights(name):
    """Their figure, on the data that their card names, to 0.3 points; and the card is theirs."""
    weights = read_weights(name)
    file = Path(__file__).parents[1] / "imaml_ext" / "pretrained" / "weights" / name
    assert file.with_suffix(".md").read_text() == weights.card.to_markdown(
        name, weights.algorithm, shared_head=weights.shared_head
    )
    if weights.card.data["kind"] == "omniglot" and not os.environ.get("IMAML_DATA_ROOT"):
        pytest.skip("IMAML_DATA_ROOT is not set: it names the folder of the real data")
    expected = weights.card.test["first"]  # all of them take minutes, 20-way tasks most
    found = evaluate_pretrained(name, {"run.device": "cpu", "evaluation.tasks": expected["tasks"]})
    assert found.tasks == expected["tasks"]
    assert found.accuracy == pytest.approx(expected["accuracy"], abs=0.003)
    # They are tasks like the others: the mean of so many lies within six standard deviations.
    test = weights.card.test
    apart = abs(expected["accuracy"] - test["accuracy"])
    assert apart <= 3 * test["accuracy_interval"] * (test["tasks"] / expected["tasks"]) ** 0.5
