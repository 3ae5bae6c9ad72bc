"""Training of predictors on traces, and how well they do on tokens they never saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shadowllm.errors import UserError
from shadowllm.models.budget import Budget
from shadowllm.models.decoder import Unit
from shadowllm.models.spec import ModelSpec
from shadowllm.predictor.artefact import Kind, Predictor
from shadowllm.predictor.networks import default_rank, initial_tensors, scores
from shadowllm.predictor.progress import Advance, no_progress
from shadowllm.predictor.topk import recall, top_mask
from shadowllm.predictor.tracefile import OCTAVES, Traces
from shadowllm.predictor.traces import Tracer

TINY = torch.finfo(torch.float32).tiny
UNITS: tuple[Unit, ...] = ("heads", "neurons")
# Scores of one layer and what they should be -> a scalar. The count is the budget's.
Loss = Callable[[Tensor, Tensor, int], Tensor]
LOSSES: dict[str, Loss] = {}


def loss(function: Loss) -> Loss:
    """Register a training loss under its name."""
    LOSSES[function.__name__] = function
    return function


@loss
def bce(predicted: Tensor, importance: Tensor, count: int) -> Tensor:
    """Binary cross entropy of being among the ``count`` most important, mean over units.

    Args:
        predicted: logits ``(tokens, n_sparse, n_units)``.
        importance: the criterion's scores, of the same shape.
    """
    if count >= importance.shape[-1]:
        return predicted.sum() * 0  # everything is kept: nothing to learn
    wanted = (importance >= _threshold(importance, count)).to(predicted.dtype)
    return F.binary_cross_entropy_with_logits(predicted, wanted)


@loss
def weighted_bce(predicted: Tensor, importance: Tensor, count: int) -> Tensor:
    """`bce` with each unit weighted by how much a wrong choice costs, ``|importance - threshold|``.

    The optimum's sign is that of the expected ``importance - threshold``: near ties count for
    nothing, and a rarely but hugely important unit is kept. Weights are relative to the mean
    importance of their token and layer.
    """
    if count >= importance.shape[-1]:
        return predicted.sum() * 0
    threshold = _threshold(importance, count)
    weight = (importance - threshold).abs() / importance.mean(dim=-1, keepdim=True).clamp_min(TINY)
    return F.binary_cross_entropy_with_logits(predicted, (importance >= threshold).to(predicted.dtype), weight)


def _threshold(importance: Tensor, count: int) -> Tensor:
    """The ``count``-th largest importance of each token and layer, ``(tokens, n_sparse, 1)``.

    After a ReLU that may be 0, and everything would count as important. What then tells units apart
    is how often and how much they fire: the ``count``-th largest mean over the tokens takes its place.
    """
    rank = importance.shape[-1] - count + 1
    of_token = importance.kthvalue(rank, dim=-1, keepdim=True).values
    of_mean = importance.mean(dim=0).kthvalue(rank, dim=-1, keepdim=True).values
    return torch.where(of_token > 0, of_token, of_mean)


@loss
def mse(predicted: Tensor, importance: Tensor, count: int) -> Tensor:
    """Mean squared error to the log importance, standardised within each token and layer; shapes as in `bce`."""
    # What is below the range of a trace counts as its end: silent neurons must not outweigh all others.
    floor = importance.amax(dim=-1, keepdim=True).clamp_min(TINY) * 2.0**-OCTAVES
    return F.mse_loss(predicted, _standard_log(torch.maximum(importance, floor)))


BUDGET = Budget(neurons=0.5, heads=0.75)


@dataclass(frozen=True)
class Recipe:
    """How to train a shadow.

    Attributes:
        budget: the fractions at which membership is learned and recall is judged; the scores rank
            all units and serve other budgets too.
        loss: name in `LOSSES`. The default costs recall against ``bce`` and wins perplexity: what a
            wrong choice costs differs from unit to unit.
        epochs: passes over the training windows.
        learning_rate: peak of AdamW's; it falls to zero along a cosine.
        weight_decay: AdamW's, on the output weights: pulls towards the static ranking.
        batch_tokens: tokens of a step.
        rank: width of the trunk; `default_rank` when None.
        seed: of initial weights and order.
    """

    budget: Budget = BUDGET
    loss: str = "weighted_bce"
    epochs: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    batch_tokens: int = 128
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"no training loss {self.loss!r}", f"known: {', '.join(sorted(LOSSES))}")
        least = min(self.epochs, self.batch_tokens, 1 if self.rank is None else self.rank)
        if least < 1 or self.learning_rate <= 0:
            raise UserError("epochs, batch size, learning rate and rank must be positive", "mend the training options")


def train_static(
    spec: ModelSpec,
    traces: Traces,
    *,
    kind: Kind = "static",
    budget: Budget = BUDGET,
    weights: Mapping[str, Tensor] | None = None,
) -> Predictor:
    """The ranking by mean importance over the training tokens; needs no training.

    Args:
        kind: "static", or "quantized-shadow", whose heads go by their fit instead.
        budget: the fractions at which recall on the held-out tokens is recorded.
        weights: canonical float32 tensors; needed only when the traces were too large to keep.
    """
    predictor = Predictor(
        kind,
        spec.n_layers - traces.dense_layers,
        traces.dense_layers,
        spec.n_heads,
        spec.intermediate_size,
        spec.hidden_size,
        _statistics(traces),
        traces.base_fingerprint,
    )
    found = evaluate_recall(spec, predictor, traces, budget, tracer=_tracer(spec, traces, weights))
    return replace(predictor, record=_record(traces, budget) | {"held_out": {"static": found}})


def train_shadow(
    spec: ModelSpec,
    traces: Traces,
    recipe: Recipe | None = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
    advance: Advance = no_progress,
) -> Predictor:
    """Train the network that scores the whole model at its first sparse layer.

    It starts as the static ranking and learns what the hidden state adds to that.

    Args:
        weights: canonical float32 tensors; needed only when the traces were too large to keep.
        advance: told how many tokens were learned from, as they are (``epochs`` times the training tokens).

    Returns:
        A shadow whose record holds loss and recall@k of shadow and static on the same held-out tokens.

    Raises:
        UserError: a model too small for a shadow, or traces to be made anew without ``weights``.
    """
    recipe = recipe or Recipe()
    tracer = _tracer(spec, traces, weights)
    start = _initial(spec, traces, recipe)
    static = evaluate_recall(spec, start, traces, recipe.budget, recipe.loss, tracer)
    trained = _fit(spec, start, traces, recipe, tracer, advance)
    found = evaluate_recall(spec, trained, traces, recipe.budget, recipe.loss, tracer)
    record = _record(traces, recipe.budget) | {
        "loss": recipe.loss,
        "epochs": recipe.epochs,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "batch_tokens": recipe.batch_tokens,
        "rank": trained.rank,
        "seed": recipe.seed,
        "held_out": {"shadow": found, "static": static},
    }
    return replace(trained, record=record)


def _fit(
    spec: ModelSpec, start: Predictor, traces: Traces, recipe: Recipe, tracer: Tracer | None, advance: Advance
) -> Predictor:
    learned = {
        name: tensor.clone().requires_grad_()
        for name, tensor in start.tensors.items()
        if not name.endswith(".scores") and not name.startswith("layers.")
    }
    network = replace(start, tensors=start.tensors | learned)
    outputs = [tensor for name, tensor in learned.items() if name in ("heads.weight", "neurons.weight")]
    others = [tensor for name, tensor in learned.items() if name not in ("heads.weight", "neurons.weight")]
    optimiser = torch.optim.AdamW(
        [{"params": outputs, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
    )
    total = recipe.epochs * traces.windows.train.numel()
    generator = torch.Generator().manual_seed(recipe.seed)
    counts = _counts(spec, recipe.budget)
    seen = 0
    for _ in range(recipe.epochs):
        order = torch.randperm(len(traces.windows.train), generator=generator)
        for chunk in traces.training(tracer, order):
            shuffled = torch.randperm(len(chunk.hidden), generator=generator)
            for rows in shuffled.split(recipe.batch_tokens):
                predicted = dict(zip(UNITS, scores(network, chunk.hidden[rows]), strict=True))
                total_loss = torch.stack(
                    [LOSSES[recipe.loss](predicted[unit], getattr(chunk, unit)[rows], counts[unit]) for unit in UNITS]
                ).sum()
                for group in optimiser.param_groups:
                    group["lr"] = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * seen / total))
                optimiser.zero_grad()
                total_loss.backward()
                optimiser.step()
                seen += len(rows)
                advance(len(rows))
    return replace(network, tensors={name: tensor.detach() for name, tensor in network.tensors.items()})


@torch.no_grad()
def evaluate_recall(
    spec: ModelSpec,
    predictor: Predictor,
    traces: Traces,
    budget: Budget,
    loss: str | None = None,
    tracer: Tracer | None = None,
) -> dict[str, float]:
    """Recall@k at a budget, and a loss if named, over the held-out tokens.

    Returns:
        ``head_recall``, ``neuron_recall`` and, with a loss, ``loss`` (heads and neurons added), each
        a mean over tokens and layers.
    """
    counts = _counts(spec, budget)
    sums: dict[str, float] = {"head_recall": 0.0, "neuron_recall": 0.0} | ({"loss": 0.0} if loss else {})
    tokens = 0
    for chunk in traces.held_out(tracer):
        n = len(chunk.hidden)
        for unit, predicted in zip(UNITS, scores(predictor, chunk.hidden), strict=True):
            wanted = getattr(chunk, unit)
            sums[f"{unit[:-1]}_recall"] += n * recall(top_mask(predicted, counts[unit]), top_mask(wanted, counts[unit]))
            if loss:
                sums["loss"] += n * float(LOSSES[loss](predicted, wanted, counts[unit]))
        tokens += n
    return {name: value / tokens for name, value in sums.items()}


@torch.no_grad()
def _initial(spec: ModelSpec, traces: Traces, recipe: Recipe) -> Predictor:
    n_sparse = spec.n_layers - traces.dense_layers
    rank = recipe.rank or default_rank(spec, traces.dense_layers)
    biases = {
        unit: _bias(traces.statistics[unit], count, recipe.loss) for unit, count in _counts(spec, recipe.budget).items()
    }
    tensors = initial_tensors(spec, n_sparse, rank, biases["heads"], biases["neurons"], recipe.seed)
    return Predictor(
        "shadow",
        n_sparse,
        traces.dense_layers,
        spec.n_heads,
        spec.intermediate_size,
        spec.hidden_size,
        _statistics(traces) | tensors,
        traces.base_fingerprint,
    )


def _statistics(traces: Traces) -> dict[str, Tensor]:
    """What calibration alone gives every predictor: the rankings, and the fit of the heads."""
    rankings = {f"{unit}.scores": traces.statistics[unit] for unit in UNITS}
    return rankings | {f"layers.heads.{name}": tensor for name, tensor in traces.fit.items()}


def _bias(statistic: Tensor, count: int, loss: str) -> Tensor:
    # A monotone map of the statistic: the untrained network ranks exactly as static does. The
    # logarithm, standardised, is the mean target of mse; shifted so that count units of a layer lie
    # above zero, it is a fair first logit for bce.
    standard = _standard_log(statistic.clamp_min(TINY))
    if loss == "mse" or count >= statistic.shape[-1]:
        return standard
    return standard - standard.kthvalue(statistic.shape[-1] - count + 1, dim=-1, keepdim=True).values


def _counts(spec: ModelSpec, budget: Budget) -> dict[Unit, int]:
    """Units of a layer to keep: membership is learned at one budget for all layers."""
    heads, neurons = budget.mean().counts(spec, 1)
    return {"heads": int(heads[0]), "neurons": int(neurons[0])}


def _standard_log(importance: Tensor) -> Tensor:
    """Logarithms with mean 0 and deviation 1 in each row."""
    log = importance.log()
    deviation, mean = torch.std_mean(log, dim=-1, keepdim=True, correction=0)
    return (log - mean) / deviation.clamp_min(1e-6)


def _tracer(spec: ModelSpec, traces: Traces, weights: Mapping[str, Tensor] | None) -> Tracer | None:
    return None if weights is None else Tracer(spec, weights, traces.criterion, traces.dense_layers)


def _record(traces: Traces, budget: Budget) -> dict[str, Any]:
    return {
        "criterion": traces.criterion,
        "tokens": traces.windows.train.numel(),
        "held_out_tokens": traces.windows.held_out.numel(),
        "text": traces.windows.source,
        "neuron_budget": budget.mean().neurons,
        "head_budget": budget.mean().heads,
        "versions": {name: version(name) for name in ("shadowllm", "torch")},
    }
