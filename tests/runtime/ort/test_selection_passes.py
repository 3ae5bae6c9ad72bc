"""The graph passes: fewer nodes, the same results, and an error for a graph of another form."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx_ir.passes import PreconditionError

from shadowllm.bundle.manifest import read_manifest
from shadowllm.bundle.op_domain import DOMAIN
from shadowllm.bundle.selection_names import SELECTION
from shadowllm.runtime.ort.flatten_hidden_states import FlattenHiddenStates
from shadowllm.runtime.ort.own_selections import OwnSelections
from shadowllm.runtime.ort.split_selection import SplitSelection


@pytest.fixture
def body(bundle):
    return ir.load(bundle() / "body.onnx")


def test_every_row_of_the_selection_is_an_input(bundle, body):
    whole = {value.name: value.shape for value in body.graph.inputs}
    SplitSelection()(body)
    spec = read_manifest(bundle()).spec
    rows = {value.name: value.shape for value in body.graph.inputs if value.name not in whole}
    assert set(rows) == {f"{name}.{row}" for name in SELECTION for row in range(spec.n_layers - 1)}
    assert all(shape == whole[name.split(".")[0]][1:] for name, shape in rows.items())
    assert not set(SELECTION) & {value.name for value in body.graph.inputs}


def test_every_sequence_gets_a_selection(bundle):
    shapes = {}
    for folder, piece in (
        (bundle(), "predictor"),
        (bundle(), "body"),
        (bundle(kind="quantized-shadow", rest="shadow"), "body"),
    ):
        model = ir.load(folder / f"{piece}.onnx")
        OwnSelections()(model)
        values = (*model.graph.inputs, *model.graph.outputs)
        shapes |= {f"{piece} {value.name}": [str(dim) for dim in value.shape] for value in values}
    for piece in ("predictor", "body"):
        assert shapes[f"{piece} neuron_counts"] == ["2", "batch"]
        assert shapes[f"{piece} neuron_indices"] == ["2", "batch", "88"]
    assert shapes["body head_indices.1"] == ["batch", "4"]
    assert shapes["body rest"] == shapes["body shortlist"] == shapes["body certify"] == ["batch"]
    assert shapes["body recomputed"] == ["rows"]
    assert shapes["body hidden"] == ["batch", "seqlen", "48"]


def test_no_reshape_stands_around_a_sparse_op(body):
    FlattenHiddenStates()(body)
    ops = [node for node in body.graph if node.domain == DOMAIN]
    assert len(ops) == 4
    around = {node.inputs[0].producer().op_type for node in ops}
    around |= {user.op_type for node in ops for user, _ in node.outputs[0].uses()}
    assert around == {"RMSNormalization", "Add"}


def test_other_graphs_are_refused(body):
    gather = next(user for value in body.graph.inputs if value.name == "head_counts" for user, _ in value.uses())
    gather.op_type = "Identity"
    with pytest.raises(PreconditionError, match="head_counts is not read row by row"):
        SplitSelection()(body)
    FlattenHiddenStates()(body)
    with pytest.raises(PreconditionError, match="does not stand between"):
        FlattenHiddenStates()(body)
