"""Gives the dense graph of a step the output table of a sparse one.

This table can be read in part: a budget with a shortlist, but with all heads and neurons, costs what the dense layers
cost. And it has 16-bit rows, which the dense graph would widen.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shadowllm.plugins.ops.shortlist_logits.schema import SHORTLIST_LOGITS
from shadowllm.runtime.ort.join_graphs import HIDDEN, join

LOGITS = "logits"
LINEAR = ("MatMulNBits", "Gemm")
# The inputs that the linear layer of the dense graph has too: the copy, if integers are nested, or the table itself.
COMMON = [[port.name for port in SHORTLIST_LOGITS.inputs].index(name) for name in ("copy", "table")]


def shorten(dense: ir.Model, body: ir.Model) -> ir.Model:
    """Move the shortlist of a sparse graph to the end of the dense one.

    Args:
        dense, body: as the exporter writes them, of nested integers or floats. Neither can be used afterwards.

    Returns:
        The dense graph with the inputs and outputs of the shortlist.

    Raises:
        ValueError: the body has no shortlist, or the dense graph has no linear layer with the same table.
    """
    shortlist = next((node for node in body.graph if node.op_type == SHORTLIST_LOGITS.name), None)
    if shortlist is None:
        raise ValueError("the body has no shortlist")
    inputs = (shortlist.inputs[place] for place in COMMON)
    _end_before_table(dense, [str(value.name) for value in inputs if value is not None])
    _keep_shortlist(body, shortlist)
    return join(dense, body)


def _end_before_table(dense: ir.Model, names: Sequence[str]) -> None:
    """Let the graph write the input of its output table instead of the logits."""
    graph = dense.graph
    users = [use.node for name in names if name in graph.initializers for use in graph.initializers[name].uses()]
    hidden = next((node.inputs[0] for node in users if node.op_type in LINEAR), None)
    if hidden is None:
        raise ValueError(f"the dense graph has no linear layer that reads {' or '.join(names)}")
    hidden.name = HIDDEN
    graph.outputs[:] = [hidden, *(value for value in graph.outputs if value.name != LOGITS)]
    RemoveUnusedNodesPass()(dense)


def _keep_shortlist(body: ir.Model, shortlist: ir.Node) -> None:
    """Let the graph read the input of its shortlist, and compute nothing else."""
    graph = body.graph
    hidden = next(value for value in graph.inputs if value.name == HIDDEN)
    shortlist.replace_input_with(0, hidden)
    own = {value.name for value in shortlist.outputs} | {LOGITS}
    graph.outputs[:] = [value for value in graph.outputs if value.name in own]
    RemoveUnusedNodesPass()(body)
    graph.inputs[:] = [value for value in graph.inputs if value.uses()]
