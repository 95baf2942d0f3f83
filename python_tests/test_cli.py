"""The command line in a process of its own."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from training_tools import SMALL, assert_one_sentence, environment, fastest_step, imaml, imaml_command, imaml_process

from imaml_ext.training import PRESETS
from imaml_ext.training.checkpoint import list_checkpoints, load_checkpoint
from imaml_ext.training.run_directory import read_metrics


def _theta(run: Path) -> torch.Tensor:
    return load_checkpoint(list_checkpoints(run / "checkpoints")[-1]).theta


def test_help_lists_commands_presets_and_knobs() -> None:
    top = imaml_process("--help")
    assert top.returncode == 0
    assert all(command in top.stdout for command in ("train", "evaluate", "data", "doctor"))
    presets = imaml("train", "--help")
    assert presets.returncode == 0
    assert all(name in presets.stdout for name in PRESETS)
    knobs = imaml("train", "glyphs-5w1s", "--help")
    assert knobs.returncode == 0
    assert "--outer.lr" in knobs.stdout
    assert "Peak outer learning rate." in knobs.stdout


def test_train_evaluate_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = imaml_process("train", "sinusoid-5shot", "--outer.steps", 8, "--run-dir", run, *SMALL)
    assert trained.returncode == 0, trained.stderr
    assert "test mean squared error" in trained.stderr
    result = json.loads((run / "result.json").read_text())
    assert result["preset"] == "sinusoid-5shot"
    assert result["command"].startswith("imaml train sinusoid-5shot --outer.steps 8")

    output = tmp_path / "evaluated.json"
    tested = imaml("evaluate", run, "--output", output)
    assert tested.returncode == 0, tested.stderr
    assert tested.stdout.startswith("test mean squared error")
    evaluated = json.loads(output.read_text())
    assert evaluated["loss"] == pytest.approx(result["test"]["loss"], rel=1e-6)
    assert evaluated.keys() == result["test"].keys() | {"command", "environment"}
    assert evaluated["command"] == f"imaml evaluate {run} --output {output}"
    assert evaluated["environment"] == result["environment"]

    again = imaml("train", "sinusoid-5shot", "--run-dir", run, "--resume")  # its own settings, not the preset's
    assert again.returncode == 0, again.stderr
    assert json.loads((run / "result.json").read_text())["steps"] == 8

    other = imaml("train", "sinusoid-10shot", "--run-dir", run, "--resume")
    assert_one_sentence(other, "holds a run of the preset 'sinusoid-5shot', not of 'sinusoid-10shot'")
    changed = imaml("train", "sinusoid-5shot", "--run-dir", run, "--resume", "--outer.lr", 0.5)
    assert_one_sentence(changed, "a resumed run keeps its settings: outer.lr was")


@pytest.mark.long
def test_killed_five_times_at_random_and_resumed(tmp_path: Path) -> None:
    """SIGKILL leaves no time for anything; the resumed run ends with the bits of one that was never interrupted."""
    steps = 400
    knobs = ["--outer.steps", steps, *SMALL, "--run.log-every", 7, "--run.checkpoint-every", 10]

    def command(name: str) -> list[str]:
        return imaml_command("train", "sinusoid-5shot", *knobs, "--run-dir", tmp_path / name, "--resume")

    subprocess.run(command("straight"), env=environment(), check=True, capture_output=True, timeout=600)

    moment = random.Random()  # a new moment at each run of the test
    within = 30 * fastest_step(tmp_path / "straight")  # seconds: five kills leave steps to be taken, however fast
    checkpoints, kills = tmp_path / "killed" / "checkpoints", 0
    while kills < 5:
        before = len(list_checkpoints(checkpoints)) and list_checkpoints(checkpoints)[-1].name
        process = subprocess.Popen(command("killed"), env=environment(), stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and process.poll() is None:  # until it is past where it was
                now = list_checkpoints(checkpoints)
                if now and now[-1].name != before:
                    break
                time.sleep(0.005)
            time.sleep(moment.uniform(0, within))
        finally:
            process.kill()
            process.wait()
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed five times"
        kills += 1
        assert list_checkpoints(checkpoints)[-1].stat().st_size > 0
    assert load_checkpoint(list_checkpoints(checkpoints)[-1]).step < steps
    subprocess.run(command("killed"), env=environment(), check=True, capture_output=True, timeout=600)

    assert torch.equal(_theta(tmp_path / "straight"), _theta(tmp_path / "killed"))
    logged = [row["step"] for row in read_metrics(tmp_path / "killed" / "metrics.jsonl")]
    assert logged == [*range(7, steps, 7), steps]
    straight, killed = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("straight", "killed"))
    assert straight["test"] == killed["test"]
    assert not list((tmp_path / "killed").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)]
)
def test_a_signal_saves_and_ends(tmp_path: Path, number: signal.Signals, code: int) -> None:
    knobs = [*SMALL, "--outer.steps", 100_000, "--run.log-every", 5]
    run = tmp_path / "run"
    command = imaml_command("train", "sinusoid-5shot", *knobs, "--run-dir", run)
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and len(read_metrics(run / "metrics.jsonl")) < 2:
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    saved = load_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    assert saved.step >= 10
    assert f"stopped after step {saved.step}; continue with --resume" in stderr
    assert all(row["step"] <= saved.step for row in read_metrics(run / "metrics.jsonl"))


def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    knobs = [knob for knob in SMALL if knob != "--run.no-tensorboard"]
    run = imaml(
        "train", "sinusoid-5shot", *knobs, "--outer.steps", 6, "--run.log-every", 2, "--run-dir", tmp_path / "run"
    )
    assert run.returncode == 0, run.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("query/query_loss")] == [2, 4, 6]


def test_data_describes_a_data_set(tmp_path: Path) -> None:
    described = imaml("data", "glyphs", "--picture", tmp_path / "glyphs.png")
    assert described.returncode == 0, described.stderr
    assert all(split in described.stdout for split in ("train", "val", "test"))
    assert (tmp_path / "glyphs.png").read_bytes().startswith(b"\x89PNG")


def test_data_describes_a_folder_of_pictures(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("ant", "bee", "cat", "dog", "elk", "fox"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (9, 9), (10 * number, 100, 200)).save(tmp_path / "mine" / name / f"{number}.png")
    options = ["--root", tmp_path / "mine", "--cache-dir", tmp_path / "cache", "--image-size", 12]
    described = imaml("data", "folder", *options, "--picture", tmp_path / "mine.png")
    assert described.returncode == 0, described.stderr
    assert "classification, one example: 3 × 12 × 12" in described.stdout
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")
    refused = imaml("data", "folder", *options, "--val-fraction", 0.01)
    assert_one_sentence(refused, "holds 6 classes, which leaves none for 'val'")
    assert_one_sentence(imaml("data", "folder"), "root must be given")
    assert_one_sentence(imaml("data", "glyphs", "--greyscale"), "data.greyscale must be left out for the data set 'gly")


def test_doctor() -> None:
    report = imaml("doctor")
    assert "Traceback" not in report.stderr
    assert torch.__version__ in report.stdout
