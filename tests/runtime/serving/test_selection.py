"""Summaries of selections, and histograms, on cases counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.runtime.serving.counters import Histogram
from shadowllm.runtime.serving.selection import active_shares, summarise


def padded(rows, width):
    return np.array([row + [-1] * (width - len(row)) for row in rows], dtype=np.int32)


def test_groups_of_neurons(llama):
    spec, _ = llama
    neurons = [[0], list(range(88))]  # 64 groups of one or two neurons: the first group has neuron 0 alone
    found = summarise(spec, {"heads": padded([[1, 3], [0]], 4), "neurons": padded(neurons, 88)})
    assert found.heads == ["0101", "1000"]
    assert found.neurons == [1, 88]
    assert found.bins == ["f" + "0" * 63, "f" * 64]
    # Group 2 is neurons 2 and 3; one of two is in full, rounded up.
    assert summarise(spec, {"heads": padded([[0]], 4), "neurons": padded([[2]], 88)}).bins == ["00" + "8" + "0" * 61]


def test_shares():
    selection = {"heads": padded([[1], [0]], 4), "neurons": padded([[0, 1], [5]], 8)}
    assert active_shares(selection) == {"heads": 0.25, "neurons": pytest.approx(3 / 16)}
    assert active_shares(None) == {"heads": 1.0, "neurons": 1.0}


def test_a_histogram_counts_a_limit_in_its_bucket():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.add(value)
    assert (histogram.counts, histogram.total) == ([2, 1, 1], 12.0)
