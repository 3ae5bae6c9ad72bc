"""Numbers that users give, and what they may be."""

from __future__ import annotations

import os

from shadowllm.errors import UserError

LARGEST = 2**31 - 1  # of what counts tokens, layers and the like
LARGEST_SEED = 2**63 - 1  # PyTorch and NumPy both take this much
THREADS_PER_CORE = 8


def check_whole(name: str, value: int, least: int = 1, most: int = LARGEST) -> int:
    """Give back a whole number within its limits.

    Args:
        name: of the option or setting, for the message.

    Raises:
        UserError: it is beyond them, or no whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UserError(f"{name} is {value}", f"give a whole number from {least} to {most}")
    return value


def check_seed(value: int, name: str = "the seed") -> int:
    """Give back a seed that every random generator in use accepts.

    Raises:
        UserError: it is negative or too large.
    """
    return check_whole(name, value, 0, LARGEST_SEED)


def check_threads(value: int, name: str = "the number of threads") -> int:
    """Give back a number of threads that this machine can reasonably run.

    Raises:
        UserError: none, or many more than there are cores: each would cost memory and slow down all others.
    """
    return check_whole(name, value, 1, THREADS_PER_CORE * (os.cpu_count() or 1))
