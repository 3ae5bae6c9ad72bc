"""Joins two graphs of a step that run one after the other.

A run of a graph has costs of its own: ONNX Runtime sets up the run, and binds every cache anew.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import numpy as np
import onnx_ir as ir

HIDDEN = "hidden"  # what one graph gives to the next


def join(first: ir.Model, second: ir.Model) -> ir.Model:
    """Move the nodes of the second graph to the end of the first.

    The second reads ``hidden``, which the first wrote. Other inputs and initializers of the same name become one.

    Args:
        first, second: as the exporter writes them. Neither can be used afterwards.

    Returns:
        The joined model. It has all inputs and outputs of both but ``hidden``.

    Raises:
        ValueError: a graph lacks ``hidden``, or initializers of the same name differ.
    """
    graph, other = first.graph, second.graph
    known = {str(value.name): value for value in graph.inputs}
    known[HIDDEN] = _hidden(graph.outputs)
    _hidden(other.inputs)
    added = [value for value in other.inputs if not _replaced(value, known)]
    initializers = list(other.initializers.values())
    for value in initializers:
        _check_same(value, graph.initializers.get(str(value.name)))
    constants = [value for value in initializers if not _replaced(value, graph.initializers)]
    nodes, outputs = list(other), list(other.outputs)
    taken = {node.name for node in graph} | {value.name for node in graph for value in node.outputs}
    for values in (other.inputs, other.outputs, other.initializers):
        values.clear()
    other.remove(nodes)
    for node in nodes:
        node.name = _free(node.name, taken)
        for value in node.outputs:
            value.name = _free(value.name, taken)
    graph.inputs.extend(added)
    for value in constants:
        graph.register_initializer(value)
    graph.extend(nodes)
    graph.outputs[:] = [value for value in graph.outputs if value.name != HIDDEN] + outputs
    first.functions.update(second.functions)
    graph.opset_imports.update(other.opset_imports)
    return first


def _hidden(values: Sequence[ir.Value]) -> ir.Value:
    for value in values:
        if value.name == HIDDEN:
            return value
    raise ValueError(f"a graph does not write or read {HIDDEN}")


def _free(name: str | None, taken: Container[str | None]) -> str | None:
    return f"next.{name}" if name in taken else name


def _replaced(value: ir.Value, known: Mapping[str, ir.Value]) -> bool:
    """Let the readers of a value read the known one of its name instead. Returns whether there is one."""
    own = known.get(str(value.name))
    if own is not None:
        value.replace_all_uses_with(own)
    return own is not None


def _check_same(value: ir.Value, known: ir.Value | None) -> None:
    if known is None:
        return
    one, two = value.const_value, known.const_value
    if isinstance(one, ir.ExternalTensor) and isinstance(two, ir.ExternalTensor):
        same = (one.location, one.offset, one.length) == (two.location, two.offset, two.length)
    else:
        same = one is not None and two is not None and np.array_equal(one.numpy(), two.numpy())
    if not same:
        raise ValueError(f"both graphs have an initializer {value.name}, and these differ")
