"""Algorithm 1 in this process: what a run leaves behind, and that a resumed one ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_tools import files_of, small_config

from imaml_ext.data import Glyphs, Omniglot
from imaml_ext.errors import CheckpointError, ConfigError, Interrupted, RunError
from imaml_ext.inner import GradientDescent, NewtonCG
from imaml_ext.meta import FOMAML, IMAML, MAML, MetaAlgorithm, Reptile
from imaml_ext.models import Conv4
from imaml_ext.settings import changed, from_json
from imaml_ext.solvers import FixedPoint, Neumann
from imaml_ext.train import (
    EvaluationSettings,
    Outer,
    RunSettings,
    Tasks,
    Theta,
    TrainConfig,
    build,
    evaluate,
    evaluate_run,
    train,
)
from imaml_ext.train.checkpoint import list_checkpoints, load_checkpoint
from imaml_ext.train.run_directory import read_metrics
from imaml_ext.train.schedule import learning_rate

_TIMES = {"seconds", "tasks_per_second"}


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`at_step(7, action)`: call `action(meta_gradient)` in place of the seventh meta-gradient from now on."""

    def install(step: int, action: Any) -> None:
        calls = 0

        original = IMAML.meta_gradient

        def patched(self: IMAML, params: Any, episodes: Any) -> Any:
            nonlocal calls
            calls += 1
            gradient = original(self, params, episodes)
            return action(gradient) if calls == step else gradient

        monkeypatch.setattr(IMAML, "meta_gradient", patched)

    return install


def _stop(meta: Any) -> Any:
    os.kill(os.getpid(), signal.SIGTERM)
    return meta


def _final(path: Path) -> dict[str, Any]:
    return vars(load_checkpoint(list_checkpoints(path / "checkpoints")[-1]))


def _rows(path: Path) -> list[dict[str, Any]]:
    """The metrics without the times, which differ from run to run."""
    return [{k: v for k, v in row.items() if k not in _TIMES} for row in read_metrics(path / "metrics.jsonl")]


def test_what_a_run_leaves(tmp_path: Path) -> None:
    config = changed(small_config(), {"evaluation.every": 6, "evaluation.validation_tasks": 10})
    result = train(config, tmp_path / "run", recipe="mine", command="imaml train mine")

    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert from_json(TrainConfig, recorded["config"]) == config
    assert recorded["environment"]["torch"] == torch.__version__
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert result["test"]["tasks"] == 20
    assert result["test"]["loss"] > 0
    assert result["command"] == "imaml train mine"
    assert result["train_seconds"] > 0

    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 6, 8, 12]  # every 4, and where a validation falls between
    assert [row["step"] for row in rows if "val_loss" in row] == [6, 12]
    assert rows[0]["lr"] == learning_rate(config.outer, 3)
    for name in ("query_loss", "support_loss", "solve_residual", "gradient_norm", "tasks_per_second", "seconds"):
        assert all(row[name] is not None for row in rows), name

    kept = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == ["step-00000005.pt", "step-00000010.pt", "step-00000012.pt"]
    for picture in ("learning_curve.png", "episodes.png"):
        assert (tmp_path / "run" / picture).read_bytes().startswith(b"\x89PNG")


