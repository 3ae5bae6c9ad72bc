"""What a field of a configuration says of itself: the numbers it takes, and the command-line flag that sets it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from shadowllm.limits import LARGEST, check_whole

T = TypeVar("T")
KEY = "option"  # of a field's metadata


@dataclass(frozen=True)
class Option:
    """Beside name, type, default and docstring of a field.

    Attributes:
        flag: its name on the command line, where it is not the field's own.
        metavar: what stands for the value in the help.
        least, most: limits of a whole number, or of each in a sequence; no least, no limits.
        called: its name in a message about its limits, where it is not the field's own.
        values: what a user writes, and what the field is then; None takes anything.
        otherwise: the default in words, where the value does not say it.
        help: what the flag does, where the docstring does not say that.
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
    """A field of a dataclass that a flag sets; ``keywords`` are `Option`'s."""
    return field(default=default, metadata={KEY: Option(**keywords)})


def check_numbers(config: Any) -> None:
    """Refuse whole numbers beyond their limits.

    Args:
        config: a dataclass with fields that `option` made.

    Raises:
        UserError: a number is beyond its limits, or no whole number.
    """
    for one in fields(config):
        found: Option | None = one.metadata.get(KEY)
        if found is None or found.least is None:
            continue
        value = getattr(config, one.name)
        for number in value if isinstance(value, Sequence) else () if value is None else (value,):
            check_whole(found.called or one.name, number, found.least, found.most)
