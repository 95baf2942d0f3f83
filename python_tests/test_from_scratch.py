"""The baseline without meta-learning: a network trained on each test task alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training_tools import assert_one_sentence, imaml, small_config

from imaml_ext.errors import ConfigError
from imaml_ext.settings import changed
from imaml_ext.train import FromScratch, build, evaluate, evaluate_run, train


def test_each_task_is_a_training_run_of_its_own() -> None:
    """The same with torch.optim.Adam, a task at a time."""
    experiment = build(changed(small_config(), {"run.dtype": "float64"}))
    scratch = FromScratch(steps=7, lr=0.01)
    found = evaluate(experiment, scratch, split="test", tasks=5, seed=3)
    episodes = experiment.sampler("test", tasks=5, seed=3).sample(0)
    losses = []
    for task in range(5):
        alone = episodes.shard(task, 5)
        phi = experiment.model.init(seed=3 + task, dtype=torch.float64).unsqueeze(0).requires_grad_()
        optimizer = torch.optim.Adam([phi], lr=0.01)
        for _ in range(7):
            (phi.grad,) = torch.autograd.grad(experiment.loss(phi, alone.support).sum(), phi)
            optimizer.step()
        losses.append(experiment.loss(phi, alone.query).item())
    mean = torch.tensor(losses, dtype=torch.float64)
    assert found.loss == pytest.approx(mean.mean().item(), rel=1e-9)
    assert found.loss_interval == pytest.approx(1.96 * mean.std().item() / 5**0.5, rel=1e-9)
    assert found.inner_steps == 7
    few = build(changed(experiment.config, {"evaluation.meta_batch": 2}))
    again = evaluate(few, scratch, split="test", tasks=5, seed=3)
    assert again.loss == pytest.approx(found.loss, rel=1e-12)


def test_it_stands_beside_the_result_of_a_run(tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "result.json"
    train(small_config(steps=4), run)
    printed = imaml("evaluate", run, "--from-scratch", 6, "--scratch-lr", 0.02, "--output", output)
    assert printed.returncode == 0, printed.stderr
    first, second = printed.stdout.splitlines()
    assert first.startswith("test mean squared error")
    assert second.startswith("from scratch, 6 steps per task: test mean squared error")
    written = json.loads(output.read_text())
    baseline = written.pop("from_scratch")
    del written["command"], written["environment"]
    assert written == evaluate_run(run).to_json()  # which knows of no baseline
    assert baseline["tasks"] == written["tasks"]
    assert baseline["seed"] == written["seed"]
    assert f"{baseline['loss']:.4f}" in second
    assert baseline == evaluate_run(run, from_scratch=FromScratch(6, 0.02)).to_json()["from_scratch"]
    assert_one_sentence(imaml("evaluate", run, "--from-scratch", 0), "FromScratch.steps must be at least 1, got 0")


def test_its_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"FromScratch.lr must be above 0, got 0\.0"):
        FromScratch(steps=1, lr=0.0)