def test_the_outer_step_is_the_one_configured(tmp_path: Path) -> None:
    """Plain SGD with clipping and a schedule, against the three lines that define it."""
    config = small_config(steps=3, optimizer="sgd", lr=0.5, clip_norm=0.1, schedule="linear", average=0.5)
    train(config, tmp_path / "run")
    experiment = build(config)
    theta, sampler = experiment.initial_params()["theta"], experiment.sampler("train", tasks=4, seed=0)
    average = theta.clone()
    for step in range(3):
        gradient = experiment.algorithm.meta_gradient(theta, sampler.sample(step)).gradient
        gradient = gradient * min(1.0, 0.1 / gradient.norm().item())
        theta = theta - 0.5 * (1 - step / 3) * gradient
        decay = min(0.5, (2 + step) / (11 + step))
        average = decay * average + (1 - decay) * theta
    final = _final(tmp_path / "run")
    torch.testing.assert_close(final["params"], {"theta": theta}, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(final["averages"], {"theta": average}, rtol=1e-5, atol=1e-6)
    assert not torch.equal(final["params"]["theta"], experiment.initial_params()["theta"])


def test_resuming_changes_no_bit(tmp_path: Path, at_step: Any) -> None:
    """Stopped at steps 3, 8 and 11 of 12: none of them at a line of the log or at a regular checkpoint."""
    config = small_config(average=0.9, clip_norm=1.0)
    config = changed(config, {"evaluation.every": 6, "evaluation.validation_tasks": 10})
    train(config, tmp_path / "straight")
    for calls in (3, 5, 3):
        at_step(calls, _stop)
        with pytest.raises(Interrupted) as caught:
            train(config, tmp_path / "stopped", resume=True)
        assert caught.value.signal == signal.SIGTERM
        assert not (tmp_path / "stopped" / "result.json").exists()
    result = train(config, tmp_path / "stopped", resume=True)

    straight, stopped = _final(tmp_path / "straight"), _final(tmp_path / "stopped")
    assert stopped["step"] == 12
    assert torch.equal(straight["params"]["theta"], stopped["params"]["theta"])
    assert torch.equal(straight["averages"]["theta"], stopped["averages"]["theta"])
    for name, value in straight["optimizer"]["state"][0].items():
        assert torch.equal(value, stopped["optimizer"]["state"][0][name]), name
    assert _rows(tmp_path / "straight") == _rows(tmp_path / "stopped")
    assert json.loads((tmp_path / "straight" / "result.json").read_text())["test"] == result["test"]


@pytest.mark.parametrize("sharing", ["global", "tensor", "parameter"])
def test_a_learnt_lambda_resumes_with_the_same_bits_and_is_used_at_evaluation(
    tmp_path: Path, at_step: Any, sharing: str
) -> None:
    config = changed(small_config(learnt_lr=0.1), {"algorithm.learn": {"lam": sharing}})
    straight = train(config, tmp_path / "straight")
    at_step(7, _stop)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "stopped")
    stopped = train(config, tmp_path / "stopped", resume=True)
    ends = [_final(tmp_path / name)["params"] for name in ("straight", "stopped")]
    assert list(ends[0]) == ["theta", "log_lam"]
    assert torch.equal(ends[0]["theta"], ends[1]["theta"])
    assert torch.equal(ends[0]["log_lam"], ends[1]["log_lam"])
    assert _rows(tmp_path / "straight") == _rows(tmp_path / "stopped")
    assert straight["test"] == stopped["test"] == evaluate_run(tmp_path / "stopped").to_json()

    log_lam = ends[0]["log_lam"]
    assert (log_lam != 0).double().mean() > 0.5  # λ was 1; those of dead units stay
    assert len(log_lam) == {"global": 1, "tensor": 6, "parameter": 97}[sharing]
    rows = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    assert rows[-1]["lam"] == pytest.approx(float(log_lam.exp().mean()), rel=0.05)
    experiment = build(config)
    theta = ends[0]["theta"]
    begun = {"theta": theta, "log_lam": experiment.initial_params()["log_lam"]}
    with_first = evaluate(experiment, begun, split="test", tasks=20, seed=0).loss
    assert with_first != straight["test"]["loss"]
    fixed = build(changed(small_config(), {"algorithm.lam": 5.0}))
    assert evaluate(fixed, theta, split="test", tasks=20, seed=0).loss != with_first


@pytest.mark.parametrize(
    "algorithm",
    [
        IMAML(lam=1.0, inner=GradientDescent(steps=3, lr=0.02), learn={"lam": "tensor"}),
        MAML(lam=1.0, inner=GradientDescent(steps=3, lr=0.02), learn={"lam": "global", "lr": "tensor"}),
    ],
)
def test_what_is_learnt_takes_the_step_configured(tmp_path: Path, algorithm: MetaAlgorithm) -> None:
    """SGD on logarithms at their own rate and the schedule of θ, against the line that defines it."""
    config = small_config(steps=2, optimizer="sgd", lr=0.5, learnt_lr=0.2, schedule="linear")
    config = changed(config, {"algorithm": algorithm})
    train(config, tmp_path / "run")
    experiment = build(config)
    params, sampler = experiment.initial_params(), experiment.sampler("train", tasks=4, seed=0)
    start = {name: value.clone() for name, value in params.items()}
    assert len(params) == 1 + len(algorithm.learn)
    for step in range(2):
        meta = experiment.algorithm.meta_gradient(params, sampler.sample(step))
        for name in params:
            rate = (0.5 if name == "theta" else 0.2) * (1 - step / 2)
            params[name] = params[name] - rate * meta.gradients[name]
    torch.testing.assert_close(_final(tmp_path / "run")["params"], params, rtol=1e-5, atol=1e-6)
    assert not any(torch.equal(value, start[name]) for name, value in params.items())


