"""The data file: for a number that its type cannot hold, the error names the tensor."""

from __future__ import annotations

import pytest
import torch

from shadowllm.bundle.quantisation import WEIGHT_DTYPES
from shadowllm.bundle.quantised_tensors import QuantisedTensors
from shadowllm.bundle.weight_file import WeightStore
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
