"""The functions that all NumPy references share."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.plugins.reference import active


@pytest.mark.parametrize(
    ("indices", "count", "words"), [([0, 9], 2, "index 9"), ([-1, 0], 1, "index -1"), ([0], 2, "count 2")]
)
def test_out_of_range_is_an_error(indices, count, words):
    with pytest.raises(IndexError, match=words):
        active(np.array(indices), count, 9)
