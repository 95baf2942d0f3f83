"""README.md and docs/: their Python code runs, their links lead somewhere, and their command lines are understood.

The Python blocks of a page run one after the other in one namespace, in an empty folder. A long loop is made short, so
that a page takes seconds.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import shlex
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from imaml_ext._renamed import recipe_of_today
from imaml_ext.settings import to_json
from imaml_ext.train import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SMALLER = {  # what a reader runs -> what the test runs
    "range(100)": "range(2)",
    '{"outer.steps": 100}': '{"outer.steps": 4, "evaluation.tasks": 20, "evaluation.every": 0}',
}
NAMES = {  # what a placeholder stands for, or a name that a reader would give
    "NAME": "omniglot-5w1s",
    "EXPERIMENT": "exactness",
    "RECIPE": "glyphs-5w1s",
    "my-recipe": "glyphs-5w1s",
    "my-experiment": "exactness",
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python_blocks(page: Path) -> list[str]:
    return [code for language, code in CODE.findall(page.read_text(encoding="utf-8")) if language == "python"]


def prose(page: Path) -> str:
    """The page without its fenced blocks and its indented lines."""
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    return "\n".join(line for line in text.split("\n") if not line.startswith("    "))


WITH_CODE = [pytest.param(page, id=name_of(page)) for page in PAGES if python_blocks(page)]
ALL = [pytest.param(page, id=name_of(page)) for page in PAGES]


@pytest.mark.parametrize("page", WITH_CODE)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    draw_letters()
    for name, stand_in in (("wandb", wandb()), ("optuna", optuna())):  # which nothing here needs
        monkeypatch.setitem(sys.modules, name, stand_in)
    module = types.ModuleType("documentation")  # where dataclasses look up the types of their fields
    monkeypatch.setitem(sys.modules, module.__name__, module)
    try:
        for number, code in enumerate(python_blocks(page), start=1):
            for printed, small in SMALLER.items():
                code = code.replace(printed, small)
            exec(compile(code, f"{name_of(page)}, Python block {number}", "exec"), vars(module))
    finally:
        torch.set_num_threads(threads)


def wandb() -> Any:
    return SimpleNamespace(init=lambda project: SimpleNamespace(log=lambda row, step: None))


def optuna() -> Any:
    """Two trials: one that is judged by what it returns, and one that is pruned at its first report."""

    class TrialPruned(Exception):
        pass

    def optimize(objective: Any, n_trials: int) -> None:
        figures: list[float] = []
        for number in range(2):
            trial = SimpleNamespace(
                number=number,
                suggest_float=lambda name, low, high, log: (low * high) ** 0.5,
                report=lambda value, step: figures.append(value),
                should_prune=lambda number=number: number == 1,
            )
            if number == 1:
                with pytest.raises(TrialPruned):
                    objective(trial)
            else:
                assert objective(trial) == min(figures)

    study = SimpleNamespace(optimize=optimize)
    return SimpleNamespace(TrialPruned=TrialPruned, create_study=lambda direction: study)


def draw_letters() -> None:
    """The pictures that the pages speak of."""
    for name, letter in {"a.png": "L", "b.png": "O", "which.png": "L"}.items():
        picture = Image.new("L", (80, 80), 255)
        ImageDraw.Draw(picture).text((30, 30), letter, fill=0, font_size=30)
        picture.save(name)


def test_there_is_code_for_every_kind_of_user() -> None:
    for page in ("README.md", "docs/solver.md", "docs/bilevel.md", "docs/train.md"):
        assert python_blocks(ROOT / page), page
    readme = python_blocks(ROOT / "README.md")
    lines = [[line for line in code.splitlines() if line.strip()] for code in readme]
    assert all(len(block) <= 10 for block in lines)
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


# --- links --------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
        found[slug] = found.get(slug, 0) + 1
    return {slug if not n else f"{slug}-{n}" for slug, count in found.items() for n in range(count)}


def links(page: Path) -> list[str]:
    return re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose(page))


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        assert target.is_relative_to(ROOT), f"{name_of(page)} links to {link}, which is outside the repository"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)} links to {link}; there is no such heading"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        linked = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
        waiting += [other for other in linked if other.suffix == ".md" and other in PAGES and other not in reached]
    assert set(PAGES) == reached


def test_files_that_are_named_exist() -> None:
    """Paths in `…` that begin with a folder of this repository."""
    folders = "csrc|cpp_tests|imaml_ext|python_tests|benchmarks|examples|docs"
    for page in PAGES:
        for path in re.findall(rf"`((?:{folders})/[\w/.\-]*)`", prose(page)):
            if "my_" not in path and "FAMILY" not in path:  # examples in develop.md
                assert (ROOT / path).exists(), f"{name_of(page)} names {path}"


def test_recipes_and_weights_that_are_named_exist() -> None:
    from imaml_ext.pretrained import pretrained_names
    from imaml_ext.train import recipe_names

    known = {*recipe_names(), *pretrained_names()}
    for page in PAGES:
        named = re.findall(r"`((?:glyphs|omniglot|mini-imagenet|cifar-fs|fc100|sinusoid)-\d\w*(?:-\w+)*)`", prose(page))
        pages_of_then = ("docs/benchmarks.md", "docs/reproduction/first-trainings.md", "docs/reproduction/newton-cg.md")
        of_then = name_of(page) in pages_of_then
        for name in named:
            assert name in known or (of_then and recipe_of_today(name)), f"{name_of(page)} names {name}"


# --- command lines ------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """Every `imaml …` line of a page's blocks, and every one in `…`, without comments."""
    text = page.read_text(encoding="utf-8")
    block = re.findall(r"^(?:    |\$ )?((?:torchrun .* -m imaml_ext|imaml) .*)$", text, re.MULTILINE)
    inline = re.findall(r"`(imaml [^`]*)`", prose(page))
    found = [re.sub(r"\s+#.*", "", line).strip() for line in (*block, *inline)]
    return [re.sub(r"^torchrun .* -m imaml_ext", "imaml", line) for line in found]


