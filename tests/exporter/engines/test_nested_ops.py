"""Engines of nested integers: the parser's copy computes what the graph of the bundle computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

pytest.importorskip("triton")

from shadowllm.bundle.manifest import read_manifest
from shadowllm.errors import UserError
from shadowllm.exporter.engines.graph import describe_onnx, prepare
from shadowllm.runtime.ort.graph import ExactIntegerInputs
from tests.exporter.engines.interpreted_graph import interpreted
from tests.plugins import kernel_programs

pytestmark = pytest.mark.slow

CAPACITY = 16
# Hidden sizes, heads and MLPs that are no multiples of a block, an odd vocabulary, and both residuals.
BUNDLES = {
    "int8-quantized-shadow": {"variant": "llama-head-dim", "kind": "quantized-shadow", "weight_dtype": "int8"},
    "int6-layerwise": {"variant": "opt", "kind": "layerwise", "weight_dtype": "int6"},
    "int6-shadow-tied": {"variant": "llama-mqa-tied", "kind": "shadow", "weight_dtype": "int6"},
}


def original(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of an ONNX file on ONNX Runtime, whose products with integers read float32 inputs."""
    model = ir.load(path)
    ExactIntegerInputs(native=False)(model)
    proto = ir.to_proto(model)
    onnx.load_external_data_for_model(proto, str(path.parent))
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def feeds_of(path: Path, batch: int, seqlen: int) -> dict[str, np.ndarray]:
    """Random inputs of a graph: a prompt after some tokens that are in the cache."""
    rng, made = np.random.default_rng(0), {}
    sizes = {"batch": batch, "seqlen": seqlen, "kept": 1, "capacity": CAPACITY}
    places = np.array([[3], [1]])[:batch] + np.arange(seqlen)
    known = {"input_ids": rng.integers(97, size=(batch, seqlen)), "position_ids": places}
    known |= {"logits_to_keep": np.full((batch, 1), seqlen - 1)}
    known |= {"head_counts": [3, 1], "neuron_counts": [40, 17], "rest": 1, "shortlist": 5, "certify": 1}
    for tensor in describe_onnx(path).inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        if tensor.dtype == "float32":
            made[tensor.name] = rng.normal(size=shape).astype(np.float32)
        elif "indices" in tensor.name:
            chosen = np.sort(rng.permuted(np.tile(np.arange(shape[1]), (shape[0], 1)), axis=1)[:, : shape[1] // 2])
            made[tensor.name] = np.full(shape, -1, dtype=np.int32)
            made[tensor.name][:, : chosen.shape[1]] = chosen
            known[tensor.name.replace("indices", "counts")] = np.full(shape[0], chosen.shape[1])
        else:
            made[tensor.name] = np.array(known[tensor.name], dtype=tensor.dtype)
    return made


@pytest.mark.parametrize(("batch", "seqlen"), [(1, 1), (2, 5)])
@pytest.mark.parametrize("options", BUNDLES.values(), ids=BUNDLES)
def test_the_copy_computes_what_the_graph_does(bundle, options, batch, seqlen):
    folder = bundle(**options, rest="shadow")
    for piece in read_manifest(folder).sparse_pieces:
        path = folder / f"{piece}.onnx"
        feeds = feeds_of(path, batch, seqlen)
        found = interpreted(path, feeds, CAPACITY)
        for name, wanted in original(path, feeds).items():
            assert found[name].dtype == wanted.dtype
            np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-4, err_msg=f"{piece}: {name}")


@pytest.mark.parametrize("piece", ["stem", "body"])
def test_integers_in_one_part_are_refused_by_name(bundle, piece):
    path = bundle("llama-blocks", weight_dtype="int8") / f"{piece}.onnx"
    with pytest.raises(UserError, match=f"TensorRT has no .*, which the graph {piece} has; export without"):
        prepare(path, {}, lambda *_: kernel_programs.program())
