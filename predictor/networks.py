"""The shadow network: one small causal network that scores every head and neuron of the model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from shadowllm.errors import UserError
from shadowllm.models.spec import ModelSpec
from shadowllm.predictor.artefact import Predictor

NORM_EPS = 1e-5
MAX_RANK = 1024
RANK_STEP = 16
SHARE = 0.04


def scores(predictor: Predictor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of a static or shadow predictor; a token's depend on its own hidden state alone.

    ``out = W relu(T layer_norm(hidden) + t) + b``; the layer norm has no parameters and eps 1e-5,
    for what the network is to see is the direction of a hidden state, not its length.

    Args:
        hidden: input of the first sparse layer, float32 ``(tokens, hidden_size)``.

    Returns:
        Head scores ``(tokens, n_sparse, n_heads)`` and neuron scores ``(tokens, n_sparse, intermediate_size)``.
    """
    tensors = predictor.tensors
    if predictor.kind != "shadow":
        heads, neurons = (tensors[f"{unit}.scores"].expand(len(hidden), -1, -1) for unit in ("heads", "neurons"))
        return heads, neurons
    z = F.relu(F.linear(normalise(hidden), tensors["trunk.weight"], tensors["trunk.bias"]))
    heads, neurons = (F.linear(z, tensors[f"{unit}.weight"], tensors[f"{unit}.bias"]) for unit in ("heads", "neurons"))
    return heads.unflatten(1, (predictor.n_sparse, -1)), neurons.unflatten(1, (predictor.n_sparse, -1))


def layer_head_scores(predictor: Predictor, layer: int, x: Tensor) -> Tensor:
    """A quantised shadow's scores of one layer's heads, linear in the attention's input.

    Args:
        layer: of the model, a sparse one.
        x: normed attention input, float32 ``(..., hidden_size)``.

    Returns:
        Float32 ``(..., n_heads)``.
    """
    row = layer - predictor.dense_layers
    rows = slice(row * predictor.n_heads, (row + 1) * predictor.n_heads)
    return F.linear(x, predictor.tensors["layers.heads.weight"][rows], predictor.tensors["layers.heads.bias"][rows])


def normalise(hidden: Tensor) -> Tensor:
    """The network's input: a layer norm without parameters."""
    return F.layer_norm(hidden, hidden.shape[-1:], eps=NORM_EPS)


def default_rank(spec: ModelSpec, dense_layers: int) -> int:
    """Largest multiple of 16, up to 1024, that keeps the network under 4% of the model's parameters.

    Raises:
        UserError: not even 16 fits: the model is too small to be worth a shadow.
    """
    outputs = (spec.n_layers - dense_layers) * (spec.n_heads + spec.intermediate_size)
    # rank * (hidden_size + 1) in the trunk, outputs * (rank + 1) behind it
    rank = int((SHARE * spec.n_parameters - outputs) / (spec.hidden_size + 1 + outputs))
    rank = min(MAX_RANK, rank // RANK_STEP * RANK_STEP)
    if rank < RANK_STEP:
        raise UserError(
            f"a shadow of rank {RANK_STEP} exceeds {SHARE:.0%} of this model's parameters",
            "give --rank, or use a static predictor",
        )
    return rank


def initial_tensors(
    spec: ModelSpec, n_sparse: int, rank: int, heads: Tensor, neurons: Tensor, seed: int
) -> dict[str, Tensor]:
    """A network that starts as the static ranking: output weights zero, output biases as given.

    Args:
        heads: bias of each head, ``(n_sparse, n_heads)``.
        neurons: bias of each neuron, ``(n_sparse, intermediate_size)``.
        seed: of the trunk's random projection (normal, unit variance in and out).
    """
    generator = torch.Generator().manual_seed(seed)
    trunk = torch.randn(rank, spec.hidden_size, generator=generator) / spec.hidden_size**0.5
    return {
        "trunk.weight": trunk,
        "trunk.bias": torch.zeros(rank),
        "heads.weight": torch.zeros(n_sparse * spec.n_heads, rank),
        "heads.bias": heads.flatten().clone(),
        "neurons.weight": torch.zeros(n_sparse * spec.intermediate_size, rank),
        "neurons.bias": neurons.flatten().clone(),
    }
