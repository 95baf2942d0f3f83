"""The meta-step over buffers, which a CUDA graph replays: run as it is, it does what the ordinary one does."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from systems import needs_while_nodes
from training_tools import small_config

from imaml_ext.data import Augmentation, ClassImages, EpisodeSampler, Glyphs, Sampler, SinusoidSampler
from imaml_ext.errors import ConfigError, RunError
from imaml_ext.inner import GradientDescent, NewtonCG
from imaml_ext.meta import FOMAML, IMAML, MAML, Reptile
from imaml_ext.meta.learnt_lam import LearntLam
from imaml_ext.settings import changed
from imaml_ext.solvers import CG, Neumann
from imaml_ext.train import Tasks, TrainConfig, build, train, trainer
from imaml_ext.train.captured import CapturedStep, StaticStep, static_tasks
from imaml_ext.train.checkpoint import list_checkpoints, load_checkpoint
from imaml_ext.train.experiment import Experiment
from imaml_ext.train.meta_step import EagerStep, State
from imaml_ext.train.metrics import MetricAccumulator
from imaml_ext.train.ranks import Ranks
from imaml_ext.train.run_directory import read_metrics
from imaml_ext.train.schedule import outer_optimizer

_INNER = GradientDescent(steps=3, lr=0.02)
_IMAML = IMAML(lam=1.0, inner=_INNER, curvature="gauss_newton")
_ALGORITHMS = {
    "imaml": _IMAML,
    "maml": MAML(lam=1.0, inner=_INNER),
    "fomaml": FOMAML(lam=1.0, inner=_INNER),
    "reptile": Reptile(lam=1.0, inner=_INNER),
    "lam": replace(_IMAML, learn={"lam": "tensor"}),
    "lr": MAML(lam=1.0, inner=_INNER, learn={"lr": "parameter"}),
    "neumann": replace(_IMAML, linear_solver=Neumann()),
    "looks": replace(_IMAML, linear_solver=CG(max_iterations=9, check_every=2)),
}
_GLYPHS = {"data": Glyphs(), "tasks": Tasks(ways=3, shots=1, queries=2)}


def _config(**changes: object) -> TrainConfig:
    """Every part of a step at once: a schedule, clipping, an average; float64, for equal numbers."""
    config = small_config(clip_norm=0.5, average=0.8, warmup_steps=3)
    return changed(config, {"run.dtype": "float64", **changes})


def _images() -> ClassImages:
    images = torch.randint(0, 256, (7, 6, 5, 5), dtype=torch.uint8)
    orientations = np.ones((7, 4), dtype=bool)
    orientations[2, 1:3] = False
    return ClassImages(images, rotations=4, orientations=orientations)


def _samplers() -> list[Sampler]:
    sizes = {"shots": 2, "queries": 3, "meta_batch": 4, "seed": 3}
    colour = ClassImages(torch.randint(0, 256, (9, 5, 4, 6, 3), dtype=torch.uint8), characters=[1, 3, 4, 8])
    ragged = ClassImages(torch.randint(0, 256, (22, 3, 3), dtype=torch.uint8), counts=[5, 6, 5, 6], rotations=4)
    return [
        EpisodeSampler(_images(), ways=5, **sizes),
        EpisodeSampler(colour, ways=3, dtype=torch.float64, **sizes),
        EpisodeSampler(ragged, ways=3, **sizes),
        EpisodeSampler(colour, ways=2, augmentation=Augmentation(flip=True, crop_padding=1), **sizes),
        SinusoidSampler(**sizes),
    ]


@pytest.mark.parametrize("index", range(5))
def test_static_tasks_are_the_sampler_s_in_buffers_that_stay(index: int) -> None:
    sampler = _samplers()[index]
    tasks = static_tasks(sampler)
    places = set()
    for step in (0, 5, 1):
        tasks.load(step)
        ours, expected = tasks.batch(), sampler.sample(step)
        for name in ("support_x", "support_y", "query_x", "query_y"):
            torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=0, atol=0)
        places.add((ours.support_y.data_ptr(), ours.query_y.data_ptr()))
    assert len(places) == 1


def _begin(config: TrainConfig, *, static: bool) -> tuple[Experiment, Sampler, State]:
    experiment = build(config)
    params = experiment.initial_params()
    optimizer = outer_optimizer(config.outer, params, static=static)
    averages = {name: value.clone() for name, value in params.items()} if config.outer.average else {}
    state = State(0, params, averages, optimizer, MetricAccumulator(experiment.device), 0.0)
    return experiment, experiment.sampler("train", tasks=config.outer.meta_batch, seed=config.run.seed), state


def _assert_same(ours: State, expected: State) -> None:
    assert ours.step == expected.step
    assert ours.metrics.means() == expected.metrics.means()
    for a, b in zip(ours.tensors(), expected.tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", list(_ALGORITHMS))
def test_a_static_step_does_what_the_ordinary_one_does(name: str) -> None:
    config = _config(algorithm=_ALGORITHMS[name])
    experiment, tasks, expected = _begin(config, static=False)
    plain = EagerStep(experiment, tasks, expected, Ranks())
    experiment, tasks, ours = _begin(config, static=True)
    static = StaticStep(experiment, tasks, ours)
    start = {name: value.clone() for name, value in ours.params.items()}
    for _ in range(4):
        plain()
        static()
    assert not any(torch.equal(value, start[name]) for name, value in ours.params.items())
    _assert_same(ours, expected)


def test_a_static_step_learns_from_images_as_the_ordinary_one_does() -> None:
    config = _config(**_GLYPHS)
    experiment, tasks, expected = _begin(config, static=False)
    assert isinstance(tasks, EpisodeSampler)
    plain = EagerStep(experiment, tasks, expected, Ranks())
    experiment, tasks, ours = _begin(config, static=True)
    static = StaticStep(experiment, tasks, ours)
    for _ in range(2):
        plain()
        static()
    _assert_same(ours, expected)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_rehearsal_leaves_no_trace(steps_before: int) -> None:
    config = _config(**{"algorithm.learn": {"lam": "global"}})
    experiment, tasks, expected = _begin(config, static=True)
    plain = StaticStep(experiment, tasks, expected)
    experiment, tasks, ours = _begin(config, static=True)
    rehearsed = StaticStep(experiment, tasks, ours)
    for _ in range(steps_before):
        plain()
        rehearsed()
    rehearsed.load()
    rehearsed.rehearse(3)
    assert ours.step == steps_before
    for _ in range(2):
        plain()
        rehearsed()
    _assert_same(ours, expected)


def test_the_first_step_that_is_not_finite_is_remembered() -> None:
    experiment, tasks, state = _begin(_config(), static=True)
    step = StaticStep(experiment, tasks, state)
    step()
    assert state.metrics.first_nonfinite_step() is None
    state.params["theta"][0] = math.nan
    step()
    step()
    assert state.metrics.first_nonfinite_step() == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outer.optimizer": "sgd"}, "outer.optimizer must be 'adam' with run.capture.* got 'sgd'"),
        (
            {"algorithm.on_breakdown": "raise"},
            "algorithm.on_breakdown must be 'keep', 'gradient' or 'skip' with run.capture.* got 'raise'",
        ),
        (
            {"algorithm.inner": NewtonCG(stop_early=True)},
            "algorithm.inner.stop_early must be unset with run.capture.* got True",
        ),
    ],
)
def test_what_cannot_be_captured_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(_config(), {**changes, "run.device": "cuda", "run.capture": True})


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_without_a_gpu_nothing_is_written(device: str, tmp_path: Path) -> None:
    if device == "auto" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    config = _config(**{"run.capture": True, "run.device": device})
    with pytest.raises(ConfigError, match=f"run.device must be a CUDA device with run.capture, got '{device}'"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused() -> None:
    class Two(Ranks):
        size = 2

    config = _config(**{"run.capture": True})
    with pytest.raises(ConfigError, match=r"run.capture must be left out with several processes, got 2"):
        trainer._prepare(config, Two())


def _on_cuda(config: TrainConfig, *, capture: bool) -> TrainConfig:
    return changed(config, {"run.device": "cuda", "run.capture": capture})


@pytest.mark.cuda
@pytest.mark.parametrize("data", ["sinusoid", "glyphs"])
@pytest.mark.parametrize(
    "name", [*(name for name in _ALGORITHMS if name != "looks"), pytest.param("looks", marks=needs_while_nodes)]
)
def test_captured_training_ends_where_eager_training_ends(data: str, name: str, tmp_path: Path) -> None:
    config = _config(algorithm=_ALGORITHMS[name], **(_GLYPHS if data == "glyphs" else {}))
    ends, rows = [], []
    for capture in (False, True):
        path = tmp_path / str(capture)
        train(_on_cuda(config, capture=capture), path)
        ends.append(load_checkpoint(list_checkpoints(path / "checkpoints")[-1]))
        rows.append(read_metrics(path / "metrics.jsonl"))
    torch.testing.assert_close(ends[1].params, ends[0].params, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ends[1].averages, ends[0].averages, rtol=1e-7, atol=1e-9)
    for ours, expected in zip(rows[1], rows[0], strict=True):
        for key in ("query_loss", "gradient_norm", "lr"):
            assert ours[key] == pytest.approx(expected[key], rel=1e-6)


@pytest.mark.cuda
def test_captured_training_can_be_resumed_either_way(tmp_path: Path) -> None:
    config = _config()
    train(_on_cuda(config, capture=True), tmp_path / "whole")
    expected = load_checkpoint(list_checkpoints(tmp_path / "whole" / "checkpoints")[-1])
    for capture in (False, True):
        path = tmp_path / f"then {capture}"
        train(_on_cuda(config, capture=not capture), path)
        early = list_checkpoints(path / "checkpoints")[0]
        train(_on_cuda(config, capture=capture), path, resume=True, checkpoint=early)
        resumed = load_checkpoint(list_checkpoints(path / "checkpoints")[-1])
        assert resumed.step == expected.step
        torch.testing.assert_close(resumed.params, expected.params, rtol=1e-7, atol=1e-9)


@pytest.mark.cuda
def test_a_replay_waits_for_nothing_and_newton_cg_is_captured_too() -> None:
    config = _on_cuda(_config(), capture=True)
    config = changed(config, {"algorithm.inner": NewtonCG(steps=1, curvature="gauss_newton")})
    experiment, tasks, ours = _begin(config, static=True)
    captured = CapturedStep(experiment, tasks, ours)
    experiment, tasks, expected = _begin(config, static=True)
    static = StaticStep(experiment, tasks, expected)
    for _ in range(3):
        captured()
        static()
    for a, b in zip(ours.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    glyphs = changed(config, _GLYPHS)
    captured = CapturedStep(*_begin(glyphs, static=True))
    captured()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_a_step_that_looks_at_the_host_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(**{"algorithm.learn": {"lam": "global"}})
    begun = _begin(_on_cuda(config, capture=True), static=True)
    gradient = LearntLam.gradient

    def looks(lam: LearntLam, rho: torch.Tensor, by_parameter: torch.Tensor) -> torch.Tensor:
        assert math.isfinite(float(by_parameter.sum()))
        return gradient(lam, rho, by_parameter)

    monkeypatch.setattr(LearntLam, "gradient", looks)
    with pytest.raises(RunError, match=r"cannot be captured as a CUDA graph: .*; leave run.capture out"):
        CapturedStep(*begun)
    torch.randn(3, device="cuda")  # the process goes on
