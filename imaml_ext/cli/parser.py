"""Reads settings from a command line: every field of nested settings is an option, and so is the class of a choice.

A field that stands for one of several classes, such as `data: DataSource`, is a slot: `--data omniglot` chooses its
class, and `--data.root FOLDER` sets a field of that class. tyro makes the options from the objects themselves, so that
defaults, bounds and help stand in one place.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import operator
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from imaml_ext.errors import ConfigError, ConfigTypeError
from imaml_ext.settings import Choice, Settings, field_types

S = TypeVar("S", bound="Settings")
T = TypeVar("T")
_PLAIN = (int, float, bool, str, Path, type(None))
_FLAT = ("algorithm",)  # a field whose own fields stand on the command line without its name before them
_SLOT = "class_of_"
_UNSET = "none"  # in place of the name of a class
_FIELD = re.compile(r" {4}(\w+): ")


def parse(
    kind: Callable[..., T], arguments: Sequence[str], *, prog: str, description: str = "", default: T | None = None
) -> T:
    """The options of a command, a dataclass; the command line changes `default`, and the classes of its settings.

    Ends the process with 2 where the command line cannot be understood.
    """
    given: dict[str, Any] = {}
    if default is not None:
        values = vars(default).items()
        settings = {name: _chosen(value, list(arguments)) for name, value in values if isinstance(value, Settings)}
        given["default"] = dataclasses.replace(default, **settings)  # type: ignore[type-var]
    registry = ConstructorRegistry()
    registry.struct_rule(_settings_rule)
    with registry:
        try:
            return tyro.cli(kind, prog=prog, description=description or summary_of(kind), args=arguments, **given)
        except _Refused as refused:
            print(f"{prog}: {refused}", file=sys.stderr)
            raise SystemExit(2) from refused


class _Refused(Exception):
    """A value outside its bounds; not a ValueError, which tyro would put into words of its own."""


def summary_of(kind: object) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())


def _chosen(settings: S, arguments: list[str], prefix: str = "--") -> S:
    """The settings with the classes that `--SLOT NAME` chooses; fields of the same name keep their values.

    Nothing is checked here: what tyro makes in the end is.
    """
    settings = copy.copy(settings)
    for field in _shown(settings):
        value, (family, names) = getattr(settings, field.name), _family(type(settings), field.name)
        flag = prefix + field.name.replace("_", "-")
        name = last_value(arguments, flag)
        if family is not None and name in names and name != _name(value):
            value = None if name == _UNSET else _carried(value, family.kind(name)())
            object.__setattr__(settings, field.name, value)
        if not isinstance(value, Settings):
            continue
        below = prefix if field.name in _FLAT else f"{flag}."
        object.__setattr__(settings, field.name, _chosen(value, arguments, below))
    return settings


def last_value(arguments: Sequence[str], flag: str) -> str | None:
    """The value that was given last to an option, as `--flag value` or `--flag=value`."""
    value = None
    for word, after in pairwise([*arguments, ""]):
        name, equals, given = word.partition("=")
        if name.replace("_", "-") == flag:
            value = given if equals else after
    return value


def _family(cls: type, field: str) -> tuple[type[Choice] | None, tuple[str, ...]]:
    """The family of a field that stands for one of several classes, and the words that choose; else None and none."""
    kind = field_types(cls)[field]
    members = typing.get_args(kind) or (kind,)
    family = next((member for member in members if isinstance(member, type) and issubclass(member, Choice)), None)
    if family is None:
        return None, ()
    return family, ((_UNSET,) if type(None) in members else ()) + tuple(family.kinds)


def _name(value: Choice | None) -> str:
    return _UNSET if value is None else value.kind_name


def _carried(old: Settings | None, new: S) -> S:
    """`new` with the values of `old` in the fields that both have, of the same type whatever its bounds."""
    if old is None:
        return new
    ours, theirs = (typing.get_type_hints(type(settings)) for settings in (old, new))
    for field in dataclasses.fields(new):  # type: ignore[arg-type]
        if ours.get(field.name) == theirs[field.name]:
            object.__setattr__(new, field.name, getattr(old, field.name))
    return new


def _shown(settings: Settings) -> list[dataclasses.Field[Any]]:
    """The fields that a command line can set: not what the data decides, nor what no file records."""
    fields = dataclasses.fields(settings)  # type: ignore[arg-type]
    return [f for f in fields if f.metadata.get("recorded", True) and not f.metadata.get("from_data", False)]


def _settings_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """How tyro sees settings: the fields that can be set and, for each slot, an option for its class."""
    default = info.default
    if not isinstance(default, Settings):
        return None
    cls: Any = type(default)
    help_of, specs = field_help(cls), []
    for field in _shown(default):
        value, text = getattr(default, field.name), help_of.get(field.name, "")
        _, names = _family(cls, field.name)
        if names:
            choices: Any = Annotated[Literal[names], tyro.conf.arg(name=field.name)]
            specs.append(StructFieldSpec(_SLOT + field.name, choices, default=_name(value), helptext=text))
        if isinstance(value, Settings):
            nested: Any = Annotated[type(value), tyro.conf.arg(name="" if field.name in _FLAT else field.name)]
            specs.append(StructFieldSpec(field.name, nested, default=value, helptext=summary_of(type(value))))
        elif not names and isinstance(value, (*_PLAIN, tuple, dict)):  # and not a tensor
            kind = _readable(field_types(cls)[field.name])
            specs.append(StructFieldSpec(field.name, kind, default=value, helptext=text))

    def made(**values: Any) -> Settings:
        fields = {name: value for name, value in values.items() if not name.startswith(_SLOT)}
        for name in values.keys() - fields.keys():
            if values[name] != _name(getattr(default, name.removeprefix(_SLOT))):
                raise _Refused(f"{name.removeprefix(_SLOT)} {values[name]} must be given as --NAME VALUE")
        try:
            return dataclasses.replace(default, **fields)  # type: ignore[type-var]
        except (ConfigError, ConfigTypeError) as error:
            raise _Refused(str(error)) from error

    return StructConstructorSpec(instantiate=made, fields=tuple(specs))


def _readable(kind: Any) -> Any:
    """The type as words on a command line stand for it: without tensors, and a dictionary as names and values."""
    plain = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    origin, members = typing.get_origin(plain), typing.get_args(plain)
    if origin in (types.UnionType, typing.Union):
        return functools.reduce(operator.or_, [m for m in members if m in _PLAIN or typing.get_origin(m) is Literal])
    return Annotated[plain, _pairs(members[1])] if origin is dict else kind


def _pairs(kind: Any) -> PrimitiveConstructorSpec[dict[str, Any]]:
    """A dictionary as `--lr-of NAME VALUE NAME VALUE …`."""

    def read(words: list[str]) -> dict[str, Any]:
        if len(words) % 2:
            raise ValueError("give a name and a value, in turn")
        pairs = zip(words[::2], words[1::2], strict=True)
        return {name: float(word) if kind is float else word for name, word in pairs}

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME VALUE ...]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [str(word) for pair in value.items() for word in pair],
    )


@functools.cache
def field_help(cls: type) -> dict[str, str]:
    """The comment beside or above each field of a class and of its bases."""
    texts: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        try:
            lines = textwrap.dedent(inspect.getsource(base)).splitlines()
        except OSError:  # a class without a source file
            continue
        above: list[str] = []
        for line in lines:
            code, mark, comment = line.partition("#") if line.lstrip().startswith("#") else line.partition("  # ")
            field = _FIELD.match(code)
            if field and (mark or above):
                texts[field[1]] = comment.strip() if mark else " ".join(above)
            above = [*above, comment.strip()] if mark and not code.strip() else []
    return texts
