"""Every example runs unchanged, on a tiny model and with less text."""

from __future__ import annotations

import runpy
import sys
from functools import partial
from pathlib import Path

import pytest

from shadowllm.bundle.manifest import read_manifest
from shadowllm.config import Calibration

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
SAYS = {
    "compare_budgets": ["dense", "static", "oracle", "30%", "50%", "70%"],
    "export_and_generate": ["quantized-shadow predictor, float32"],
    "transformers_generate": ["100% of the neurons:", "50% of the neurons:"],
    "stream": ["100% of the neurons:", "50% of the neurons:"],
}


@pytest.mark.usefixtures("quick_exports")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shadowllm.pipeline.Calibration", partial(Calibration, tokens=512, seqlen=32))
    monkeypatch.setattr(sys, "argv", [str(path), str(checkpoint("llama-gqa")), str(tmp_path / "out")])
    for _ in range(2):  # a second run finds the bundle of the first
        runpy.run_path(str(path), run_name="__main__")
        said = capsys.readouterr().out
        assert [words for words in SAYS[path.stem] if words not in said] == []
    assert read_manifest(tmp_path / "out").validation


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_mistakes_are_one_line(path, tmp_path, monkeypatch):
    for arguments, words in (([], "MODEL OUT"), (["no model", str(tmp_path / "out")], "error: no such model")):
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        with pytest.raises(SystemExit, match=words) as ended:
            runpy.run_path(str(path), run_name="__main__")
        assert "\n" not in str(ended.value)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_use_the_facade_alone(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 30
    assert not [line for line in lines if "import" in line and "shadowllm." in line]
