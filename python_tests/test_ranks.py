"""Training over several processes, started by torchrun: the same numbers, the same decisions, and no harm by a kill."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks_worker
import torch
from training_tools import SMALL, environment, fastest_step, files_of, small_config

from imaml_ext.errors import Interrupted
from imaml_ext.train import build, evaluate_run, train
from imaml_ext.train.checkpoint import list_checkpoints, load_checkpoint
from imaml_ext.train.job import joined
from imaml_ext.train.ranks import Ranks
from imaml_ext.train.run_directory import RunDirectory, read_config, read_metrics

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is a build without distributed")

_TIMEOUT = 600  # seconds; of a job that takes a few on an idle machine
_TIMES = {"seconds", "tasks_per_second"}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torchrun(processes: int, *program: object, restarts: int = 0) -> subprocess.Popen[str]:
    """Start a job on this machine, on a port of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command = [*launcher, "--max-restarts", restarts, *program]
    return subprocess.Popen(
        list(map(str, command)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(job: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a job; one that hangs is killed, with its processes, and fails the test."""
    try:
        out, err = job.communicate(timeout=_TIMEOUT)
    finally:
        if job.poll() is None:
            for pid in ranks_of(job):
                os.kill(pid, signal.SIGKILL)
            job.kill()
            job.wait()
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


def ranks_of(job: subprocess.Popen[str]) -> list[int]:
    """The process ids of a job's ranks."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if parent == job.pid and b"torch.distributed.run" not in command and len(command) > 2:
            found.append(int(folder.name))
    return sorted(found)


def wait_for(condition: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while not condition():
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def told(process: subprocess.CompletedProcess[str]) -> list[str]:
    """What the command itself says of its end; the rest is the launcher's."""
    lines = process.stderr.splitlines()
    assert not [line for line in lines if line.lstrip().startswith('File "') and "imaml_ext" in line]  # no traceback
    return [line for line in lines if line.startswith("imaml: ")]


def rows(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in _TIMES} for row in read_metrics(run / "metrics.jsonl")]


def final(run: Path) -> dict[str, Any]:
    return vars(load_checkpoint(list_checkpoints(run / "checkpoints")[-1]))


def close(one: Any, other: Any, *, rtol: float, atol: float = 0.0) -> None:
    torch.testing.assert_close(one, other, rtol=rtol, atol=atol, equal_nan=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that the others are compared with, and the first half of it."""
    folder = tmp_path_factory.mktemp("alone")
    train(ranks_worker.trained_config(), folder / "straight")
    shutil.copytree(folder / "straight", folder / "half")
    newest = list_checkpoints(folder / "half" / "checkpoints")[-1]
    newest.unlink()
    return folder


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.long)])
def job(request: pytest.FixtureRequest, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What every rank of a job of several processes has found; and the job's folder."""
    folder = tmp_path_factory.mktemp(f"job-{request.param}")
    shutil.copytree(alone / "half", folder / "of-one-process")
    process = ended(torchrun(request.param, Path(ranks_worker.__file__), folder))
    assert process.returncode == 0, process.stderr
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(request.param)], folder


@pytest.mark.parametrize("name", ranks_worker.ALGORITHMS)
def test_the_meta_gradient_is_that_of_one_process(job: Any, name: str) -> None:
    alone = ranks_worker.meta_gradient(name, Ranks())
    for found in job[0]:
        meta = found["meta"][name]
        for part in ("gradients", "carried"):
            assert meta[part].keys() == alone[part].keys()
            for parameter, value in alone[part].items():
                close(meta[part][parameter], value, rtol=1e-6, atol=1e-12)
                assert torch.equal(meta[part][parameter], job[0][0]["meta"][name][part][parameter])
        assert int(meta["counted"]) == int(alone["counted"])
        assert meta["metrics"].keys() == alone["metrics"].keys()
        for metric, value in alone["metrics"].items():
            close(meta["metrics"][metric].double(), value.double(), rtol=1e-6, atol=1e-12)
    counts = int(alone["counted"])
    assert counts == ranks_worker.TASKS - ("left out" in name)
    assert all(value.isfinite().all() for value in alone["gradients"].values())


def test_the_evaluation_is_that_of_one_process_to_the_bit(job: Any) -> None:
    alone = ranks_worker.evaluation(Ranks())
    assert all(found["evaluation"] == alone for found in job[0])


def test_two_hundred_steps_agree_with_one_process(job: Any, alone: Path) -> None:
    one, several = final(alone / "straight"), final(job[1] / "straight")
    for kind, names in (("params", ["theta", "log_lam"]), ("averages", ["theta", "log_lam"])):
        assert list(several[kind]) == list(one[kind]) == names
        for name in names:
            close(several[kind][name], one[kind][name], rtol=1e-4, atol=1e-4)
    assert not torch.equal(one["params"]["theta"], build(ranks_worker.trained_config()).initial_params()["theta"])
    for mine, theirs in zip(rows(job[1] / "straight"), rows(alone / "straight"), strict=True):
        assert mine.keys() == theirs.keys()
        assert mine["step"] == theirs["step"]
        assert mine["query_loss"] == pytest.approx(theirs["query_loss"], rel=1e-4)
    results = [found["result"] for found in job[0]]
    assert all(result == results[0] for result in results)
    assert results[0] == json.loads((job[1] / "straight" / "result.json").read_text())
    assert results[0]["environment"]["processes"] == len(results)
    assert (job[1] / "straight" / "episodes.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_one_process_is_resumed_by_several(job: Any, alone: Path) -> None:
    assert final(job[1] / "of-one-process")["step"] == 200
    ours, expected = (final(path)["params"] for path in (job[1] / "of-one-process", alone / "straight"))
    close(ours, expected, rtol=1e-4, atol=1e-4)
    steps = [row["step"] for row in rows(job[1] / "of-one-process")]
    assert steps == [row["step"] for row in rows(alone / "straight")]


def test_stages_follow_each_other(job: Any, tmp_path: Path) -> None:
    results = [found["staged"] for found in job[0]]
    assert all(result == results[0] for result in results)
    alone = ranks_worker.staged(tmp_path)
    assert results[0]["test"]["loss"] == pytest.approx(alone["test"]["loss"], rel=1e-4)
    for stage in ("1-first", "2-second"):
        ours, expected = (final(path / "stages" / stage)["params"] for path in (job[1], tmp_path))
        close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_best_is_chosen_by_all_alike(job: Any) -> None:
    straight, stopped = job[1] / "best", job[1] / "best-stopped"
    losses = {row["step"]: row["val_loss"] for row in rows(straight) if "val_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert best < max(losses) < 40  # it has stopped early, and is not judged by its last step
    assert max(losses) - best == 3 * 2  # as many validations as its patience
    for found in job[0]:
        for result in found["best"]:
            assert result["best"] == {"step": best, "val_loss": losses[best]}
            assert result["steps"] == max(losses)
            assert result["test"] == found["best"][0]["test"]
        assert found["best"][0] == job[0][0]["best"][0]
    assert rows(straight) == rows(stopped)
    ends = [final(run) for run in (straight, stopped)]
    assert torch.equal(ends[0]["params"]["theta"], ends[1]["params"]["theta"])
    kept = evaluate_run(straight)  # by this process
    assert kept.to_json() == job[0][0]["best"][0]["test"]
    assert kept != evaluate_run(straight, checkpoint=list_checkpoints(straight / "checkpoints")[-1])


def test_every_rank_decides_alike(job: Any) -> None:
    found, folder = job
    size = len(found)
    assert [each["maximum"] for each in found] == [10 * (size - 1)] * size
    assert [each["on first"] for each in found] == [0] * size
    failures = {name: [each["failures"][name] for each in found] for name in found[0]["failures"]}
    assert [kind for kind, _ in failures["first"]] == ["ValueError"] + ["ReportedElsewhere"] * (size - 1)
    assert [kind for kind, _ in failures["one"]].index("ValueError") == 1
    assert {words for _, words in failures["one"]} == {"rank 1 cannot"}
    message = "every process must run the same: outer.lr is 0.1 on rank 0, 0.2 on rank 1"
    assert {words for _, words in failures["settings"]} == {message}
    assert [kind for kind, _ in failures["settings"]] == ["RunError"] + ["ReportedElsewhere"] * (size - 1)
    message = f"outer.meta_batch must be at least {size}, a task for every process, got 1"
    assert {words for _, words in failures["tasks"]} == {message}
    assert not (folder / "none").exists()


def test_no_thread_of_the_job_is_left(job: Any) -> None:
    """One that has yet to let go of a tensor when Python ends takes the process with it, once in many runs."""
    for found in job[0]:
        assert not [name for name in found["threads"] if "gloo" in name]


def test_one_process_is_left_as_it_is() -> None:
    before = "imaml_ext.train.process_group" in sys.modules
    with joined() as ranks:
        assert type(ranks) is Ranks
        meta = ranks_worker.meta_gradient("imaml", ranks)
    assert ("imaml_ext.train.process_group" in sys.modules) == before
    experiment = build(ranks_worker.config_of("imaml"))
    episodes = experiment.sampler("train", tasks=ranks_worker.TASKS, seed=0).sample(7)
    expected = experiment.algorithm.meta_gradient(experiment.initial_params(), episodes)
    assert torch.equal(meta["gradients"]["theta"], expected.gradient)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--run-dir", "{mine}"), 1, "is not empty: continue its run with --resume, or give another --run-dir"),
        (("--outer.lr", "fast", "--run-dir", "{run}"), 2, "Error parsing --outer.lr"),
    ],
)
def test_an_error_is_told_once(tmp_path: Path, options: tuple[str, ...], code: int, words: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    places = {"mine": tmp_path / "mine", "run": tmp_path / "run"}
    given = [option.format(**places) for option in options]
    process = ended(torchrun(2, "-m", "imaml_ext", "train", "sinusoid", *SMALL, *given))
    assert process.returncode != 0
    assert process.stderr.count(words) == 1, process.stderr
    assert f"exitcode  : {code} " in process.stderr
    assert files_of(tmp_path) == {"mine/thesis.tex": b"years"}


@pytest.mark.parametrize("to", ["launcher", pytest.param("rank 1", marks=pytest.mark.long)])
def test_sigterm_saves_and_a_single_process_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    run = tmp_path / "run"
    options = [*SMALL, "--outer.steps", 100_000, "--run.log-every", 5, "--run.checkpoint-every", 100_000]
    job = torchrun(2, "-m", "imaml_ext", "train", "sinusoid", *options, "--run-dir", run)
    wait_for(lambda: len(read_metrics(run / "metrics.jsonl")) >= 2, job)
    os.kill(job.pid if to == "launcher" else ranks_of(job)[1], signal.SIGTERM)
    process = ended(job)
    assert process.returncode != 0
    saved = load_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    assert saved.step >= 10
    assert told(process) == [f"imaml: stopped after step {saved.step}; continue with --resume"]
    assert not list(run.rglob("*.tmp"))

    recorded = json.loads((run / "config.json").read_text())
    config = read_config(RunDirectory(run)).config
    assert recorded["environment"]["processes"] == 2
    theta = build(config).initial_params()["theta"]
    monkeypatch.setattr(Ranks, "maximum", lambda self, number: signal.SIGINT)  # after one more step
    with pytest.raises(Interrupted):
        train(config, run, recipe="sinusoid", resume=True)
    resumed = final(run)
    assert resumed["step"] == saved.step + 1
    assert not torch.equal(resumed["params"]["theta"], theta)


@pytest.mark.long
def test_killed_four_times_at_random(tmp_path: Path) -> None:
    """SIGKILL to either rank, at any moment; three times the launcher starts the job anew, and then gives up."""
    steps, kills = 200, 4
    options = [*SMALL, "--outer.steps", steps, "--run.log-every", 7, "--run.checkpoint-every", 10]

    def start(name: str, restarts: int = 0) -> subprocess.Popen[str]:
        program = ["-m", "imaml_ext", "train", "sinusoid", *options, "--run-dir", tmp_path / name, "--resume"]
        return torchrun(2, *program, restarts=restarts)

    process = ended(start("straight"))
    assert process.returncode == 0, process.stderr

    moment = random.Random()  # another one at each run of the test
    within = 15 * fastest_step(tmp_path / "straight")  # seconds: the kills leave steps to be taken, however fast
    checkpoints = tmp_path / "killed" / "checkpoints"
    job = start("killed", restarts=kills - 1)
    seen: list[int] = []
    for _ in range(kills):
        before = [path.name for path in list_checkpoints(checkpoints)]
        wait_for(lambda before=before: [path.name for path in list_checkpoints(checkpoints)] != before, job)  # type: ignore[misc]
        time.sleep(moment.uniform(0, within))
        killed = ranks_of(job)
        os.kill(moment.choice(killed), signal.SIGKILL)
        wait_for_end = time.monotonic() + 120  # of both: the one that was killed, and the one that has lost it
        while any(Path(f"/proc/{pid}/cmdline").exists() for pid in killed):
            assert time.monotonic() < wait_for_end, "a rank outlives the other"
            time.sleep(0.005)
        seen.append(load_checkpoint(list_checkpoints(checkpoints)[-1]).step)  # whole, whenever the kill came
    process = ended(job)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in process.stderr
    lost = told(process)
    assert 0 < len(lost) <= kills
    assert all("another process of the job has ended" in line and "--resume continues" in line for line in lost)
    assert seen == sorted(set(seen))
    assert seen[-1] < steps, "the run ended before it was killed four times"

    process = ended(start("killed"))
    assert process.returncode == 0, process.stderr
    straight, resumed = final(tmp_path / "straight"), final(tmp_path / "killed")
    assert resumed["step"] == steps
    assert torch.equal(straight["params"]["theta"], resumed["params"]["theta"])
    for name, value in straight["optimizer"]["state"][0].items():
        assert torch.equal(value, resumed["optimizer"]["state"][0][name]), name
    assert rows(tmp_path / "straight") == rows(tmp_path / "killed")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("straight", "killed")]
    assert results[0]["test"] == results[1]["test"]
    assert not list((tmp_path / "killed").rglob("*.tmp"))


def test_what_runs_in_one_process_says_so(tmp_path: Path) -> None:
    train(small_config(steps=2), tmp_path / "run")
    before = files_of(tmp_path / "run")
    process = ended(torchrun(2, "-m", "imaml_ext", "evaluate", tmp_path / "run", "--output", tmp_path / "out.json"))
    assert told(process) == ["imaml: imaml evaluate runs in one process: start it without torchrun"]
    assert files_of(tmp_path / "run") == before
    assert not (tmp_path / "out.json").exists()
