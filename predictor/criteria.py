"""Importance criteria: what one head or neuron is worth to one token.

Attention heads and MLP neurons are the same thing here: a unit is ``width`` activation values (the
context of a head, the product of a neuron) and ``width`` rows of the projection that follows, so a
criterion is one function for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from shadowllm.errors import UserError
from shadowllm.models.decoder import Unit
from shadowllm.models.spec import ModelSpec


@dataclass(frozen=True)
class UnitTrace:
    """What a criterion sees of the units of one layer.

    Attributes:
        activation: A, ``(..., n_units, width)``; width is ``head_dim`` for heads and 1 for neurons.
        rows: W, the projection behind it, ``(n_units, width, hidden_size)``.
        gradient: dL/dA of the window's summed next-token cross entropy, as ``activation``; None
            unless the criterion needs gradients.
    """

    activation: Tensor
    rows: Tensor
    gradient: Tensor | None = None


Score = Callable[[UnitTrace], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A registered criterion: ``score`` maps a `UnitTrace` to float32 ``(..., n_units)``, not negative."""

    name: str
    score: Score
    needs_gradients: bool


CRITERIA: dict[str, Criterion] = {}


def criterion(needs_gradients: bool) -> Callable[[Score], Score]:
    """Register the decorated function under its own name."""

    def register(score: Score) -> Score:
        CRITERIA[score.__name__] = Criterion(score.__name__, score, needs_gradients)
        return score

    return register


def find_criterion(name: str) -> Criterion:
    """Look a criterion up.

    Raises:
        UserError: no such criterion.
    """
    if name not in CRITERIA:
        raise UserError(f"no importance criterion {name!r}", f"known: {', '.join(sorted(CRITERIA))}")
    return CRITERIA[name]


@criterion(needs_gradients=True)
def plainact(trace: UnitTrace) -> Tensor:
    """``|sum over the unit of A * dL/dA|``: to first order, how far the loss moves without the unit.

    Source: ShadowLLM (Akhauri et al., arXiv 2406.16635), where it is the criterion of choice; the
    first-order term is that of Molchanov et al., arXiv 1611.06440.
    """
    if trace.gradient is None:
        raise ValueError("plainact needs gradients")
    return (trace.activation * trace.gradient).sum(dim=-1).abs()


@criterion(needs_gradients=False)
def l2norm(trace: UnitTrace) -> Tensor:
    """``||A @ W||``: length of what the unit adds to the residual stream.

    For a neuron this is ``|h_f| * ||w_down[f]||``. Computed as ``sqrt(A (W W^T) A^T)``, so that the
    ``hidden_size`` wide contribution of every unit and token need not exist.

    Source: the magnitude criterion of DejaVu (Liu et al., arXiv 2310.17157), with the projection in it.
    """
    gram = trace.rows @ trace.rows.transpose(-1, -2)
    if gram.shape[-1] == 1:
        return trace.activation[..., 0].abs() * gram[:, 0, 0].sqrt()
    moved = (trace.activation.unsqueeze(-2) @ gram).squeeze(-2)
    # Rounding may leave the square of a vanishing contribution just below zero.
    return (moved * trace.activation).sum(dim=-1).clamp_min(0).sqrt()


def unit_trace(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    layer: int,
    unit: Unit,
    activation: Tensor,
    gradient: Tensor | None = None,
) -> UnitTrace:
    """Bring a tap's activation (and its gradient) and the layer's weights into a criterion's form."""
    if unit == "heads":
        rows = weights[f"layers.{layer}.o_proj.weight"].unflatten(0, (spec.n_heads, spec.head_dim))
        return UnitTrace(activation, rows, gradient)
    rows = weights[f"layers.{layer}.down_proj.weight"].unsqueeze(1)
    return UnitTrace(activation.unsqueeze(-1), rows, None if gradient is None else gradient.unsqueeze(-1))
