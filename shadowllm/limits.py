"""Checks of the numbers, switches and paths that users give."""

from __future__ import annotations

import os
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TypeVar

from shadowllm.errors import UserError

LARGEST = 2**31 - 1  # limit of counts of tokens, layers and so on
LARGEST_SEED = 2**63 - 1  # PyTorch and NumPy both accept it
MOST_LAYERS = 1 << 16  # far more than any model has, and few enough to list them
MOST_SEQUENCES = 1 << 16  # of a batch: more would only exhaust the memory
LONGEST_DRAFT = 64  # drafted tokens of a round; more than a few never pay
THREADS_PER_CORE = 8
T = TypeVar("T")


def check_whole(name: str, value: int, least: int = 1, most: int = LARGEST) -> int:
    """Return a whole number after checking its limits.

    Args:
        name: name of the option or setting, for the message.

    Raises:
        UserError: it is outside them, or not a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UserError(f"{name} is {value!r:.60}", f"give a whole number from {least} to {most}")
    return value


def check_real(name: str, value: float) -> float:
    """Return a number as Python's own, because JSON has none of NumPy.

    Args:
        name: name of the option or setting, for the message.

    Raises:
        UserError: it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{name} is {value!r:.60}", "give a number")
    return value if isinstance(value, int) else float(value)


def check_switch(name: str, value: object) -> bool:
    """Return a switch after checking that it is True or False.

    Args:
        name: name of the option or setting, for the message.

    Raises:
        UserError: it is another value, for example the text "no", which Python takes for true.
    """
    if not isinstance(value, bool):
        raise UserError(f"{name} is {value!r:.60}", "give True or False")
    return value


def check_kind(name: str, value: object, kind: type[T], example: str) -> T:
    """Return a value after checking its class.

    Args:
        name: name of the setting, for the message.
        example: how a user makes one, for the message.

    Raises:
        UserError: it is of another class.
    """
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise UserError(f"{name} is {value!r:.60}", f"give {article} {kind.__name__}, for example {example}")
    return value


def check_path(name: str, value: str | PathLike[str]) -> Path:
    """Return the path that a text or path names; ``~`` is the home folder.

    Raises:
        UserError: it is something else.
    """
    try:
        return Path(os.path.expanduser(value))
    except TypeError:
        raise UserError(f"{name} is {value!r:.60}, which is no path", "give its name as text") from None


def check_seed(value: int) -> int:
    """Return a seed after checking that every random generator in use accepts it.

    Raises:
        UserError: it is negative or too large.
    """
    return check_whole("the seed", value, 0, LARGEST_SEED)


def check_threads(value: int, name: str = "the number of threads") -> int:
    """Return a number of threads after checking that this machine can reasonably run it.

    Raises:
        UserError: it is 0, or many times the number of cores. Each thread costs memory and slows down the others.
    """
    return check_whole(name, value, 1, THREADS_PER_CORE * (os.cpu_count() or 1))
