"""Benchmark scripts: a user's mistake gives one line and exit code 1, and a bug keeps its traceback."""

from __future__ import annotations

import pytest

from shadowllm.benchmarks import criteria, noisy_model, selection_costs, serving, shapes, small_model
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


@pytest.mark.parametrize("module", [serving, shapes, selection_costs])
def test_results_that_could_not_be_written_are_refused_at_once(module, tmp_path, capsys):
    out = tmp_path / "missing" / "results.json"
    assert module.main(["--json", str(out), *(["bundle"] if module is not shapes else [])]) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot write {out}: there is no folder")
