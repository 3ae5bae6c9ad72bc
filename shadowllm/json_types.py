"""Check that data read from JSON has the expected types."""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict


def check_type(value: Any, kind: Any, name: str) -> None:
    """Check a JSON value against a plain type, list (as tuple), dict, union, literal, TypedDict or dataclass.

    The value of a TypedDict may have unknown keys, that of a dataclass may not.

    Raises:
        ValueError: a part differs; the message names it.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        _check_fields(value, kind, name)
    elif is_typeddict(kind):
        _check_keys(value, get_type_hints(kind), kind.__required_keys__, name)
    elif origin in (Union, UnionType):
        _check_any(value, arguments, name)
    elif origin is dict and isinstance(value, dict):
        for key, item in value.items():
            check_type(item, arguments[1], f"{name}.{key}")
    elif origin is tuple and isinstance(value, list | tuple):
        for i, item in enumerate(value):
            check_type(item, arguments[0], f"{name}[{i}]")
    elif not _is_plain(value, kind, origin):
        raise ValueError(f"{name} is {value!r:.60}")


def _is_plain(value: Any, kind: Any, origin: Any) -> bool:
    if kind is Any:
        return True
    if origin is Literal:
        return value in get_args(kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind in (str, bool, NoneType) and isinstance(value, kind)


def _check_any(value: Any, kinds: tuple[Any, ...], name: str) -> None:
    errors = []
    for kind in kinds:
        try:
            return check_type(value, kind, name)
        except ValueError as error:
            errors.append(error)
    # The longest message names the innermost part, so it belongs to the type that fits best.
    raise max(errors, key=lambda error: len(str(error)))


def _check_fields(value: Any, kind: Any, name: str) -> None:
    required = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    hints = get_type_hints(kind)
    _check_keys(value, hints, required, name)
    for key in value:
        if key not in hints:
            raise ValueError(f"{name} has an unknown entry {key!r}")


def _check_keys(value: Any, hints: dict[str, Any], required: set[str] | frozenset[str], name: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r:.60}")
    for key, hint in hints.items():
        if key in value:
            check_type(value[key], hint, f"{name}.{key}")
        elif key in required:
            raise ValueError(f"{name} lacks {key}")
