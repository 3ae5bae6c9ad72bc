"""The trained networks: one that scores all sparse layers upfront (shadow), or one in each layer (layerwise)."""

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
    """Score all sparse layers upfront: by the network of a shadow, or by the static ranking.

    The network is ``out = W relu(T layer_norm(hidden) + t) + b``. The layer norm has no parameters and eps 1e-5: the
    network should see the direction of a hidden state, not its length. Without `Predictor.normed`, it is left out.

    Args:
        hidden: input of the first sparse layer, float32 ``(tokens, hidden_size)``.

    Returns:
        Head scores ``(tokens, n_sparse, n_heads)`` and neuron scores ``(tokens, n_sparse, intermediate_size)``.
    """
    tensors = predictor.tensors
    if predictor.kind != "shadow":
        heads, neurons = (tensors[f"{unit}.scores"].expand(len(hidden), -1, -1) for unit in UNITS)
        return heads, neurons
    z = _trunk(predictor, hidden, tensors["trunk.weight"], tensors["trunk.bias"])
    heads, neurons = (F.linear(z, tensors[f"{unit}.weight"], tensors[f"{unit}.bias"]) for unit in UNITS)
    return heads.unflatten(1, (predictor.n_sparse, -1)), neurons.unflatten(1, (predictor.n_sparse, -1))


def layer_head_scores(predictor: Predictor, layer: int, x: Tensor) -> Tensor:
    """Score the heads of one layer by the linear map of the attention's input (see `linear_fit`).

    Args:
        layer: index of a sparse layer in the model.
        x: normed attention input, float32 ``(..., hidden_size)``.

    Returns:
        Float32 ``(..., n_heads)``.
    """
    return F.linear(x, _layer(predictor, layer, "heads.weight"), _layer(predictor, layer, "heads.bias"))


def layer_neuron_scores(predictor: Predictor, layer: int, x: Tensor) -> Tensor:
    """Score the neurons of one layer by its network, with the formula of `scores` on the MLP's input.

    Source: the MLP predictor of DejaVu (Liu et al., arXiv 2310.17157). That one predicts one layer ahead; this
    one reads the input of its own layer.

    Args:
        layer: index of a sparse layer in the model.
        x: normed MLP input, float32 ``(..., hidden_size)``.

    Returns:
        Float32 ``(..., intermediate_size)``.
    """
    z = _trunk(predictor, x, _layer(predictor, layer, "trunk.weight"), _layer(predictor, layer, "trunk.bias"))
    return F.linear(z, _layer(predictor, layer, "neurons.weight"), _layer(predictor, layer, "neurons.bias"))


def layerwise_scores(predictor: Predictor, inputs: Mapping[Unit, Tensor]) -> dict[Unit, Tensor]:
    """Return `layer_head_scores` and `layer_neuron_scores` of all sparse layers, for training.

    Args:
        inputs: normed inputs of each layer's attention and MLP, float32 ``(tokens, n_sparse, hidden_size)``.

    Returns:
        Float32 ``(tokens, n_sparse, n_units)`` of heads and of neurons.
    """
    # One batched product. With one product per layer, the gradient of each slice would be as large as the whole tensor.
    x = {unit: stacked.transpose(0, 1) for unit, stacked in inputs.items()}
    z = F.relu(_linears(predictor, "trunk", _normed(predictor, x["neurons"])))
    heads, neurons = _linears(predictor, "heads", x["heads"]), _linears(predictor, "neurons", z)
    return {"heads": heads.transpose(0, 1), "neurons": neurons.transpose(0, 1)}


def _linears(predictor: Predictor, name: str, x: Tensor) -> Tensor:
    """Apply the linear map of each layer to its part of ``x``, ``(n_sparse, tokens, width)``."""
    weight, bias = (
        predictor.tensors[f"layers.{name}.{part}"].unflatten(0, (predictor.n_sparse, -1)) for part in ("weight", "bias")
    )
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def _layer(predictor: Predictor, layer: int, name: str) -> Tensor:
    """Return the rows of a stacked tensor that belong to a layer."""
    return predictor.tensors[f"layers.{name}"].unflatten(0, (predictor.n_sparse, -1))[layer - predictor.dense_layers]


def _trunk(predictor: Predictor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.linear(_normed(predictor, x), weight, bias))


def _normed(predictor: Predictor, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) if predictor.normed else x


def default_rank(layers: SparseLayers, kind: str = "shadow", share: float = SHARE) -> int:
    """Return the largest rank that keeps the networks under a share of the model's parameters.

    It is a multiple of 16, at most 1024.

    Raises:
        UserError: rank 16 is already too large, because the model is small.
    """
    spec, n_sparse = layers.spec, layers.count
    outputs = n_sparse * (spec.intermediate_size + (spec.n_heads if kind == "shadow" else 0))
    trunks = n_sparse if kind == "layerwise" else 1
    # Parameters: rank * (hidden_size + 1) in each trunk, and outputs * (rank + 1) in the output layers.
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
    """Make networks with output weights of zero and the given output biases, so that they start as the static ranking.

    Args:
        kind: "shadow" or "layerwise".
        heads: bias of each head, ``(n_sparse, n_heads)``; used only for a shadow.
        neurons: bias of each neuron, ``(n_sparse, intermediate_size)``.
        seed: seed of the trunks' random weights (normal; inputs of unit variance give outputs of unit variance).
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
