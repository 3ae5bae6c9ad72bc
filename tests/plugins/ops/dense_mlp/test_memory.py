"""Memory of the native op. Not among `test_native`, because sanitizers keep freed memory."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from shadowllm.malloc import return_freed_memory
from tests.plugins.native_model import built, make_session
from tests.plugins.ops.dense_mlp.native_inputs import WEIGHTS, dense_mlp_inputs

pytestmark = built
STATUS = Path("/proc/self/status")


@pytest.mark.skipif(not STATUS.is_file(), reason="no /proc: not Linux")
def test_the_memory_of_a_long_prompt_is_given_back():
    def own_bytes():
        return int(re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())[1]) * 1024

    tokens, neurons = 3000, 5000
    inputs = dense_mlp_inputs((1, 64, neurons))
    session = make_session("DenseMLP", inputs, WEIGHTS, activation="relu", gated=1)
    return_freed_memory()  # other tests of this process may have told glibc to keep it
    before = own_bytes()
    session.run(None, {"x": np.ones((tokens, 64), np.float32)})
    return_freed_memory()
    assert own_bytes() - before < tokens * neurons * 4
