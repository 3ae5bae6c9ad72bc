"""The NumPy reference of ``SparseMLP``; see `plugins.reference`."""

from __future__ import annotations

import numpy as np

from shadowllm.bundle.quantisation import dense_rows
from shadowllm.models.activations import RELU_LIKE
from shadowllm.plugins.reference import (
    activate,
    active,
    copy_rows,
    each_selection,
    full_rows,
    largest,
    mlp_product,
    padded,
)


@each_selection()
def sparse_mlp(
    x: np.ndarray,
    indices: np.ndarray | None,
    count: int,
    w_gate: np.ndarray | None,
    b_gate: np.ndarray | None,
    w_up: np.ndarray,
    b_up: np.ndarray | None,
    w_down: np.ndarray,
    b_down: np.ndarray | None,
    s_gate: np.ndarray | None = None,
    s_up: np.ndarray | None = None,
    s_down: np.ndarray | None = None,
    rest: int | None = None,
    c_gate: np.ndarray | None = None,
    c_up: np.ndarray | None = None,
    c_down: np.ndarray | None = None,
    cs_gate: np.ndarray | None = None,
    cs_up: np.ndarray | None = None,
    cs_down: np.ndarray | None = None,
    down_norms: np.ndarray | None = None,
    *,
    activation: str,
    threshold: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """``SparseMLP``: x ``(B, S, D)``, weights ``(F, D)``, integers or residuals -> ``(B, S, D)``, chosen ``(F,)``.

    With a selection for each sequence (see `each_selection`), chosen is ``(B, F)``.
    """
    width, wide = x.shape[2], x.astype(np.float32)

    def project(weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        return wide @ weight.T + (0 if bias is None else bias.astype(np.float32))

    def products(gate: np.ndarray | None, up: np.ndarray) -> np.ndarray:
        first = project(up, b_up) if gate is None else project(gate, b_gate)
        return mlp_product(activation, threshold, first, None if gate is None else project(up, b_up))

    low, gate_first = None, indices is None and c_up is None and down_norms is None and activation in RELU_LIKE
    if rest or (indices is None and not gate_first):
        low = products(None if w_gate is None else copy_rows(c_gate, cs_gate, width), copy_rows(c_up, cs_up, width))
    if indices is not None:
        rows = active(indices, count, len(w_up))
    elif gate_first:
        first = (w_up, s_up, b_up) if w_gate is None else (w_gate, s_gate, b_gate)
        gates = activate(activation, threshold, project(dense_rows(*first[:2], width), first[2]))
        rows = np.flatnonzero(gates.any(axis=(0, 1)))
    else:
        rows = _choose(low, down_norms, count, len(w_up))
    gate = None if w_gate is None else full_rows(w_gate, s_gate, c_gate, cs_gate, width)
    hidden = products(gate, full_rows(w_up, s_up, c_up, cs_up, width))
    y = hidden[..., rows] @ full_rows(w_down, s_down, c_down, cs_down, width)[rows]
    if rest and low is not None:
        others = np.setdiff1d(np.arange(len(w_up)), rows)
        y = y + low[..., others] @ copy_rows(c_down, cs_down, width)[others]
    return (y if b_down is None else y + b_down.astype(np.float32)).astype(x.dtype), padded(rows, len(w_up))


def _choose(low: np.ndarray | None, down_norms: np.ndarray | None, count: int, neurons: int) -> np.ndarray:
    """Return the neurons with the largest products from the low-bit copy, as down would add them."""
    if not 0 <= count <= neurons:
        raise IndexError(f"count {count} is outside 0..{neurons}")
    if low is None or down_norms is None:
        raise ValueError("without indices, a low-bit copy and down_norms are needed")
    return largest(np.abs(low).reshape(-1, neurons).mean(axis=0) * down_norms, count)
