"""The contenders of the frontier and its report; the measurement itself is that of `bench`."""

from __future__ import annotations

import pytest

from shadowllm.benchmarks.frontier import DENSE, DIAL, contenders_of, measure, plot, print_rows


@pytest.fixture
def bundles(bundle):
    mixed = {"kind": "quantized-shadow", "rest": "shadow"}
    return {
        "float32": bundle("llama-blocks", **mixed),
        "int8": bundle("llama-blocks", weight_dtype="int8", **mixed),
        "int4": bundle("llama-blocks", weight_dtype="int4"),
    }


def test_contenders(bundles):
    found = contenders_of(bundles)
    dense = [name for name, (_, backend, _) in found.items() if backend == "ort-dense"]
    assert dense == [DENSE, "int8 dense", "int4 dense"]
    assert len(found) == len(dense) + 2 * (len(DIAL) + 1)


@pytest.mark.slow
def test_rows_and_figure(bundles, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text"
    text.write_text("the sea and the shadow of a model " * 20)
    sizes = {"prompt_len": 4, "new_tokens": 4, "runs": 1, "windows": 1, "seqlen": 16}
    rows = measure(bundles, [text], **sizes)
    assert all(row["perplexity"] > 1 and row["itl_ms"] > 0 for row in rows)
    assert rows[0]["speedup"]["median"] == 1
    print_rows(rows)
    assert "int8 10%/100%/1024" in capsys.readouterr().out
    plot(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
