"""The benchmark of lossless decoding, on a tiny bundle."""

from __future__ import annotations

import json

import pytest

from shadowllm.benchmarks.lossless import check_text, costs, costs_of_shape, main, measure_speed, print_results
from shadowllm.bundle.manifest import read_manifest
from shadowllm.evaluation.draft_tuning import measure_drafts, with_fastest


@pytest.fixture
def folder(bundle):
    return bundle("llama-blocks", kind="quantized-shadow", rest="shadow")


def test_text_and_command(folder, tmp_path, capsys):
    found = check_text(folder, prompts=3, new_tokens=8, prompt_len=12, threads=1, batches=(1, 2))
    assert (found["tokens"], found["ties"], found["wrong"]) == (2 * 3 * 8, [], [])
    # The command's prompts have 64 tokens, which is all that this model has.
    assert main([str(folder), "--parts", "text", "--threads", "1", "--prompts", "1", "--new-tokens", "9"]) == 1
    assert "exceed the model" in capsys.readouterr().err


@pytest.mark.slow
def test_speed_and_costs(folder, capsys):
    measured = measure_drafts(folder, threads=1, tokens=256)
    tuned = with_fastest(read_manifest(folder), measured)
    speed = measure_speed(folder, tuned, prompt_len=12, new_tokens=8, runs=1, threads=1)
    assert set(speed) == {"text", "random", "weak"}
    for rows in speed.values():
        assert list(rows) == ["dense", "dense, native ops", "lossless", "lossless, packed weights"]
        assert rows["dense"]["speedup"]["median"] == 1
        assert rows["lossless"]["drafts"]
    assert all(speed[case]["lossless"]["same_tokens"] for case in ("text", "weak"))
    assert speed["random"]["lossless"]["same_tokens"] is None
    assert all(0 <= rows["lossless"]["acceptance"] <= 1 for rows in speed.values() if tuned.tuned_drafts.length)
    found = costs(measured)
    assert all(row["speedup_at"][0.7] <= row["speedup_at"][0.9] for row in found)
    print_results({"speed": speed, "costs": found})
    assert "lossless, packed weights" in capsys.readouterr().out
    json.dumps([speed, found])


def test_costs_of_a_shape(capsys):
    rows = costs_of_shape("tiny-llama", None, threads=1)
    assert all(row["draft_ms"] > 0 and set(row["speedup_at"]) == {0.7, 0.8, 0.9} for row in rows)
    with pytest.raises(SystemExit):
        main(["--parts", "costs"])
    assert "give a bundle or --shape" in capsys.readouterr().err
