"""The benchmarks at tiny sizes: they run, their checks can fail, and the document is what the result files say."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cg  # noqa: E402
import measure  # noqa: E402
import meta_step  # noqa: E402
import peers  # noqa: E402
import precision  # noqa: E402
import render  # noqa: E402
import scaling  # noqa: E402
import two_versions  # noqa: E402

TINY = ["--filters", "3", "--tasks", "2", "--inner-steps", "2", "--cg-steps", "2", "--rounds", "2"]


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small matrix product to measure the machine by."""
    monkeypatch.setattr(measure.Machine.__init__, "__kwdefaults__", {"size": 64})


def run(monkeypatch: pytest.MonkeyPatch, module, *arguments: str) -> dict:
    """What the script writes with `--json`."""
    path = Path(arguments[-1])
    monkeypatch.setattr(sys, "argv", [module.__file__, *arguments])
    assert module.main() == 0
    return json.loads(path.read_text())


def problem(proximal: str) -> peers.Problem:
    workload = meta_step.Workload(tasks=3, filters=4, inner_steps=3, cg_steps=3)
    algorithm = peers.Algorithm(proximal, 3, 3)
    seed = int(torch.randint(10**6, ()))
    return meta_step.make_problem(workload, algorithm, data="glyphs", device=torch.device("cpu"), seed=seed)


def test_meta_step_writes_figures_of_every_implementation(monkeypatch, tmp_path):
    result = run(monkeypatch, meta_step, "5w1s-1q", "20w1s", *TINY, "--hvp", "--json", str(tmp_path / "r.json"))
    assert [r["name"] for r in result["runs"]] == ["5w1s-1q", "20w1s"]
    assert set(result["left_out"]) >= {"imaml_dev", "hypertorch", "JAX"}
    for measured in result["runs"]:
        rows = measured["results"]
        assert set(rows) >= {"imaml_ext", "imaml_ext, nn.Module", "grouped conv2d"}
        assert rows["imaml_ext"]["ratio_to_ours"] == 1
        for row in [*rows.values(), *measured["product"].values()]:
            assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert all(row["distance_from_float64"] <= 1e-4 for row in rows.values())
    assert "### 20w1s" in render._meta_step(result)