COMMANDS = [pytest.param(page, line, id=line) for page in PAGES for line in dict.fromkeys(commands(page))]


class Understood(Exception):
    """Raised where a command would begin its work."""


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_command_lines_are_understood(
    page: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is parsed by the command's own parser, with something in the place of every placeholder."""
    from imaml_ext import cli
    from imaml_ext.cli import parser
    from imaml_ext.train.job import joined

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_recipe.py").write_text("from imaml_ext.recipes.sinusoid import recipe\n")
    recorded = tmp_path / "runs" / "glyphs-5w1s" / "config.json"  # an earlier run
    recorded.parent.mkdir(parents=True)
    recorded.write_text(json.dumps({"recipe": "glyphs-5w1s", "config": to_json(load_recipe("glyphs-5w1s").config)}))
    line = re.sub(r"\[[^]]*\]|…", "", line)  # of a synopsis
    words = [NAMES.get(word, word) for word in shlex.split(line)[1:]]
    words = [re.sub(r"^[PF]$", "0.5" if word == "F" else "1", word) for word in words]
    if words[0] == "reproduce" and words[1:2] == [NAMES["NAME"]]:
        words[1] = NAMES["EXPERIMENT"]
    command, *arguments = words
    if command in ("COMMAND", "--version"):
        return
    assert command in cli.COMMANDS, f"{name_of(page)}: {line}"
    if not arguments:  # the name of a command
        return
    parse = parser.parse

    def stop(*args: object, **keywords: object) -> None:
        parse(*args, **keywords)
        raise Understood

    # All of them are imported first: one that is imported later would keep the parser that is put in place here.
    modules = [importlib.import_module(found.name) for found in pkgutil.iter_modules(cli.__path__, "imaml_ext.cli.")]
    for loaded in modules:
        if hasattr(loaded, "parse"):
            monkeypatch.setattr(loaded, "parse", stop)
    module = importlib.import_module(f"imaml_ext.cli.{command}")
    with joined() as ranks, pytest.raises((Understood, SystemExit)) as ended:
        module.run(arguments, ranks)
    if isinstance(ended.value, SystemExit):
        assert ended.value.code == 0, f"{name_of(page)}: {line}\n{capsys.readouterr().err}"


def test_settings_that_are_named_exist() -> None:
    """`--outer.steps` and `outer.steps` in a page's text are options of `imaml train`, for some choice of classes."""
    known = known_options()
    groups = "|".join(sorted({name.split(".")[0] for name in known if "." in name}))
    for page in PAGES:
        text = prose(page)
        named = re.findall(rf"`(?:--)?((?:{groups})\.[a-z_.\-]+)[ `]", text)
        named += re.findall(r"`--([a-z][a-z_.\-]*)[ `]", text)
        for name in named:
            name = name.replace("_", "-").replace(".no-", ".").removeprefix("no-")
            assert name in known or name in OTHER_OPTIONS, f"{name_of(page)} names the setting {name}"


OTHER_OPTIONS = {"max-restarts", "help", "debug", "dry-run", "native", "many-iterations", "seed", "proc-per-node"}


def known_options() -> set[str]:
    """The names of all settings, as options of `imaml` write them, and of the other commands' options."""
    import dataclasses

    from imaml_ext import cli
    from imaml_ext.data import Augmentation, DataSource
    from imaml_ext.inner import InnerSolver
    from imaml_ext.meta import MetaAlgorithm
    from imaml_ext.models import TaskModel
    from imaml_ext.pictures import Reading
    from imaml_ext.reproduction import EXPERIMENTS
    from imaml_ext.solvers import LinearSolver
    from imaml_ext.train import EvaluationSettings, Outer, RunSettings, Tasks, Theta

    def members(family: type) -> list[type]:
        return [family.kind(name) for name in family.kinds]  # type: ignore[attr-defined]

    solvers = members(LinearSolver)
    places: dict[str, list[type]] = {
        "data": members(DataSource),
        "data.pictures": [Reading],
        "tasks": [Tasks],
        "augment": [Augmentation],
        "model": members(TaskModel),
        "theta": [Theta],
        "": members(MetaAlgorithm),
        "inner": members(InnerSolver),
        "linear-solver": solvers,
        "inner.linear-solver": solvers,
        "outer": [Outer],
        "evaluation": [EvaluationSettings],
        "run": [RunSettings],
    }
    known = {"data", "model", "algorithm", "inner", "linear-solver", "inner.linear-solver"}
    for place, kinds in places.items():
        for kind in kinds:
            known |= {f"{place}.{field.name}".lstrip(".") for field in dataclasses.fields(kind)}
    for module in pkgutil.iter_modules(cli.__path__, "imaml_ext.cli."):
        options = getattr(importlib.import_module(module.name), "Options", None)
        if options is not None:
            known |= {field.name for field in dataclasses.fields(options)}
    for experiment in EXPERIMENTS.values():
        known |= {field.name for field in dataclasses.fields(experiment)}
    return {name.replace("_", "-") for name in known}
