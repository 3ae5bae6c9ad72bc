"""The load check of the server, on a tiny model: every text is that of the request alone, and nothing is lost."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("openai", reason="the official client is not installed (pip install openai)")
pytest.importorskip("fastapi", reason="the server needs packages (pip install '.[serve]')")


@pytest.mark.slow
def test_mixed_requests_of_many_clients(bundle, tmp_path, capsys):
    from shadowllm.benchmarks.serving import main

    folder, file = bundle("llama-blocks", kind="quantized-shadow", rest="shadow"), tmp_path / "serving.json"
    options = ["--requests", "100", "--clients", "16", "--slots", "4", "--words", "6", "--most-tokens", "24"]
    assert main([str(folder), *options, "--threads", "1", "--prepack", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert (found["lost"], found["wrong"], found["slots_taken_afterwards"]) == (0, [], 0)
    assert found["outcomes"]["error"] == 0
    assert found["outcomes"]["cancelled"] > 0
    assert found["outcomes"]["stop"] + found["outcomes"]["length"] >= found["requests"] - found["cancelled_by_clients"]
    assert len(found["rss_mb"]) == 20
    assert "lost 0, wrong 0, slots taken 0" in capsys.readouterr().out


def test_a_difference_is_noticed(bundle):
    from shadowllm.benchmarks.serving import Answer, compare, plan_requests

    folder = bundle("llama-blocks", kind="quantized-shadow", rest="shadow")
    plans = plan_requests(8, words=3, most_tokens=4)
    answers = {index: Answer("not this", 0.0, 0.0) for index in range(len(plans))}
    assert compare(folder, plans, answers, threads=1, prepack=False) == list(range(8))
