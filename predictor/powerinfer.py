"""Read the neuron predictors that PowerInfer publishes as the networks of a layerwise predictor.

Source: PowerInfer (Song et al., arXiv 2312.12456) and its code. A folder holds ``model_0.pt``, ``model_1.pt`` and so
on, one file per layer of the model. Each has ``fc1.weight (width, hidden_size)`` and ``fc2.weight (intermediate_size,
width)``. A layer's scores are ``fc2 relu(fc1 h)``, where h is the hidden state before the norm of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from shadowllm.config import WIDEST
from shadowllm.errors import UserError, foreign_reader
from shadowllm.models.sparsity import SparseLayers

FC1, FC2 = "fc1.weight", "fc2.weight"


def read_networks(folder: Path, layers: SparseLayers, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the networks of the sparse layers, with their input changed to ours: the MLP's input after its norm.

    An RMSNorm gives ``x = w * h / r``, with r > 0. The networks have no biases, so ``fc2 relu((fc1 / w) x)`` is the
    score of `PowerInfer` over r, which gives the neurons of a token the same order. Networks that are narrower than
    others are padded with zeros, which changes no score.

    Args:
        folder: contains a file for each layer, ``.pt`` or ``.safetensors``.
        weights: canonical weights of the model, for its norms.

    Returns:
        The tensors ``layers.trunk`` and ``layers.neurons`` of a `Predictor` with ``normed=False``, float32.

    Raises:
        UserError: the model's MLP has no RMSNorm before it, a file is missing or holds more than tensors, or a tensor
            has another name, shape or numbers that are not finite.
    """
    spec = layers.spec
    if spec.norm != "rmsnorm" or not spec.pre_norm:
        raise UserError(
            f"PowerInfer's predictors of {spec.family} models are not read: they need the MLP's input before its norm",
            "train one: --selector layerwise",
        )
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"no such predictor: {folder} is no folder", "give the folder with model_0.pt and so on")
    if beyond := _file(folder, spec.n_layers):
        raise UserError(f"the model has {spec.n_layers} layers, and {beyond} is of one more", "give its own predictor")
    firsts, seconds = [], []
    for layer in layers.layers:
        fc1, fc2 = _read(folder, layer, spec.hidden_size, spec.intermediate_size)
        norm = weights[f"layers.{layer}.post_norm.weight"].float()
        if not norm.all():
            raise UserError(
                f"the norm before the MLP of layer {layer} has a weight of zero, which hides an input of the predictor",
                "train one: --selector layerwise",
            )
        firsts.append(fc1 / norm)
        seconds.append(fc2)
    width = max(len(fc1) for fc1 in firsts)
    trunk = torch.cat([F.pad(fc1, (0, 0, 0, width - len(fc1))) for fc1 in firsts])
    neurons = torch.cat([F.pad(fc2, (0, width - fc2.shape[1])) for fc2 in seconds])
    return {
        "layers.trunk.weight": trunk,
        "layers.trunk.bias": torch.zeros(len(trunk)),
        "layers.neurons.weight": neurons,
        "layers.neurons.bias": torch.zeros(len(neurons)),
    }


def _file(folder: Path, layer: int) -> Path | None:
    paths = (folder / f"model_{layer}{ending}" for ending in (".pt", ".safetensors"))
    return next((path for path in paths if path.is_file()), None)


def _read(folder: Path, layer: int, hidden_size: int, intermediate_size: int) -> tuple[Tensor, Tensor]:
    """Return the checked float32 matrices of one layer."""
    path = _file(folder, layer)
    if path is None:
        raise UserError(f"there is no model_{layer}.pt or model_{layer}.safetensors in {folder}", "download it again")
    tensors = _tensors(path)
    if tensors.keys() != {FC1, FC2}:
        odd = min(map(str, tensors.keys() ^ {FC1, FC2}))
        raise UserError(f"{path} should hold {FC1} and {FC2} alone: {odd} is missing or unknown", "give another file")
    fc1, fc2 = tensors[FC1], tensors[FC2]
    width = fc1.shape[0] if fc1.ndim else 0
    for name, tensor, shape in ((FC1, fc1, (width, hidden_size)), (FC2, fc2, (intermediate_size, width))):
        if tuple(tensor.shape) != shape or not 0 < width <= WIDEST:
            raise UserError(
                f"{name} of {path} has shape {tuple(tensor.shape)}, and the model needs {shape}",
                "give the predictor of this model",
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise UserError(f"{name} of {path} holds NaN, infinity or integers", "download it again")
    return fc1.float(), fc2.float()


def _tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors. Pickled code is never run."""
    with foreign_reader(f"{path} is damaged, or holds more than tensors, which could run code", "do not use this file"):
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
            raise ValueError("no dictionary of tensors")
        return found
