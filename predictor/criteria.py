"""Importance criteria: scores for how much one head or neuron matters for one token.

One function serves heads and neurons. Both are units: ``width`` activation values (the context of a head, the
product of a neuron) and ``width`` rows of the projection that follows.
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
    """The input of a criterion: data of the units of one layer.

    Attributes:
        activation: A, ``(..., n_units, width)``; width is ``head_dim`` for heads and 1 for neurons.
        rows: W, the rows of the projection that follows, ``(n_units, width, hidden_size)``.
        gradient: g = dL/dA, where L is the window's summed next-token cross entropy. Same shape as ``activation``.
        curvature: Hg, the derivative with respect to A of half the squared norm of all gradients. Same shape.
        targets: the token that follows each position, int64 ``(batch, seqlen)``; -1 at the last position.

    The last three are None if the criterion does not need them.
    """

    activation: Tensor
    rows: Tensor
    gradient: Tensor | None = None
    curvature: Tensor | None = None
    targets: Tensor | None = None


Score = Callable[[UnitTrace], Tensor]
# Added to a kernel's diagonal, and to correlations before their logarithm, as in the papers' code.
RIDGE = 1e-5


@dataclass(frozen=True)
class Criterion:
    """A registered criterion.

    Attributes:
        score: maps a `UnitTrace` to float32 ``(..., n_units)``, not negative.
        derivatives: highest derivative of the loss that it needs: 0, 1 (gradient) or 2 (also curvature).
    """

    name: str
    score: Score
    derivatives: int

    @property
    def needs_gradients(self) -> bool:
        """Whether the criterion needs a backward pass."""
        return self.derivatives > 0


CRITERIA: dict[str, Criterion] = {}


def criterion(derivatives: int) -> Callable[[Score], Score]:
    """Register the decorated function under its own name."""

    def register(score: Score) -> Score:
        CRITERIA[score.__name__] = Criterion(score.__name__, score, derivatives)
        return score

    return register


def find_criterion(name: str) -> Criterion:
    """Return the criterion of a name.

    Raises:
        UserError: no such criterion.
    """
    if name not in CRITERIA:
        raise UserError(f"no importance criterion {name!r}", f"known: {', '.join(sorted(CRITERIA))}")
    return CRITERIA[name]


@criterion(derivatives=1)
def plainact(trace: UnitTrace) -> Tensor:
    """``|sum over the unit of A * dL/dA|``: the change of the loss without the unit, to first order.

    Source: ShadowLLM (Akhauri et al., arXiv 2406.16635), which recommends this criterion. The first-order
    term is from Molchanov et al., arXiv 1611.06440.
    """
    return (trace.activation * _gradient(trace)).sum(dim=-1).abs()


@criterion(derivatives=1)
def grad_norm(trace: UnitTrace) -> Tensor:
    """``||g||``: how strongly the loss depends on the unit's activation. The activation's own value is not used.

    Source: the gradient norm of Abdelfattah et al. (arXiv 2101.08134), here of the activation.
    """
    return _gradient(trace).norm(dim=-1)


@criterion(derivatives=1)
def fisher(trace: UnitTrace) -> Tensor:
    """``sum of (A * g)^2``: the empirical Fisher information of a gate on each value of the unit.

    A neuron has one value, so for neurons it ranks as `plainact` does.

    Source: Theis et al. (arXiv 1801.05787), without their average over examples.
    """
    return (trace.activation * _gradient(trace)).square().sum(dim=-1)


@criterion(derivatives=1)
def snip(trace: UnitTrace) -> Tensor:
    """``sum of |A * g|``: sensitivity of the loss to a gate on each value of the unit.

    It is an upper bound of `plainact`, whose terms may cancel. A neuron has one value, so for neurons both are equal.

    Source: connection sensitivity (Lee et al., arXiv 1810.02340), with gates on activations instead of weights.
    """
    return (trace.activation * _gradient(trace)).abs().sum(dim=-1)


@criterion(derivatives=2)
def grasp(trace: UnitTrace) -> Tensor:
    """``|sum of A * Hg|``: the change of half the squared gradient norm without the unit, to first order.

    The sign tells whether removal helps or hinders training. It is dropped: a unit matters in both cases.

    Source: gradient signal preservation (Wang et al., arXiv 2002.07376), for activations instead of weights.
    """
    if trace.curvature is None:
        raise ValueError("grasp needs the curvature")
    return (trace.activation * trace.curvature).sum(dim=-1).abs()


@criterion(derivatives=0)
def l2norm(trace: UnitTrace) -> Tensor:
    """``||A @ W||``: the norm of what the unit adds to the residual stream.

    For a neuron this is ``|h_f| * ||w_down[f]||``. It is computed as ``sqrt(A (W W^T) A^T)``: the contribution of
    every unit and token, ``hidden_size`` values each, would take too much memory.

    Source: the magnitude criterion of DejaVu (Liu et al., arXiv 2310.17157), with the projection included.
    """
    if trace.rows.shape[1] == 1:
        return trace.activation[..., 0].abs() * trace.rows[:, 0].norm(dim=-1)
    gram = trace.rows @ trace.rows.transpose(-1, -2)
    moved = torch.einsum("...hd,hde->...he", trace.activation, gram)
    # Rounding can make the square of a tiny contribution negative.
    return (moved * trace.activation).sum(dim=-1).clamp_min(0).sqrt()


@criterion(derivatives=0)
def nwot(trace: UnitTrace) -> Tensor:
    """Novelty of the token's code compared with the codes before it. A code has a bit for each value: is it above 0?

    K is the share of bits in which two tokens agree. In the paper, the score of a window is ``log det K``. The
    Cholesky factor L of K splits it into one term per token, ``2 log L_tt``. The result here is ``L_tt^2``, in (0, 1].

    Source: Mellor et al. (arXiv 2006.04647), eq. 2.
    """
    bits = (trace.activation > 0).to(trace.activation.dtype).transpose(1, 2)
    width = bits.shape[-1]
    agree = bits @ bits.transpose(-1, -2) + (1 - bits) @ (1 - bits).transpose(-1, -2)
    return _cholesky(agree / width).diagonal(dim1=-2, dim2=-1).square().transpose(1, 2)


@criterion(derivatives=1)
def jacov(trace: UnitTrace) -> Tensor:
    """Novelty of the token's gradient: low if it repeats gradients of other tokens of the window.

    K is the correlation of two tokens' gradients over the values of the unit. In the paper, the score of a window
    is ``-sum of (log(v) + 1/v)`` over the eigenvalues v of ``K + RIDGE``. The sum splits into one term per token,
    ``2 log L_tt + (L L^T)^-1_tt``. A constant makes this term positive, and the result here is its reciprocal.
    A single value has no correlation, so all neurons of a token get the same score.

    Source: Mellor et al. (arXiv 2006.04647v1), as the aggregate of Abdelfattah et al. (arXiv 2101.08134).
    """
    factor = _cholesky(_correlation(_gradient(trace)))
    novelty = factor.diagonal(dim1=-2, dim2=-1).log() * 2
    redundancy = torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1)
    return (novelty + redundancy + 1 - torch.log(torch.tensor(RIDGE))).reciprocal().transpose(1, 2)


@criterion(derivatives=1)
def epenas(trace: UnitTrace) -> Tensor:
    """How differently the token's gradient correlates with gradients of its own class and of other classes.

    The class of a token is the next token. The score is ``1 + |mean of log(|K| + RIDGE) in its own class - mean of
    the same in other classes|``, with K as in `jacov`. The score is 1 for all neurons, for a token without a next
    token, and if the window has no token of another class.

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
    """Pearson correlation of every two tokens; 0 with a token whose values are all equal.

    Input ``(batch, seqlen, n_units, width)``, output ``(batch, n_units, seqlen, seqlen)``.
    """
    x = (x - x.mean(dim=-1, keepdim=True)).transpose(1, 2)
    length = x.norm(dim=-1, keepdim=True)
    x = torch.where(length > 0, x / length.clamp_min(torch.finfo(x.dtype).tiny), 0)
    return x @ x.transpose(-1, -2)


def _cholesky(kernel: Tensor) -> Tensor:
    # A kernel without full rank is positive definite only with the ridge and in float64.
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
    """Make a `UnitTrace` of an activation hook's tensor, its derivatives and the layer's weights."""
    if unit == "heads":
        rows = weights[f"layers.{layer}.o_proj.weight"].unflatten(0, (spec.n_heads, spec.head_dim))
        return UnitTrace(activation, rows, gradient, curvature, targets)
    rows = weights[f"layers.{layer}.down_proj.weight"].unsqueeze(1)
    gradient, curvature = (None if t is None else t.unsqueeze(-1) for t in (gradient, curvature))
    return UnitTrace(activation.unsqueeze(-1), rows, gradient, curvature, targets)
