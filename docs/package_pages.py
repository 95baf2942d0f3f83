"""A Sphinx extension: the parts of the site that come from the package itself.

To each page `docs/api/ROOM.md` it adds the public names of `imaml_ext.ROOM` with their docstrings, to
`docs/commands.md` what `imaml COMMAND --help` prints, and to the pages that others belong to their tables of contents.
The pages in the repository are plain Markdown. A new name, option, command or page appears by itself.
"""

import contextlib
import dataclasses
import enum
import functools
import importlib
import inspect
import io
import os
import pkgutil
import re
import typing
from pathlib import Path

import imaml_ext
from imaml_ext.cli import COMMANDS, main
from imaml_ext.cli.parser import field_help, summary_of
from imaml_ext.settings import Bounds, Settings, field_types

DOCS = Path(__file__).resolve().parent
ROOMS = sorted(page.stem for page in (DOCS / "api").glob("*.md") if page.stem != "README")
EXAMPLES = {"train": "glyphs-5w1s", "data": "omniglot", "reproduce": "exactness"}  # of the name that a command takes
DIRECTIVES = {"class": "autoclass", "exception": "autoexception", "function": "autofunction"}


# --- what is public -------------------------------------------------------------------------------------------------


@functools.cache
def public_names(room: str) -> dict[str, object]:
    """Returns {name: object} of a room: its `__all__` and all members of its families, but what is another room's."""
    module = importlib.import_module(f"imaml_ext.{room}")
    made_here = [name for name, value in vars(module).items() if kind_of(value) and value.__module__ == module.__name__]
    names = getattr(module, "__all__", None) or [name for name in made_here if not name.startswith("_")]
    found = {name: getattr(module, name) for name in names}
    for family in [value for value in found.values() if "kinds" in getattr(value, "__dict__", {})]:
        members = map(family.kind, family.kinds)
        found |= {member.__name__: member for member in members}
    return {name: value for name, value in found.items() if room_of(value) in (room, None)}


def room_of(value: object) -> str | None:
    """Returns the room that an object is made in; None for one without a page."""
    room = [*(getattr(value, "__module__", None) or "").split("."), ""][1]
    return room if room in ROOMS else None


def kind_of(value: object) -> str:
    """Returns what an object is for Sphinx, "" where that is neither a class nor a function."""
    if inspect.isclass(value):
        return "exception" if issubclass(value, BaseException) else "class"
    return "function" if inspect.isfunction(value) else ""


def public_bases(cls: type) -> list[type]:
    """Returns the bases of a class that a reader can look up; in the place of any other stand its own."""
    found = []
    for base in cls.__bases__:
        room = room_of(base)
        known = base.__module__ in ("builtins", "enum") or (room and base in public_names(room).values())
        found += [base] if known else public_bases(base)
    return [base for base in dict.fromkeys(found) if base is not object]


@functools.cache
def assigned_names() -> dict[str, tuple[str, list[str]]]:
    """Returns {name: (room, its entry)} of public constants, and of the types that public signatures name."""
    said = {word for room in ROOMS for value in public_names(room).values() for word in words_of_annotations(value)}
    found = {}
    for room in ROOMS:
        package = importlib.import_module(f"imaml_ext.{room}")
        below = pkgutil.iter_modules(getattr(package, "__path__", ()), f"{package.__name__}.")
        for module in [package, *(importlib.import_module(each.name) for each in below)]:
            for line in inspect.getsource(module).splitlines():
                code, _, comment = line.partition("  # ")
                name, _, definition = code.partition(" = ")
                value = getattr(module, name, None)
                if name in said and typing.get_origin(value):
                    found[name] = (
                        room,
                        [f".. py:type:: {name}", f"   :canonical: {definition}", "", f"   {comment}", ""],
                    )
                elif name in public_names(room) and not kind_of(value):
                    found[name] = (room, [f".. py:data:: {name}", f"   :value: {value!r}", "", f"   {comment}", ""])
    return found


def words_of_annotations(value: object) -> set[str]:
    """Returns the words in the annotations of a function, or of a class and what is public in it."""
    of_class = getattr(value, "__dict__", {}).items()
    inside = [value, *(each for name, each in of_class if re.match("__|[^_]", name))]
    return set(re.findall(r"\w+", " ".join(str(getattr(each, "__annotations__", "")) for each in inside)))