_DESCENT = GradientDescent(steps=3, lr=0.02)


@pytest.mark.parametrize(
    "algorithm",
    [
        MAML(inner=_DESCENT),
        MAML(lam=1.0, inner=replace(_DESCENT, optimizer="adam"), checkpoint=True, learn={"lam": "tensor"}),
        FOMAML(inner=replace(_DESCENT, optimizer="momentum"), learn={"lr": "global"}),
        Reptile(inner=_DESCENT),
        IMAML(lam=1.0, inner=NewtonCG(steps=2, curvature="gauss_newton"), curvature="gauss_newton"),
        Reptile(lam=1.0, inner=NewtonCG(steps=1)),
        IMAML(lam=1.0, inner=_DESCENT, linear_solver=Neumann(), damping=5.0, curvature="gauss_newton"),
        IMAML(lam=1.0, inner=replace(_DESCENT, proximal="after"), linear_solver=FixedPoint(), curvature="gauss_newton"),
    ],
)
def test_every_algorithm_trains(tmp_path: Path, algorithm: MetaAlgorithm) -> None:
    config = changed(small_config(steps=4), {"algorithm": algorithm})
    result = train(config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["skipped"] == 0
    assert rows[-1]["query_loss"] > 0
    assert result["test"]["loss"] > 0
    assert not torch.equal(_final(tmp_path / "run")["params"]["theta"], build(config).initial_params()["theta"])
    solver = getattr(algorithm, "linear_solver", None)
    assert ("solve_residual" in rows[-1]) == (solver is not None)
    assert ("diverged" in rows[-1]) == isinstance(solver, Neumann | FixedPoint)
    assert ("newton_step_size" in rows[-1]) == isinstance(algorithm.inner, NewtonCG)
    assert ("lam" in rows[-1]) == ("lam" in algorithm.learn)
    assert ("inner_lr" in rows[-1]) == ("lr" in algorithm.learn)
    assert rows[-1]["lr"] == learning_rate(config.outer, 3)  # of theta
    assert (tmp_path / "run" / "learning_curve.png").exists()


def test_a_finished_run_is_only_tested_again(tmp_path: Path) -> None:
    config = small_config()
    first = train(config, tmp_path / "run")
    before = files_of(tmp_path / "run" / "checkpoints")
    again = train(config, tmp_path / "run", resume=True)
    assert again["test"] == first["test"]
    assert files_of(tmp_path / "run" / "checkpoints") == before
    more = changed(config, {"evaluation.tasks": 30})  # may be set anew
    assert train(more, tmp_path / "run", resume=True)["test"]["tasks"] == 30


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    config = small_config(steps=4)
    train(config, tmp_path / "run")
    before = files_of(tmp_path / "run")
    with pytest.raises(RunError, match="is not empty: continue its run with --resume, or give another --run-dir"):
        train(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"a resumed run keeps its settings: outer.lr was 0.01 in .*run, now 0.5"):
        train(small_config(steps=4, lr=0.5), tmp_path / "run", resume=True)
    other_seed = changed(config, {"run.seed": 1})
    with pytest.raises(ConfigError, match=r"run.seed was 0 in .*run, now 1"):
        train(other_seed, tmp_path / "run", resume=True)
    assert files_of(tmp_path / "run") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    for resume in (False, True):
        with pytest.raises(RunError, match="mine"):
            train(config, tmp_path / "mine", resume=resume)
    assert files_of(tmp_path / "mine") == {"thesis.tex": b"years"}


def test_a_non_finite_meta_gradient_ends_the_run(tmp_path: Path, at_step: Any) -> None:
    def poison(meta: Any) -> Any:
        return replace(meta, gradients={"theta": meta.gradient * torch.tensor(float("nan"))})

    at_step(7, poison)
    with pytest.raises(
        RunError, match=r"non-finite at step 7; the newest checkpoint, .*step-00000005.pt, is from before"
    ):
        train(small_config(), tmp_path / "run")
    final = _final(tmp_path / "run")
    assert final["step"] == 5
    assert final["params"]["theta"].isfinite().all()
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [4]


def test_a_damaged_checkpoint_is_named_and_not_passed_over(tmp_path: Path, at_step: Any) -> None:
    config = small_config()
    train(config, tmp_path / "straight")
    at_step(11, _stop)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run")
    older, newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-2:]
    newest.write_bytes(newest.read_bytes()[:-200])
    before = files_of(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"00011.pt is damaged.*continue from the older .*step-00000010.pt"):
        train(config, tmp_path / "run", resume=True)
    assert files_of(tmp_path / "run") == before
    with pytest.raises(CheckpointError, match=r"step-00000011.pt is damaged"):
        evaluate_run(tmp_path / "run")

    train(config, tmp_path / "run", resume=True, checkpoint=older)
    ends = [_final(tmp_path / name)["params"]["theta"] for name in ("run", "straight")]
    assert torch.equal(*ends)
    assert _rows(tmp_path / "run") == _rows(tmp_path / "straight")
    assert not newest.exists()


