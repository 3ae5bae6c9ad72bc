"""Inputs with a selection for each sequence, and the check that a sequence has the same bits alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.plugins.native_model import ints, pick

Inputs = dict[str, np.ndarray | None]


def each_selects(inputs: Inputs, counts: Sequence[int], width: int, rest: Sequence[int] = ()) -> Inputs:
    """The same inputs with a count, and indices and a rest if there are any, for each sequence."""
    rng = np.random.default_rng(width)
    found = inputs | {"count": ints(*counts)}
    if inputs["indices"] is not None:
        found["indices"] = np.stack([pick(rng, width, count, width) for count in counts])
    return found | ({"rest": ints(*rest)} if rest else {})


def assert_same_alone(run: Callable[[Inputs], Sequence[np.ndarray]], inputs: Inputs, apart: Sequence[str]) -> None:
    """All outputs of each row are those of a call with this row alone, to the bit.

    Args:
        apart: inputs of which each row has its own part.
    """
    together = run(inputs)
    for row in range(len(inputs["x"])):
        own = {name: inputs[name][row : row + 1] for name in apart if inputs.get(name) is not None}
        for found, wanted in zip(together, run(inputs | own), strict=True):
            np.testing.assert_array_equal(found[row : row + 1], wanted)
