"""The learned networks: one that scores the whole model ahead (shadow), and one in each layer (layerwise)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from shadowllm.bundle.predictor_file import Kind, Predictor
from shadowllm.errors import UserError
from shadowllm.models.sparsity import UNITS, SparseLayers, Unit

NORM_EPS = 1e-5
MAX_RANK = 1024
RANK_STEP = 16
SHARE = 0.04


def scores(predictor: Predictor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Scores ahead of the layers: a shadow's, or the static ranking; a token's depend on its own hidden state alone.

    ``out = W relu(T layer_norm(hidden) + t) + b``; the layer norm has no parameters and eps 1e-5,
    for what the network is to see is the direction of a hidden state, not its length.

    Args:
        hidden: input of the first sparse layer, float32 ``(tokens, hidden_size)``.

    Returns:
        Head scores ``(tokens, n_sparse, n_heads)`` and neuron scores ``(tokens, n_sparse, intermediate_size)``.
    """
    tensors = predictor.tensors
    if predictor.kind != "shadow":
        heads, neurons = (tensors[f"{unit}.scores"].expand(len(hidden), -1, -1) for unit in UNITS)
        return heads, neurons
    z = _trunk(hidden, tensors["trunk.weight"], tensors["trunk.bias"])
    heads, neurons = (F.linear(z, tensors[f"{unit}.weight"], tensors[f"{unit}.bias"]) for unit in UNITS)
    return heads.unflatten(1, (predictor.n_sparse, -1)), neurons.unflatten(1, (predictor.n_sparse, -1))


def layer_head_scores(predictor: Predictor, layer: int, x: Tensor) -> Tensor:
    """Scores of one layer's heads, linear in the attention's input (see `linear_fit`).

    Args:
        layer: of the model, a sparse one.
        x: normed attention input, float32 ``(..., hidden_size)``.

    Returns:
        Float32 ``(..., n_heads)``.
    """
    return F.linear(x, _layer(predictor, layer, "heads.weight"), _layer(predictor, layer, "heads.bias"))


def layer_neuron_scores(predictor: Predictor, layer: int, x: Tensor) -> Tensor:
    """A layerwise network's scores of one layer's neurons, by the formula of `scores` on the layer's own input.

    Source: the MLP predictor of DejaVu (Liu et al., arXiv 2310.17157), which looks one layer ahead;
    here it reads the very input of its own layer.

    Args:
        layer: of the model, a sparse one.
        x: normed MLP input, float32 ``(..., hidden_size)``.

    Returns:
        Float32 ``(..., intermediate_size)``.
    """
    z = _trunk(x, _layer(predictor, layer, "trunk.weight"), _layer(predictor, layer, "trunk.bias"))
    return F.linear(z, _layer(predictor, layer, "neurons.weight"), _layer(predictor, layer, "neurons.bias"))


def layerwise_scores(predictor: Predictor, inputs: Mapping[Unit, Tensor]) -> dict[Unit, Tensor]:
    """`layer_head_scores` and `layer_neuron_scores` of all sparse layers at once, as training wants them.

    Args:
        inputs: what each layer's units are computed from, float32 ``(tokens, n_sparse, hidden_size)``.

    Returns:
        Float32 ``(tokens, n_sparse, n_units)`` of heads and of neurons.
    """
    # One batched product: the gradient of a layer's slice would be a tensor of all layers' size, for every layer.
    x = {unit: stacked.transpose(0, 1) for unit, stacked in inputs.items()}
    z = F.relu(_linears(predictor, "trunk", F.layer_norm(x["neurons"], x["neurons"].shape[-1:], eps=NORM_EPS)))
    heads, neurons = _linears(predictor, "heads", x["heads"]), _linears(predictor, "neurons", z)
    return {"heads": heads.transpose(0, 1), "neurons": neurons.transpose(0, 1)}


def _linears(predictor: Predictor, name: str, x: Tensor) -> Tensor:
    """Each layer's own linear map of its own ``x[layer]``, ``(n_sparse, tokens, width)``."""
    weight, bias = (
        predictor.tensors[f"layers.{name}.{part}"].unflatten(0, (predictor.n_sparse, -1)) for part in ("weight", "bias")
    )
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def _layer(predictor: Predictor, layer: int, name: str) -> Tensor:
    """The rows of a stacked tensor that belong to a layer."""
    return predictor.tensors[f"layers.{name}"].unflatten(0, (predictor.n_sparse, -1))[layer - predictor.dense_layers]


def _trunk(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.linear(F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), weight, bias))


def default_rank(layers: SparseLayers, kind: Kind = "shadow", share: float = SHARE) -> int:
    """Largest multiple of 16, up to 1024, that keeps a model's networks under a share of its parameters.

    Raises:
        UserError: not even 16 fits: the model is too small to be worth a network.
    """
    spec, n_sparse = layers.spec, layers.count
    outputs = n_sparse * (spec.intermediate_size + (spec.n_heads if kind == "shadow" else 0))
    trunks = n_sparse if kind == "layerwise" else 1
    # rank * (hidden_size + 1) in each trunk, outputs * (rank + 1) behind them
    rank = int((share * spec.n_parameters - outputs) / (trunks * (spec.hidden_size + 1) + outputs))
    rank = min(MAX_RANK, rank // RANK_STEP * RANK_STEP)
    if rank < RANK_STEP:
        raise UserError(
            f"{kind} networks of rank {RANK_STEP} exceed {share:.0%} of this model's parameters",
            "give --rank, or use a static predictor",
        )
    return rank


def initial_tensors(
    kind: Kind, layers: SparseLayers, rank: int, heads: Tensor, neurons: Tensor, seed: int
) -> dict[str, Tensor]:
    """Networks that start as the static ranking: output weights zero, output biases as given.

    Args:
        kind: "shadow" or "layerwise".
        heads: bias of each head, ``(n_sparse, n_heads)``; a shadow's alone.
        neurons: bias of each neuron, ``(n_sparse, intermediate_size)``.
        seed: of the trunks' random projections (normal, unit variance in and out).
    """
    prefix, trunks = ("layers.", layers.count) if kind == "layerwise" else ("", 1)
    width = layers.spec.hidden_size
    generator = torch.Generator().manual_seed(seed)
    found = {
        "trunk.weight": torch.randn(trunks * rank, width, generator=generator) / width**0.5,
        "trunk.bias": torch.zeros(trunks * rank),
    }
    for unit, bias in (("heads", heads), ("neurons", neurons)):
        if unit == "neurons" or kind == "shadow":
            found[f"{unit}.weight"] = torch.zeros(bias.numel(), rank)
            found[f"{unit}.bias"] = bias.flatten().clone()
    return {f"{prefix}{name}": tensor for name, tensor in found.items()}