def test_a_checkpoint_of_elsewhere_is_refused(tmp_path: Path) -> None:
    config = small_config(steps=4)
    train(config, tmp_path / "one")
    train(config, tmp_path / "two")
    foreign = list_checkpoints(tmp_path / "one" / "checkpoints")[-1]
    with pytest.raises(RunError, match=r"--from-checkpoint must be one of .*two"):
        train(config, tmp_path / "two", resume=True, checkpoint=foreign)


class TestEvaluation:
    def test_batch_size_changes_no_task(self) -> None:
        config = small_config()
        results = []
        for meta_batch in (20, 7, 1):
            experiment = build(changed(config, {"evaluation.meta_batch": meta_batch}))
            results.append(evaluate(experiment, experiment.initial_params(), split="test", tasks=20, seed=3))
        assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
        assert results[0].loss == pytest.approx(results[2].loss, rel=1e-6)
        assert results[0].loss_interval == pytest.approx(results[1].loss_interval, rel=1e-5)

    def test_the_first_tasks_are_those_of_a_shorter_evaluation(self) -> None:
        images = {"data": Glyphs(), "model": Conv4(filters=4), "tasks": Tasks(ways=3, shots=1, queries=4)}
        for changes, number in (({"tasks.queries": 11}, 114), (images, 105)):  # of 1,250 query examples together
            config = changed(small_config(), changes)
            experiment = build(config)
            theta = experiment.initial_params()["theta"]
            long, short = (evaluate(experiment, theta, split="test", tasks=n, seed=3) for n in (130, number))
            assert long.first["tasks"] == short.tasks == number
            assert long.first["loss"] == pytest.approx(short.loss, rel=1e-6)
            assert long.loss != pytest.approx(short.loss, rel=1e-6)
            assert long.first["accuracy"] == short.first["accuracy"] == short.accuracy

    def test_the_interval_is_the_one_stated(self) -> None:
        config = small_config()
        experiment = build(config)
        theta = experiment.initial_params()["theta"]
        episodes = experiment.sampler("test", tasks=20, seed=0).sample(0)
        phi = experiment.algorithm.adapt(theta, episodes.support)
        losses = experiment.loss(phi, episodes.query).detach().double()
        result = evaluate(experiment, theta, split="test", tasks=20, seed=0)
        assert result.loss == pytest.approx(losses.mean().item(), rel=1e-6)
        assert result.loss_interval == pytest.approx(1.96 * losses.std().item() / 20**0.5, rel=1e-6)
        assert result.accuracy is None

    def test_splits_and_seeds_are_different_tasks(self) -> None:
        experiment = build(small_config())
        theta = experiment.initial_params()["theta"]
        losses = {
            evaluate(experiment, theta, split=split, tasks=10, seed=seed).loss
            for split in ("train", "val", "test")
            for seed in (0, 1)
        }
        assert len(losses) == 6

    def test_of_a_run(self, tmp_path: Path) -> None:
        result = train(small_config(), tmp_path / "run")
        assert evaluate_run(tmp_path / "run").to_json() == result["test"]
        first = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
        assert evaluate_run(tmp_path / "run", checkpoint=first).loss != result["test"]["loss"]
        assert evaluate_run(tmp_path / "run", {"evaluation.inner_steps": 1}).inner_steps == 1
        for split in ("train", "test"):
            fewer = evaluate_run(tmp_path / "run", {"tasks.shots": 2, "tasks.train_shots": None}, split=split)
            as_trained = evaluate_run(tmp_path / "run", split=split)
            assert (fewer.shots, as_trained.shots) == (2, 5)
            assert fewer.loss != as_trained.loss
        with pytest.raises(RunError, match="holds no run"):
            evaluate_run(tmp_path / "nothing")

    def test_unknown_split(self) -> None:
        experiment = build(small_config())
        with pytest.raises(ConfigError, match="has no split 'holdout'; there are: train, val, test"):
            evaluate(experiment, experiment.initial_params()["theta"], split="holdout", tasks=10, seed=0)


