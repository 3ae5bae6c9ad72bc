"""Gives the dense graph of a step the output table of a sparse one, which can be read in part.

So a budget with a shortlist, but with all heads and neurons, costs what the dense layers cost.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shadowllm.plugins.ops.shortlist_logits.schema import SHORTLIST_LOGITS
from shadowllm.runtime.ort.join_graphs import HIDDEN, join

LOGITS = "logits"
COPY = [port.name for port in SHORTLIST_LOGITS.inputs].index("copy")


def shorten(dense: ir.Model, body: ir.Model) -> ir.Model:
    """Move the shortlist of a sparse graph to the end of the dense one.

    Args:
        dense, body: as the exporter writes them, of nested integers. Neither can be used afterwards.

    Returns:
        The dense graph with the inputs and outputs of the shortlist.

    Raises:
        ValueError: the body has no shortlist, or the dense graph has no linear layer with the same low-bit copy.
    """
    shortlist = next((node for node in body.graph if node.op_type == SHORTLIST_LOGITS.name), None)
    if shortlist is None:
        raise ValueError("the body has no shortlist")
    copy = shortlist.inputs[COPY]
    _end_before_table(dense, "" if copy is None else str(copy.name))
    _keep_shortlist(body, shortlist)
    return join(dense, body)


def _end_before_table(dense: ir.Model, copy: str) -> None:
    """Let the graph write the input of its output table instead of the logits."""
    graph = dense.graph
    users = graph.initializers[copy].uses() if copy in graph.initializers else ()
    hidden = next((node.inputs[0] for node, _ in users if node.op_type == "MatMulNBits"), None)
    if hidden is None:
        raise ValueError(f"the dense graph has no linear layer that reads {copy}")
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
