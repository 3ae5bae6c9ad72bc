"""The mapped data file: pages that were read are given back, and read again when they are needed."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from shadowllm.errors import UserError
from shadowllm.runtime.ort import shared_weights
from shadowllm.runtime.ort.shared_weights import SharedWeights

SIZE = 1 << 25
STATUS = Path("/proc/self/status")


def mapped_bytes():
    return int(re.search(r"RssFile:\s+(\d+) kB", STATUS.read_text())[1]) * 1024


@pytest.mark.skipif(not STATUS.is_file(), reason="no /proc: not Linux")
def test_released_pages_leave_the_memory_and_keep_their_contents(tmp_path):
    path = tmp_path / "data"
    expected = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
    expected.tofile(path)
    weights = SharedWeights(path)
    tensor = ir.ExternalTensor(path, 0, SIZE, ir.DataType.UINT8, shape=ir.Shape([SIZE]), name="w")
    value = ir.Value(name="w", const_value=tensor)
    weights.give([ir.Graph([], [], nodes=[], initializers=[value])], ort.SessionOptions())
    (shared,) = weights._values
    before = mapped_bytes()
    assert np.array_equal(shared.numpy(), expected)
    assert mapped_bytes() - before > SIZE / 2
    weights.release()
    assert mapped_bytes() - before < SIZE / 2
    assert np.array_equal(shared.numpy(), expected)


def test_a_full_temporary_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "data").write_bytes(b"0")

    class Full(BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shared_weights, "TemporaryFile", Full)
    words = f"cannot use the temporary folder {tempfile.gettempdir()} .No space left on device.; set TMPDIR to a folder"
    with pytest.raises(UserError, match=words):
        SharedWeights(tmp_path / "data").give_computed({"a": lambda: np.arange(5)}, ort.SessionOptions())


def test_weights_of_one_name_are_computed_once(tmp_path):
    (tmp_path / "data").write_bytes(b"0")
    weights, computed = SharedWeights(tmp_path / "data"), []

    def compute(name):
        computed.append(name)
        return np.arange(5, dtype=np.float32)

    for names in (("a", "b"), ("b", "c"), ("a",)):
        options = ort.SessionOptions()
        weights.give_computed({name: lambda name=name: compute(name) for name in names}, options)
    assert computed == ["a", "b", "c"]
    for value in weights._values:
        np.testing.assert_array_equal(value.numpy(), np.arange(5, dtype=np.float32))
