"""The command line in a process of its own."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_tools import SMALL, assert_one_sentence, environment, fastest_step, imaml, imaml_command, imaml_process

from imaml_ext.cli import COMMANDS
from imaml_ext.cli.train_options import training_options
from imaml_ext.data import DataSource, Sinusoid
from imaml_ext.inner import GradientDescent, NewtonCG
from imaml_ext.meta import MAML
from imaml_ext.models import MLP
from imaml_ext.reproduction import EXPERIMENTS
from imaml_ext.solvers import MINRES, Neumann
from imaml_ext.train.checkpoint import list_checkpoints, load_checkpoint
from imaml_ext.train.config import TrainConfig
from imaml_ext.train.recipe import load_recipe, recipe_names
from imaml_ext.train.run_directory import read_metrics


def _theta(run: Path) -> torch.Tensor:
    return load_checkpoint(list_checkpoints(run / "checkpoints")[-1]).params["theta"]


def _help(*arguments: object) -> str:
    shown = imaml(*arguments, "--help")
    assert shown.returncode == 0, shown.stderr
    return " ".join(shown.stdout.replace("│", " ").split())


def test_help_lists_commands_recipes_and_settings() -> None:
    top = imaml_process("--help")
    assert top.returncode == 0
    assert all(f"  {name} " in top.stdout and summary in top.stdout for name, summary in COMMANDS.items())
    recipes = imaml_process("train", "--help")
    assert recipes.returncode == 0
    names = recipe_names()
    assert len(names) == 14
    assert all(f"  {name} " in recipes.stdout for name in names)
    assert "on the built-in glyphs" in recipes.stdout
    settings = _help("train", "glyphs-5w1s")
    for words in (
        "5-way 1-shot on the built-in glyphs",
        "Accuracy: 96.7 ± 0.3 %",
        "--data {" + ",".join(DataSource.kinds) + "}",
        "--algorithm {imaml,maml,fomaml,reptile}",
        "--inner {gradient_descent,newton_cg}",
        "--linear-solver {cg,neumann,fixed_point,minres}",
        "--outer.lr FLOAT",
        "(default: 0.003)",
        "--lam FLOAT",
        "--learn [NAME VALUE ...]",
    ):
        assert words in settings, words
    for hidden in ("--model.ways", "--model.in-channels", "--loss"):  # the data decide them, or nobody
        assert hidden not in settings
    assert all(f"  {name} " in imaml("reproduce", "--help").stdout for name in EXPERIMENTS)
    assert all(f"  {name} " in imaml("data", "--help").stdout for name in DataSource.kinds)


def test_the_help_of_training_fits_a_screen() -> None:
    lines = imaml("train", "--help").stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100


def test_the_help_of_every_command_is_shown() -> None:
    assert "--pretrained" in _help("evaluate")
    assert "--commit" in _help("export")
    assert "imaml runs compare RUN RUN" in _help("runs")
    assert "--json" in _help("runs", "compare")
    assert "--output" in _help("runs", "plot")
    assert "--condition-numbers" in _help("reproduce", "exactness")
    assert "--root" in _help("data", "omniglot")
    assert "versions" in _help("doctor")


@pytest.mark.parametrize("statement", ["from imaml_ext.cli import main; main(['--help'])", "import imaml_ext"])
def test_what_must_be_quick_imports_no_torch(statement: str) -> None:
    check = "import sys; assert not {'torch', 'numpy', 'tyro', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{statement}; {check}"], env=environment(), check=True, capture_output=True)


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    for arguments in (("--help",), ("train", "--help"), ("train", "glyphs-5w1s", "--help"), ("data", "glyphs")):
        process = subprocess.Popen(
            imaml_command(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.close()
        _, stderr = process.communicate(timeout=600)
        assert process.returncode == 0
        assert stderr == ""


class TestSlots:
    """What `imaml train` makes of a command line."""

    @staticmethod
    def _config(recipe: str, *arguments: str) -> TrainConfig:
        return training_options(recipe, load_recipe(recipe).config, list(arguments)).config

    def test_a_class_is_chosen_and_takes_what_both_have(self) -> None:
        config = self._config("glyphs-5w1s", "--inner", "newton_cg", "--inner.linear-solver.max-iterations=3")
        inner = config.algorithm.inner
        assert inner == NewtonCG(steps=5, linear_solver=replace(NewtonCG().linear_solver, max_iterations=3))
        assert config.algorithm.lam == 0.1
        solved = self._config("glyphs-5w1s", "--linear-solver=neumann", "--linear-solver.max-iterations", "7")
        assert solved.algorithm.linear_solver == Neumann(max_iterations=7)
        nested = self._config("glyphs-5w1s", "--inner.linear-solver", "minres", "--inner", "newton_cg")
        assert isinstance(nested.algorithm.inner.linear_solver, MINRES)
        for last in (["--linear_solver", "neumann"], ["--linear-solver=minres", "--linear-solver", "neumann"]):
            assert self._config("glyphs-5w1s", *last).algorithm.linear_solver == Neumann()

    def test_classes_that_belong_together_are_chosen_together(self) -> None:
        config = self._config("glyphs-5w1s", "--data", "sinusoid", "--model", "mlp", "--model.hidden", "8", "8")
        assert (config.data, config.model) == (Sinusoid(), MLP(hidden=(8, 8)))

    def test_another_algorithm(self) -> None:
        config = self._config("glyphs-5w1s", "--algorithm", "maml", "--checkpoint", "--learn", "lam", "tensor")
        expected = MAML(lam=0.1, inner=GradientDescent(steps=5, lr=0.4), checkpoint=True, learn={"lam": "tensor"})
        assert config.algorithm == expected
        assert self._config("glyphs-5w1s", "--inner.lr-of", "linear.*", "0.5").algorithm.inner.lr_of == {
            "linear.*": 0.5
        }

    def test_nothing_given_changes_nothing(self) -> None:
        for name in ("glyphs-5w1s", "sinusoid"):
            assert self._config(name) == load_recipe(name).config

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("--inner.lam 0.5", "--lam 0.5"),
            ("--inner.lam=0.5", "--lam 0.5"),
            ("--data.ways 3 --data.shots 2 --data.queries=4", "--tasks.ways 3 --tasks.shots 2 --tasks.queries 4"),
            ("--data.name sinusoid --model.name mlp", "--data sinusoid --model mlp"),
            ("--meta.cg-steps 2 --meta.damping 1", "--linear-solver.max-iterations 2 --damping 1"),
            ("--meta.solver neumann", "--linear-solver neumann"),
            ("--meta.negative-curvature skip", "--on-breakdown skip"),
            ("--meta.algorithm maml --meta.checkpoint-steps", "--algorithm maml --checkpoint"),
            ("--meta.learn-lam layer --outer.lam-lr 0.1", "--learn lam tensor --outer.learnt-lr 0.1"),
            ("--meta.learn-lam none", "--learn"),
            (
                "--inner.solver hessian_free --inner.cg-steps 2",
                "--inner newton_cg --inner.linear-solver.max-iterations 2",
            ),
            ("--inner.solver=hessian_free", "--inner newton_cg"),
            ("--inner.proximal pullback", "--inner.proximal after"),
            ("--model.head shared --model.weights x", "--theta.shared-head --theta.weights x"),
            ("--resume --checkpoint a.pt", "--resume --from-checkpoint a.pt"),
        ],
    )
    def test_old_names_are_understood(self, capsys: pytest.CaptureFixture[str], old: str, new: str) -> None:
        config = load_recipe("glyphs-5w1s").config
        before = training_options("glyphs-5w1s", config, old.split())
        warned = capsys.readouterr().err
        after = training_options("glyphs-5w1s", config, new.split())
        assert capsys.readouterr().err == ""
        assert before == after
        flags = [word.partition("=")[0] for word in old.split() if word.startswith("--") and word != "--resume"]
        assert [line.split()[3] for line in warned.splitlines()] == flags


def test_a_recipe_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "my_sine.py").write_text(
        '"""Sine waves of mine.\n\nCommand: imaml train my_sine.py\n"""\n'
        "from imaml_ext.recipes import sinusoid\n"
        "from imaml_ext.settings import changed\n"
        "from imaml_ext.train.recipe import Recipe\n"
        'recipe = Recipe(changed(sinusoid.recipe.config, {"outer.steps": 3}))\n'
    )
    assert "Sine waves of mine." in _help("train", tmp_path / "my_sine.py")
    done = imaml("train", tmp_path / "my_sine.py", *SMALL, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["recipe"], result["steps"]) == ("my-sine", 3)
    assert_one_sentence(imaml("train", tmp_path / "none.py"), "none.py")
    (tmp_path / "empty.py").write_text("")
    assert_one_sentence(imaml("train", tmp_path / "empty.py"), "recipe")


def test_a_run_with_the_settings_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = imaml("train", "sinusoid", *SMALL, "--outer.steps", 2, "--run-dir", "first")
    assert first.returncode == 0, first.stderr
    assert "(default: 2)" in _help("train", "first/config.json")
    second = imaml("train", "first/config.json", "--outer.steps", 3)
    assert second.returncode == 0, second.stderr
    recorded = [json.loads((tmp_path / run / "config.json").read_text()) for run in ("first", "runs/sinusoid")]
    assert recorded[1]["recipe"] == "sinusoid"
    steps = [each["config"]["outer"].pop("steps") for each in recorded]
    assert steps == [2, 3]
    assert recorded[0]["config"] == recorded[1]["config"]
    again = imaml("train", "first", "--resume", "--evaluation.tasks", 30)  # the run that is named, in its place
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "first" / "result.json").read_text())["test"]["tasks"] == 30
    assert_one_sentence(imaml("train", "first"), "runs/sinusoid is not empty")
    assert_one_sentence(imaml("train", "none.json"), "there is no recipe 'none.json'")
    assert imaml("train", "nowhere").returncode == 2


def test_train_evaluate_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = imaml_process("train", "sinusoid", "--outer.steps", 8, "--run-dir", run, *SMALL)
    assert trained.returncode == 0, trained.stderr
    assert "test mean squared error" in trained.stderr
    result = json.loads((run / "result.json").read_text())
    assert result["recipe"] == "sinusoid"
    assert result["command"].startswith("imaml train sinusoid --outer.steps 8")

    output = tmp_path / "evaluated.json"
    tested = imaml("evaluate", run, "--output", output)
    assert tested.returncode == 0, tested.stderr
    assert tested.stdout.startswith("test mean squared error")
    evaluated = json.loads(output.read_text())
    assert evaluated["loss"] == pytest.approx(result["test"]["loss"], rel=1e-6)
    assert evaluated.keys() == result["test"].keys() | {"command", "environment"}
    assert evaluated["command"] == f"imaml evaluate {run} --output {output}"
    assert evaluated["environment"] == result["environment"]

    again = imaml("train", "sinusoid", "--run-dir", run, "--resume")  # its own settings, not the recipe's
    assert again.returncode == 0, again.stderr
    assert json.loads((run / "result.json").read_text())["steps"] == 8

    other = imaml("train", "glyphs-5w1s", "--run-dir", run, "--resume")
    assert_one_sentence(other, "holds a run of the recipe 'sinusoid', not of 'glyphs-5w1s'")
    changed = imaml("train", "sinusoid", "--run-dir", run, "--resume", "--outer.lr", 0.5)
    assert_one_sentence(changed, "a resumed run keeps its settings: outer.lr was")


@pytest.mark.long
def test_killed_three_times_at_random_and_resumed(tmp_path: Path) -> None:
    """SIGKILL leaves no time for anything; the resumed run ends with the bits of one that was never interrupted."""
    steps = 240
    knobs = ["--outer.steps", steps, *SMALL, "--run.log-every", 7, "--run.checkpoint-every", 10]

    def command(name: str) -> list[str]:
        return imaml_command("train", "sinusoid", *knobs, "--run-dir", tmp_path / name, "--resume")

    subprocess.run(command("straight"), env=environment(), check=True, capture_output=True, timeout=600)

    moment = random.Random()  # a new moment at each run of the test
    within = 30 * fastest_step(tmp_path / "straight")  # seconds: three kills leave steps to be taken, however fast
    checkpoints, kills = tmp_path / "killed" / "checkpoints", 0
    while kills < 3:
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
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed three times"
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
    command = imaml_command("train", "sinusoid", *knobs, "--run-dir", run)
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
    run = imaml("train", "sinusoid", *knobs, "--outer.steps", 6, "--run.log-every", 2, "--run-dir", tmp_path / "run")
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

    for name in ("ant", "bee", "cat", "dog", "gnu", "fox"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (9, 9), (10 * number, 100, 200)).save(tmp_path / "mine" / name / f"{number}.png")
    options = ["--root", tmp_path / "mine", "--cache-dir", tmp_path / "cache", "--pictures.size", 12]
    described = imaml("data", "folder", *options, "--picture", tmp_path / "mine.png")
    assert described.returncode == 0, described.stderr
    assert "classification, one example: 3 × 12 × 12" in described.stdout
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")
    refused = imaml("data", "folder", *options, "--test-fraction", 0.01)
    assert_one_sentence(refused, "leave none for 'test' with --val-fraction 0.16 and --test-fraction 0.01")
    assert_one_sentence(imaml("data", "folder"), "root must be given")


def test_doctor() -> None:
    report = imaml("doctor")
    assert "Traceback" not in report.stderr
    assert torch.__version__ in report.stdout


def test_output_in_an_encoding_that_lacks_our_signs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    knobs = ["--outer.steps", 2, "--run-dir", run, *SMALL]

    def in_ascii(*arguments: object) -> str:
        done = subprocess.run(
            imaml_command(*arguments), env=environment(PYTHONIOENCODING="ascii"), capture_output=True, check=True
        )
        return (done.stdout + done.stderr).decode("ascii")

    assert re.search(r"test mean squared error [\d.]+ \+/- [\d.]+ \(20 tasks", in_ascii("train", "sinusoid", *knobs))
    assert "one example: 1 x 28 x 28" in in_ascii("data", "glyphs")
    assert "--inner.lr" in in_ascii("train", "sinusoid", "--help")
    odd = tmp_path / "h\udce9t\u00e9" / "\u2603"  # bytes that are no UTF-8, and signs that ASCII lacks
    refused = subprocess.run(
        imaml_command("predict", odd, odd), env=environment(PYTHONIOENCODING="ascii"), capture_output=True, check=False
    )
    assert refused.returncode == 1
    assert rb"h\udce9t\xe9/\u2603 must be a folder of folders" in refused.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_leaves_ends_the_command_quietly(stream: str, tmp_path: Path) -> None:
    """As in `imaml … | head`, or `imaml … 2>&1 | head` with the lines of a progress bar."""
    steps = ["--outer.steps", 200_000, "--run.log-every", 1, "--run-dir", tmp_path / "run"]
    commands = {
        "stdout": ("evaluate", "--pretrained", "omniglot-5w1s", "--data", "glyphs", "--tasks", 4, "--per-class"),
        "stderr": ("train", "sinusoid", *SMALL, *steps),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if stream == "stderr":
        pipes["stderr"] = subprocess.STDOUT
    process = subprocess.Popen(imaml_command(*commands[stream]), env=environment(), text=True, **pipes)
    assert process.stdout is not None
    if stream == "stderr":
        assert process.stdout.readline()
    process.stdout.close()
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0
    assert "Traceback" not in (stderr or "")
    assert "BrokenPipe" not in (stderr or "")
