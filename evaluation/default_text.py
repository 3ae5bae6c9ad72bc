"""The text of benchmarks: Python's module documentation, which every machine has.

The built-in calibration text uses the language reference instead. So a predictor is not evaluated on text that it
was trained on.
"""

from __future__ import annotations

import heapq
import importlib
import inspect
from collections.abc import Callable, Sequence

from shadowllm.errors import UserError

# The essay on priority queues in heapq comes first, because it has not changed in decades. These modules follow if
# more text is needed.
MODULES = ("difflib", "doctest", "argparse", "decimal", "statistics", "optparse", "random", "fractions", "pickle")


def passage(encode: Callable[[str], Sequence[int]], length: int) -> list[int]:
    """Return the first ``length`` token ids of the text.

    Raises:
        UserError: the text has fewer tokens.
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
