"""The text a benchmark runs on: documentation that Python ships, the same on every machine.

Module documentation, because the calibration text is drawn from the language reference: a
predictor is not judged on what it was trained on.
"""

from __future__ import annotations

import heapq
import importlib
import inspect
from collections.abc import Callable, Sequence

from shadowllm.errors import UserError

# heapq's essay on priority queues comes first (it has not changed in decades), then as much of
# these as a long prompt needs.
MODULES = ("difflib", "doctest", "argparse", "decimal", "statistics", "optparse", "random", "fractions", "pickle")


def passage(encode: Callable[[str], Sequence[int]], length: int) -> list[int]:
    """The first ``length`` token ids of the text.

    Raises:
        UserError: the text has fewer.
    """
    text = getattr(heapq, "__about__", "")
    ids = list(encode(text))
    for name in MODULES:
        if len(ids) >= length:
            break
        text += "\n\n" + _documentation(name)
        ids = list(encode(text))
    if len(ids) < length:
        raise UserError(
            f"the benchmark's text has {len(ids)} tokens, {length} are needed",
            "ask for a shorter prompt or fewer tokens to judge quality by",
        )
    return ids[:length]


def _documentation(name: str) -> str:
    module = importlib.import_module(name)
    members = [
        value
        for key, value in sorted(vars(module).items())
        if not key.startswith("_") and getattr(value, "__module__", None) == name
    ]
    return "\n\n".join(text for text in map(inspect.getdoc, [module, *members]) if text)
