"""Metadata of a configuration's fields: the limits of numbers, and the command-line flag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from shadowllm.errors import UserError
from shadowllm.limits import LARGEST, check_switch, check_whole

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
    """Refuse whole numbers outside their limits, switches that are neither True nor False, and a value for a list.

    Args:
        config: a dataclass with fields that `option` made.

    Raises:
        UserError: a number is outside its limits, or not a whole number; a switch has another value; or a field with
            several values has a text, which would be read letter by letter, or something else that is no sequence.
    """
    for one in fields(config):
        found: Option | None = one.metadata.get(KEY)
        value = getattr(config, one.name)
        if found is not None and isinstance(one.default, bool):
            check_switch(one.name, value)
        if found is not None and isinstance(one.default, tuple) and not _is_list(value):
            raise UserError(f"{found.called or one.name} is {value!r:.60}", "give a list")
        if found is None or found.least is None:
            continue
        for number in value if isinstance(value, Sequence) else () if value is None else (value,):
            check_whole(found.called or one.name, number, found.least, found.most)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
