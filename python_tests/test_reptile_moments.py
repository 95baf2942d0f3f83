"""Reptile whose inner moments go on from task to task, beside loops with torch's own optimisers."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_tasks import F64, Data, Episodes, classification, regression
from training_tools import small_config

from imaml_ext import FOMAML, GradientDescent, NewtonCG, Reptile
from imaml_ext.errors import ConfigError
from imaml_ext.inner import Moments
from imaml_ext.pretrained.weights import read_weights
from imaml_ext.settings import changed, from_json, to_json
from imaml_ext.train import build, evaluate, train
from imaml_ext.train.checkpoint import list_checkpoints, load_checkpoint
from imaml_ext.train.export import export_run

ADAM = GradientDescent(steps=3, lr=0.02, optimizer="adam", betas=(0.0, 0.99), batch_size=3)


def _torch_optimizer(inner: GradientDescent, phi: torch.Tensor) -> torch.optim.Optimizer:
    if inner.optimizer == "adam":
        return torch.optim.Adam([phi], lr=inner.lr, betas=inner.betas, eps=inner.eps)
    return torch.optim.SGD([phi], lr=inner.lr, momentum=inner.momentum, nesterov=inner.nesterov)


def _apart(episodes: Episodes, task: int) -> Episodes:
    return Episodes(*(Data(side.x[task : task + 1], side.y[task : task + 1]) for side in episodes))


@pytest.mark.parametrize(
    "inner", [ADAM, replace(ADAM, betas=(0.8, 0.99), batch_size=None), replace(ADAM, optimizer="momentum", lr=0.01)]
)
def test_one_task_per_meta_step_is_the_published_loop_with_one_optimiser(inner: GradientDescent) -> None:
    """The optimiser sees task after task, θ ← θ + ε (φ − θ) between them, and the support set of a test at the end."""
    torch.manual_seed(1)
    loss, theta, episodes = regression(6)
    algorithm = Reptile(loss, inner=inner, keep_moments=True)
    params = algorithm.initial(theta)
    phi = theta.clone().requires_grad_()
    optimizer, expected = _torch_optimizer(inner, phi), theta.clone()
    parts = 1 if inner.batch_size is None else 2

    def adapt(support: Data) -> None:
        with torch.no_grad():
            phi.copy_(expected)
        for step in range(inner.steps):
            part = [side[:, step % parts :: parts] for side in support]
            optimizer.zero_grad()
            (loss.model(phi.unsqueeze(0), part[0]) - part[1]).square().mean().backward()
            optimizer.step()

    for task in range(5):
        one = _apart(episodes, task)
        meta = algorithm.meta_gradient(params, one)
        adapt(one.support)
        torch.testing.assert_close(meta.gradient, expected - phi.detach(), rtol=1e-9, atol=1e-12)
        expected = expected + 0.7 * (phi.detach() - expected)
        params = {"theta": params["theta"] - 0.7 * meta.gradient, **meta.carried}
        assert params["moment_steps"].tolist() == [3 * (task + 1)]
    last = _apart(episodes, 5)
    found = algorithm.adapt(params, last.support)[0]
    adapt(last.support)
    torch.testing.assert_close(found, phi.detach(), rtol=1e-9, atol=1e-12)
    alone = replace(algorithm, keep_moments=False).adapt(params["theta"], last.support)[0]
    assert (found - alone).norm() > 1e-3 * found.norm()  # the moments tell


@pytest.mark.parametrize("size", [None, 2])
def test_what_is_kept_is_the_mean_over_the_tasks_that_count(size: int | None) -> None:
    loss, theta, episodes = regression(5)
    algorithm = Reptile(loss, inner=replace(ADAM, betas=(0.5, 0.9)), keep_moments=True, tasks_per_chunk=size)
    params = algorithm.initial(theta) | {
        "moment_2": torch.rand(len(theta), dtype=F64),
        "moment_steps": theta[:1] * 0 + 7,
    }
    apart = [algorithm.meta_gradient(params, _apart(episodes, task)).carried for task in (0, 1, 2, 4)]
    episodes.support.x[3, 1] = float("nan")
    meta = algorithm.meta_gradient(params, episodes)
    assert meta.carried.keys() == {"moment_1", "moment_2", "moment_steps"}
    assert meta.gradients.keys() == {"theta"}
    for name, value in meta.carried.items():
        torch.testing.assert_close(value, torch.stack([each[name] for each in apart]).mean(0), rtol=1e-12, atol=1e-14)
    assert meta.carried["moment_steps"].tolist() == [10]
    episodes.support.x[:] = float("nan")
    nothing = algorithm.meta_gradient(params, episodes)  # and the meta-step after it does not fail
    assert all(value.isnan().all() for value in nothing.carried.values())
    assert algorithm.meta_gradient({**nothing.carried, "theta": theta * float("nan")}, episodes).counted == 0


def test_metrics_are_of_the_query_sets() -> None:
    loss, theta, episodes = classification(3)
    episodes = Episodes(*(Data(side.x.repeat(1, 2, 1, 1, 1), side.y.repeat(1, 2)) for side in episodes))
    episodes.query.x.copy_(torch.rand_like(episodes.query.x))
    inner = GradientDescent(steps=2, lr=0.3)
    found = Reptile(loss, inner=inner, query_sets=4).meta_gradient(theta, episodes)
    expected = FOMAML(loss, inner=inner, query_sets=4).meta_gradient(theta, episodes)
    whole = Reptile(loss, inner=inner).meta_gradient(theta, episodes)
    for name in ("query_loss", "query_accuracy"):
        torch.testing.assert_close(found.per_task[name], expected.per_task[name])
    assert not torch.allclose(found.per_task["query_loss"], whole.per_task["query_loss"])
    assert torch.equal(found.gradient, whole.gradient)


def test_moments_that_do_not_fit_are_refused() -> None:
    loss, theta, episodes = regression(2)
    for inner in (GradientDescent(), NewtonCG()):
        with pytest.raises(ConfigError, match=r"keep_moments must be false for inner steps without moments.*got True"):
            Reptile(loss, inner=inner, keep_moments=True)
        with pytest.raises(ValueError, match="moments must be None for a solver whose steps keep none"):
            inner.solve(loss, theta, episodes.support, lam=0.0, moments=Moments((), 0))
    for vectors, words in (
        ((theta,), "moments must hold 2 vectors, as the rule keeps, got 1"),
        ((theta, theta[1:]), r"moments must be \[\d+\] or \[2, \d+\], torch.float64 on cpu as theta is, got \[\d+\]"),
    ):
        with pytest.raises(ValueError, match=words):
            ADAM.solve(loss, theta, episodes.support, lam=0.0, moments=Moments(vectors, 0))
    with pytest.raises(ValueError, match="moment_1, moment_2, moment_steps is missing"):
        Reptile(loss, inner=ADAM, keep_moments=True).meta_gradient(theta, episodes)
    with pytest.raises(ConfigError, match=r"algorithm.keep_moments must be false with run.capture"):
        changed(_config(), {"outer.optimizer": "adam", "run.capture": True})


def _config(**changes: Any) -> Any:
    algorithm = Reptile(inner=replace(ADAM, betas=(0.5, 0.99)), keep_moments=True)
    of_outer = {"outer.optimizer": "sgd", "outer.lr": 0.5, "outer.schedule": "linear", "outer.average": 0.9}
    return changed(small_config(), {"algorithm": algorithm, **of_outer, "outer.clip_norm": 0.05, **changes})


def test_a_run_replaces_the_moments_resumes_with_the_same_bits_and_exports_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config()
    result = train(config, tmp_path / "straight")
    calls, original = 0, Reptile.meta_gradient

    def stopping(self: Reptile, params: Any, episodes: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, params, episodes)

    monkeypatch.setattr(Reptile, "meta_gradient", stopping)
    with pytest.raises(RuntimeError, match="stopped after step 7"):
        train(config, tmp_path / "stopped")
    assert train(config, tmp_path / "stopped", resume=True)["test"] == result["test"]
    ends = [load_checkpoint(list_checkpoints(tmp_path / run / "checkpoints")[-1]) for run in ("straight", "stopped")]
    assert ends[0].params.keys() == {"theta", "moment_1", "moment_2", "moment_steps"}
    assert ends[0].averages.keys() == {"theta"}
    for name, value in ends[0].params.items():
        assert torch.equal(value, ends[1].params[name]), name

    experiment = build(config)  # 12 meta-steps once more: the moments move at no outer rate, and nothing clips them
    params, sampler = experiment.initial_params(), experiment.sampler("train", tasks=4, seed=0)
    for step in range(12):
        meta = experiment.algorithm.meta_gradient(params, sampler.sample(step))
        clip = min(1.0, 0.05 / float(meta.gradient.norm()))
        params = {"theta": params["theta"] - 0.5 * (1 - step / 12) * clip * meta.gradient, **meta.carried}
    torch.testing.assert_close(ends[0].params, params, rtol=1e-4, atol=1e-6)
    assert params["moment_steps"].tolist() == [36]

    judged = ends[0].evaluated
    without = experiment.algorithm.initial(judged["theta"])
    losses = [evaluate(experiment, each, split="test", tasks=20, seed=0).loss for each in (judged, without)]
    assert losses[0] == result["test"]["loss"] != losses[1]
    old = to_json(config.algorithm)
    del old["keep_moments"]
    assert not from_json(type(config.algorithm), old, "algorithm").keep_moments
    export_run(tmp_path / "straight", tmp_path / "w.safetensors")
    again = read_weights(tmp_path / "w.safetensors")
    assert again.params.keys() == judged.keys()
    assert all(torch.equal(again.params[name], value) for name, value in judged.items())
