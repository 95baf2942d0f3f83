"""The workflows of .github/: they can be read, and what they call is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from imaml_ext import cli

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SUPPORTED = ["3.10", "3.11", "3.12", "3.13", "3.14"]


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_there_are_workflows() -> None:
    assert [path.name for path in WORKFLOWS] == ["docs.yml", "tests.yml", "wheels.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_a_workflow_calls_is_there(path: Path) -> None:
    workflow = read(path)
    assert {"name", True, "jobs"} == set(workflow)  # YAML takes the key `on` for true
    targets, commands = make_targets(), 0
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
            continue
        for target, arguments in re.findall(r"\bmake ([\w-]+)(.*)", step["run"]):
            commands += 1
            assert target in targets, f"{path.name}: make {target}"
            known = (ROOT / "Makefile").read_text(encoding="utf-8")
            for variable in re.findall(r"\b([A-Z_]+)=", arguments):
                assert re.search(rf"^{variable} \?=", known, re.MULTILINE), f"{path.name}: {variable}"
        for command in re.findall(r"\bimaml (\w+)", step["run"]):
            assert command in cli.COMMANDS
    assert commands


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_expression_has_a_value(path: Path) -> None:
    for job in read(path)["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        known = {*matrix, *(key for row in matrix.get("include", []) for key in row)} - {"include"}
        used = set(re.findall(r"\$\{\{ matrix\.(\w+) \}\}", yaml.safe_dump(job)))
        assert used <= known
        for row in matrix.get("include", []):  # it extends what is there, and adds no job of its own
            assert any(row[key] in matrix[key] for key in row if key in matrix), row


def test_wheels_are_built_and_installed_for_the_whole_matrix() -> None:
    jobs = read(ROOT / ".github" / "workflows" / "wheels.yml")["jobs"]
    for job in (jobs["build"], jobs["install"]):
        matrix = job["strategy"]["matrix"]
        assert matrix["python"] == SUPPORTED
        assert matrix["processor"] == ["x86_64", "aarch64"]
    assert jobs["build"]["strategy"]["matrix"]["kind"] == ["cpu", "cuda"]
    artifacts = [step["with"]["name"] for step in steps({"jobs": jobs}) if "artifact" in step.get("uses", "")]
    assert artifacts[0].replace("${{ matrix.kind }}", "cpu") == artifacts[1]
