"""The rooms of the package: each imports only from below, local imports included, and no two modules import each other.

`_renamed` is left out: it stands for old names, reaches every room by name, and goes after one release.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import imaml_ext

PACKAGE = Path(imaml_ext.__file__).parent
BASE = {"errors", "checks", "files", "progress", "rng", "settings", "batch"}
BASE |= {"_version", "_build", "_record", "_renamed"}
# What each room may import beside itself and the base.
ROOMS: dict[str, set[str]] = {
    **{name: set() for name in BASE},
    "pictures": set(),
    "data": {"pictures"},
    "_native": set(),
    "ops": {"_native"},
    "models": {"ops", "_native"},
    "solvers": {"ops", "_native"},
}
ROOMS["losses"] = {"models", "solvers", "ops", "_native"}
ROOMS["inner"] = ROOMS["losses"] | {"losses"}
ROOMS["bilevel"] = ROOMS["inner"] | {"inner"}
ROOMS["meta"] = ROOMS["bilevel"] | {"bilevel"}
ROOMS["integrations"] = ROOMS["meta"] | {"meta"}
ROOMS["pretrained"] = ROOMS["meta"] | {"meta", "data", "pictures"}
ROOMS["train"] = ROOMS["pretrained"] | {"pretrained"}
ROOMS["recipes"] = ROOMS["train"] | {"train"}
ROOMS["reproduction"] = ROOMS["recipes"] | {"recipes"}
ROOMS["doctor"] = ROOMS["train"] | {"train"}
ROOMS["cli"] = set(ROOMS)
ROOMS["__main__"] = {"cli"}
ROOMS["training"] = ROOMS["reproduce"] = set()  # old names


def modules() -> dict[str, Path]:
    """{"imaml_ext.meta.imaml": its file} of every module but the package's own, which imports nothing but on demand."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(("imaml_ext", *(parts[:-1] if parts[-1] == "__init__" else parts)))
        found[name] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of this package that a file imports anywhere, but for annotations alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test):
            block.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "imaml_ext")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module and node.module.split(".")[0] == "imaml_ext":
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    if submodule != "imaml_ext._C":  # the compiled part
                        yield submodule if submodule in known else node.module


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def test_rooms_import_from_below() -> None:
    known = modules()
    wrong = []
    for module, path in known.items():
        here = room(module)
        if here in ("", "_renamed"):
            continue
        assert here in ROOMS, f"{module} is in no room: give it a place in this test"
        for target in imports(path, known):
            there = room(target)
            if there == "":
                wrong.append(f"{module} imports the package itself")
            elif there not in (here, *BASE, *ROOMS[here]):
                wrong.append(f"{module} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_circle() -> None:
    known = modules()
    graph = {
        module: {target for target in imports(path, known) if target in known and target != module}
        for module, path in known.items()
        if room(module) not in ("", "_renamed")
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " → ".join((*trail[trail.index(module) :], module))
        if module in done or module not in graph:
            return
        for target in graph[module]:
            visit(target, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_the_house_stays_small() -> None:
    """Lines of the package, recipes and reproduction included; the largest file and, its docstring apart, function."""

    def length(node: ast.FunctionDef) -> int:
        documented = ast.get_docstring(node) is not None
        docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if documented else 0
        return node.end_lineno - node.lineno + 1 - docstring

    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in PACKAGE.rglob("*.py")}
    assert sum(lines.values()) <= 24_900
    assert {path.name: count for path, count in lines.items() if count > 400} == {}
    long = {
        f"{path.name}: {node.name}": length(node)
        for path in lines
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and length(node) >= 80
    }
    assert long == {}
