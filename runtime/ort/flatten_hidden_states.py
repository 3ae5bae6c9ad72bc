"""Graph pass: removes the ``Reshape`` before and after each sparse op."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shadowllm.bundle.op_domain import DOMAIN


class FlattenHiddenStates(InPlacePass):
    """Makes the sparse ops read and write hidden states in the form of the nodes around them.

    This form is ``(batch*seqlen, hidden_size)``, which the native ops also take. The schema has
    ``(batch, seqlen, hidden_size)``, so the exporter writes a ``Reshape`` before and after each sparse op.

    Requires: every sparse op is between two ``Reshape`` nodes. Ensures: the same outputs with the native ops.
    """

    def requires(self, model: ir.Model) -> None:
        """See the class.

        Raises:
            PreconditionError: an op with other nodes around it.
        """
        for node in _sparse_ops(model):
            before = node.inputs[0].producer() if node.inputs[0] else None
            after = {user.op_type for user, _ in node.outputs[0].uses()}
            if before is None or {before.op_type} | after != {"Reshape"}:
                raise PreconditionError(f"{node.name} does not stand between two Reshape nodes")

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the model in place."""
        found = _sparse_ops(model)
        for node in found:
            before = node.inputs[0].producer() if node.inputs[0] else None
            assert before is not None
            node.replace_input_with(0, before.inputs[0])
            for user, _ in node.outputs[0].uses():
                node.outputs[0].shape, node.outputs[0].type = user.outputs[0].shape, user.outputs[0].type
                user.outputs[0].replace_all_uses_with(node.outputs[0])
        RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=bool(found))


def _sparse_ops(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type.startswith("Sparse")]
