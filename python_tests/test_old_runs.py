"""Runs that version 0.1 began go on as if nothing had happened; the files in old_runs/ are its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from imaml_ext.errors import ConfigError, RunError
from imaml_ext.inner import NewtonCG
from imaml_ext.meta import IMAML
from imaml_ext.models import Conv4
from imaml_ext.solvers import CG, Neumann
from imaml_ext.train import TrainConfig, evaluate_run, train
from imaml_ext.train.checkpoint import load_checkpoint
from imaml_ext.train.environment import environment
from imaml_ext.train.legacy import config_from_old
from imaml_ext.train.run_directory import RunDirectory, read_config, read_metrics

_OLD = Path(__file__).with_name("old_runs")
_NAMES = sorted(path.name for path in _OLD.iterdir() if path.is_dir())


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _copy(name: str, path: Path) -> dict[str, Any]:
    """Lays an old run into a run directory; returns its end."""
    (path / "checkpoints").mkdir(parents=True)
    for file in ("config.json", "metrics.jsonl"):
        shutil.copy(_OLD / name / file, path / file)
    shutil.copy(_OLD / name / "step-00000004.pt", path / "checkpoints")
    return torch.load(_OLD / name / "end.pt", weights_only=True)


def _same_bits(recorded: dict[str, Any]) -> bool:
    """Whether this is the kind of machine, and the torch, that the old runs are of."""
    here = environment(torch.device("cpu"))
    return all(here[name] == recorded[name] for name in ("torch", "cpu", "instructions", "system"))


@pytest.mark.parametrize("name", _NAMES)
def test_an_old_run_is_continued(name: str, tmp_path: Path) -> None:
    end = _copy(name, tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    exact = _same_bits(recorded["environment"])
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-4}
    config = read_config(RunDirectory(tmp_path / "run")).config
    result = train(config, tmp_path / "run", recipe=name, resume=True)
    final = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000008.pt")
    params = {"theta": end["theta"]} | ({} if end["log_lam"] is None else {"log_lam": end["log_lam"]})
    torch.testing.assert_close(final.params, params, **tolerance)
    averages = {} if end["average"] is None else {"theta": end["average"]}
    torch.testing.assert_close(final.averages, averages, **tolerance)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 6, 8]
    for row, expected in zip(rows, end["rows"], strict=True):
        assert set(row) - set(expected) == {"seconds", "tasks_per_second"}
        for metric, value in expected.items():
            assert row[metric] == (value if exact else pytest.approx(value, rel=1e-2, abs=1e-3)), metric
    assert result["test"] == (end["test"] if exact else result["test"] | {"tasks": end["test"]["tasks"]})
    assert evaluate_run(tmp_path / "run").to_json() == result["test"]


def _values(name: str) -> dict[str, Any]:
    return json.loads((_OLD / name / "config.json").read_text())["config"]


def test_old_knobs_are_settings_of_today() -> None:
    config = config_from_old(_values("hessian-free"))
    assert config.model == Conv4(filters=4)
    assert config.algorithm == IMAML(
        lam=0.5,
        inner=NewtonCG(steps=2, linear_solver=CG(max_iterations=2, rtol=0.0), curvature="gauss_newton", backtracks=4),
        linear_solver=Neumann(max_iterations=3, rtol=1e-5),
        damping=4.0,
        curvature="gauss_newton",
        on_breakdown="gradient",
    )
    learnt = config_from_old(_values("learnt-lambda"))
    assert learnt.algorithm.learn == {"lam": "tensor"}
    assert learnt.theta.shared_head
    assert learnt.theta.feature_scale == 2.0


def test_runs_of_before_there_were_photographs_are_read() -> None:
    values = _values("hessian-free")
    del values["augment"], values["run"]["capture"], values["model"]["weights"], values["inner"]["batch_size"]
    for knob in ("image_size", "greyscale", "val_fraction", "test_fraction"):
        del values["data"][knob]
    assert config_from_old(values) == config_from_old(_values("hessian-free"))


def test_what_cannot_be_continued_is_named(tmp_path: Path) -> None:
    values = _values("maml")
    values["outer"]["weight_decay"] = 0.1
    with pytest.raises(ConfigError, match=r"outer\.weight_decay was 0\.1 in this run, and is no longer a setting"):
        config_from_old(values)
    del values["outer"]["weight_decay"], values["inner"]["lam"]
    with pytest.raises(ConfigError, match=r"setting inner\.lam is missing"):
        config_from_old(values)
    _copy("maml", tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"preset": "maml", "config": values}))
    with pytest.raises(RunError, match=r"config.json cannot be read: setting inner\.lam is missing"):
        train(TrainConfig(), tmp_path / "run", resume=True)
