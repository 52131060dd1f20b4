"""Frozen dataclasses to JSON and back, refusing whatever does not fit exactly.

A record is written by one version of the code and read by another, months later: a field that is missing, unknown or of
another type means that the two disagree, and guessing would put a wrong number into a table. The one exception is a
field marked ABSENT_MEANS_DEFAULT. JSON has no NaN, so floats that are not finite are written as the strings "nan",
"inf" and "-inf".
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import types
import typing
from typing import Any, Literal, TypeVar, Union

from workbench.errors import InputError
from workbench.problem import ABSENT_MEANS_DEFAULT
from workbench.variant import Config

T = TypeVar("T")
_NOT_FINITE = ("nan", "inf", "-inf")


def encode(value: Any) -> Any:
    """What `json.dumps` takes for `value`: a dataclass, Config, enum, tuple, str, int, float, bool or None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Config):
        return dict(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def decode(kind: type[T], value: Any, where: str = "record") -> T:
    """The `kind` that `encode` made `value` from.

    Raises InputError that names the place inside the record, what was expected there and what came.
    """
    return typing.cast(T, _decode(kind, value, where))


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return _one_of(arguments, value, where)
    if origin in (Union, types.UnionType):
        return None if value is None else _decode(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        return _decode_tuple(arguments, value, where)
    if kind is Config:
        return Config(**_mapping(value, where))
    if kind is float:
        return _decode_float(value, where)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if issubclass(kind, enum.Enum):
        return kind(_one_of(tuple(member.value for member in kind), value, where))
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = _hints(kind)
    given = _mapping(value, where)
    may_be_absent = {field.name for field in dataclasses.fields(kind) if ABSENT_MEANS_DEFAULT in field.metadata}
    missing = [name for name in hints if name not in given and name not in may_be_absent]
    unknown = [name for name in given if name not in hints]
    if missing or unknown:
        complaints = [f"missing {name!r}" for name in missing] + [f"unknown {name!r}" for name in unknown]
        raise InputError(f"{where}: expected the fields of {kind.__name__}, got {', '.join(complaints)}")
    return kind(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in given.items()})


def _decode_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise InputError(f"{where}: expected a list, got {value!r}")
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
    if len(kinds) != len(value):
        raise InputError(f"{where}: expected {len(kinds)} items, got {len(value)}")
    return tuple(_decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _decode_float(value: Any, where: str) -> float:
    if value in _NOT_FINITE or (isinstance(value, int | float) and not isinstance(value, bool)):
        return float(value)
    raise InputError(f"{where}: expected a number, got {value!r}")


def _one_of(allowed: tuple[Any, ...], value: Any, where: str) -> Any:
    if value not in allowed:
        raise InputError(f"{where}: expected one of {', '.join(map(str, allowed))}, got {value!r}")
    return value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, got {value!r}")
    return value


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return {field.name: typing.get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}
