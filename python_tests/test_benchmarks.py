"""The benchmarks at tiny sizes: they run, their checks can fail, and the document is what the result files say."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_emulated
import test_launches
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cg  # noqa: E402
import every_kernel  # noqa: E402
import gpu_check  # noqa: E402
import integrations  # noqa: E402
import measure  # noqa: E402
import meta_step  # noqa: E402
import minres  # noqa: E402
import ncu_details  # noqa: E402
import peers  # noqa: E402
import precision  # noqa: E402
import profile_step  # noqa: E402
import render  # noqa: E402
import scaling  # noqa: E402
import two_versions  # noqa: E402
import yardsticks  # noqa: E402
from integration_examples import Meter  # noqa: E402

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
    step = result["step"]
    assert step["rounds"] == 2 * 3  # of five steps, neither the first nor the last
    words = 7 * 5 * 60 * 4 / 1e6 / result["copy_gb_per_s"]
    assert step["ms_at_copy_speed"] == pytest.approx(words, rel=0.1, abs=1e-4)
    assert "2 rows at a time and its callback move 3 words" in render._cg(result)


def test_a_solver_that_is_off_is_recorded_and_the_others_are_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(cg, "linear_operator_peer", lambda: lambda hvp, b, shift, iterations: 0 * b)
    arguments = ["--rows", "5", "--cols", "60", "--blocks", "--rounds", "2", "--json", str(tmp_path / "r.json")]
    result = run(monkeypatch, cg, *arguments)
    assert result["wrong"] == {"linear_operator": "off by 1, more than 1e-04"}
    assert "linear_operator" not in result["results"]
    assert "Not timed: linear_operator (off by 1, more than 1e-04)." in render._cg(result)


def test_minres_beside_its_algorithm_in_torch_operations(monkeypatch, tmp_path):
    arguments = ["--rows", "3", "--cols", "50", "--rounds", "2", "--json", str(tmp_path / "r.json")]
    result = run(monkeypatch, minres, *arguments)
    assert set(result["results"]) == {"imaml_ext.solvers.minres", "in torch operations", "operator alone"}
    assert result["results"]["imaml_ext.solvers.minres"]["ratio_to_ours"] == 1


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


def faulty(factor: float):
    def make(problem: peers.Problem) -> peers.Implementation:
        right = peers.grouped(problem)
        return replace(right, gradient=lambda flat: factor * flat)

    return make


def raising(problem: peers.Problem) -> peers.Implementation:
    raise RuntimeError("out of memory\nand more of it")


@pytest.mark.parametrize(
    ("peer", "what"),
    [(faulty(1.001), "off by 0.001, "), (faulty(math.nan), "off by nan, "), (raising, "RuntimeError: out of memory")],
)
def test_a_peer_that_is_off_is_recorded_and_the_others_are_timed(monkeypatch, tmp_path, peer, what):
    makers = meta_step.makers

    def with_peer(options):
        found, left_out = makers(options)
        return {**found, "peer": peer}, left_out

    monkeypatch.setattr(meta_step, "makers", with_peer)
    result = run(monkeypatch, meta_step, "5w1s-1q", "5w1s-8tasks", *TINY, "--json", str(tmp_path / "r.json"))
    assert len(result["runs"]) == 2
    for measured in result["runs"]:
        assert measured["wrong"].keys() == {"peer"}
        assert measured["wrong"]["peer"].startswith(what)
        assert set(measured["results"]) == {"imaml_ext", "imaml_ext, nn.Module", "grouped conv2d"}
    assert f"Not timed: peer ({what}" in render._meta_step(result)


def test_ours_must_be_right_and_each_of_its_forms_too(monkeypatch, tmp_path):
    task = problem("after")
    with pytest.raises(measure.MismatchError, match="imaml_ext is off"):
        meta_step.check(task, task, {"imaml_ext": faulty(1.001)})
    monkeypatch.setattr(peers, "imaml_ext_module", faulty(1.001))
    monkeypatch.setattr(sys, "argv", [meta_step.__file__, "5w1s-1q", *TINY])
    assert meta_step.main() == 1


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


def test_integrations_compare_results_before_they_are_written(monkeypatch, tmp_path):
    def example(ours: bool) -> integrations.Run:
        meter = Meter()
        double = meter.timed(meter.counted(lambda x: 2 * x))
        return meter.run(double(torch.tensor([1.0, 1.0 + error * ours])))

    texts = {"PACKAGES": ("torch",), "EXAMPLE": "Doubling.", "CHANGE": ("x + x", "2 * x"), "REASON": "None."}
    monkeypatch.setattr(integrations, "entry", lambda name: SimpleNamespace(example=example, **texts))
    monkeypatch.setattr(integrations, "NAMES", ["doubling"])
    threads, error = torch.get_num_threads(), 1e-6
    try:
        result = run(monkeypatch, integrations, "doubling", "--rounds", "2", "--json", str(tmp_path / "r.json"))
        error = 1e-4
        with pytest.raises(measure.MismatchError, match="doubling: the results must agree within 1e-05"):
            run(monkeypatch, integrations, "--json", str(tmp_path / "r.json"))
    finally:
        torch.set_num_threads(threads)
    row = result["results"]["doubling"]
    assert row["difference"] == pytest.approx(1e-6, rel=0.1)
    assert row["library"]["products"] == row["ours"]["products"] == 1
    assert 0 <= row["ours"]["min_s"] <= row["ours"]["median_s"] <= row["ours"]["max_s"]
    assert "    + 2 * x" in render._integrations(result)


@pytest.mark.skipif(not render.RESULTS.exists(), reason="the result files are not part of a source distribution")
def test_the_pages_are_what_the_result_files_say():
    assert (render.ROOT / "docs" / "benchmarks.md").read_text() == render.render()
    assert (render.ROOT / "docs" / "gallery.md").read_text() == render.gallery()


def test_kernels_are_shown_before_and_after(monkeypatch):
    def report(commit: str, name: str, **changed) -> dict:
        kernel = {"registers": 40, "shared": 1024, "blocks": 2, "stores": {"4": 9}, "in_pieces": {}, "stack": 0}
        stamp = {"commit": commit, "nvcc": "V1", "architecture": "sm_90"}
        return {"stamp": stamp, "kernels": {name: {**kernel, **changed}}}

    monkeypatch.setattr(render, "KERNELS", {"a step": ("old<float>", "new<float>")})
    before = report("aaa", "old<float>", stack=16, in_pieces={"4": 3, "2": 1, "8": 5})
    after = report("bbb", "new<float>", registers=64, stores={"4": 1, "16": 7}, in_pieces={"8": 6})
    page = render._kernels(before, after, has_run=False)
    assert "Nothing has run on a GPU yet" in page
    assert "Nothing has run on a GPU yet" not in render._kernels(before, after, has_run=True)
    assert "Before is commit aaa; after is bbb" in page
    assert "| a step | 40 → 64 | 1,024 | 2 | 0 → 7 | 4 → 0 | 5 → 6 | 16 → 0 |" in page
    assert "| kernels | 1 |" in page
    assert "| that spill | 1 → 0 |" in page
    assert "| that store in pieces of 4 bytes or less | 1 → 0 |" in page
    with pytest.raises(KeyError, match="new<float>"):
        render._kernels(before, report("bbb", "renamed<float>"), has_run=False)


def test_launches_that_are_shown_are_those_that_are_counted():
    meta_step, inner_step = (after for _, after in render.LAUNCHES.values())
    assert meta_step == test_emulated.LAUNCHES_OF_A_META_STEP
    assert inner_step == test_launches.INNER_STEP


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


def test_a_step_is_profiled_by_name_and_grid(monkeypatch, tmp_path, capsys):
    result = run(monkeypatch, profile_step, *TINY[:-2], "--json", str(tmp_path / "r.json"))
    names = {row["name"]: row for row in result["results"]["eager"]["by_kernel"]}
    assert names["imaml_ext::network_product"]["count"] == 2  # a step of conjugate gradients each
    assert "imaml_ext::network_descend_" in capsys.readouterr().out
    launch = {"name": "k", "ts": 5.0, "dur": 2.0, "args": {"grid": [2, 1, 1], "registers per thread": 40}}
    found = profile_step.table([launch, {**launch, "ts": 8.0}, {**launch, "ts": 11.0, "args": {"grid": [3, 1, 1]}}])
    assert (found["launches"], found["busy_us"], found["span_us"]) == (3, 6.0, 8.0)
    assert [(row["grid"], row["count"], row["registers"]) for row in found["by_kernel"]] == [
        ("2×1×1", 2, 40),
        ("3×1×1", 1, None),
    ]


def test_the_pages_of_ncu_become_a_line_per_launch():
    head = '"ID","Process ID","Kernel Name","Block Size","Grid Size","Metric Name","Metric Unit","Metric Value"'
    rows = ['"0","1","step","(512, 1, 1)","(8, 1, 1)","Duration","us","45.10"', '"0","1","step","","","Rule","",""']
    rows.append('"1","1","mul","(128, 1, 1)","(9, 1, 1)","DRAM Throughput","%","91"')
    lines = list(ncu_details.summary("\n".join(["==PROF== Connected", head, *rows])))
    assert lines == ["step (8, 1, 1): time 45.10 us", "mul (9, 1, 1): memory 91 %"]
    assert list(ncu_details.summary("==ERROR== no counters")) == []


def test_each_part_is_measured_by_ncu_from_its_first_launch_on(monkeypatch, tmp_path, capsys):
    def launches(call, device):
        return [{"cat": "kernel", "name": f"{call()} {'MulFunctor' if place % 2 else ''}"} for place in range(11)]

    parts = {"step": (lambda: "s", 1, 2), "gradient": (lambda: "g", 2, 6)}
    monkeypatch.setattr(ncu_details, "trace", launches)
    monkeypatch.setattr(ncu_details, "parts", lambda tasks, device: parts)
    ncu = tmp_path / "ncu"
    ncu.write_text('#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done\necho "==PROF== $*" > "$2"\n')
    ncu.chmod(0o755)
    arguments = ["--device", "cuda", "--ncu", str(ncu), "--details", str(tmp_path / "ncu.csv")]
    monkeypatch.setattr(sys, "argv", ["ncu_details.py", *arguments])
    assert ncu_details.main() == 0
    out = capsys.readouterr().out
    assert "step, 2 launches from number 5 on" in out
    assert "gradient, 6 launches from number 8 on" in out
    pages = (tmp_path / "ncu.csv").read_text()
    assert (
        pages.index("# step") < pages.index("--part step") < pages.index("# gradient") < pages.index("--part gradient")
    )


def test_yardsticks_are_held_against_float64(monkeypatch, tmp_path):
    arguments = ["--tasks", "2", "--repeat", "1", "--rounds", "1", "--json", str(tmp_path / "r.json")]
    result = run(monkeypatch, yardsticks, *arguments)
    assert result["results"]["torch.bmm, float32"]["relative_error"] < 1e-5
    assert "| torch.bmm, float32 |" in render._yardsticks(result)


def test_every_kernel_names_the_case_that_fails(monkeypatch, capsys):
    calls = []

    def arguments(shape, dtype):
        yield "right", lambda device: [torch.ones(2)]
        yield "wrong", lambda device: [torch.ones(2) * len(calls)] if calls.append(0) is None else []

    monkeypatch.setattr(every_kernel, "arguments", arguments)
    small = ["--device", "cpu", "--dtypes", "float32", "--sizes", "2x31", "3x4", "--networks"]
    monkeypatch.setattr(sys, "argv", ["every_kernel.py", *small])
    assert every_kernel.main() == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED: ")]
    assert failed == ["FAILED: wrong, float32, 2x31", "FAILED: wrong, float32, 3x4"]
    calls.clear()
    monkeypatch.setattr(sys, "argv", ["every_kernel.py", *small, "--only", failed[1].removeprefix("FAILED: ")])
    assert every_kernel.main() == 1
    assert len(calls) == 2


# --- gpu_check.py -----------------------------------------------------------------------------------------------------


def runner(folder: Path, *, budget: float = 60, **options) -> gpu_check.Runner:
    folder.mkdir(exist_ok=True)
    check = gpu_check.Check(folder, report={"stamp": {"torch": "1"}, "cuda": True})
    return gpu_check.Runner(check, budget=budget, **options)


def step(name: str, *programs: str, limit: int = 30) -> gpu_check.Step:
    commands = [[sys.executable, "-c", program] for program in programs]
    return gpu_check.Step(name, limit, lambda check: iter(commands))


def test_steps_fail_alone_and_their_results_are_kept_for_the_same_stamp(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LEAST", 0)
    first, copy = runner(tmp_path), tmp_path / "copy"
    copy.mkdir()
    first.copy = copy
    assert first.take(step("good", "print('one')", "print('two')")) == "passed"
    assert first.take(step("bad", "print('before'); raise SystemExit(3)", "print('after')")) == "failed (3)"
    assert first.take(gpu_check.Step("none", 9, lambda check: iter([[check.tool("no-such-tool")]]))).startswith("skipp")
    assert first.take(step("slow", "import time; time.sleep(60)", limit=1)) == "failed: out of time"
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert written == json.loads((copy / "gpu_check.json").read_text())
    assert [s["last_line"] for s in written["steps"].values()][:2] == ["two", "after"]
    assert "one\n$" in (tmp_path / written["steps"]["good"]["log"]).read_text()
    assert "===== bad" in (copy / "gpu_check.log").read_text()
    again = runner(tmp_path)
    again.take(step("bad", "print('mended')"))
    assert again.result["steps"]["bad"]["status"] == "passed"
    assert again.result["steps"]["good"] == written["steps"]["good"]
    other = gpu_check.Check(tmp_path, report={"stamp": {"torch": "2"}})
    assert gpu_check.Runner(other, budget=60).result["steps"] == {}


def test_steps_beyond_the_budget_are_left_out(tmp_path):
    short = runner(tmp_path, budget=gpu_check.LEAST + 0.5)  # a command is not begun for less than LEAST
    assert short.take(step("first", "import time; time.sleep(1)", "print('too late')")) == "failed: out of time"
    assert short.take(step("second", "print('never')")) == "left out: no time"
    assert "too late" not in (tmp_path / "first.log").read_text().split("$ ")[1]
    assert not (tmp_path / "second.log").exists()


@pytest.mark.parametrize("write", range(4))
def test_a_step_that_is_stopped_while_its_status_is_written_says_so(tmp_path, monkeypatch, write):
    stopped, publish, written = runner(tmp_path), gpu_check.Runner.publish, []

    def publish_and_stop(self: gpu_check.Runner) -> None:
        publish(self)
        written.append(self.result["steps"]["one"]["status"])
        if len(written) == write + 1:
            gpu_check.stop(15, None)

    monkeypatch.setattr(gpu_check.Runner, "publish", publish_and_stop)
    with pytest.raises(SystemExit, match="143"):
        stopped.take(step("one", "pass", "pass"))
    assert written == [*["under way", "under way", "under way", "passed"][: write + 1], "interrupted"]
    assert json.loads((tmp_path / "gpu_check.json").read_text())["steps"]["one"]["status"] == "interrupted"


def test_a_result_of_an_earlier_call_is_not_that_of_a_step_that_fails(tmp_path):
    def measuring(program: str) -> gpu_check.Step:
        command = [sys.executable, "-c", program, "--json", str(tmp_path / "cg-2x3.json")]
        return gpu_check.Step("cg", 30, lambda check: iter([command]))

    both = runner(tmp_path)
    assert both.take(measuring("import sys; open(sys.argv[2], 'w').write('[1]')")) == "passed"
    assert both.result["benchmarks"] == {"cg-2x3": [1]}
    for program in ("raise SystemExit(1)", "import sys; open(sys.argv[2], 'w').write('[1'); raise SystemExit(1)"):
        assert both.take(measuring(program)) == "failed (1)"
        assert both.result["benchmarks"] == {}


def test_the_case_that_failed_is_what_memcheck_looks_at(tmp_path, monkeypatch):
    check = runner(tmp_path).check
    monkeypatch.setattr(gpu_check.Check, "tool", lambda self, name: name)
    log, lines = tmp_path / "every_kernel.log", "$ python\ncase: cg, float32, 2x31\ncase: cg, float32, 2x4096\n"
    for more, case in (("", "2x4096"), ("FAILED: cg, float32, 2x31\n  off by 1\nFAILED: other\n", "2x31")):
        log.write_text(lines + more)
        (command,) = gpu_check.memcheck_of_the_failure(check)
        assert command[command.index("--tool") + 1] == "memcheck"
        assert command[command.index("--only") + 1] == f"cg, float32, {case}"


def test_a_prebuilt_extension_is_taken_only_for_this_torch_and_these_sources(tmp_path, monkeypatch):
    check = runner(tmp_path / "out").check
    check.prebuilt, root = tmp_path, tmp_path / "root"
    monkeypatch.setattr(gpu_check, "ROOT", root)
    (root / "imaml_ext").mkdir(parents=True)
    works = [sys.executable, "-c", ""]
    assert "No such file" in str(gpu_check.take_prebuilt(check, works))
    built = tmp_path / "imaml_ext"
    built.mkdir()
    (built / "_C.abi.so").touch()
    (built / "_build_info.json").write_text(json.dumps({"cuda": True, "torch": "0"}))
    assert "built for torch 0; here is 1" in str(gpu_check.take_prebuilt(check, works))
    (root / "csrc").mkdir()
    (root / "csrc" / "kernel.cu").write_text("// one")
    digest = gpu_check.load_build_support().sources_digest(root / "csrc")
    (built / "_build_info.json").write_text(json.dumps({"cuda": True, "torch": "1", "sources": digest}))
    assert gpu_check.take_prebuilt(check, works) is None
    (root / "csrc" / "kernel.cu").write_text("// two")
    assert "other sources" in str(gpu_check.take_prebuilt(check, works))
    (root / "csrc" / "kernel.cu").write_text("// one")
    assert (root / "imaml_ext" / "_C.abi.so").exists()
    broken = [sys.executable, "-c", """print('{"unusable": "undefined symbol"}'); raise SystemExit(1)"""]
    assert gpu_check.take_prebuilt(check, broken) == "undefined symbol"


SCRIPT = [str(BENCHMARKS / "gpu_check.sh")]


def rehearse(folder: Path, *arguments: str, **options) -> subprocess.Popen:
    command = [*SCRIPT, "--rehearse", "--output-dir", str(folder), *arguments]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def steps_of(folder: Path) -> dict[str, dict]:
    path = folder / "gpu_check.json"
    return json.loads(path.read_text())["steps"] if path.exists() else {}


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_check_that_is_killed_leaves_what_it_has_measured(tmp_path, number):
    process = rehearse(tmp_path, "yardsticks", "cg", "short_training")
    until = time.monotonic() + 120
    while steps_of(tmp_path).get("cg", {}).get("status") != "under way":
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    left = steps_of(tmp_path)
    assert left["yardsticks"]["status"] == "passed"
    assert left["cg"]["status"] == ("under way" if number == signal.SIGKILL else "interrupted")
    assert "short_training" not in left
    measured = json.loads((tmp_path / "gpu_check.json").read_text())["benchmarks"]
    assert measured["yardsticks"]["results"]
    assert rehearse(tmp_path, "cg").wait(timeout=120) == 0
    then = steps_of(tmp_path)
    assert then["cg"]["status"] == "passed"
    assert then["yardsticks"] == left["yardsticks"]


@pytest.mark.long
def test_the_whole_check_rehearsed(tmp_path):
    process = rehearse(tmp_path, "--copy", str(tmp_path / "copy"))
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output.decode()
    steps = steps_of(tmp_path)
    assert list(steps) == [step.name for step in gpu_check.STEPS if step.default]
    assert {name: s["status"] for name, s in steps.items() if s["status"] != "passed"}.keys() <= {"rivals"}
    measured = json.loads((tmp_path / "gpu_check.json").read_text())["benchmarks"]
    assert measured.keys() >= {"cg-3x50", "meta_step", "profile_step", "yardsticks"}
    for name, result in measured.items():
        assert render._SECTIONS[name.partition("-")[0]](result).startswith("## ")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"gpu_check.json", "gpu_check.log"}
    assert rehearse(tmp_path, "cg", "profile", "--budget", "4").wait(timeout=60) == 0
    left_out = steps_of(tmp_path)
    assert left_out["cg"]["status"] == left_out["profile"]["status"] == "left out: no time"
    assert left_out["ncu"] == steps["ncu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_every_step_is_skipped(tmp_path):
    done = subprocess.run([*SCRIPT, "--output-dir", str(tmp_path)], env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0
    assert {step["status"] for step in steps_of(tmp_path).values()} == {"skipped: no CUDA device"}
