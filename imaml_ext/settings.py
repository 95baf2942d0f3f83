"""Settings: frozen dataclasses whose fields carry their defaults, bounds and help.

A field is written once, in the class that uses it:

    @dataclass(frozen=True)
    class Descent(Settings):
        steps: Annotated[int, Bounds(at_least=0)] = 16  # Steps per task.

Making an object checks the type and the bounds of every field. The command line is generated from the classes: the
comment beside or above a field is its help. `to_json` and `from_json` write and read them. A `Choice` is a setting that
stands for one of several classes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from imaml_ext.errors import ConfigError, ConfigTypeError

S = TypeVar("S", bound="Settings")
_TYPES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", Path: "a path"}


@dataclass(frozen=True)
class Bounds:
    """The range of a number, or of each number of a tuple or dictionary."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __str__(self) -> str:
        words = {"at_least": "at least", "above": "above", "at_most": "at most", "below": "below"}
        given = [f"{words[name]} {value:g}" for name, value in vars(self).items() if value is not None]
        return " and ".join(given)

    def hold(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


POSITIVE = Bounds(above=0)
NOT_NEGATIVE = Bounds(at_least=0)
FRACTION = Bounds(at_least=0, below=1)
COUNT = Bounds(at_least=1)


class Settings:
    """The base of all settings; a subclass is a frozen dataclass.

    Raises:
        ConfigTypeError, ConfigError: a field of the wrong type, or outside its bounds.
    """

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The JSON form of today, from one that an earlier version has written: for a field that came later, the value
        that was in effect before there was the field."""
        return values

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = _checked(field_types(type(self))[field.name], getattr(self, field.name), self._called(field.name))  # type: ignore[arg-type]
            object.__setattr__(self, field.name, value)

    def require(self, condition: bool, field: str, expected: str) -> None:
        """Raises ConfigError unless `condition` holds: "Class.field must be `expected`, got …"."""
        if not condition:
            raise ConfigError(f"{self._called(field)} must be {expected}, got {getattr(self, field)!r}")

    def _called(self, field: str) -> str:
        return f"{type(self).__name__}.{field}"


class Choice(Settings):
    """Settings of one class out of several, which are chosen by name.

    Attributes:
        kinds: {name: "module.Class"} of a family, in its base class. Another member of the family is one more entry;
            its module is imported when it is chosen.
    """

    kinds: ClassVar[dict[str, str]] = {}

    @classmethod
    def kind(cls, name: str) -> type:
        """The class of that name.

        Raises:
            ConfigError: there is none.
        """
        if name not in cls.kinds:
            raise ConfigError(f"{_words(cls)} must be one of {', '.join(map(repr, cls.kinds))}, got {name!r}")
        module, _, attribute = cls.kinds[name].rpartition(".")
        return getattr(importlib.import_module(module), attribute)

    @property
    def kind_name(self) -> str:
        """The name under which the class of this object is chosen.

        Raises:
            ConfigError: its class has none.
        """
        path = f"{type(self).__module__}.{type(self).__qualname__}"
        for name, known in self.kinds.items():
            if known == path:
                return name
        raise ConfigError(f"{path} has no name: add it to `kinds` of its family, so that a file can refer to it")


def _words(cls: type) -> str:
    """InnerSolver → "inner solver"."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in cls.__name__).strip()


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The type of every field, with its `Bounds`."""
    return typing.get_type_hints(cls, include_extras=True)


def _plain(expected: Any) -> tuple[Any, Bounds | None]:
    """A type and its bounds."""
    if typing.get_origin(expected) is not typing.Annotated:
        return expected, None
    plain, *extras = typing.get_args(expected)
    return plain, next((extra for extra in extras if isinstance(extra, Bounds)), None)


def _checked(expected: Any, value: Any, name: str, bounds: Bounds | None = None) -> Any:
    """A value, if it is of the type and within the bounds; an int becomes a float where a float is expected."""
    expected, own = _plain(expected)
    bounds = own or bounds
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any or isinstance(expected, TypeVar) or origin is typing.ClassVar:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        rest = [argument for argument in arguments if argument is not type(None)]
        others = [a for a in rest if a not in _TYPES and isinstance(a, type)]  # such as torch.Tensor
        if any(isinstance(value, other) for other in others):
            return value
        return _checked(next((a for a in rest if a not in others), rest[0]), value, name, bounds)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise ConfigTypeError(f"{name} must be a tuple, got {value!r}")
        if arguments[-1] is Ellipsis:
            return tuple(_checked(arguments[0], item, name, bounds) for item in value)
        if len(value) != len(arguments):
            raise ConfigError(f"{name} must hold {len(arguments)} values, got {value!r}")
        return tuple(_checked(each, item, name, bounds) for each, item in zip(arguments, value, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigTypeError(f"{name} must be a dictionary, got {value!r}")
        return {
            _checked(arguments[0], k, name): _checked(arguments[1], v, f"{name}[{k!r}]", bounds)
            for k, v in value.items()
        }
    if expected in _TYPES:
        return _checked_plain(expected, value, name, bounds)
    if isinstance(origin or expected, type) and not isinstance(value, origin or expected):
        raise ConfigTypeError(f"{name} must be of type {(origin or expected).__name__}, got {type(value).__name__}")
    return value


def _checked_plain(expected: Any, value: Any, name: str, bounds: Bounds | None) -> Any:
    """A number, string, path or truth value."""
    if expected in (int, float) and not isinstance(value, bool) and hasattr(value, "__index__"):
        value = expected(value.__index__())
    elif expected is float and isinstance(value, Real) and not isinstance(value, bool):  # NumPy's
        value = float(value)
    elif expected is Path and isinstance(value, str):
        value = Path(value)
    if not isinstance(value, expected) or (expected in (int, float) and isinstance(value, bool)):
        raise ConfigTypeError(f"{name} must be {_TYPES[expected]}, got {value!r}")
    if expected in (int, float) and not (bounds or Bounds()).hold(value):
        wanted = bounds if bounds and math.isfinite(value) else "finite"
        raise ConfigError(f"{name} must be {wanted}, got {value!r}")
    return value


# --- by path --------------------------------------------------------------------------------------------------------


def leaves(settings: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as ("algorithm.inner.steps", value), nested ones after one another; a choice gives its name too."""
    if isinstance(settings, Choice):
        yield prefix.rstrip(".") or "kind", settings.kind_name
    for field in _recorded(settings):
        value = getattr(settings, field)
        if isinstance(value, Settings):
            yield from leaves(value, f"{prefix}{field}.")
        else:
            yield f"{prefix}{field}", value


def changed(settings: S, values: Mapping[str, Any]) -> S:
    """The settings with other values for some paths, {"outer.lr": 1e-3, "algorithm.inner": NewtonCG(), …}, in order.

    Raises:
        ConfigError, ConfigTypeError: a path that does not exist, or a value outside its bounds.
    """
    for path, value in values.items():
        settings = _with(settings, path.split("."), value, path)
    return settings


def _with(settings: Any, names: list[str], value: Any, path: str) -> Any:
    first, *rest = names
    if not isinstance(settings, Settings) or first not in field_types(type(settings)):  # type: ignore[arg-type]
        raise ConfigError(f"there is no setting {path}")
    if rest:
        value = _with(getattr(settings, first), rest, value, path)
    return dataclasses.replace(settings, **{first: value})  # type: ignore[type-var]


# --- as JSON --------------------------------------------------------------------------------------------------------


def _recorded(settings: Settings | type) -> list[str]:
    """The fields that a file holds: all but those marked `metadata={"recorded": False}`."""
    fields = dataclasses.fields(settings)  # type: ignore[arg-type]
    return [field.name for field in fields if field.metadata.get("recorded", True)]


def to_json(settings: Settings) -> dict[str, Any]:
    """The settings as plain JSON values; a choice has its name under "kind". `from_json` gives them back equal."""

    def plain(value: Any) -> Any:
        if isinstance(value, Settings):
            return to_json(value)
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    kind = {"kind": settings.kind_name} if isinstance(settings, Choice) else {}
    return kind | {name: plain(getattr(settings, name)) for name in _recorded(settings)}


def from_json(cls: type[S], values: Any, path: str = "") -> S:
    """Reads what `to_json` wrote, strictly: every setting is there, with a value of its type, and nothing else.

    Raises:
        ConfigError, ConfigTypeError: a setting that is unknown, missing, of the wrong type or outside its bounds.
    """
    here = path or "the configuration"
    if not isinstance(values, Mapping):
        raise ConfigTypeError(f"{here} must be a JSON object, got {values!r}")
    values = dict(values)
    if issubclass(cls, Choice):
        if "kind" not in values:
            raise ConfigError(f"{here} must have a kind, got {', '.join(values) or 'nothing'}")
        cls = cls.kind(values.pop("kind"))
    dot = f"{path}." if path else ""
    names, values = _recorded(cls), cls.upgraded(values)
    for unknown in (name for name in values if name not in names):
        raise ConfigError(f"unknown setting {dot}{unknown}; known here: {', '.join(names)}")
    for missing in (name for name in names if name not in values):
        raise ConfigError(f"setting {dot}{missing} is missing")
    return cls(**{name: _read(field_types(cls)[name], values[name], f"{dot}{name}") for name in names})  # type: ignore[arg-type]


def _read(expected: Any, value: Any, path: str) -> Any:
    """A nested object from its JSON form; plain values are checked by the object that takes them."""
    plain, _ = _plain(expected)
    for candidate in (plain, *typing.get_args(plain)):
        if isinstance(candidate, type) and issubclass(candidate, Settings) and value is not None:
            return from_json(candidate, value, path)
    return value
