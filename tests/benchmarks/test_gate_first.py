"""The benchmark of gate-first decoding, on a tiny bundle."""

from __future__ import annotations

import json

from shadowllm.benchmarks import gate_first


def test_the_figures_of_a_relu_llama(bundle, tmp_path, capsys):
    sizes = ["--prompts", "2", "--prompt-len", "8", "--new-tokens", "4", "--runs", "1", "--threads", "1"]
    folder = bundle("llama-relu", kind="relu")
    assert gate_first.main([str(folder), *sizes, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["silence"]) == 3
    assert all(0.2 < share < 0.8 for share in found["silence"])
    assert found["logits"]["same_tokens"] == found["logits"]["tokens"] == 2 * 4
    assert 0 < found["logits"]["largest_difference"] < 1e-4 * found["logits"]["largest_logit"]
    assert [result["name"] for result in found["results"]] == ["sparse", "ort-dense"]
    assert "8 of 8 tokens are the same" in capsys.readouterr().out


def test_logits_that_differ_fail(bundle, monkeypatch, capsys):
    wrong = {"prompts": 1, "tokens": 1, "same_tokens": 1, "largest_difference": 0.1, "largest_logit": 9.0}
    monkeypatch.setattr(gate_first, "compare_logits", lambda *args, **sizes: wrong)
    sizes = ["--prompt-len", "8", "--new-tokens", "4", "--runs", "1", "--threads", "1"]
    assert gate_first.main([str(bundle("llama-relu", kind="relu")), *sizes]) == 1
    assert "not those of the dense model" in capsys.readouterr().err


def test_other_selectors_are_refused(bundle, capsys):
    assert gate_first.main([str(bundle("llama-relu"))]) == 1
    assert "--selector relu" in capsys.readouterr().err