@functools.cache
def places() -> dict[str, str]:
    """Returns {name: its full name on the site} of everything public."""
    assigned = {name: f"imaml_ext.{room}.{name}" for name, (room, _) in assigned_names().items()}
    return assigned | {name: f"imaml_ext.{room}.{name}" for room in ROOMS for name in public_names(room)}


# --- pages ----------------------------------------------------------------------------------------------------------


def add_to_page(app, docname: str, source: list[str]) -> None:
    """Adds to a page of the repository what belongs on it."""
    added = []
    folder, _, page = docname.rpartition("/")
    if docname in (app.config.root_doc, "docs/api/README"):
        pages = re.findall(r"^- \[.*?\]\((.*?)\.md\)", source[0], re.MULTILINE)
        added = ["```{toctree}", ":hidden:", "", *pages, "```", "", *(summaries() if folder else [])]
    elif folder == "docs/api":
        added = ["```{eval-rst}", f".. py:currentmodule:: imaml_ext.{page}", "", *entries(page), "```"]
    elif docname == "docs/commands":
        added = [line for command in COMMANDS for line in helps(command)]
    elif docname == "docs/reproduction/README":
        added = ["```{toctree}", ":hidden:", "", "first-trainings", "newton-cg", "```"]
    elif re.search("/(weights|results)(/|$)", folder):  # written by programs, and linked from other pages alone
        title = "" if source[0].startswith("# ") else f"# {page}\n\n"
        source[0] = f"---\norphan: true\n---\n{title}{source[0]}"
    source[0] += "\n" + "\n".join(added) + "\n"


def summaries() -> list[str]:
    """A table of what `imaml_ext` itself offers."""
    names = [name for name in imaml_ext.__all__ if name in places()]
    rows = [f"| {{py:obj}}`{name} <{places()[name]}>` | {summary_of(getattr(imaml_ext, name))} |" for name in names]
    return ["| `imaml_ext.…` | |", "|---|---|", *rows]


def entries(room: str) -> list[str]:
    """The classes and functions of a room, for autodoc; then its constants, and the types that signatures name."""
    lines = []
    for name, value in public_names(room).items():
        if kind := kind_of(value):
            is_class = inspect.isclass(value)
            options = {
                "show-inheritance": is_class and public_bases(value),
                "undoc-members": is_class and issubclass(value, enum.Enum),
            }
            lines += [
                f".. {DIRECTIVES[kind]}:: {name}",
                *(f"   :{option}:" for option in options if options[option]),
                "",
            ]
    for where, entry in assigned_names().values():
        lines += [as_rst(line) for line in entry] if where == room else []
    return lines


def helps(command: str) -> list[str]:
    """What a command prints for --help; and for a name, where it takes one."""
    lines = [f"## imaml {command}", ""]
    for words in [[command], *([[command, EXAMPLES[command]]] if command in EXAMPLES else [])]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                code = main([*words, "--help"])
            except SystemExit as end:
                code = end.code
        if code:
            raise RuntimeError(f"imaml {' '.join(words)} --help ended with {code}")
        lines += [f"    imaml {' '.join(words)} --help", "", "```text", printed.getvalue().rstrip(), "```", ""]
    return lines


# --- docstrings -----------------------------------------------------------------------------------------------------

_AFTER_ANOTHER = re.compile(r"(?<=\S)\. ([a-z_]+(?:, [a-z_]+)*): (?=\S)")  # an argument on the line of another


def as_rst(text: str) -> str:
    """Plain text with names in `…` as reStructuredText: a public name becomes a link, and all else is code.

    A name that is a plain word, such as `train`, may mean something else: it is a link only with its module.
    """

    def marked(match: re.Match[str]) -> str:
        name = match[1].rpartition(".")[2]
        place = places().get(name)
        public = place and (
            match[1] in (f"imaml_ext.{name}", place) or (match[1] == name and not re.fullmatch("[a-z]+", name))
        )
        return f":py:obj:`{name} <{places()[name]}>`" if public else f"``{match[1]}``"

    return re.sub(r"(?<!`)`([^`]+)`(?!`)|\*", lambda match: marked(match) if match[1] else r"\*", text)


