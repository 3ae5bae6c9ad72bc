"""Graph pass: each layer's row of the selection becomes an input.

This removes ``Gather`` nodes. At one token, even a node that only moves data costs one or two microseconds.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shadowllm.bundle.selection_names import SELECTION, of_row


class SplitSelection(InPlacePass):
    """Makes every layer's row of the selection a separate input, as ``neuron_indices.3``.

    Requires: only ``Gather`` nodes with a constant row read each input named in `selection_names.SELECTION`.
    Ensures: the same outputs, if the caller binds the row's memory to the new input.
    """

    def requires(self, model: ir.Model) -> None:
        """See the class.

        Raises:
            PreconditionError: an input is read in another way.
        """
        for whole in _selection(model):
            if whole.shape is None or any(_row(user) is None for user, _ in whole.uses()):
                raise PreconditionError(f"{whole.name} is not read row by row")

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the model in place."""
        found = _selection(model)
        for whole in found:
            assert whole.name is not None
            assert whole.shape is not None
            for gather, _ in whole.uses():
                index = _row(gather)
                assert index is not None
                row = ir.val(of_row(whole.name, index), dtype=whole.dtype, shape=ir.Shape(whole.shape[1:]))
                gather.outputs[0].replace_all_uses_with(row)
                model.graph.inputs.append(row)
            model.graph.inputs.remove(whole)
        RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=bool(found))


def _selection(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if value.name in SELECTION]


def _row(gather: ir.Node) -> int | None:
    """The constant row that a ``Gather`` reads; None for any other node."""
    index = gather.inputs[1].const_value if gather.op_type == "Gather" and gather.inputs[1] else None
    return None if index is None else int(index.numpy())
