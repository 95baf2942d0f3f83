"""The code of README.md and docs/ runs as it is printed, and the commands named there exist."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from imaml_ext.cli.train import CHAINS, RECIPES
from imaml_ext.settings import Choice, Settings
from imaml_ext.train.config import TrainConfig
from imaml_ext.train.recipe import load_recipe, recipe_summaries

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE), 1)
]


@pytest.mark.parametrize("code", BLOCKS)
def test_code_runs_as_printed(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if 'load_dataset("omniglot"' in code:
        pytest.skip("needs Omniglot")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "<documentation>", "exec"), {"__name__": "__main__"})


def test_the_readme_has_both_snippets() -> None:
    text = (ROOT / "README.md").read_text()
    assert "imaml_ext.cg(" in text
    assert "from_module(module)" in text
    assert "make train" in text
    assert "make test" in text


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(
            r"\]\((?!https?:)([^)#]+)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        ):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def _flags(settings: Settings, prefix: str = "") -> Iterator[str]:
    """Every option that some choice of classes has, without its dashes."""
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        if not field.metadata.get("recorded", True):
            continue
        value, name = getattr(settings, field.name), prefix + field.name.replace("_", "-")
        yield name
        if isinstance(value, Settings):
            below = prefix if field.name == "algorithm" else f"{name}."
            kinds = [value.kind(kind)() for kind in value.kinds] if isinstance(value, Choice) else [value]
            for kind in kinds:
                yield from _flags(kind, below)


def test_recipes_and_settings_that_are_named_exist() -> None:
    flags = {*_flags(TrainConfig())}
    groups = "|".join(sorted({flag.split(".")[0] for flag in flags if "." in flag}))
    recipes = recipe_summaries((RECIPES, CHAINS))
    named = set()
    for page in PAGES:
        text = page.read_text()
        for flag in re.findall(r"--([a-z-]+\.[a-z.-]*[a-z])", text) + re.findall(rf"`((?:{groups})\.[a-z.-]+)`", text):
            assert flag.replace(".no-", ".") in flags, f"{page.name}: {flag}"
        for recipe in re.findall(r"`((?:glyphs|omniglot|mini-imagenet|cifar-fs|fc100|sinusoid)-\w[\w-]*)`", text):
            assert recipe in recipes, f"{page.name}: {recipe}"
            named.add(recipe)
    assert named >= recipe_summaries((RECIPES,)).keys()


def test_the_heads_of_recipes_name_themselves_and_the_weights() -> None:
    for folder in (RECIPES, CHAINS):
        for name in recipe_summaries((folder,)):
            head = load_recipe(name, (folder,)).description
            assert f"Command: imaml train {name}" in head
            assert len(head.splitlines()[0]) <= 100, name