def mend_docstring(app, what: str, name: str, value: object, options, lines: list[str]) -> None:
    """Makes links of names; adds the members of a family and the fields of a dataclass."""
    text = as_rst(_AFTER_ANOTHER.sub(r".\n    \1: ", "\n".join(lines)))
    if getattr(value, "__dict__", {}).get("kinds"):
        members = [f"``{kind}`` is `{path.rpartition('.')[2]}`" for kind, path in value.kinds.items()]
        text += "\n\n" + as_rst(f"By name: {', '.join(members)}.")
    if isinstance(value, type) and dataclasses.is_dataclass(value):
        text += "\n\n" + "\n".join(fields_of(value, text))
    if what in ("attribute", "property"):  # napoleon takes what is before a colon in a first line for a type
        text = f"..\n\n{text}"
    lines[:] = text.split("\n")


def put_types_first(app, what: str, name: str, value: object, options, lines: list[str]) -> None:
    """Puts the type that napoleon has found for an attribute on the line of its name."""
    found = r"^(\.\. attribute:: \w+\n)((?:\n|   .*\n)*?)   (:type: .*\n)"
    lines[:] = re.sub(found, r"\1   \3\2", "\n".join([*lines, ""]), flags=re.MULTILINE).split("\n")


def fields_of(cls: type, docstring: str) -> list[str]:
    """The settings of a class, or those fields of another dataclass that are explained by a comment beside them."""
    lines = []
    for field in [field for field in dataclasses.fields(cls) if not field.name.startswith("_")]:
        text = field_help(cls).get(field.name, "")
        if re.search(rf"^ +{field.name}: ", docstring, re.MULTILINE) or not (text or issubclass(cls, Settings)):
            continue
        hint = field_types(cls)[field.name]
        bounds = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Bounds)]
        text += "".join(f" It is {each}." for each in bounds)
        written = re.sub(r"^Annotated\[(.*), \w+(\(.*\))?\]$", r"\1", str(field.type))
        lines += [
            f".. py:attribute:: {field.name}",
            f"   :type: {written}",
            *default(field),
            "",
            f"   {as_rst(text)}",
            "",
        ]
    return lines


def default(field: dataclasses.Field) -> list[str]:
    """The option of `py:attribute` for the default of a field; an object that has nothing but defaults is short."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return []
    plain = isinstance(value, Settings) and value == type(value)()
    return [f"   :value: {type(value).__name__}()" if plain else f"   :value: {value!r}"]


def mend_signature(app, what: str, name: str, value: object, options, signature: str | None, returned: str | None):
    """Leaves the arguments of settings to the entries of their fields, and names types as the source does."""
    if isinstance(value, type) and issubclass(value, Settings) and dataclasses.is_dataclass(value):
        return "(…)", None
    return tuple(text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in (signature, returned))


def skip(app, what: str, name: str, value: object, skipped: bool, options) -> bool | None:
    """Skips the fields of a named tuple, which its docstring explains."""
    return True if str(getattr(value, "__doc__", "")).startswith("Alias for field number") else None


def show_public_bases(app, name: str, value: type, options, bases: list[type]) -> None:
    """Shows no base that a reader cannot look up."""
    bases[:] = public_bases(value)


def find_by_name(app, env, node, content):
    """Finds the entry of a name that is written without its module, or with the module that it is defined in."""
    place = places().get(node.get("reftarget", "").rpartition(".")[2])
    if node.get("refdomain") != "py" or place is None:
        return None
    domain = env.domains["py"]
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", place, node, content)


def set_dashes(app, doctree) -> None:
    """Puts a dash between an argument and its text, where Sphinx has left two hyphens for another extension to join."""
    for text in list(doctree.findall(lambda node: node == " -- ")):
        text.parent.replace(text, type(text)(" – "))


def write_index(app, error) -> None:
    """Leads from index.html, which servers show first, to the README."""
    if error is None and app.builder.format == "html":
        first = f"{app.config.root_doc}.html"
        page = f'<!doctype html><title>imaml_ext</title><meta http-equiv="refresh" content="0; url={first}">\n'
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")


def setup(app):
    os.environ["COLUMNS"] = "100"  # of what commands print
    app.connect(
        "config-inited", lambda app, config: config.autodoc_type_aliases.update({n: n for n in assigned_names()})
    )
    app.connect("source-read", add_to_page)
    app.connect("autodoc-process-docstring", mend_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", put_types_first, priority=600)  # after napoleon
    app.connect("autodoc-process-signature", mend_signature)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-bases", show_public_bases)
    app.connect("doctree-read", set_dashes)
    app.connect("missing-reference", find_by_name)
    app.connect("build-finished", write_index)
    return {"parallel_read_safe": True}
