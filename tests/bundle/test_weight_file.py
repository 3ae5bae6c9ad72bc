"""The data file: for a number that its type cannot hold, the error names the tensor. Read, it needs little memory."""

from __future__ import annotations

import mmap

import psutil
import pytest
import torch

from shadowllm.bundle.quantisation import WEIGHT_DTYPES
from shadowllm.bundle.quantised_tensors import QuantisedTensors
from shadowllm.bundle.weight_file import MappedTensors, WeightStore
from shadowllm.bundle.weight_layout import quantised_groups
from shadowllm.errors import UserError


def write(folder, tensor, dtype):
    store = WeightStore(folder / "data", iter([[("down", tuple(tensor.shape), dtype)]]))
    store.write({"down": tensor})


@pytest.mark.parametrize(
    ("dtype", "largest", "beyond"),
    [("float16", 65504.0, 65520.0), ("bfloat16", 3.38e38, 3.4e38), ("float32", 3.4e38, 1e39)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_number_fits_and_the_next_one_is_refused(tmp_path, dtype, largest, beyond, sign):
    tensor = torch.ones(5, 32, dtype=torch.float64)
    tensor[3, 7] = sign * largest
    write(tmp_path, tensor, dtype)
    tensor[3, 7] = sign * beyond
    with pytest.raises(UserError, match=rf"tensor down holds the number .*{dtype} ends at .*bf16"):
        write(tmp_path, tensor, dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(tmp_path, value):
    tensor = torch.ones(5, 32)
    tensor[4, 0] = value
    with pytest.raises(UserError, match="tensor down holds NaN or infinity"):
        write(tmp_path, tensor, "float16")


@pytest.mark.parametrize("kind", WEIGHT_DTYPES)
def test_scales_must_be_numbers(tmp_path, kind):
    tensor, q = torch.ones(5, 32), WEIGHT_DTYPES[kind]
    tensor[4, 0] = float("inf")
    store = WeightStore(tmp_path / "data", quantised_groups({"down": (5, 32)}, q))
    with pytest.raises(UserError, match=r"tensor down\.scales holds NaN or infinity"):
        store.write(QuantisedTensors({"down": tensor}, q))


def mapped(folder, count=32, elements=1 << 20):
    """A file of ``count`` tensors of ones, twos, ..., and how much memory was resident before it was mapped."""
    store = WeightStore(folder / "data", iter([[(str(i), (elements,), "float32")] for i in range(count)]))
    store.write({str(i): torch.full((elements,), float(i)) for i in range(count)})
    return MappedTensors(store), psutil.Process().memory_info().rss


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system keeps the pages of mapped files")
def test_pages_of_a_mapped_file_are_given_back(monkeypatch, tmp_path):
    monkeypatch.setattr(MappedTensors, "KEPT", 1 << 24)
    tensors, before = mapped(tmp_path)
    assert [float(tensors[name].mean()) for name in tensors] == list(range(32))
    assert psutil.Process().memory_info().rss - before < 1 << 26
    kept = dict(tensors)
    assert [float(tensor.mean()) for tensor in kept.values()] == list(range(32))
    assert psutil.Process().memory_info().rss - before > 1 << 26


def test_a_tensor_is_valid_after_its_pages_were_given_back(monkeypatch, tmp_path):
    monkeypatch.setattr(MappedTensors, "KEPT", 0)
    tensors, _ = mapped(tmp_path, count=4, elements=3000)
    first = tensors["1"]
    assert float(tensors["2"].sum()) == 6000
    assert torch.equal(first, torch.ones(3000))
    assert (len(tensors), "4" in tensors, tensors.get("4")) == (4, False, None)