def test_validation_needs_a_validation_split(tmp_path: Path) -> None:
    if not os.environ.get("IMAML_DATA_ROOT"):
        pytest.skip("IMAML_DATA_ROOT is not set: no Omniglot")
    config = TrainConfig(data=Omniglot(cache_dir=tmp_path / "cache"), evaluation=EvaluationSettings(every=10))
    with pytest.raises(ConfigError, match="has no split 'val'"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_resume_with_all_threads(tmp_path: Path, at_step: Any) -> None:
    """Conv4 on glyphs, with whatever number of threads torch has chosen."""
    config = TrainConfig(
        data=Glyphs(),
        tasks=Tasks(ways=3, shots=1, queries=2),
        model=Conv4(filters=8),
        algorithm=IMAML(inner=GradientDescent(steps=3), curvature="gauss_newton"),
        outer=Outer(steps=6, meta_batch=4),
        evaluation=EvaluationSettings(tasks=12),
        run=RunSettings(device="cpu", tensorboard=False),
    )
    straight = train(config, tmp_path / "straight")
    at_step(4, _stop)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "stopped")
    stopped = train(config, tmp_path / "stopped", resume=True)
    ends = [_final(tmp_path / name)["params"]["theta"] for name in ("straight", "stopped")]
    assert torch.equal(*ends)
    assert straight["test"] == stopped["test"]
    assert 0 <= straight["test"]["accuracy"] <= 1
    assert (tmp_path / "stopped" / "episodes.png").read_bytes().startswith(b"\x89PNG")


def test_shots_of_training_and_of_the_test() -> None:
    experiment = build(changed(small_config(), {"tasks.shots": 5, "tasks.train_shots": 7}))
    shots = {
        split: experiment.sampler(split, tasks=2, seed=0).sample(0).support_x.shape[1] for split in ("train", "test")
    }
    assert shots == {"train": 7, "test": 5}


def test_theta_itself_is_judged_with_no_inner_steps() -> None:
    experiment = build(changed(small_config(), {"evaluation.inner_steps": 0}))
    theta = experiment.initial_params()["theta"]
    episodes = experiment.sampler("test", tasks=20, seed=0).sample(0)
    result = evaluate(experiment, theta, split="test", tasks=20, seed=0)
    assert result.inner_steps == 0
    assert result.loss == pytest.approx(experiment.loss(theta.expand(20, -1), episodes.query).mean().item(), rel=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_with_a_shared_head_the_order_of_the_classes_says_nothing(shared: bool) -> None:
    """Numbering every task's classes otherwise leaves the meta-gradient; with a head of their own it does not."""
    seed = torch.seed() % 2**31
    config = TrainConfig(
        data=Glyphs(),
        tasks=Tasks(ways=4, shots=2, queries=3),
        model=Conv4(filters=6),
        theta=Theta(shared_head=shared),
        algorithm=IMAML(lam=0.5, inner=GradientDescent(steps=3, lr=0.1), curvature="gauss_newton"),
        run=RunSettings(device="cpu", dtype="float64", seed=seed),
    )
    experiment = build(config)
    theta = experiment.initial_params()["theta"]
    episodes = experiment.sampler("train", tasks=3, seed=seed).sample(0)
    order = torch.stack([torch.randperm(4) for _ in range(3)])  # [B, ways]
    order[0] = torch.tensor([1, 2, 3, 0])  # not the old one
    renumbered = replace(
        episodes,
        support_y=order.gather(1, episodes.support_y),
        query_y=order.gather(1, episodes.query_y),
    )
    one, other = (
        experiment.shared_(experiment.algorithm.meta_gradient(theta, tasks).gradient)
        for tasks in (episodes, renumbered)
    )
    if shared:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    else:
        assert not torch.allclose(one, other, rtol=1e-3)
