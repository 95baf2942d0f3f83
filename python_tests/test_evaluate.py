"""`imaml evaluate`: any weights on any data, class by class, one query alone, in a log, and stopped."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_tools import assert_one_sentence, environment, imaml, imaml_command, small_config

from imaml_ext.data import Folder, Glyphs
from imaml_ext.errors import ConfigError
from imaml_ext.models import Conv4
from imaml_ext.pictures import Reading
from imaml_ext.pretrained import load_pretrained, read_weights
from imaml_ext.train import Tasks, build, evaluate, evaluate_pretrained, export_run, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on glyphs, 3-way 2-shot, and its weights beside it in weights.safetensors."""
    folder = tmp_path_factory.mktemp("evaluate")
    changes = {"data": Glyphs(), "tasks": Tasks(ways=3, shots=2, queries=4), "model": Conv4(filters=4)}
    train(replace(small_config(steps=2), **changes), folder / "run", recipe="mine")
    export_run(folder / "run", folder / "weights.safetensors")
    return folder / "run"


@pytest.fixture(scope="module")
def weights(run: Path) -> Path:
    return run.with_name("weights.safetensors")


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six classes of pictures, five of each: strokes in colour on paper."""
    folder, rng = tmp_path_factory.mktemp("birds"), np.random.default_rng(torch.randint(1 << 30, ()).item())
    for name in ("ant", "bee", "cat", "dog", "elk", "fox"):
        (folder / name).mkdir()
        for number in range(5):
            pixels = np.full((30, 40, 3), 240, np.uint8)
            top, left = rng.integers(2, 18, 2)
            pixels[top : top + 9, left : left + 3 + number] = (90, 30, 20)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def written(output: Path, *arguments: object) -> dict:
    done = imaml("evaluate", *arguments, "--output", output)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


def test_one_query_is_judged_alone(weights: Path, tmp_path: Path) -> None:
    """As by a learner that is asked about one example at a time."""
    found = written(tmp_path / "a.json", "--pretrained", weights, "--no-transductive", "--tasks", 5, "--queries", 3)
    assert found["transductive"] is False
    config = replace(small_config(), data=Glyphs(), model=Conv4(filters=4), tasks=Tasks(ways=3, shots=2, queries=3))
    episodes = build(config).sampler("test", tasks=5, seed=found["seed"]).sample(0)
    learner, right, losses = load_pretrained(weights), [], []
    parts = (episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y)
    for x, y, query_x, query_y in zip(*parts, strict=True):
        adapted = learner.adapt(x, y)
        each = torch.cat([adapted.predict(query.unsqueeze(0)) for query in query_x])
        right.append((each.argmax(-1) == query_y).double().mean())
        losses.append(torch.nn.functional.nll_loss(each.log(), query_y))
    assert found["accuracy"] == pytest.approx(torch.stack(right).mean().item(), abs=1e-12)
    assert found["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    together = written(tmp_path / "b.json", "--pretrained", weights, "--tasks", 5, "--queries", 3)
    assert "transductive" not in together
    assert together["loss"] != found["loss"]


def test_the_accuracy_of_every_class(weights: Path, tmp_path: Path) -> None:
    arguments = ["--pretrained", weights, "--tasks", 40, "--seed", 3]
    found = written(tmp_path / "a.json", *arguments, "--per-class")
    classes = found.pop("per_class")
    plain = written(tmp_path / "b.json", *arguments)
    del found["command"], plain["command"]
    assert found == plain
    assert sum(each["queries"] for each in classes.values()) == 40 * 3 * 4
    right = sum(each["queries"] * each["accuracy"] for each in classes.values())
    assert right / (40 * 3 * 4) == pytest.approx(found["accuracy"], abs=1e-12)

    config = replace(small_config(), data=Glyphs(), model=Conv4(filters=4), tasks=Tasks(ways=3, shots=2, queries=4))
    sampler = build(config).sampler("test", tasks=40, seed=3)
    drawn, counts = np.unique(sampler.indices(0).classes, return_counts=True)
    names = [sampler.images.name(each) for each in drawn]
    assert {name: each["queries"] for name, each in classes.items()} == dict(zip(names, 4 * counts, strict=True))

    table = imaml("evaluate", *arguments, "--per-class").stdout.splitlines()
    assert re.fullmatch(rf"{len(classes)} classes, the lowest accuracy first:", table[2])
    assert len(table) == 4 + min(40, len(classes))
    worst = table[4].rsplit(maxsplit=3)
    assert classes[worst[0].strip()]["accuracy"] == min(each["accuracy"] for each in classes.values())
    sine = build(small_config())
    with pytest.raises(ConfigError, match="per_class must be false for sinusoid"):
        evaluate(sine, sine.initial_params(), split="test", tasks=2, seed=0, per_class=True)


def halved(root: Path, cache: Path) -> list[object]:
    """The options for pictures in a folder, half of whose classes test."""
    places = ["--data", "folder", "--data.root", root, "--data.cache-dir", cache]
    return [*places, "--data.test-fraction", 0.5, "--data.split-by", "rank"]


def test_weights_on_another_data_set(weights: Path, birds: Path, tmp_path: Path) -> None:
    """Its pictures are read as the card of the weights says, unless an option says otherwise."""
    folder = halved(birds, tmp_path)
    tasks = ["--tasks", 6, "--shots", 1, "--queries", 2]
    found = written(tmp_path / "a.json", "--pretrained", weights, *folder, *tasks)
    card = read_weights(weights).card
    assert card.reading == Reading(size=28, colours="ink", square="ink", margin=0.2)
    data = Folder(root=birds, cache_dir=tmp_path, test_fraction=0.5, split_by="rank", pictures=card.reading)
    changes = {"data": data, "evaluation.tasks": 6, "tasks.shots": 1, "tasks.train_shots": None, "tasks.queries": 2}
    assert evaluate_pretrained(weights, changes).to_json() == {name: found[name] for name in found.keys() - _STAMP}
    wider = written(tmp_path / "b.json", "--pretrained", weights, *folder, *tasks, "--data.pictures.margin", 0.4)
    data = replace(data, pictures=replace(card.reading, margin=0.4))
    assert evaluate_pretrained(weights, changes | {"data": data}).loss == wider["loss"] != found["loss"]

    other = ["--data.pictures.colours", "rgb", "--data.pictures.square", "squeeze"]
    refused = imaml("evaluate", "--pretrained", weights, *folder, *other, *tasks)
    assert_one_sentence(refused, "an example of folder must be of shape 1 × 28 × 28 for the weights weights, got 3 ×")
    with pytest.raises(ConfigError, match="must be of shape 1 × 28 × 28"):
        evaluate_pretrained(weights, changes | {"data": replace(data, pictures=Reading(size=28, colours="rgb"))})


_STAMP = {"command", "environment"}


def test_a_run_on_another_data_set(run: Path, weights: Path, birds: Path, tmp_path: Path) -> None:
    folder = halved(birds, tmp_path)
    tasks = ["--tasks", 6, "--shots", 1, "--queries", 2]
    of_run = written(tmp_path / "a.json", run, *folder, *tasks)
    of_weights = written(tmp_path / "b.json", "--pretrained", weights, *folder, *tasks)
    assert of_run["loss"] == of_weights["loss"]
    refused = imaml("evaluate", run, *folder, *tasks, "--data.pictures.size", 40)
    assert_one_sentence(refused, "must be of shape 1 × 28 × 28 for the run", "got 1 × 40 × 40")
    train(small_config(steps=1), tmp_path / "other")
    refused = imaml("evaluate", "--output", tmp_path / "other", run)
    assert_one_sentence(refused, "are both runs: give the one to evaluate first")
    refused = imaml("evaluate", run, "--data", "sinusoid")
    assert_one_sentence(refused, "model must be 'mlp'")


def test_the_old_name_of_the_option_is_understood() -> None:
    refused = imaml("evaluate", "--pretrained", "omniglot-5w1s", "--data-root", "/nowhere")
    assert "the option --data-root is now --data.root" in refused.stderr
    assert "/nowhere" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_signal_ends_with_the_figure_so_far(weights: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Its progress is in the log before, and the result of the tasks that were judged is that of so many tasks."""
    output, log = tmp_path / "a.json", tmp_path / "log"
    arguments = ["evaluate", "--pretrained", weights, "--tasks", 100_000, "--output", output, "--meta-batch", 7]
    with log.open("w") as file:
        process = subprocess.Popen(
            imaml_command(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=file, text=True
        )
        while "evaluating" not in log.read_text():
            assert process.poll() is None
        process.send_signal(number)
        stdout, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + number
    found = json.loads(output.read_text())
    done = found["tasks"]
    assert re.search(r"evaluating \d+/100000 +accuracy [\d.]+ ± [\d.]+ %", log.read_text())
    assert f"stopped after {done} of 100000 tasks" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert stdout.startswith(f"test accuracy {100 * found['accuracy']:.2f} ± {100 * found['accuracy_interval']:.2f} % ")
    assert 2 <= done < 100_000
    assert evaluate_pretrained(weights, {"evaluation.tasks": done}).accuracy == pytest.approx(found["accuracy"])
