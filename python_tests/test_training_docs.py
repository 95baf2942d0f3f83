"""The code of README.md and docs/ runs as it is printed, and the commands named there exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from imaml_ext.training import PRESETS
from imaml_ext.training.config import TrainConfig, knobs

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


def test_presets_and_knobs_that_are_named_exist() -> None:
    names = {name.replace("_", "-") for name, _ in knobs(TrainConfig())}
    groups = "|".join(sorted({name.split(".")[0] for name in names}))
    for page in PAGES:
        text = page.read_text()
        for knob in re.findall(rf"[`-]({groups})\.([a-z_-]+)`", text):
            assert ".".join(knob).replace("_", "-").replace(".no-", ".") in names, f"{page.name}: {knob}"
        for preset in re.findall(r"`((?:glyphs|omniglot|mini-imagenet|cifar-fs|fc100|sinusoid)-\w+)`", text):
            assert preset in PRESETS, f"{page.name}: {preset}"
    table = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in table for name in PRESETS)
