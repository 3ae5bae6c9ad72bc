"""Fewer nodes around the sparse ops: at one token, a node that moves nothing still costs a microsecond or two."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shadowllm.bundle.op_domain import DOMAIN
from shadowllm.bundle.selection_names import SELECTION, of_row


def split_selection(model: ir.Model) -> None:
    """Make every layer's row of the selection an input of its own, as ``neuron_indices.3``.

    Requires: each input named in `selection_names.SELECTION` is read by ``Gather`` nodes of one constant row each.
    Ensures: a caller who binds the row's own memory gets the same outputs.
    """
    graph = model.graph
    for whole in [value for value in graph.inputs if value.name in SELECTION]:
        assert whole.name is not None
        assert whole.shape is not None
        for gather, _ in whole.uses():
            index = gather.inputs[1].const_value if gather.inputs[1] else None
            if gather.op_type != "Gather" or index is None:
                raise ValueError(f"{whole.name} is not read row by row")
            row = ir.val(of_row(whole.name, int(index.numpy())), dtype=whole.dtype, shape=ir.Shape(whole.shape[1:]))
            gather.outputs[0].replace_all_uses_with(row)
            graph.inputs.append(row)
        graph.inputs.remove(whole)
    RemoveUnusedNodesPass()(model)


def flatten(model: ir.Model) -> None:
    """Give the sparse ops hidden states as they lie between them, ``(batch*seqlen, hidden_size)``.

    The native ops take that form as well as the one of their schema, which the exporter writes a
    ``Reshape`` before and behind for.
    """
    for node in model.graph:
        if node.domain != DOMAIN or not node.op_type.startswith("Sparse"):
            continue
        before = node.inputs[0].producer() if node.inputs[0] else None
        behind = [user for user, _ in node.outputs[0].uses()]
        if before is None or {before.op_type, *(user.op_type for user in behind)} != {"Reshape"}:
            raise ValueError(f"{node.name} does not stand between two Reshape nodes")
        node.replace_input_with(0, before.inputs[0])
        node.outputs[0].shape = None
        for user in behind:
            user.outputs[0].replace_all_uses_with(node.outputs[0])
    RemoveUnusedNodesPass()(model)
