"""`imaml reproduce`: every experiment at a size of seconds; interrupted, resumed, drawn from what there is, refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from training_tools import assert_one_sentence, imaml, stopped_in

from imaml_ext.data.linear import LinearClosedForm, LinearSampler
from imaml_ext.meta import IMAML
from imaml_ext.reproduction import EXPERIMENTS, cost
from imaml_ext.reproduction.ablation import RECIPES, STUDIES, ablation_cells
from imaml_ext.reproduction.cost import CostCell, _cpu_memory, measure
from imaml_ext.reproduction.equal_budget import equal_cells
from imaml_ext.reproduction.omniglot_table import read_cells, table
from imaml_ext.reproduction.options import ALGORITHMS, Ablation, Cost, EqualBudget, Sinusoid
from imaml_ext.reproduction.paper import PUBLISHED
from imaml_ext.reproduction.sinusoid import sinusoid_cells
from imaml_ext.settings import changed, leaves
from imaml_ext.train.checkpoint import list_checkpoints, load_checkpoint
from imaml_ext.train.run_directory import RunDirectory, read_config

TRIAL = ("--budget", "trial", "--threads", "1", "--device", "cpu")


@pytest.fixture(autouse=True)
def _own_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


# ---- all of them ----------------------------------------------------------------------------------------------------


def test_help_names_the_experiments() -> None:
    listed = imaml("reproduce", "--help")
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in EXPERIMENTS)
    assert list(EXPERIMENTS) == ["exactness", "cost", "sinusoid", "omniglot-table", "equal-budget", "ablation"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("table", ["table", "omniglot-table"]),
        ("exactness --condition-numbers 1", ["condition_numbers must be at least 2, got 1.0"]),
        ("exactness --condition-numbers nan", ["condition_numbers must be finite, got nan"]),
        ("exactness --eigenvalues 21", ["eigenvalues must be no larger than features (20), got (21,)"]),
        ("exactness --cg-steps", ["cg_steps must be one or more values, got ()"]),
        ("exactness --dtypes float16", ["float16", "float64"]),
        ("cost --methods reptile", ["reptile", "fomaml"]),
        ("cost --steps 0", ["steps must be at least 1, got 0"]),
        ("cost --memory-limit -1", ["memory_limit must be above 0, got -1.0"]),
        ("sinusoid --budget huge", ["huge", "published"]),
        ("ablation --threads 0", ["threads must be at least 1, got 0"]),
        ("cost --data glyphs --data-root here", ["data_root must be left out for the data set 'glyphs'"]),
        ("omniglot-table --cels 5w1s", ["Unrecognized options", "--cels"]),
    ],
)
def test_a_command_that_cannot_be_understood(
    arguments: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    process = imaml("reproduce", *arguments.split())
    assert process.returncode == 2, process.stderr
    text = " ".join(process.stderr.replace("│", " ").split())
    assert all(word in text for word in words), text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["exactness", "sinusoid", "ablation"])
def test_an_output_directory_that_is_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    process = imaml("reproduce", name, "--output-dir", tmp_path / "file" / "below")
    assert_one_sentence(process, "output directory", "cannot be used", "Not a directory")
    assert (tmp_path / "file").read_text() == "a file"


# ---- exactness ------------------------------------------------------------------------------------------------------


def test_exactness(tmp_path: Path) -> None:
    seed, features, tasks, condition = random.randrange(10**6), 6, 2, 10.0
    sizes = f"--features {features} --tasks {tasks} --draws 1 --seed {seed} --condition-numbers {condition}"
    choices = "--eigenvalues 3 --cg-steps 1 3 20 --dtypes float64 float32"
    process = imaml("reproduce", "exactness", "--output-dir", tmp_path, *sizes.split(), *choices.split())
    assert process.returncode == 0, process.stderr
    assert _is_picture(tmp_path / "exactness.png")
    results = _json(tmp_path / "exactness.json")
    assert results["experiment"] == "exactness"
    assert results["command"].startswith("imaml reproduce exactness --output-dir")
    assert results["configuration"]["seed"] == seed
    assert results["environment"]["torch"] == torch.__version__

    double, single = results["findings"]
    assert double["terminal_error"]["imaml-20"] <= 1e-6
    assert double["terminal_error"]["imaml-3"] <= 1e-6  # three eigenvalues: CG has arrived after three steps
    assert double["terminal_error"]["imaml-1"] > 1e-4  # and not after one
    assert double["terminal_error"]["maml"] <= 1e-6  # the same limit
    assert 1e-9 < single["terminal_error"]["maml"] < 1e-3  # rounding

    # Every error before the limit, against matrices: φ_k − φ* = C (θ − φ*), C = (I − ηA)^k, A = H + λI.
    curve = results["curves"][0]
    sampler = LinearSampler(
        features=features, shots=12, queries=12, meta_batch=tasks, seed=seed, condition_number=condition, eigenvalues=3
    )
    batch = sampler.sample(0)
    forms, lam, theta = LinearClosedForm(batch), 2 / condition, torch.zeros(features, dtype=torch.float64)
    A = forms.hessian(batch.support) + lam * torch.eye(features)
    solution, (exact, _) = forms.solution(theta, lam), forms.meta_gradient(theta, lam)
    for point in curve["points"]:
        steps = point["inner_steps"]
        if steps > 20 or point["method"] not in ("maml", "imaml-20"):
            continue
        C = torch.linalg.matrix_power(torch.eye(features) - A / (2 + lam), steps)
        phi = solution + (C @ (theta - solution).unsqueeze(-1)).squeeze(-1)
        v = (forms.hessian(batch.query) @ phi.unsqueeze(-1)).squeeze(-1) - forms.moment(batch.query)
        J = lam * torch.linalg.inv(A)
        if point["method"] == "maml":
            J = C + (torch.eye(features) - C) @ J
        error = ((J @ v.unsqueeze(-1)).squeeze(-1).mean(0) - exact).norm() / exact.norm()
        assert point["median"] == pytest.approx(error.item(), rel=1e-6, abs=1e-12), point


# ---- cost -----------------------------------------------------------------------------------------------------------


def _cost_cell(method: str, steps: int) -> CostCell:
    return CostCell(method, steps, Cost(data="glyphs", filters=2, queries=1, repeats=1, device="cpu"))


def test_peak_memory_is_the_allocators() -> None:
    def call() -> None:
        first = torch.empty(1000, 250)  # 1 MB
        second = torch.empty(2000, 250)  # 3 MB together
        del first
        third = torch.empty(500, 250)  # 2.5 MB
        assert second is not third

    memory = _cpu_memory(call)
    assert memory["peak_bytes"] == 3_000_000
    assert memory["resident_bytes"] >= 0


def _in_a_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(call).result()


def test_memory_grows_with_mamls_steps_alone() -> None:
    flat = ("imaml-gd", "imaml-hf", "fomaml")
    cells = [("maml", 2), ("maml", 4), ("maml", 8), *((method, steps) for method in flat for steps in (2, 8))]
    # A thread each, as a process each otherwise: the native engine keeps a thread's last tape for its next call, which
    # would not count here if the cell before had left one of the same size.
    peaks = {cell: _in_a_thread(lambda cell=cell: measure(_cost_cell(*cell))["peak_bytes"]) for cell in cells}
    for method in flat:
        assert peaks[method, 8] <= 1.05 * peaks[method, 2], method
    growth = [(peaks["maml", more] - peaks["maml", less]) / (more - less) for less, more in ((2, 4), (4, 8))]
    assert growth[0] == pytest.approx(growth[1], rel=0.05)  # linear
    assert peaks["maml", 8] > 2 * peaks["maml", 2]


def test_cost_keeps_what_it_has_measured(tmp_path: Path) -> None:
    def run(*more: object) -> Any:
        sizes = ["--filters", 2, "--queries", 1, "--repeats", 1]
        options = [*sizes, "--threads", 1, "--device", "cpu", "--data", "glyphs"]
        return imaml("reproduce", "cost", "--output-dir", tmp_path, "--methods", "imaml-gd", *options, *more)

    first = run("--steps", 1)
    assert first.returncode == 0, first.stderr
    results = _json(tmp_path / "cost.json")
    (cell,) = results["cells"].values()
    assert cell["peak_bytes"] > 0
    assert cell["seconds"] > 0
    assert results["settings"]["ways"] == 20
    assert _is_picture(tmp_path / "cost.png")

    # A cell of an interrupted call is not measured again; one that would not fit is left out with its estimate.
    results["cells"]["imaml-gd/2"] = {**cell, "steps": 2, "peak_bytes": cell["peak_bytes"] + 2**30}
    (tmp_path / "cost.json").write_text(json.dumps(results))
    again = run("--steps", 1, 2, 5, "--memory-limit", 3)
    assert again.returncode == 0, again.stderr
    cells = _json(tmp_path / "cost.json")["cells"]
    assert cells["imaml-gd/1"] == cell
    assert cells["imaml-gd/2"] == results["cells"]["imaml-gd/2"]
    assert cells["imaml-gd/5"]["estimated_bytes"] == cell["peak_bytes"] + 4 * 2**30
    assert "limit of 3.0 GiB" in cells["imaml-gd/5"]["left_out"]

    assert_one_sentence(run("--steps", 1, "--meta-batch", 2), "measured with meta_batch 1, now 2")
    (tmp_path / "cost.json").write_text("{")
    assert_one_sentence(run("--steps", 1), "cost.json cannot be read", "remove it")


def _killed(cell: CostCell, sender: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _failing(cell: CostCell, sender: Any) -> None:
    os._exit(3)


def test_a_cell_whose_process_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--methods", "fomaml", "--steps", 1, "--threads", 1, "--device", "cpu", "--data", "glyphs"]
    monkeypatch.setattr(cost, "_send_measured", _failing)
    failed = imaml("reproduce", "cost", "--output-dir", tmp_path, *options)
    assert_one_sentence(failed, "measuring fomaml/1 failed with exit code 3")
    monkeypatch.setattr(cost, "_send_measured", _killed)
    killed = imaml("reproduce", "cost", "--output-dir", tmp_path, *options)
    assert killed.returncode == 0, killed.stderr
    assert "its process was killed" in _json(tmp_path / "cost.json")["cells"]["fomaml/1"]["left_out"]
    assert _is_picture(tmp_path / "cost.png")


# ---- the experiments that train -------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["small", "published", "trial"])
def test_cells_differ_in_what_their_names_say(budget: Any) -> None:
    table = {name: dict(leaves(config)) for name, config in equal_cells(EqualBudget(budget=budget)).items()}
    assert len(table) == 20
    for name, config in table.items():
        column, algorithm = name.split("/")
        assert f"{config['tasks.ways']}w{config['tasks.shots']}s" == column
        assert config["algorithm"] == algorithm.removesuffix("-gd").removesuffix("-hf")
        assert (config["algorithm.inner"] == "newton_cg") == (algorithm == "imaml-hf")
        assert config["data"] == "omniglot"
    assert set(PUBLISHED) == set(ALGORITHMS)

    regression = sinusoid_cells(Sinusoid(budget=budget)).values()
    assert [config.tasks.shots for config in regression] == 5 * [5] + 5 * [10]

    ablation = {name: dict(leaves(config)) for name, config in ablation_cells(Ablation(budget=budget)).items()}
    for study in STUDIES:
        recipe = ablation[f"recipe/{study.base}"]
        for label, changes in study.cells.items():
            config = ablation[f"{study.name}/{label}"]
            different = {path: value for path, value in config.items() if value != recipe[path]}
            assert different, (study.name, label)
            assert different.items() <= changes.items()
    assert RECIPES["public-code"].damping + RECIPES["public-code"].lam == 24


RESULTS = Path(__file__).parents[1] / "docs" / "reproduction" / "results"
RUNS = sorted(RESULTS.glob("equal-budget/runs/small/*/*/config.json"))


@pytest.mark.skipif(not RUNS, reason="the result files are not part of a source distribution")
def test_cells_are_those_of_the_recorded_runs(tmp_path: Path) -> None:
    cells = equal_cells(EqualBudget(threads=1))
    for path in RUNS:  # of version 0.1; how often it logged and saved changes no result
        cell, recorded = cells["/".join(path.parts[-3:-1])], read_config(RunDirectory(path.parent)).config
        assert changed(recorded, {"run": cell.run}) == cell, path
    shutil.copytree(RESULTS / "equal-budget" / "runs", tmp_path / "runs")
    drawn = imaml("reproduce", "equal-budget", "--draw-only", "--output-dir", tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "equal-budget.md").read_text() == (RESULTS / "equal-budget/equal-budget.md").read_text()


def test_the_table_trains_a_recipe_judges_it_and_draws_from_result_files(tmp_path: Path) -> None:
    options = ["--output-dir", tmp_path, "--trial", "--threads", 1, "--device", "cpu"]
    done = imaml("reproduce", "omniglot-table", *options, "--cells", "5w5s/imaml-gd", "5w1s/reptile")
    assert done.returncode == 0, done.stderr
    assert "2 cells are finished" in done.stderr
    stages = [path.name for path in sorted((tmp_path / "1200-423/runs/5w5s/imaml-gd").iterdir())]
    assert stages == ["1-five-ways", "2-twenty-ways", "3-longer", "4-own-tasks"]
    cell = _json(tmp_path / "1200-423/5w5s/imaml-gd.json")
    assert [stage["name"] for stage in cell["stages"]] == stages
    assert [stage["tasks"] for stage in cell["stages"]] == ["5-way 1-shot", *2 * ["20-way 1-shot"], "5-way 5-shot"]
    last = _json(tmp_path / "1200-423/runs/5w5s/imaml-gd/4-own-tasks/result.json")
    assert cell["judged"]["paper"] == last["test"]
    assert cell["judged"]["alone"]["transductive"] is False
    assert set(cell["judged"]) == {"paper", "five", "alone"}
    assert f"--output-dir {tmp_path.name} --trial" in cell["command"]  # without the folders of this machine
    first = (tmp_path / "omniglot-table.md").read_text()
    accuracy = (
        f"{100 * cell['judged']['paper']['accuracy']:.2f} ± {100 * cell['judged']['paper']['accuracy_interval']:.2f}"
    )
    assert f"| iMAML, gradient descent | not run | {accuracy} | not run | not run |" in first
    assert _is_picture(tmp_path / "omniglot-table.png")

    newton = imaml("reproduce", "omniglot-table", *options, "--cells", "20w1s/imaml-hf")
    assert newton.returncode == 0, newton.stderr
    assert "20w1s/imaml-hf begins with 2 of 4 stages of" in newton.stderr
    assert len(_json(tmp_path / "1200-423/20w1s/imaml-hf.json")["stages"]) == 4
    first = (tmp_path / "omniglot-table.md").read_text()

    # The result files alone are enough to draw again, with those of the other split beside them.
    shutil.rmtree(tmp_path / "1200-423" / "runs")
    shutil.copytree(tmp_path / "1200-423", tmp_path / "vinyals")
    again = imaml("reproduce", "omniglot-table", *options, "--draw-only")
    assert again.returncode == 0, again.stderr
    both = (tmp_path / "omniglot-table.md").read_text()
    assert both.startswith(first.rpartition("\nPublished: ")[0])
    assert both.count("**Vinyals' split**") == 3
    empty = imaml("reproduce", "omniglot-table", "--output-dir", tmp_path / "none", "--draw-only")
    assert_one_sentence(empty, "holds no result of this experiment: there is nothing to draw")


@pytest.mark.skipif(not RUNS, reason="the result files are not part of a source distribution")
def test_the_table_in_the_documentation_is_that_of_its_result_files() -> None:
    folder = RESULTS / "omniglot-table"
    assert (folder / "omniglot-table.md").read_text() == table(read_cells(folder))


def test_sinusoid(tmp_path: Path) -> None:
    process = imaml(
        "reproduce", "sinusoid", "--output-dir", tmp_path, *TRIAL, "--cells", "5shot/maml", "10shot/imaml-gd"
    )
    assert process.returncode == 0, process.stderr
    assert "2 of 10 cells are finished" in process.stderr
    assert _is_picture(tmp_path / "sinusoid.png")
    assert _is_picture(tmp_path / "functions.png")
    results = _json(tmp_path / "sinusoid.json")
    assert list(results["cells"]) == ["5shot/maml", "10shot/imaml-gd"]
    table = (tmp_path / "sinusoid.md").read_text()
    assert "| Reptile | not run | not run |" in table

    adaptation = results["adaptation"]["5shot/maml"]
    steps = [error["inner_steps"] for error in adaptation["errors"]]
    assert steps == sorted({0, 1, 2, 3, 5, 10, 20, 50})
    at = {error["inner_steps"]: error for error in adaptation["errors"]}
    tested = results["cells"]["5shot/maml"]["test"]
    assert at[tested["inner_steps"]]["loss"] == pytest.approx(tested["loss"], rel=1e-6)
    assert f"{tested['loss']:.3f} ± {tested['loss_interval']:.3f} ({tested['inner_steps']} steps)" in table
    run = tmp_path / "runs" / "trial" / "5shot" / "maml"
    evaluated = imaml("evaluate", run, "--inner-steps", 0, "--output", tmp_path / "zero.json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert at[0]["loss"] == pytest.approx(_json(tmp_path / "zero.json")["loss"], rel=1e-6)
    before = adaptation["functions"]["before"]["y"]
    assert before[0] == before[1]  # θ itself knows nothing of the task
    assert adaptation["functions"]["after"]["y"][0] != adaptation["functions"]["after"]["y"][1]


@pytest.mark.long
def test_table_interrupted_resumed_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(output: Path, *more: object) -> Any:
        return imaml("reproduce", "equal-budget", "--data", "glyphs", "--output-dir", output, *TRIAL, *more)

    def theta(output: Path) -> torch.Tensor:
        return load_checkpoint(list_checkpoints(output / "runs/trial/5w1s/imaml-gd/checkpoints")[-1]).params["theta"]

    assert_one_sentence(run(tmp_path / "a", "--cells", "5w2s"), "no cell is called '5w2s'", "5w1s/imaml-gd")
    assert_one_sentence(run(tmp_path / "a", "--draw-only"), "nothing to draw")

    with stopped_in(monkeypatch, 2):
        stopped = run(tmp_path / "a", "--cells", "5w1s/imaml-gd")
    assert stopped.returncode == 143, stopped.stderr
    assert not (tmp_path / "a" / "equal-budget.md").exists()

    resumed = run(tmp_path / "a", "--cells", "5w1s/imaml-gd", "5w1s/reptile")
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing after step 2" in resumed.stderr
    straight = run(tmp_path / "b", "--cells", "5w1s/imaml-gd")
    assert straight.returncode == 0, straight.stderr
    assert torch.equal(theta(tmp_path / "a"), theta(tmp_path / "b"))

    results = _json(tmp_path / "a" / "equal-budget.json")
    cells = results["cells"]
    assert list(cells) == ["5w1s/imaml-gd", "5w1s/reptile"]
    assert cells["5w1s/reptile"]["config"]["tasks"]["train_shots"] == 10
    test = cells["5w1s/imaml-gd"]["test"]
    table = (tmp_path / "a" / "equal-budget.md").read_text()
    accuracy = f"{100 * test['accuracy']:.2f} ± {100 * test['accuracy_interval']:.2f}"
    assert f"| iMAML, gradient descent | here | {accuracy} | not run | not run | not run |" in table
    assert "| 99.16 ± 0.35 | 99.67 ± 0.12 | 94.46 ± 0.42 | 98.69 ± 0.1 |" in table
    assert _is_picture(tmp_path / "a" / "equal-budget.png")
    assert _is_picture(tmp_path / "a" / "learning-curves.png")

    checkpoint = list_checkpoints(tmp_path / "a/runs/trial/5w1s/imaml-gd/checkpoints")[-1]
    written = checkpoint.stat().st_mtime_ns
    again = run(tmp_path / "a", "--cells", "5w1s/imaml-gd")
    assert again.returncode == 0, again.stderr
    assert "5w1s/imaml-gd is finished" in again.stderr
    assert checkpoint.stat().st_mtime_ns == written
    other = run(tmp_path / "a", "--cells", "5w1s/imaml-gd", "--seed", 1)
    assert_one_sentence(other, "run.seed was 0", "now 1")

    (tmp_path / "a" / "equal-budget.png").unlink()
    assert run(tmp_path / "a", "--draw-only").returncode == 0
    assert _is_picture(tmp_path / "a" / "equal-budget.png")
    (tmp_path / "a/runs/trial/5w1s/reptile/result.json").write_text("{")
    assert_one_sentence(run(tmp_path / "a", "--draw-only"), "result.json cannot be read")


def test_ablation_and_a_cell_that_diverges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*more: object) -> Any:
        return imaml("reproduce", "ablation", "--data", "glyphs", "--output-dir", tmp_path, *TRIAL, *more)

    meta_gradient = IMAML.meta_gradient

    def diverging(self: IMAML, *arguments: Any) -> Any:
        meta = meta_gradient(self, *arguments)
        if self.damping == 1.0:
            meta.gradient.fill_(float("nan"))
        return meta

    monkeypatch.setattr(IMAML, "meta_gradient", diverging)
    trained = run("--cells", "recipe/base", "damping/1")
    assert trained.returncode == 0, trained.stderr
    assert "2 of 44 cells are finished" in trained.stderr
    assert "became non-finite at step 1" in _json(tmp_path / "runs/trial/damping/1/diverged.json")["diverged"]
    again = run("--cells", "damping/1")
    assert again.returncode == 0, again.stderr
    assert "damping/1 is finished" in again.stderr
    table = (tmp_path / "ablation.md").read_text()
    assert "| base: damping δ | 0 (base) |" in table
    assert "|  | 1 | diverged |" in table
    cells = _json(tmp_path / "ablation.json")["cells"]
    assert "non-finite" in cells["damping/1"]["diverged"]
    assert cells["recipe/base"]["test"]["tasks"] == 10
    assert _is_picture(tmp_path / "ablation.png")


def test_omniglot_that_is_not_there(tmp_path: Path) -> None:
    missing = ["--data-root", tmp_path / "nowhere", "--output-dir", tmp_path / "out"]
    for name in ("cost", "ablation", "equal-budget"):
        assert_one_sentence(imaml("reproduce", name, *missing), "nowhere")