def test_scaling_writes_every_axis_and_the_training_shares(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "Workload", lambda **sizes: meta_step.Workload(**sizes, filters=3, inner_steps=2))
    monkeypatch.setitem(scaling.AXES, "filters", (2, 3))
    arguments = ["tasks", "filters", "training", "--largest", "8", "--rounds", "1", "--training-steps", "2"]
    result = run(monkeypatch, scaling, *arguments, "--json", str(tmp_path / "r.json"))
    assert [p["value"] for p in result["axes"]["tasks"]["points"]] == [1, 2, 4, 8]
    assert 0 < result["training"]["outside"] < 1
    assert sum(result["training"]["shares"].values()) == pytest.approx(1, abs=0.2)
    assert "Training `glyphs-5w1s`" in render._scaling(result)
    render.draw(result, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").stat().st_size > 1000


def test_cg_compares_ours_and_in_place_loops_whole_and_in_blocks(monkeypatch, tmp_path):
    arguments = ["--rows", "5", "--cols", "60", "--blocks", "2", "--rounds", "2", "--json", str(tmp_path / "r.json")]
    result = run(monkeypatch, cg, *arguments)
    rows = result["results"]
    for name in ("imaml_ext.cg", *(f"in-place PyTorch ({dot})" for dot in ("bmm", "vecdot", "mul_sum"))):
        assert {name, f"{name}, 2 rows at a time"} <= set(rows)
    assert rows[result["best_of_ours"]]["ratio_to_ours"] == 1
    assert {bound["words_moved_per_unknown"] for bound in result["bounds"].values()} == {3, 47}
    assert "2 rows at a time and its callback move 3 words" in render._cg(result)


def test_a_blocked_loop_gives_what_the_whole_one_gives():
    d, b = torch.rand(5, 30) + 1, torch.randn(5, 30)
    for dot in ("bmm", "vecdot", "mul_sum"):
        whole, *blocked = (
            cg.InPlace(b, dot, size)(lambda p, rows: d[rows] * p, b, 0.5, 3).clone() for size in (5, 1, 2)
        )
        for x in blocked:
            torch.testing.assert_close(x, whole)


@pytest.mark.parametrize("proximal", ["after", "gradient"])
def test_grouped_and_both_models_agree_in_float64(proximal):
    exact = problem(proximal).double()
    truth = peers.grouped(exact)
    expected = truth.gradient(truth.step())
    for make in (peers.imaml_ext, peers.imaml_ext_module):
        ours = make(exact)
        assert (ours.gradient(ours.step()) - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize("wrong", [1.001, math.nan])
def test_a_wrong_implementation_is_named(wrong):
    def broken(problem: peers.Problem) -> peers.Implementation:
        right = peers.grouped(problem)
        return replace(right, name="broken", gradient=lambda flat: wrong * flat)

    task = problem("after")
    with pytest.raises(measure.MismatchError, match="broken by"):
        meta_step.check(task, task, {"broken": broken})


def test_the_steps_leave_theta_alone():
    task = problem("after")
    for make in (peers.imaml_ext, peers.imaml_ext_module, peers.grouped):
        implementation = make(task)
        first, second = (implementation.gradient(implementation.step()).clone() for _ in range(2))
        assert torch.equal(first, second)


def count_flop(call) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_the_arithmetic_is_what_torch_counts():
    workload = meta_step.Workload(ways=int(torch.randint(2, 9, ())), filters=int(torch.randint(1, 9, ())))
    network = peers.conv4_module(workload.ways, workload.filters)
    x, y = torch.rand(workload.ways, 1, 28, 28), torch.arange(workload.ways)
    parameters = tuple(network.parameters())

    def loss() -> Tensor:
        return torch.nn.functional.cross_entropy(network(x), y)

    assert count_flop(loss) == workload.forward_flop(workload.ways)[0]
    assert count_flop(lambda: torch.autograd.grad(loss(), parameters)) == workload.gradient_flop(workload.ways)


def test_deviation_from_linear_is_the_largest_from_four_tasks_on():
    assert scaling.deviation_from_linear({1: 9.0, 4: 4.4, 8: 8.0, 64: 64.0}) == pytest.approx(0.1)
    assert scaling.deviation_from_linear({4: 4.0, 8: 6.0, 16: 16.0}) == pytest.approx(0.25)


def test_share_of_sgemm_and_ratio_are_taken_within_rounds():
    machine = measure.Machine(torch.device("cpu"))
    times = {"a": [1.0, 10.0], "b": [2.0, 20.0], machine.SGEMM: [0.5, 5.0]}
    assert measure.ratio(times, "b", "a") == 2
    assert machine.share_of_sgemm(times, "a", machine.flop) == pytest.approx(0.5)


@pytest.mark.skipif(not render.RESULTS.exists(), reason="the result files are not part of a source distribution")
def test_the_document_is_what_the_result_files_say():
    assert (render.ROOT / "docs" / "benchmarks.md").read_text() == render.render()


def test_precision_is_measured_against_float64(monkeypatch, tmp_path):
    arguments = ["--tasks", "2", "--filters", "3", "--meta-steps", "1", "--json", str(tmp_path / "r.json")]
    result = run(monkeypatch, precision, *arguments)
    assert len(result["runs"]) == 4
    for measured in result["runs"]:
        off = {name: row["support_gradient"] for name, row in measured["results"].items()}
        assert off["float32"] < off["tf32"] / 100 < off["bfloat16"] / 100
    assert "| bfloat16 |" in render._precision(result)


def test_two_versions_take_turns_and_are_compared_within_a_visit(monkeypatch, tmp_path):
    visited, times = [], iter([10.0, 20.0, 30.0, 40.0])

    def visit(checkout: Path, workloads: list[str], rounds: int) -> dict:
        visited.append(checkout)
        row = {"name": "5w1s-1q", "results": {two_versions.OURS: {"min_ms": next(times)}}}
        return {"stamp": {"commit": "c"}, "runs": [row]}

    monkeypatch.setattr(two_versions, "visit", visit)
    other = tmp_path / "other"
    (other / "benchmarks").mkdir(parents=True)
    (other / "benchmarks" / "meta_step.py").touch()
    result = run(monkeypatch, two_versions, str(other), "5w1s-1q", "--visits", "2", "--json", str(tmp_path / "r.json"))
    assert visited == [other, two_versions.HERE, two_versions.HERE, other]
    assert result["results"]["5w1s-1q"]["ratio"] == {"median": 1.375, "min": 0.75, "max": 2.0}
    assert "| 5w1s-1q | 25.0 | 25.0 | 1.375 | 0.750 – 2.000 |" in render._two_versions(result)
