"""What the training tests share: small configurations, and the command line in a process of its own."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import imaml_ext
from imaml_ext.cli import main
from imaml_ext.data import Glyphs, Sinusoid
from imaml_ext.data.omniglot import character_names
from imaml_ext.inner import GradientDescent
from imaml_ext.meta import IMAML
from imaml_ext.models import MLP, Conv4
from imaml_ext.train import EvaluationSettings, Outer, RunSettings, Tasks, TrainConfig
from imaml_ext.train.run_directory import read_metrics

# The options that turn a sinusoid recipe into a run of a second or two.
SMALL = [
    *("--model.hidden", "8", "8"),
    *("--inner.steps", "3"),
    *("--outer.meta-batch", "4"),
    *("--evaluation.tasks", "20"),
    *("--evaluation.every", "0"),
    *("--run.threads", "1"),
    *("--run.device", "cpu"),
    "--run.no-tensorboard",
]


def packed_omniglot() -> dict[str, np.ndarray]:
    """Makes a packed file's content, with empty pictures, but for one pixel that holds the drawer."""
    names = [name.split("/character") for name in character_names()]
    alphabets = list(dict.fromkeys(alphabet for alphabet, _ in names))
    drawer = np.tile(np.arange(1, 21, dtype=np.uint8), 1623)
    images = np.zeros((32460, 28, 28), np.uint8)
    images[:, 0, 0] = drawer
    return {
        "images": images,
        "alphabet": np.repeat(np.array([alphabets.index(a) for a, _ in names], np.uint8), 20),
        "character": np.repeat(np.array([int(n) for _, n in names], np.uint8), 20),
        "drawer": drawer,
        "alphabet_names": np.array(alphabets),
    }


def small_config(**outer: object) -> TrainConfig:
    """The same as a configuration, 12 meta-steps long."""
    return TrainConfig(
        data=Sinusoid(),
        tasks=Tasks(shots=5, queries=5),
        model=MLP(hidden=(8, 8)),
        algorithm=IMAML(lam=1.0, inner=GradientDescent(steps=3, lr=0.02), curvature="gauss_newton"),
        outer=replace(Outer(steps=12, meta_batch=4, lr=1e-2, schedule="cosine"), **outer),
        evaluation=EvaluationSettings(tasks=20),
        run=RunSettings(device="cpu", log_every=4, checkpoint_every=5, tensorboard=False),
    )


def glyphs_config() -> TrainConfig:
    """Six meta-steps on images, each of which is validated; it keeps its best."""
    return TrainConfig(
        data=Glyphs(),
        tasks=Tasks(ways=3, shots=1, queries=2),
        model=Conv4(filters=4),
        algorithm=IMAML(inner=GradientDescent(steps=2), curvature="gauss_newton"),
        outer=Outer(steps=6, meta_batch=2, lr=0.3),
        evaluation=EvaluationSettings(tasks=4, every=1, validation_tasks=6, keep_best=True),
        run=RunSettings(device="cpu", threads=1, tensorboard=False),
    )


@contextlib.contextmanager
def stopped_in(monkeypatch: pytest.MonkeyPatch, step: int) -> Iterator[list[int]]:
    """SIGTERM comes in that meta-step of IMAML from now on; gives the numbers of those that were begun."""
    begun: list[int] = []
    original = IMAML.meta_gradient

    def meta_gradient(self: IMAML, params: Any, episodes: Any) -> Any:
        begun.append(len(begun) + 1)
        if begun[-1] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, params, episodes)

    with monkeypatch.context() as patched:
        patched.setattr(IMAML, "meta_gradient", meta_gradient)
        yield begun


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child process: this package, one thread."""
    package = str(Path(imaml_ext.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1", **extra}


def imaml_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "imaml_ext", *map(str, arguments)]


def imaml(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which is quicker than starting Python and torch for each."""
    out, err = io.StringIO(), io.StringIO()
    words = list(map(str, arguments))
    threads = torch.get_num_threads()
    changed = {"COLUMNS": "100", "NO_COLOR": "1", **(env or {})}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(words)
            except SystemExit as end:  # of tyro
                code = int(end.code or 0)
    finally:
        torch.set_num_threads(threads)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def imaml_process(*arguments: object, limit_file_size: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own; `limit_file_size` bytes is the most that it may write to one file."""

    def limit() -> None:
        import resource

        if limit_file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_file_size, limit_file_size))

    return subprocess.run(
        imaml_command(*arguments),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        preexec_fn=limit if limit_file_size is not None else None,
    )


def fastest_step(run: Path) -> float:
    """Seconds per meta-step in the fastest stretch of a run's log: what a step takes at least on this machine."""
    times = [(row["step"], row["seconds"]) for row in read_metrics(run / "metrics.jsonl")]
    return min((after - before) / (last - first) for (first, before), (last, after) in pairwise(times))


def assert_one_sentence(process: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command failed by one line on stderr that has these words, exit code 1, and no traceback."""
    assert process.returncode == 1, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("imaml: ")]
    assert len(lines) == 1, process.stderr
    assert "Traceback" not in process.stderr
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
