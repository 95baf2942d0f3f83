"""What the documentation site takes from the package, and the check of its links; `make docs` builds it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import imaml_ext
from imaml_ext.cli import COMMANDS

DOCS = Path(__file__).resolve().parents[1] / "docs"
sys.path.insert(0, str(DOCS))

import check_site  # noqa: E402
import package_pages  # noqa: E402


def test_every_public_name_has_an_entry() -> None:
    inits = Path(imaml_ext.__file__).parent.glob("*/__init__.py")
    rooms = {path.parent.name for path in inits if "__all__ = " in path.read_text(encoding="utf-8")}
    rooms -= {"reproduction"}  # whose door is the command line
    assert {"solvers", "models", "losses", "inner", "meta", "data", "pretrained", "train", "ops"} <= rooms
    for room in [*rooms, "settings", "errors"]:
        assert room in package_pages.ROOMS, f"docs/api/{room}.md is missing"
        shown = package_pages.entries(room)
        assert any(line.startswith(".. auto") for line in shown), room
    entries = {
        line.split(":: ")[1] for room in package_pages.ROOMS for line in package_pages.entries(room) if ":: " in line
    }
    for room in rooms:
        assert entries >= set(importlib.import_module(f"imaml_ext.{room}").__all__), room
    assert entries | {"__version__"} >= set(imaml_ext.__all__)
    assert "MINRES" in entries  # which only its family names


def test_settings_are_shown_with_bounds_and_the_comment_beside_them() -> None:
    from imaml_ext.meta import IMAML

    text = "\n".join(package_pages.fields_of(IMAML, ""))
    assert ".. py:attribute:: damping\n   :type: float\n   :value: 0.0\n" in text
    assert "added to lambda in the implicit system. It is at least 0." in text
    assert "   :type: Coefficient\n   :value: 2.0\n" in text
    assert "   :type: LinearSolver\n   :value: CG()\n" in text
    assert "_given" not in text


@pytest.mark.parametrize(
    ("plain", "marked"),
    [
        ("see `prox_solve`", "see :py:obj:`prox_solve <imaml_ext.bilevel.prox_solve>`"),
        ("see `imaml_ext.prox_solve`", "see :py:obj:`prox_solve <imaml_ext.bilevel.prox_solve>`"),
        ("a `phi` [B, *]", r"a ``phi`` [B, \*]"),
        ("`lr_of` is `* 0`", "``lr_of`` is ``* 0``"),
        ("`other.prox_solve`", "``other.prox_solve``"),
        ("SciPy's `cg`, and `imaml_ext.cg`", "SciPy's ``cg``, and :py:obj:`cg <imaml_ext.solvers.cg>`"),
    ],
)
def test_names_in_docstrings_become_links(plain: str, marked: str) -> None:
    assert package_pages.as_rst(plain) == marked


def test_short_entries_of_a_section_are_taken_apart() -> None:
    lines = ["Solves.", "", "Args:", "    a, b: [N]. shift: a number.", "    c: as in x: y. Then more."]
    package_pages.mend_docstring(None, "function", "solve", None, None, lines)
    assert lines == ["Solves.", "", "Args:", "    a, b: [N].", "    shift: a number.", "    c: as in x: y. Then more."]


def test_every_command_is_shown_with_its_options() -> None:
    for command in COMMANDS:
        shown = "\n".join(package_pages.helps(command))
        assert f"## imaml {command}\n" in shown
        assert f"usage: imaml {command}" in shown
    assert "--outer.steps" in "\n".join(package_pages.helps("train"))


def test_check_names_whatever_is_wrong_with_a_site(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "style.css").write_text("a { background: url(local.png) }")
    (tmp_path / "index.html").write_text(
        '<link rel="stylesheet" href="style.css"><h1 id="top-ü">T</h1><a href="sub/a.html#here">ok</a>'
        '<a href="https://example.org/nowhere#x">not followed</a><a href="#top-%C3%BC">ok</a><a href="#">ok</a>',
        encoding="utf-8",
    )
    (tmp_path / "sub" / "a.html").write_text('<p id="here"></p><a href="../index.html">back</a>')
    assert list(check_site.wrong(tmp_path)) == []

    (tmp_path / "bad.html").write_text(
        '<a href="gone.html">a</a><a href="sub/a.html#gone">b</a><img src="gone.png">'
        '<script src="https://example.org/x.js"></script><link href="//example.org/x.css">'
    )
    (tmp_path / "style.css").write_text('@import "https://example.org/font.css"; a { background: url(//e.org/x.png) }')
    assert list(check_site.wrong(tmp_path)) == [
        "bad.html loads https://example.org/x.js, which is not part of the site",
        "bad.html loads //example.org/x.css, which is not part of the site",
        "bad.html links to gone.html, which does not exist",
        "bad.html links to sub/a.html#gone, which has no such anchor",
        "bad.html links to gone.png, which does not exist",
        "style.css loads https://example.org/font.css, which is not part of the site",
        "style.css loads //e.org/x.png, which is not part of the site",
    ]
