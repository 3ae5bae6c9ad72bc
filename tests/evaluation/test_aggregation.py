"""How the harness aggregates raw times."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.evaluation.speed.harness import Generation, speedup, summarise


def generation(itl_ms, ttft=10.0, parts=None, rss=100.0):
    return Generation(ttft, itl_ms, list(range(len(itl_ms) + 1)), parts or {}, rss)


def test_summary_of_two_runs():
    summary = summarise(
        [generation([2.0, 4.0], 10, {"body": 3.0}, 100), generation([4.0, 12.0], 30, {"body": 5.0}, 90)]
    )
    assert summary.ttft_ms == {"min": 10, "median": 20, "max": 30}
    assert summary.itl_ms == pytest.approx(
        {"min": 2, "median": 4, "mean": 5.5, "max": 12, "p50": 4, "p90": 9.6, "p99": 11.76}
    )
    assert summary.tokens_per_second == pytest.approx((2 / 6e-3 + 2 / 16e-3) / 2)
    assert summary.tokens_per_second_spread == pytest.approx((125.0, 2 / 6e-3))
    assert summary.parts_ms == {"body": 4.0}
    assert summary.peak_rss_mb == 100


def test_other_percentiles():
    steps = list(np.arange(101.0))
    assert summarise([generation(steps)], [95, 99.5]).itl_ms["p95"] == 95
    assert summarise([generation(steps)], [95, 99.5]).itl_ms["p99.5"] == 99.5


def test_speedup_pairs_runs_in_order():
    # Per run: 3x, 2x, 1x. Pooled medians would give another result.
    slow = [generation([6.0, 6.0]), generation([8.0, 8.0]), generation([50.0, 50.0])]
    fast = [generation([2.0, 2.0]), generation([4.0, 4.0]), generation([50.0, 50.0])]
    assert speedup(slow, fast) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_speedup_refuses_unpaired_runs():
    with pytest.raises(ValueError):
        speedup([generation([1.0])], [generation([1.0]), generation([1.0])])
