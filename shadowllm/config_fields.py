"""Metadata of a configuration's fields: the limits of numbers, and the command-line flag."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from shadowllm.errors import UserError
from shadowllm.limits import LARGEST, check_path, check_real, check_switch, check_whole

T = TypeVar("T")
KEY = "option"  # of a field's metadata


@dataclass(frozen=True)
class Option:
    """Metadata of a field, in addition to its name, type, default and docstring.

    Attributes:
        flag: its flag, if that is not the field's name.
        metavar: placeholder of the value in the help.
        least, most: limits of a whole number, or of each in a sequence; no limits if ``least`` is None.
        called: its name in a message about its limits, if that is not the field's name.
        values: what a user may write -> the value of the field; None accepts anything.
        otherwise: the default in words, if the value is not clear by itself.
        help: the help of the flag, if that is not the docstring.
    """

    flag: str | None = None
    metavar: str | None = None
    least: int | None = None
    most: int = LARGEST
    called: str | None = None
    values: Mapping[str, object] | None = None
    otherwise: str | None = None
    help: str | None = None


def option(default: T, **keywords: Any) -> T:
    """Make a field of a dataclass that a flag can set; ``keywords`` are those of `Option`."""
    return field(default=default, metadata={KEY: Option(**keywords)})


def check_values(config: Any) -> None:
    """Refuse values that a field cannot have: numbers, switches, names, paths and lists.

    A name may be short, as fp16. A path may be a text.

    Args:
        config: a dataclass with fields that `option` made.

    Raises:
        UserError: a number is outside its limits, or not a number; a value is no path; a switch is neither True nor
            False; a name is unknown; or a field with several values has a text, which would be read letter by letter,
            or something else that is no sequence.
    """
    hints = get_type_hints(type(config))
    for one in fields(config):
        _check_name(config, one, hints[one.name])
        found: Option | None = one.metadata.get(KEY)
        value = getattr(config, one.name)
        if found is not None and isinstance(one.default, bool):
            check_switch(one.name, value)
        if found is not None and isinstance(one.default, tuple) and not _is_list(value):
            raise UserError(f"{found.called or one.name} is {value!r:.60}", "give a list")
        kind = without_none(hints[one.name])
        if kind is Path and value is not None:
            object.__setattr__(config, one.name, check_path(one.name, value))
        if kind is float and value is not None:
            object.__setattr__(config, one.name, check_real(one.name, value))
        if found is None or found.least is None:
            continue
        for number in value if isinstance(value, Sequence) else () if value is None else (value,):
            check_whole(found.called or one.name, number, found.least, found.most)


def without_none(hint: Any) -> Any:
    """Return a type hint without its `None`: ``int`` of ``int | None``."""
    if get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint):
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _check_name(config: Any, one: Field[Any], hint: Any) -> None:
    """Check the value of a field that has few values, and store the one that a short name stands for."""
    found, value = one.metadata.get(KEY), getattr(config, one.name)
    names = found.values if found and found.values else {}
    if get_origin(literal := without_none(hint)) is Literal:
        names = {name: name for name in get_args(literal)}
    if not names or (value is None and one.default is None):
        return
    if not isinstance(value, str) or value not in names:
        raise UserError(f"{one.name} {value!r:.60} is not supported", f"use one of {', '.join(names)}")
    object.__setattr__(config, one.name, names[value])


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
