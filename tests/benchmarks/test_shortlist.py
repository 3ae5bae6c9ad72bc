"""The benchmark of the shortlist, on a tiny bundle."""

from __future__ import annotations

import json

import pytest

from shadowllm.benchmarks import shortlist
from shadowllm.benchmarks.shortlist import main, measure
from shadowllm.bundle.manifest import read_manifest
from shadowllm.errors import UserError
from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder


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


def test_the_session_decodes_the_half_that_is_evaluated(bundle, tmp_path, monkeypatch):
    """Also if a half is no whole number of windows."""
    folder, text, report = (
        bundle("llama-blocks", kind="quantized-shadow", rest="shadow"),
        tmp_path / "t",
        tmp_path / "j",
    )
    text.write_text("the sea and the shadow of a model " * 40)
    decoded = []

    def with_session(_, windows, lengths):
        decoded.extend(windows)
        return {length: {} for length in lengths}

    monkeypatch.setattr(shortlist, "with_session", with_session)
    assert main([str(folder), "--text", str(text), "--tokens", "70", "--json", str(report)]) == 0
    manifest = read_manifest(folder)
    ids = plain_encoder(load_tokenizer(folder, manifest), manifest)(text.read_text())
    assert [token for window in decoded for token in window] == list(ids[70:140])
    found = json.loads(report.read_text())
    assert [row["positions"] for row in found["results"]] == [70] * 3
    assert found["environment"]["threads"]


def test_a_bundle_without_a_copy_is_refused(bundle):
    with pytest.raises(UserError, match="no low-bit copy of the output table"):
        measure(bundle(), [], tokens=64)
