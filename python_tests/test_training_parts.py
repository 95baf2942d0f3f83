"""The parts of a run that need no model: schedule, files, metrics, checkpoints, running means."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import pytest
import torch

from imaml_ext.errors import CheckpointError, RunError
from imaml_ext.files import atomic_write, json_bytes
from imaml_ext.train.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, load_newest, save_checkpoint
from imaml_ext.train.config import Outer
from imaml_ext.train.metrics import MetricAccumulator
from imaml_ext.train.run_directory import MetricsLog, RunDirectory, read_metrics
from imaml_ext.train.schedule import (
    average_weight,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    outer_optimizer,
    set_learning_rate,
)


def test_schedules() -> None:
    constant = Outer(steps=10, lr=0.5, warmup_steps=4)
    assert [learning_rate(constant, step) for step in range(6)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    linear = Outer(steps=10, lr=1.0, schedule="linear")
    assert [learning_rate(linear, step) for step in range(10)] == pytest.approx([1 - 0.1 * step for step in range(10)])
    cosine = Outer(steps=12, lr=2.0, schedule="cosine", warmup_steps=4)
    assert learning_rate(cosine, 4) == 2.0
    assert learning_rate(cosine, 8) == pytest.approx(2.0 * 0.5)
    assert learning_rate(cosine, 11) == pytest.approx(1 + math.cos(math.pi * 7 / 8))


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_outer_optimizer_follows_its_settings(name: str) -> None:
    outer = Outer(optimizer=name, lr=0.1, learnt_lr=0.3)  # type: ignore[arg-type]
    params = {"theta": torch.tensor([1.0, -2.0]), "log_lam": torch.tensor([0.5]), "log_lr": torch.tensor([0.2, 0.1])}
    gradients = {"theta": torch.tensor([3.0, 4.0]), "log_lam": torch.tensor([-2.0]), "log_lr": torch.tensor([1.0, 5.0])}
    start = {key: value.clone() for key, value in params.items()}
    optimizer = outer_optimizer(outer, params)
    set_learning_rate(optimizer, outer, 0.05)  # half of the peak, of every rate
    for key, value in params.items():
        value.grad = gradients[key].clone()
    optimizer.step()
    for key, value in params.items():
        rate = 0.05 if key == "theta" else 0.15
        step = gradients[key].sign() if name == "adam" else gradients[key]  # Adam's first step, bias-corrected
        torch.testing.assert_close(value, start[key] - rate * step)


def test_the_average_forgets_faster_at_first() -> None:
    outer = Outer(steps=100, average=0.9)
    assert [average_weight(outer, step) for step in (0, 1)] == pytest.approx([9 / 11, 9 / 12])
    assert average_weight(outer, 99) == pytest.approx(0.1)


@pytest.mark.parametrize("before", [False, True])
def test_an_optimiser_continues_static_or_not_whichever_it_was(before: bool) -> None:
    """The same numbers, and the same checkpoint, whether learning rates stand in tensors or not."""
    outer = Outer(lr=0.1, learnt_lr=0.3)
    gradients = torch.randn(6, 5, dtype=torch.float64)

    def steps(optimizer: torch.optim.Optimizer, params: dict[str, torch.Tensor], numbers: range) -> None:
        for step in numbers:
            set_learning_rate(optimizer, outer, 0.1 / (1 + step))
            params["theta"].grad, params["log_lam"].grad = gradients[step, :4].clone(), gradients[step, 4:].clone()
            optimizer.step()

    def parameters() -> dict[str, torch.Tensor]:
        return {"theta": torch.arange(4, dtype=torch.float64), "log_lam": torch.zeros(1, dtype=torch.float64)}

    whole = parameters()
    plain = outer_optimizer(outer, whole)
    steps(plain, whole, range(6))

    first = parameters()
    optimizer = outer_optimizer(outer, first, static=before)
    steps(optimizer, first, range(3))
    saved = optimizer_state(optimizer)
    assert [type(group["lr"]) for group in saved["param_groups"]] == [float, float]
    second = {name: value.clone() for name, value in first.items()}
    after = outer_optimizer(outer, second, static=not before)
    load_optimizer_state(after, saved)
    steps(after, second, range(3, 6))
    assert isinstance(after.param_groups[1]["lr"], torch.Tensor) != before
    for name, expected in whole.items():
        assert torch.equal(second[name], expected)
    groups = [optimizer_state(each)["param_groups"] for each in (plain, after)]
    assert groups[0] == groups[1]


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    atomic_write(target, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*file: No space left on device"):
        atomic_write(target, b"new")
    monkeypatch.undo()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_json_has_no_nan() -> None:
    assert json_bytes({"a": [float("nan"), 1.0], "b": {"c": float("inf")}}).split() == (
        b'{ "a": [ null, 1.0 ], "b": { "c": null } }'.split()
    )


class TestMetricsLog:
    def test_continues_behind_the_checkpoint(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        log = MetricsLog(path, keep_until_step=0)
        for step in (10, 20, 30):
            log.append({"step": step, "loss": 1 / step})
        log.close()
        with path.open("a") as file:
            file.write('{"step": 40, "lo')  # a machine that went down while it wrote
        log = MetricsLog(path, keep_until_step=20)
        log.append({"step": 30, "loss": float("nan")})
        log.close()
        assert [row["step"] for row in read_metrics(path)] == [10, 20, 30]
        assert read_metrics(path)[-1]["loss"] is None

    def test_a_line_is_whole_or_absent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "metrics.jsonl"
        log = MetricsLog(path, keep_until_step=0)
        log.append({"step": 1})
        before, write = path.read_bytes(), os.pwrite

        def almost_full(descriptor: int, line: bytes, at: int) -> int:
            if at > len(before):
                raise OSError(28, "No space left on device")
            return write(descriptor, line[:5], at)

        monkeypatch.setattr(os, "pwrite", almost_full)
        with pytest.raises(RunError, match=r"cannot write .*metrics.jsonl: No space left"):
            log.append({"step": 2})
        monkeypatch.undo()
        assert path.read_bytes() == before
        log.append({"step": 2})
        log.close()
        assert [row["step"] for row in read_metrics(path)] == [1, 2]

    def test_damage_inside_is_not_cut_away(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
        with pytest.raises(RunError, match="damaged: line 2 is not a metrics line"):
            MetricsLog(path, keep_until_step=5)
        assert path.read_text() == '{"step": 1}\nnonsense\n{"step": 3}\n'


def _checkpoint(step: int, size: int = 1000) -> Checkpoint:
    theta = torch.randn(size, generator=torch.Generator().manual_seed(step))
    optimizer = torch.optim.Adam([theta.clone()])
    optimizer.param_groups[0]["params"][0].grad = theta
    optimizer.step()
    sums = {"steps": torch.tensor(2), "sum loss": torch.tensor(0.5, dtype=torch.float64)}
    params = {"theta": theta, "log_lam": torch.full((2,), 0.5)}
    return Checkpoint(step, 7, {"outer": {"lr": 0.1}}, params, {"theta": -theta}, optimizer.state_dict(), sums, 1.5)


class TestCheckpoints:
    def test_round_trip(self, tmp_path: Path) -> None:
        saved = _checkpoint(3)
        path = save_checkpoint(tmp_path, saved, keep=2)
        plain = torch.load(path, weights_only=True)  # as anyone would read it
        assert torch.equal(plain["params"]["theta"], saved.params["theta"])
        assert (plain["step"], plain["seed"], plain["config"]) == (3, 7, {"outer": {"lr": 0.1}})
        loaded = load_checkpoint(path)
        assert torch.equal(loaded.params["theta"], saved.params["theta"])
        assert torch.equal(loaded.evaluated["theta"], -saved.params["theta"])
        assert torch.equal(loaded.evaluated["log_lam"], saved.params["log_lam"])
        state, expected = loaded.optimizer["state"][0], saved.optimizer["state"][0]
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert loaded.metrics == saved.metrics
        assert loaded.seconds == 1.5

    def test_keeps_the_newest(self, tmp_path: Path) -> None:
        (tmp_path / "step-notes.pt").write_text("a user's file")
        for step in (5, 10, 15, 20):
            save_checkpoint(tmp_path, _checkpoint(step, 10), keep=2)
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000015.pt", "step-00000020.pt"]
        assert (tmp_path / "step-notes.pt").exists()

    def test_any_damage_is_found(self, tmp_path: Path) -> None:
        """Flip single bits and cut the file short: either it is refused, or what comes out is what went in."""
        saved = _checkpoint(1)
        path = save_checkpoint(tmp_path, saved, keep=1)
        whole = path.read_bytes()
        positions = random.Random(0).sample(range(len(whole)), 150)
        messages: list[str] = []
        for position in positions:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << (position % 8)
            path.write_bytes(damaged)
            try:
                loaded = load_checkpoint(path)
            except CheckpointError as error:
                messages.append(str(error))
            else:  # a byte of padding between the records of the archive
                assert torch.equal(loaded.params["theta"], saved.params["theta"])
                assert torch.equal(loaded.optimizer["state"][0]["exp_avg"], saved.optimizer["state"][0]["exp_avg"])
        assert len(messages) > 100
        assert all(str(path) in message and "\n" not in message for message in messages)
        for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match="is damaged"):
                load_checkpoint(path)

    def test_not_a_checkpoint(self, tmp_path: Path) -> None:
        torch.save({"theta": torch.zeros(3)}, tmp_path / "step-00000001.pt")
        with pytest.raises(CheckpointError, match="is not a training checkpoint of format 3"):
            load_checkpoint(tmp_path / "step-00000001.pt")
        with pytest.raises(CheckpointError, match="does not exist"):
            load_checkpoint(tmp_path / "step-00000002.pt")

    def test_code_in_a_checkpoint_is_not_run(self, tmp_path: Path) -> None:
        path = tmp_path / "step-00000001.pt"
        torch.save({"theta": _Trap(tmp_path / "sprung")}, path)
        with pytest.raises(CheckpointError, match="is damaged"):
            load_checkpoint(path)
        assert not (tmp_path / "sprung").exists()

    def test_nothing_is_chosen_in_place_of_a_damaged_newest(self, tmp_path: Path) -> None:
        for step in (1, 2, 3):
            save_checkpoint(tmp_path, _checkpoint(step), keep=3)
        newest, older = tmp_path / "step-00000003.pt", tmp_path / "step-00000002.pt"
        newest.write_bytes(newest.read_bytes()[:500])
        with pytest.raises(CheckpointError) as caught:
            load_newest(tmp_path)
        assert str(newest) in str(caught.value)
        assert f"continue from the older {older} with --from-checkpoint" in str(caught.value)
        for path in (older, tmp_path / "step-00000001.pt"):
            path.write_bytes(b"")
        with pytest.raises(CheckpointError, match="no older checkpoint is usable"):
            load_newest(tmp_path)

    def test_none_yet(self, tmp_path: Path) -> None:
        assert load_newest(tmp_path) is None


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


class TestRunDirectory:
    def test_two_processes_do_not_share_one(self, tmp_path: Path) -> None:
        first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
        with first.opened(), pytest.raises(RunError, match="another process is training in"), second.opened():
            pass
        with second.opened():
            pass

    def test_leftovers_of_a_killed_process_are_removed(self, tmp_path: Path) -> None:
        directory = RunDirectory(tmp_path / "run")
        directory.checkpoints.mkdir(parents=True)
        leftover = directory.checkpoints / ".step-00000001.pt.123.tmp"
        leftover.write_bytes(b"half")
        with directory.opened():
            assert not leftover.exists()

    def test_empty_means_nothing_of_a_run(self, tmp_path: Path) -> None:
        directory = RunDirectory(tmp_path / "run")
        assert directory.is_empty()
        with directory.opened():
            pass
        assert directory.is_empty()
        (tmp_path / "run" / "notes.txt").write_text("mine")
        assert not directory.is_empty()


def test_means_of_metrics_and_their_state() -> None:
    metrics = MetricAccumulator(torch.device("cpu"))
    yes, no = torch.tensor(True), torch.tensor(False)

    def add(each: MetricAccumulator, loss: float, step: int | torch.Tensor, finite: torch.Tensor) -> None:
        each.add({"loss": torch.tensor(loss)}, step=step, finite=finite)
        each.count()

    assert metrics.means() == {}
    add(metrics, 1.0, 1, yes)
    add(metrics, 4.0, torch.tensor(2), yes)
    assert metrics.means() == {"loss": 2.5}
    other = MetricAccumulator(torch.device("cpu"))
    other.load_state(metrics.state())
    for each in (metrics, other):
        add(each, 1.0, torch.tensor(3), no)
        add(each, math.nan, 4, no)
        assert each.first_nonfinite_step() == 3
        buffers = [value.data_ptr() for value in each.buffers()]
        each.clear()
        assert each.means() == {}
        add(each, 7.0, 5, yes)
        assert each.means() == {"loss": 7.0}
        assert [value.data_ptr() for value in each.buffers()] == buffers
