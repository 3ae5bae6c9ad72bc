"""Errors of the native op for wrong inputs: their messages, and no crash."""

from __future__ import annotations

import numpy as np
import pytest

from tests.plugins.native_model import REFUSED, built, ints, run_all, scalar, zeros
from tests.plugins.ops.shortlist_logits.table_inputs import table_inputs, with_counts

pytestmark = built


def nothing(*shape):
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shortlist": scalar(-1)}, r"ShortlistLogits: shortlist -1 is outside 0\.\."),
        ({"shortlist": ints(1, 2)}, "shortlist has 2 elements, not 1"),
        ({"certify": ints()}, "certify has 0 elements, not 1"),
        ({"x": zeros(1, 1, 41)}, "x has 3 dimensions, not 2"),
        ({"x": zeros(1, 40)}, r"table has shape \(7, 41\), not \(7, 40\)"),
        ({"table": zeros(7, 41).astype(np.int32)}, "table is of none of the types"),
        ({"errors": zeros(8)}, r"errors has shape \(8\), not \(7\)"),
        ({"weighting": zeros(42)}, r"weighting has shape \(42\), not \(41\)"),
        ({"copy": nothing(7, 32)}, "copy has shape \\(7, 32\\), not \\(rows, blocks, bytes\\)"),
        ({"copy": nothing(6, 1, 32)}, r"copy has shape \(6, 1, 32\), not \(7, 1, 32\)"),
        ({"copy": nothing(7, 1, 8)}, "copy has shape \\(7, 1, 8\\), not \\(rows, blocks, bytes\\)"),
        ({"copy": nothing(7, 2, 32), "scales": zeros(7, 2)}, "copy has shape \\(7, 2, 32\\), not \\(7, 1, 32\\)"),
        ({"copy": nothing(7, 1, 0)}, "copy has shape \\(7, 1, 0\\), not \\(rows, blocks, bytes\\)"),
        ({"scales": zeros(7, 2)}, r"scales has shape \(7, 2\), not \(7, 1\)"),
    ],
)
def test_shortlist_logits_refuses(changes, words):
    inputs = with_counts(table_inputs("normal", 7, 1, 41), 3, certify=False)
    with pytest.raises(REFUSED, match=words):
        run_all("ShortlistLogits", inputs | changes)
