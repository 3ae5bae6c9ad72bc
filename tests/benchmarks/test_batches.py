"""The times of batches; the measurement is that of `OrtSlots`."""

from __future__ import annotations

from shadowllm.benchmarks.batches import SIZES, measure, print_rows
from shadowllm.models.sparsity import Budget


def test_a_row_for_each_size(bundle, capsys):
    folder = bundle("llama-blocks", kind="quantized-shadow", rest="shadow")
    rows = measure(folder, Budget(neurons=0.3, shortlist=8), steps=1, threads=1, prompt_len=5, runs=2)
    assert [row["sequences"] for row in rows] == list(SIZES)
    for row in rows:
        for name in ("sparse", "dense"):
            runs = row[f"{name}_runs_ms"]
            assert len(runs) == 2
            assert 0 < min(runs) <= row[f"{name}_ms"] <= max(runs)
    print_rows(rows)
    assert capsys.readouterr().out.count("1.00x tokens per second") == 2
