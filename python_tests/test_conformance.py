"""The conformance suite: ours passes every case, its judgement can fail, and its page is what the result file says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.conformance import __main__ as command  # noqa: E402
from benchmarks.conformance import page  # noqa: E402
from benchmarks.conformance.cases import CASES, definite, normal  # noqa: E402
from benchmarks.conformance.solvers import Ours, Solver  # noqa: E402
from benchmarks.conformance.suite import SOLVERS, run  # noqa: E402
from benchmarks.conformance.system import Must, Outcome, Products, System, Verdict, judge, true_residual  # noqa: E402


def fresh() -> int:
    return int(torch.randint(10**6, ()))


@pytest.mark.parametrize("name", CASES)
def test_ours_passes_every_case(name):
    seed = fresh()
    cell = run(Ours(), CASES[name], seed)
    assert cell.verdict is Verdict.PASS, f"{cell.message} (seed {seed})"


def test_there_are_enough_cases_and_solvers():
    assert len(CASES) >= 16
    assert len(SOLVERS) >= 9
    assert list(SOLVERS) == [solver.name for solver in SOLVERS.values()]


# --- what the judgement says of solvers whose faults are known ----------------------------------------------------


class Answers(Solver):
    """Returns what a function makes of the system and of x by a dense solve, and has every option."""

    name, package, module, call = "answers", "torch", "torch", ""
    offers = frozenset({"x0", "preconditioner", "a scalar without dimensions"})

    def __init__(self, answer):
        self.answer = answer

    def solve(self, system: System, products: Products) -> Outcome:
        A, b = system.A.nan_to_num(), system.b.double().nan_to_num()
        x = torch.linalg.pinv(A, rtol=1e-12) @ (b if b.dim() == 3 else b.unsqueeze(2))
        return self.answer(system, x.reshape(b.shape).to(system.b.dtype))


def honest(system: System, x: Tensor) -> Outcome:
    """The dense solution, and a report for every row that it does not solve."""
    if system.expected_x is not None:
        x = system.expected_x
    unsolved = [must is not Must.SOLVE for must in system.must]
    return Outcome(x, torch.tensor(unsolved))


@pytest.mark.parametrize("name", CASES)
def test_a_dense_solve_passes(name):
    assert run(Answers(honest), CASES[name], fresh()).verdict is Verdict.PASS


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_answer_is_silent_unless_it_is_reported(name):
    seed = fresh()
    if name not in ("exact_warm_start", "zero_b"):
        assert run(Answers(lambda system, x: Outcome(0 * x + 1)), CASES[name], seed).verdict is Verdict.SILENT
    every = Answers(lambda system, x: Outcome(0 * x + 1, torch.ones(len(x), dtype=torch.bool)))
    nans = Answers(lambda system, x: Outcome(x * torch.nan))
    for solver in (every, nans):
        verdict = run(solver, CASES[name], seed).verdict
        may_fail = all(Must.SOLVE not in part.must for part in CASES[name].parts(torch.Generator()))
        assert verdict is (Verdict.PASS if may_fail else Verdict.REPORTED)


def system(**options) -> System:
    g = torch.Generator().manual_seed(fresh())
    return System(definite(g, 10, 100, n=9), normal(g, 2, 9), (Must.SOLVE, Must.SOLVE), **options)


def verdict(part: System, outcome: Outcome, count: int = 0) -> Verdict:
    products = Products(part)
    products.count += count
    return judge(part, outcome, products).verdict


def test_every_demand_beyond_the_residual_can_fail():
    part = system()
    x = torch.linalg.solve(part.A, part.b)
    yes, no = torch.tensor(True), torch.tensor(False)
    assert verdict(part, Outcome(x)) is Verdict.PASS
    assert verdict(replace(part, most_products=4), Outcome(x), 4) is Verdict.PASS
    assert verdict(replace(part, most_products=4), Outcome(x), 5) is Verdict.RIGHT_BUT
    assert verdict(replace(part, expected_x=x), Outcome(x.clone())) is Verdict.PASS
    assert verdict(replace(part, expected_x=x), Outcome(x * (1 + 1e-15))) is Verdict.RIGHT_BUT
    assert verdict(part, Outcome(x, torch.tensor([False, True]))) is Verdict.RIGHT_BUT
    assert verdict(part, Outcome(x, yes)) is Verdict.RIGHT_BUT
    beside_bad = replace(part, must=(Must.SOLVE, Must.REPORT))
    assert verdict(beside_bad, Outcome(x, yes)) is Verdict.PASS  # a report for the whole call
    assert verdict(beside_bad, Outcome(x, no)) is Verdict.SILENT
    assert verdict(part, Outcome(x, raised={1: "ValueError: no"}, failed=torch.tensor([False, True]))) is Verdict.RAISES


def test_slack_is_for_those_who_report_nothing():
    part = system(rtol=1e-3)
    x = torch.linalg.solve(part.A, part.b)
    off = x - 5e-3 * torch.linalg.solve(part.A, part.b)  # a relative residual of 5e-3
    no, yes = torch.tensor([False, False]), torch.tensor([True, True])
    assert verdict(part, Outcome(off, no)) is Verdict.PASS
    assert verdict(part, Outcome(off, yes)) is Verdict.REPORTED
    assert verdict(replace(part, slack=1), Outcome(off, no)) is Verdict.SILENT


def test_b_that_is_overwritten_and_rows_that_hang_on_others():
    def overwrites(part: System, x: Tensor) -> Outcome:
        part.b.mul_(2)
        return Outcome(x)

    def coupled(part: System, x: Tensor) -> Outcome:
        return Outcome(x * (1 + 1e-13 * float(part.A.sum())))

    assert run(Answers(overwrites), CASES["identity"], fresh()).message == "b was overwritten"
    cell = run(Answers(coupled), CASES["frozen"], fresh())
    assert (cell.verdict, cell.message) == (Verdict.RIGHT_BUT, "the x of a row hangs on the rows beside it")


def test_a_solver_without_an_option_is_not_asked_for_it():
    limited = Answers(lambda part, x: pytest.fail("called"))
    limited.offers = frozenset()
    assert run(limited, CASES["far_warm_start"], fresh()).verdict is Verdict.NOT_OFFERED
    limited.answer = honest
    assert run(limited, CASES["scalar"], fresh()).verdict is Verdict.PASS  # the part without dimensions is left out


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_true_residual_of_any_magnitude(scale):
    part = system()
    x = torch.linalg.solve(part.A[0], part.b[0])
    off = x + 1e-3 * x
    residual, allowance = true_residual(part.A[0], scale * off, scale * part.b[0])
    assert residual == pytest.approx(1e-3, rel=1e-9)
    assert 0 < allowance < 1e-10


def test_products_are_counted_by_row():
    part = system()
    products = Products(part)
    p = torch.randn(2, 9, 3)
    together = products(p)
    torch.testing.assert_close(together, torch.einsum("bij,bjk->bik", part.A, p.double()).float())
    assert products.count.tolist() == [1, 1]
    alone = products(p[:1, :, 0], torch.tensor([1]))
    torch.testing.assert_close(alone[0], (part.A[1] @ p[0, :, 0].double()).float())
    assert products.count.tolist() == [1, 2]


# --- the command and the page -------------------------------------------------------------------------------------


@pytest.mark.long
def test_solvers_of_others_solve_what_is_easy():
    installed = [solver for name, solver in SOLVERS.items() if name != "imaml_ext" and not solver.missing()]
    if not installed:
        pytest.skip("none of the other solvers is installed")
    for solver in installed:
        cell = run(solver, CASES["not_contiguous"], fresh())
        assert cell.residual < 1e-6, solver.name
        assert cell.products > 5, solver.name


def test_the_command_writes_a_file_that_the_page_shows(monkeypatch, tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = ["--solvers", "imaml_ext", "--cases", "products", "drift", "--seed", "7", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["conformance", *arguments])
    assert command.main() == 0
    assert "2 of 2 cells pass" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["command"].startswith("python -m benchmarks.conformance --solvers imaml_ext")
    assert result["cells"]["products"]["imaml_ext"]["verdict"] == "pass"
    document = page.render(result)
    assert "| `drift` | pass |" in document
    result["cells"]["drift"]["imaml_ext"] |= {"verdict": "silent", "message": "row 0: wrong"}
    document = page.render(result)
    assert "- `drift`: **silent**: row 0: wrong" in document
    assert "| silently wrong | 1 |" in document


@pytest.mark.skipif(not page.RESULT.exists(), reason="the result files are not part of a source distribution")
def test_the_page_is_what_the_result_file_says():
    result = json.loads(page.RESULT.read_text())
    assert page.PAGE.read_text(encoding="utf-8") == page.render(result)
    assert set(result["cases"]) == set(CASES)
    assert result["cases"] == {name: case.asks for name, case in CASES.items()}
    assert {cell["imaml_ext"]["verdict"] for cell in result["cells"].values()} == {"pass"}
