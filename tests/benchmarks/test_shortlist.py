"""The benchmark of the shortlist, on a tiny bundle."""

from __future__ import annotations

import pytest

from shadowllm.benchmarks.shortlist import measure
from shadowllm.errors import UserError


def test_more_rows_agree_more_often_and_the_certificate_covers_them(bundle, tmp_path):
    text = tmp_path / "text"
    text.write_text("the sea and the shadow of a model " * 40)
    rows = measure(bundle("llama-blocks", kind="quantized-shadow", rest="shadow"), [text], tokens=64)
    assert [row["positions"] for row in rows] == [64] * 3
    agreements = [row["copy_alone"] for row in rows[:1]] + [row["argmax_agreement"] for row in rows]
    assert agreements == sorted(agreements)
    assert agreements[-1] == 1.0  # all rows of the table
    for row in rows:
        assert row["recomputed_bundle"]["mean"] >= row["shortlist"]
        assert row["recomputed_calibrated"]["p99"] >= row["shortlist"]
        assert row["session"]["argmax_agreement"] == 1.0
        assert row["session"]["mean"] >= row["shortlist"]


def test_a_bundle_without_a_copy_is_refused(bundle):
    with pytest.raises(UserError, match="no low-bit copy of the output table"):
        measure(bundle(), [], tokens=64)
