"""Benchmark scripts: a user's mistake gives one line and exit code 1, and a bug keeps its traceback."""

from __future__ import annotations

import pytest

from shadowllm.benchmarks import criteria, noisy_model, small_model
from shadowllm.benchmarks.script_parser import script


def test_done():
    assert script(lambda: None)() == 0


def test_a_bug_is_not_dressed_up():
    with pytest.raises(ZeroDivisionError):
        script(lambda: 1 / 0)()


@pytest.mark.parametrize(("module", "out"), [(criteria, []), (noisy_model, ["out"]), (small_model, ["out"])])
def test_a_model_that_is_not_there(module, out, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["program", str(tmp_path / "missing"), *(str(tmp_path / name) for name in out)])
    assert module.main() == 1
    assert capsys.readouterr().err.startswith("error: no such model")
    assert not list(tmp_path.iterdir())
