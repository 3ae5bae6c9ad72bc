"""Errors of the native op for wrong inputs: their messages, and no crash."""

from __future__ import annotations

import pytest

from tests.plugins.native_model import REFUSED, built, ints, run, zeros

pytestmark = built


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((1, 4), r"SelectTopK: row 1 count 4 is outside 0\.\.3"),
        ((-1, 2), r"SelectTopK: row 0 count -1 is outside 0\.\.3"),
        ((1,), r"counts has shape \(1\), not \(2\)"),
    ],
)
def test_select_topk_refuses(counts, words):
    with pytest.raises(REFUSED, match=words):
        run("SelectTopK", {"scores": zeros(2, 7), "counts": ints(*counts)}, cap=3)


def test_count_beyond_the_scores():
    with pytest.raises(REFUSED, match=r"count 8 is outside 0\.\.7"):
        run("SelectTopK", {"scores": zeros(1, 7), "counts": ints(8)}, cap=9)
