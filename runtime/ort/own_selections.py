"""Graph pass: every sequence of a step gets its own selection."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from shadowllm.bundle.op_domain import DOMAIN
from shadowllm.bundle.selection_names import RECOMPUTED, SCALARS, SELECTION

BATCH = "batch"


class OwnSelections(InPlacePass):
    """Gives the selection of a graph a dimension for the sequences.

    A bundle's graphs declare one selection for all sequences, which is what engines take. Their nodes take either (see
    `plugins.schema`), so only the declared shapes change: counts ``(n_sparse, batch)``, indices ``(n_sparse, batch,
    n_units)``, indices of one layer ``(batch, n_units)``, scalars ``(batch,)``.

    Ensures: the result of each sequence is the one that it would have alone.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the model in place."""
        modified = False
        for value in (*model.graph.inputs, *model.graph.outputs):
            if (place := _place(value.name or "")) is not None and value.shape is not None:
                dims = list(value.shape)
                value.shape = ir.Shape([*dims[:place], BATCH, *dims[place:]])
                modified = True
        for node in model.graph:
            if node.domain == DOMAIN and node.op_type == "ScoreNeurons" and node.outputs[0].shape is not None:
                node.outputs[0].shape = ir.Shape([BATCH, node.outputs[0].shape[1]])
        return PassResult(model, modified)


def _place(name: str) -> int | None:
    """Where the dimension goes; None for a value that is no part of a selection."""
    if name in SELECTION:
        return 1
    of_layer = name.rpartition(".")[0] in SELECTION
    return 0 if (name in SCALARS or of_layer) and name != RECOMPUTED else None
