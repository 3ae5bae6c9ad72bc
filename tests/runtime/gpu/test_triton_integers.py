"""Compares the Triton session with the reference where the weights of a bundle are nested integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed (pip install 'shadowllm[triton]')")

from shadowllm.bundle.weight_names import is_part, is_quantised
from shadowllm.errors import UserError
from shadowllm.runtime import Budget, open_session
from shadowllm.runtime.gpu.triton_session import TritonSession
from shadowllm.runtime.torch_session import TorchSession
from tests.runtime.gpu.reference import reference
from tests.runtime.gpu.test_triton_session import FORCED, PROMPTS, TOLERANCE, distance, steps

pytestmark = pytest.mark.slow

BUNDLES = [
    {"weight_dtype": "int8", "variant": "llama-mqa-tied", "kind": "quantized-shadow"},
    {"weight_dtype": "int6", "variant": "qwen3", "kind": "shadow"},  # does not select heads
]


@pytest.mark.parametrize("options", BUNDLES, ids=str)
def test_a_ragged_batch_follows_the_reference(bundle, options):
    """The reference has the values of the same integers: o and down of dense steps are rounded in another way."""
    folder, found = bundle(**options, rest="shadow"), []
    with open_session(folder, "triton") as ours, reference(folder) as theirs:
        if not ours.spec.selects_heads:  # then attention is that of dense steps
            theirs._weights = {name: of_dense_step(theirs, name) for name in theirs._weights}
        for session in (ours, theirs):
            session.set_budget(Budget())
            logits = [*steps(session, PROMPTS, FORCED[:1])]
            session.set_budget(Budget(neurons=(0.25, 0.6), heads=0.5, shortlist=5))
            logits.append(session.decode(FORCED[1]).copy())
            session.rewind(np.array([4, 3]))
            found.append([*logits, session.verify(np.array([[3, 90], [7, 5]]))])
        assert_integers_once(ours)
        for name, tensor in theirs._predictor.tensors.items():  # rounded, if it is a network's
            assert torch.equal(ours._predictor.tensors[name].cpu(), tensor)
    for one, other in zip(*found, strict=True):
        assert distance(one, other) < TOLERANCE


def of_dense_step(session: TorchSession, name: str) -> Tensor:
    return (session._decoder.weights if "o_proj" in name else session._weights)[name]


def assert_integers_once(session: TritonSession) -> None:
    """No matrix is on the device as floats, and the ops read the copies of the stacked matrices."""
    decoder, row = session._decoder, session._layers.layers[0]
    assert not [name for name in decoder.weights if is_part(name) or is_quantised(name)]
    inputs = decoder._copies(row, "neurons") | decoder._matrices(f"layers.{row}", "up")
    whole = decoder._nested[f"layers.{row}.gateup_proj.weight"]
    for one, part in ((inputs["c_up"], whole.copy), (inputs["cs_up"], whole.scales), (inputs["w_up"], whole.residual)):
        assert one.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()


def test_dense_follows_the_reference(bundle):
    folder = bundle("opt", kind="layerwise", weight_dtype="int6", rest="shadow")
    with open_session(folder, "triton-dense") as ours, open_session(folder, "torch-dense") as theirs:
        assert distance(steps(ours, PROMPTS, FORCED[:1]), steps(theirs, PROMPTS, FORCED[:1])) < TOLERANCE
        assert "layers.1.down_proj.weight" not in ours._decoder._nested  # only sparse steps read it


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_integers_in_one_part_are_refused(bundle, weight_dtype):
    folder = bundle("llama-blocks", weight_dtype=weight_dtype)
    for backend in ("triton", "triton-dense"):
        with pytest.raises(UserError, match=f"does not run {weight_dtype} weights without a low-bit copy.*--rest shad"):
            open_session(folder, backend)
