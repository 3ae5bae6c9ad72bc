"""Steps ahead of their results."""

from __future__ import annotations

from shadowllm.runtime.ahead import run_ahead


def test_steps_run_ahead_of_their_results():
    log = []
    found = run_ahead(3, lambda i: log.append(f"start {i}"), lambda i: log.append(f"end {i}") or i, ahead=2)
    assert list(found) == [0, 1, 2]
    assert log == ["start 0", "start 1", "start 2", "end 0", "end 1", "end 2"]
    assert list(run_ahead(1, lambda i: None, lambda i: i, ahead=5)) == [0]
