"""Training of predictors on traces, and their evaluation on held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from shadowllm.bundle.predictor_file import FINAL_SQUARES, Kind, Predictor
from shadowllm.config import DEFAULT_BUDGET, TrainConfig
from shadowllm.errors import UserError
from shadowllm.models.sparsity import UNITS, Budget, SparseLayers, Unit, layer_units
from shadowllm.models.spec import ModelSpec
from shadowllm.predictor.losses import LOSSES, initial_bias
from shadowllm.predictor.networks import default_rank, initial_tensors, layerwise_scores, scores
from shadowllm.predictor.parallel import Workers
from shadowllm.predictor.powerinfer import check_source, read_networks
from shadowllm.predictor.topk import recall, top_mask
from shadowllm.predictor.tracefile import Traces
from shadowllm.predictor.traces import Chunk, Tracer, scored_positions
from shadowllm.progress import Advance, no_progress


def train_static(
    spec: ModelSpec,
    traces: Traces,
    *,
    kind: Kind = "static",
    budget: Budget = DEFAULT_BUDGET,
    weights: Mapping[str, Tensor] | None = None,
) -> Predictor:
    """Make a predictor from the result of calibration alone, without training.

    Args:
        kind: "static", or "quantized-shadow", which scores heads by their linear fit and neurons by a low-bit copy.
        budget: the budget at which the recall of the ranking on the held-out tokens is recorded.
        weights: canonical float32 tensors; needed only if the traces were too large to keep.
    """
    predictor = _predictor(kind, spec, traces, {})
    found = evaluate_recall(spec, predictor, traces, budget, tracer=_tracer(spec, traces, weights))
    return replace(predictor, record=_record(traces, budget) | {"held_out": {"static": found}})


def random_predictor(spec: ModelSpec, fingerprint: str, dense_layers: int, seed: int) -> Predictor:
    """Make a random ranking. It has the right shape and cost, but no quality.

    Args:
        fingerprint: `Weights.fingerprint` of the model.
    """
    generator, n_sparse = torch.Generator().manual_seed(seed), SparseLayers(spec, dense_layers).count
    tensors = {
        f"{unit}.scores": torch.rand(n_sparse, width, generator=generator) for unit, width in layer_units(spec).items()
    }
    return Predictor(
        "static",
        n_sparse,
        dense_layers,
        spec.n_heads,
        spec.intermediate_size,
        spec.hidden_size,
        tensors,
        fingerprint,
        {"ranking": "random", "seed": seed},
    )


def train_network(
    spec: ModelSpec,
    traces: Traces,
    config: TrainConfig | None = None,
    *,
    kind: Kind = "shadow",
    weights: Mapping[str, Tensor] | None = None,
    advance: Advance = no_progress,
) -> Predictor:
    """Train one network for all sparse layers ("shadow"), or one in each layer ("layerwise").

    Training starts from the static ranking. Several processes (see `Workers`) share the windows and train the
    same network.

    Args:
        kind: "shadow" or "layerwise".
        weights: canonical float32 tensors, to compute the traces again. Needed if the traces were too large to
            keep, and by layerwise networks, whose inputs are not kept.
        advance: called with the number of tokens trained on since the last call. The total is the number of
            training tokens times the epochs.

    Returns:
        A predictor. Its record has loss and recall@k on the held-out tokens, after training (under its kind) and
        before ("static").

    Raises:
        UserError: the model is too small for a network, or traces must be computed and ``weights`` is missing.
    """
    config = config or TrainConfig()
    tracer, workers = _tracer(spec, traces, weights), Workers()
    epochs = config.passes(tracer is not None)
    start = initial(kind, spec, traces, config)
    windows = workers.share(torch.arange(len(traces.windows.train)))
    positions = scored_positions(traces.criterion, traces.windows.train.shape[1])
    trainer = Trainer(spec, start, config, epochs * len(windows) * positions, workers)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(epochs):
        order = windows[torch.randperm(len(windows), generator=generator)]
        for chunk in traces.training(tracer, order):
            trainer.learn(chunk)
            advance(chunk.tokens * workers.count)
    trained = trainer.predictor()
    settings = {
        "loss": config.loss,
        "epochs": epochs,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "batch_tokens": config.batch_tokens,
        "processes": workers.count,
        "rank": trained.rank,
        "seed": config.seed,
    }
    judged = _judged(spec, traces, config, tracer, {kind: trained, "static": start})
    return replace(trained, record=_record(traces, config.budget) | settings | judged)


def check_import(kind: str, config: TrainConfig) -> None:
    """Refuse what no networks of PowerInfer can be imported for, before any work.

    Raises:
        UserError: there are none at the path, or another kind of predictor was asked for.
    """
    if kind != "layerwise":
        raise UserError(f"networks of PowerInfer make a layerwise predictor, not {kind}", "leave out --selector")
    if config.powerinfer is not None:
        check_source(config.powerinfer)


def import_networks(
    spec: ModelSpec, traces: Traces, config: TrainConfig, kind: str, weights: Mapping[str, Tensor]
) -> Predictor:
    """Make a layerwise predictor of the networks that PowerInfer published. Nothing is trained.

    Args:
        config: names the files of the networks, see `powerinfer.read_networks`.
        kind: of predictor that was asked for.
        weights: canonical float32 tensors.

    Returns:
        A predictor. Its record has recall@k on the held-out tokens, and that of the static ranking.

    Raises:
        UserError: the networks cannot be read or do not fit the model, or another kind was asked for.
    """
    assert config.powerinfer is not None
    check_import(kind, config)
    networks = read_networks(config.powerinfer, SparseLayers(spec, traces.dense_layers), weights)
    static = _predictor("static", spec, traces, {})
    found = replace(_predictor("layerwise", spec, traces, networks), normed=False)
    judged = _judged(spec, traces, config, _tracer(spec, traces, weights), {"layerwise": found, "static": static})
    settings = {"networks": "PowerInfer", "rank": found.rank}
    return replace(found, record=_record(traces, config.budget) | settings | judged)


def _judged(
    spec: ModelSpec, traces: Traces, config: TrainConfig, tracer: Tracer | None, predictors: Mapping[str, Predictor]
) -> dict[str, Any]:
    """Return the recall and the loss of predictors, by name, for a record."""
    return {
        "held_out": {
            name: evaluate_recall(spec, predictor, traces, config.budget, config.loss, tracer)
            for name, predictor in predictors.items()
        }
    }


class Trainer:
    """Trains one network on chunks of traces.

    Args:
        start: a network that `initial` made.
        total: number of tokens that this process will train on; the learning rate reaches zero there.
        workers: the processes that train the same network, each on its own tokens.
    """

    def __init__(
        self, spec: ModelSpec, start: Predictor, config: TrainConfig, total: int, workers: Workers | None = None
    ) -> None:
        self._config, self._total, self._workers = config, total, workers or Workers()
        self._loss, self._counts = LOSSES[config.loss], _counts(SparseLayers(spec, start.dense_layers), config.budget)
        self._learned = {name: start.tensors[name].clone().requires_grad_() for name in sorted(start.learned)}
        self._network = replace(start, tensors=start.tensors | self._learned)
        outputs = [
            tensor for name, tensor in self._learned.items() if name.endswith(("heads.weight", "neurons.weight"))
        ]
        others = [
            tensor for name, tensor in self._learned.items() if not name.endswith(("heads.weight", "neurons.weight"))
        ]
        self._optimiser = torch.optim.AdamW(
            [{"params": outputs, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate,
            fused=True,
        )
        self._order = torch.Generator().manual_seed(config.seed)
        self.seen = 0

    def learn(self, chunk: Chunk) -> None:
        """Train on the tokens of a chunk once, in random order."""
        for rows in torch.randperm(chunk.tokens, generator=self._order).split(self._config.batch_tokens):
            self._step(chunk[rows])

    def predictor(self) -> Predictor:
        """Return a copy of the network in its current state."""
        return replace(self._network, tensors={name: t.detach().clone() for name, t in self._network.tensors.items()})

    def _step(self, batch: Chunk) -> None:
        found = [
            self._loss(predicted, batch.importance(unit), self._counts[unit])
            for unit, predicted in chunk_scores(self._network, batch).items()
            if predicted.requires_grad
        ]
        self._optimiser.zero_grad()
        torch.stack(found).sum().backward()
        self._workers.average([tensor.grad for tensor in self._learned.values()])
        for group in self._optimiser.param_groups:
            group["lr"] = self._config.learning_rate * 0.5 * (1 + math.cos(math.pi * self.seen / self._total))
        self._optimiser.step()
        self.seen += batch.tokens


def chunk_scores(predictor: Predictor, chunk: Chunk) -> dict[Unit, Tensor]:
    """Return a predictor's scores of traced tokens, ``(tokens, n_sparse, n_units)`` for heads and for neurons.

    Raises:
        UserError: the networks are layerwise, and the traces come from a file, which has no inputs of layers.
    """
    if predictor.kind != "layerwise":
        return dict(zip(UNITS, scores(predictor, chunk.hidden), strict=True))
    if not chunk.inputs:
        raise UserError("traces keep no inputs of the layers", "give the model, so that training can trace anew")
    return layerwise_scores(predictor, chunk.inputs)


@torch.no_grad()
def evaluate_recall(
    spec: ModelSpec,
    predictor: Predictor,
    traces: Traces,
    budget: Budget,
    loss: str | None = None,
    tracer: Tracer | None = None,
) -> dict[str, float]:
    """Measure recall@k at a budget, and optionally a loss, on the held-out tokens.

    Returns:
        ``head_recall``, ``neuron_recall`` and, if ``loss`` is given and the predictor is a network, ``loss``, the sum
        over the units that were trained. Each is a mean over tokens and layers.
    """
    counts = _counts(SparseLayers(spec, traces.dense_layers), budget)
    loss = loss if predictor.learned else None
    sums: dict[str, float] = {"head_recall": 0.0, "neuron_recall": 0.0} | ({"loss": 0.0} if loss else {})
    tokens = 0
    for chunk in traces.held_out(tracer):
        n = chunk.tokens
        for unit, predicted in chunk_scores(predictor, chunk).items():
            wanted = chunk.importance(unit)
            sums[f"{unit[:-1]}_recall"] += n * recall(top_mask(predicted, counts[unit]), top_mask(wanted, counts[unit]))
            if loss and any(unit in name for name in predictor.learned):
                sums["loss"] += n * float(LOSSES[loss](predicted, wanted, counts[unit]))
        tokens += n
    return {name: value / tokens for name, value in sums.items()}


@torch.no_grad()
def initial(kind: Kind, spec: ModelSpec, traces: Traces, config: TrainConfig) -> Predictor:
    """Make an untrained network ("shadow" or "layerwise") that ranks as static does.

    Only the heads of a layerwise predictor rank differently: they use the linear fit.

    Raises:
        UserError: the config gives no rank, and the model is too small for the default one.
    """
    layers = SparseLayers(spec, traces.dense_layers)
    rank = config.rank or default_rank(layers, kind)
    biases = {
        unit: initial_bias(traces.statistics[unit], count, config.loss)
        for unit, count in _counts(layers, config.budget).items()
    }
    tensors = initial_tensors(kind, layers, rank, biases["heads"], biases["neurons"], config.seed)
    return _predictor(kind, spec, traces, tensors)


def _predictor(kind: Kind, spec: ModelSpec, traces: Traces, tensors: Mapping[str, Tensor]) -> Predictor:
    """Make a predictor of the given tensors and the results of calibration: the rankings and the fit of the heads."""
    rankings = {f"{unit}.scores": traces.statistics[unit] for unit in UNITS} | {FINAL_SQUARES: traces.final_squares}
    fit = {f"layers.heads.{name}": tensor for name, tensor in traces.fit.items()}
    return Predictor(
        kind,
        SparseLayers(spec, traces.dense_layers).count,
        traces.dense_layers,
        spec.n_heads,
        spec.intermediate_size,
        spec.hidden_size,
        rankings | fit | dict(tensors),
        traces.base_fingerprint,
    )


def _counts(layers: SparseLayers, budget: Budget) -> dict[Unit, int]:
    """Return the number of units to keep in a layer. Training uses the mean budget for all layers."""
    counts = budget.mean().counts(layers)
    return {unit: int(counts[unit][0]) for unit in UNITS}


def _tracer(spec: ModelSpec, traces: Traces, weights: Mapping[str, Tensor] | None) -> Tracer | None:
    return None if weights is None else Tracer(spec, weights, traces.criterion, traces.dense_layers)


def _record(traces: Traces, budget: Budget) -> dict[str, Any]:
    return {
        "criterion": traces.criterion,
        "tokens": traces.windows.train.numel(),
        "held_out_tokens": traces.windows.held_out.numel(),
        "text": traces.windows.source,
        "text_seed": traces.windows.seed,
        "neuron_budget": budget.mean().neurons,
        "head_budget": budget.mean().heads,
        "versions": {name: version(name) for name in ("shadowllm", "torch")},
    }
