"""Joining the graphs of a step."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from shadowllm.models.sparsity import Budget
from shadowllm.plugins.function_body import OPSET
from shadowllm.runtime.ort.join_graphs import HIDDEN, join
from shadowllm.runtime.ort.session import OrtSession


def sum_graph(inputs, output, constant=1.0, constant_name="one"):
    """``output`` = the sum of the inputs and a constant. All its graphs use the same names for nodes and values."""
    values = [ir.val(name, dtype=ir.DataType.FLOAT, shape=[2]) for name in inputs]
    tensor = ir.tensor(np.full(2, constant, np.float32), name=constant_name)
    one = ir.val(constant_name, const_value=tensor)
    add = ir.node("Sum", [*values, one], name="sum", outputs=[ir.val("total")])
    end = ir.node(
        "Identity", [add.outputs[0]], name="end", outputs=[ir.val(output, dtype=ir.DataType.FLOAT, shape=[2])]
    )
    graph = ir.Graph(values, end.outputs, nodes=[add, end], initializers=[one], opset_imports={"": OPSET})
    return ir.Model(graph, ir_version=11)


def run(model, feeds):
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return [value.name for value in session.get_inputs()], session.run(None, feeds)


def test_joined_graphs_compute_what_both_compute():
    joined = join(sum_graph(["x", "both"], HIDDEN), sum_graph([HIDDEN, "both", "z"], "y"))
    x, both, z = np.float32([1, 2]), np.float32([10, 20]), np.float32([100, 200])
    names, (y,) = run(joined, {"x": x, "both": both, "z": z})
    assert names == ["x", "both", "z"]
    np.testing.assert_array_equal(y, x + 2 * both + z + 2)


def test_initializers_of_one_name_must_be_the_same():
    with pytest.raises(ValueError, match="have an initializer one, and these differ"):
        join(sum_graph(["x"], HIDDEN), sum_graph([HIDDEN], "y", constant=2.0))
    _, (y,) = run(join(sum_graph(["x"], HIDDEN), sum_graph([HIDDEN], "y", 2.0, "two")), {"x": np.float32([1, 2])})
    np.testing.assert_array_equal(y, np.float32([4, 5]))


@pytest.mark.parametrize(("written", "read"), [("other", HIDDEN), (HIDDEN, "other")])
def test_graphs_that_do_not_follow_each_other(written, read):
    with pytest.raises(ValueError, match="hidden"):
        join(sum_graph(["x"], written), sum_graph([read], "y"))


@pytest.mark.parametrize("native", [True, False])
def test_a_step_without_a_predictor_is_one_graph(bundle, native):
    """The bundle of a predictor of its own graph runs the same layers in two or three."""
    with OrtSession(bundle("llama-gqa", kind="quantized-shadow"), "sparse", profile=True, native=native) as session:
        assert session.graphs == ("stem", "body")
        session.prefill([[1, 2, 3]])
        session.decode(np.array([4]))
        assert set(session.step_seconds) == {"stem+body"}
        session.set_budget(Budget(neurons=0.5))
        session.decode(np.array([5]))
        assert set(session.step_seconds) == {"stem+body"}
