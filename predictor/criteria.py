"""Importance criteria: what one head or neuron is worth to one token.

Attention heads and MLP neurons are the same thing here: a unit is ``width`` activation values (the
context of a head, the product of a neuron) and ``width`` rows of the projection that follows, so a
criterion is one function for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shadowllm.errors import UserError
from shadowllm.models.sparsity import Unit
from shadowllm.models.spec import ModelSpec


@dataclass(frozen=True)
class UnitTrace:
    """What a criterion sees of the units of one layer.

    Attributes:
        activation: A, ``(..., n_units, width)``; width is ``head_dim`` for heads and 1 for neurons.
        rows: W, the projection behind it, ``(n_units, width, hidden_size)``.
        gradient: g = dL/dA of the window's summed next-token cross entropy, as ``activation``.
        curvature: Hg, the derivative by A of half the squared length of all gradients, as ``activation``.
        targets: the token that follows each position, int64 ``(batch, seqlen)``; -1 where none does.

    The last three are None unless the criterion needs them.
    """

    activation: Tensor
    rows: Tensor
    gradient: Tensor | None = None
    curvature: Tensor | None = None
    targets: Tensor | None = None


Score = Callable[[UnitTrace], Tensor]
# Added to a kernel's diagonal, and to correlations before their logarithm, as the papers' codes do.
RIDGE = 1e-5


@dataclass(frozen=True)
class Criterion:
    """A registered criterion.

    Attributes:
        score: maps a `UnitTrace` to float32 ``(..., n_units)``, not negative.
        derivatives: how many of the loss it needs: 0, 1 (the gradient) or 2 (the curvature too).
    """

    name: str
    score: Score
    derivatives: int

    @property
    def needs_gradients(self) -> bool:
        """Whether a forward pass alone does not suffice."""
        return self.derivatives > 0


CRITERIA: dict[str, Criterion] = {}


def criterion(derivatives: int) -> Callable[[Score], Score]:
    """Register the decorated function under its own name."""

    def register(score: Score) -> Score:
        CRITERIA[score.__name__] = Criterion(score.__name__, score, derivatives)
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


@criterion(derivatives=1)
def plainact(trace: UnitTrace) -> Tensor:
    """``|sum over the unit of A * dL/dA|``: to first order, how far the loss moves without the unit.

    Source: ShadowLLM (Akhauri et al., arXiv 2406.16635), where it is the criterion of choice; the
    first-order term is that of Molchanov et al., arXiv 1611.06440.
    """
    return (trace.activation * _gradient(trace)).sum(dim=-1).abs()


@criterion(derivatives=1)
def grad_norm(trace: UnitTrace) -> Tensor:
    """``||g||``: how strongly the loss pulls at the unit, whatever the unit says.

    Source: the gradient norm of Abdelfattah et al. (arXiv 2101.08134), taken at the activation.
    """
    return _gradient(trace).norm(dim=-1)


@criterion(derivatives=1)
def fisher(trace: UnitTrace) -> Tensor:
    """``sum of (A * g)^2``: the empirical Fisher information of a gate on each value of the unit.

    A neuron is one value, so there it ranks as `plainact` does.

    Source: Theis et al. (arXiv 1801.05787), without their average over examples.
    """
    return (trace.activation * _gradient(trace)).square().sum(dim=-1)


@criterion(derivatives=1)
def snip(trace: UnitTrace) -> Tensor:
    """``sum of |A * g|``: sensitivity of the loss to a gate on each value of the unit.

    It bounds `plainact` from above, whose terms may cancel; a neuron is one value, so there both agree.

    Source: connection sensitivity (Lee et al., arXiv 1810.02340), gating activations instead of weights.
    """
    return (trace.activation * _gradient(trace)).abs().sum(dim=-1)


@criterion(derivatives=2)
def grasp(trace: UnitTrace) -> Tensor:
    """``|sum of A * Hg|``: to first order, how far half the squared gradient moves without the unit.

    The sign, which says whether training would be helped or hindered, is dropped: here a unit
    matters either way.

    Source: gradient signal preservation (Wang et al., arXiv 2002.07376), at activations instead of weights.
    """
    if trace.curvature is None:
        raise ValueError("grasp needs the curvature")
    return (trace.activation * trace.curvature).sum(dim=-1).abs()


@criterion(derivatives=0)
def l2norm(trace: UnitTrace) -> Tensor:
    """``||A @ W||``: length of what the unit adds to the residual stream.

    For a neuron this is ``|h_f| * ||w_down[f]||``. Computed as ``sqrt(A (W W^T) A^T)``, so that the
    ``hidden_size`` wide contribution of every unit and token need not exist.

    Source: the magnitude criterion of DejaVu (Liu et al., arXiv 2310.17157), with the projection in it.
    """
    if trace.rows.shape[1] == 1:
        return trace.activation[..., 0].abs() * trace.rows[:, 0].norm(dim=-1)
    gram = trace.rows @ trace.rows.transpose(-1, -2)
    moved = torch.einsum("...hd,hde->...he", trace.activation, gram)
    # Rounding may leave the square of a vanishing contribution just below zero.
    return (moved * trace.activation).sum(dim=-1).clamp_min(0).sqrt()


@criterion(derivatives=0)
def nwot(trace: UnitTrace) -> Tensor:
    """Novelty of the token's code, one bit per value of the unit (is it above 0?), after the codes before it.

    With K the share of bits two tokens agree in, a window's score is ``log det K``. Its Cholesky
    factor splits that into one term per token, ``2 log L_tt``; here stands ``L_tt^2``, in (0, 1].

    Source: Mellor et al. (arXiv 2006.04647), eq. 2.
    """
    bits = (trace.activation > 0).to(trace.activation.dtype).transpose(1, 2)
    width = bits.shape[-1]
    agree = bits @ bits.transpose(-1, -2) + (1 - bits) @ (1 - bits).transpose(-1, -2)
    return _cholesky(agree / width).diagonal(dim1=-2, dim2=-1).square().transpose(1, 2)


@criterion(derivatives=1)
def jacov(trace: UnitTrace) -> Tensor:
    """Novelty of the token's gradient: low where it repeats gradients of other tokens of the window.

    With K the correlation of two tokens' gradients over the values of the unit, a window's score is
    ``-sum of log(v) + 1/v`` over the eigenvalues of ``K + RIDGE``. Both terms split by token, into
    ``2 log L_tt + (L L^T)^-1_tt``; the reciprocal of that plus the constant that keeps it positive
    stands here. One value has no correlation, so every neuron of a token scores alike.

    Source: Mellor et al. (arXiv 2006.04647v1), as the aggregate of Abdelfattah et al. (arXiv 2101.08134).
    """
    factor = _cholesky(_correlation(_gradient(trace)))
    novelty = factor.diagonal(dim1=-2, dim2=-1).log() * 2
    redundancy = torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1)
    return (novelty + redundancy + 1 - torch.log(torch.tensor(RIDGE))).reciprocal().transpose(1, 2)


@criterion(derivatives=1)
def epenas(trace: UnitTrace) -> Tensor:
    """How differently the token's gradient correlates with those of its own class and of the others.

    A class is the token to come. ``1 + |mean of log(|K| + RIDGE) within - mean of the same without|``, K
    as in `jacov`; nothing to compare, or nothing to come, scores 1, and so does every neuron.

    Source: Lopes et al. (arXiv 2102.08099), per token instead of per class.
    """
    if trace.targets is None:
        raise ValueError("epenas needs targets")
    likeness = (_correlation(_gradient(trace)).abs() + RIDGE).log()
    known = trace.targets >= 0
    both = (known.unsqueeze(-1) & known.unsqueeze(-2)).unsqueeze(1)
    same = (trace.targets.unsqueeze(-1) == trace.targets.unsqueeze(-2)).unsqueeze(1) & both
    within, without = (
        (likeness * where).sum(dim=-1) / where.sum(dim=-1).clamp_min(1) for where in (same, both & ~same)
    )
    comparable = same.any(dim=-1) & (both & ~same).any(dim=-1)
    return (1 + (within - without).abs() * comparable).transpose(1, 2)


def _gradient(trace: UnitTrace) -> Tensor:
    if trace.gradient is None:
        raise ValueError("the criterion needs gradients")
    return trace.gradient


def _correlation(x: Tensor) -> Tensor:
    """Pearson correlation of every two tokens; 0 with a token whose values are all alike.

    ``(batch, seqlen, n_units, width)`` to ``(batch, n_units, seqlen, seqlen)``.
    """
    x = (x - x.mean(dim=-1, keepdim=True)).transpose(1, 2)
    length = x.norm(dim=-1, keepdim=True)
    x = torch.where(length > 0, x / length.clamp_min(torch.finfo(x.dtype).tiny), 0)
    return x @ x.transpose(-1, -2)


def _cholesky(kernel: Tensor) -> Tensor:
    # A kernel of rank below its size is only positive definite with the ridge, and in float64.
    ridge = RIDGE * torch.eye(kernel.shape[-1], dtype=torch.float64)
    return torch.linalg.cholesky(kernel.double() + ridge).to(kernel.dtype)


def unit_trace(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    layer: int,
    unit: Unit,
    activation: Tensor,
    gradient: Tensor | None = None,
    curvature: Tensor | None = None,
    targets: Tensor | None = None,
) -> UnitTrace:
    """Bring what an activation hook saw (and its derivatives) and the layer's weights into a criterion's form."""
    if unit == "heads":
        rows = weights[f"layers.{layer}.o_proj.weight"].unflatten(0, (spec.n_heads, spec.head_dim))
        return UnitTrace(activation, rows, gradient, curvature, targets)
    rows = weights[f"layers.{layer}.down_proj.weight"].unsqueeze(1)
    gradient, curvature = (None if t is None else t.unsqueeze(-1) for t in (gradient, curvature))
    return UnitTrace(activation.unsqueeze(-1), rows, gradient, curvature, targets)
