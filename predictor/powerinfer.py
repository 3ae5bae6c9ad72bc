"""Read the neuron predictors that PowerInfer publishes as the networks of a layerwise predictor.

Source: PowerInfer (Song et al., arXiv 2312.12456) and its code. A folder holds ``model_0.pt``, ``model_1.pt`` and so
on, one file per layer of the model. Each has ``fc1.weight (width, hidden_size)`` and ``fc2.weight (intermediate_size,
width)``. PowerInfer's GGUF files have the same tensors, as ``blk.0.fc1.weight``, beside the model. A layer's scores are
``fc2 relu(fc1 h)``, where h is the hidden state before the norm of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from shadowllm.config import WIDEST
from shadowllm.errors import UserError, foreign_reader
from shadowllm.limits import check_path
from shadowllm.models.sparsity import SparseLayers

FC1, FC2 = "fc1.weight", "fc2.weight"
MAGIC = b"PWRI"
FOR_THIS_MODEL = "give the predictor of this model"
Stored = Callable[[int], dict[str, Tensor]]  # the tensors of a layer; empty if there are none


def read_networks(source: Path, layers: SparseLayers, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the networks of the sparse layers, with their input changed to ours: the MLP's input after its norm.

    An RMSNorm gives ``x = w * h / r``, with r > 0. The networks have no biases, so ``fc2 relu((fc1 / w) x)`` is the
    score of `PowerInfer` over r, which gives the neurons of a token the same order. Networks that are narrower than
    others are padded with zeros, which changes no score.

    Args:
        source: a folder with a ``.pt`` or ``.safetensors`` file for each layer, or a ``.gguf`` file.
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
    stored = _open(check_path("the predictor of PowerInfer", source))
    if stored(spec.n_layers):
        raise UserError(f"{source} has networks of more layers than the model's {spec.n_layers}", FOR_THIS_MODEL)
    firsts, seconds = [], []
    for layer in layers.layers:
        tensors = stored(layer)
        if not tensors:
            raise UserError(f"{source} has no network of layer {layer}", "it is incomplete: download it again")
        place = f"the network of layer {layer} in {source}"
        fc1, fc2 = _checked(place, tensors, spec.hidden_size, spec.intermediate_size)
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


def _checked(place: str, tensors: dict[str, Tensor], hidden_size: int, intermediate_size: int) -> tuple[Tensor, Tensor]:
    """Return the checked float32 matrices of one layer."""
    if tensors.keys() != {FC1, FC2}:
        odd = min(map(str, tensors.keys() ^ {FC1, FC2}))
        raise UserError(f"{place} should have {FC1} and {FC2} alone: {odd} is missing or unknown", "give another file")
    fc1, fc2 = tensors[FC1], tensors[FC2]
    width = fc1.shape[0] if fc1.ndim else 0
    for name, tensor, shape in ((FC1, fc1, (width, hidden_size)), (FC2, fc2, (intermediate_size, width))):
        if tuple(tensor.shape) != shape or not 0 < width <= WIDEST:
            raise UserError(
                f"{name} of {place} has shape {tuple(tensor.shape)}, and the model needs {shape}", FOR_THIS_MODEL
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise UserError(f"{name} of {place} holds NaN, infinity or integers", "download it again")
    return fc1.float(), fc2.float()


def check_source(source: Path) -> None:
    """Refuse a path where no predictor can be.

    Raises:
        UserError: it is neither a folder nor a GGUF file.
    """
    if not source.is_dir() and not (source.suffix == ".gguf" and source.is_file()):
        raise UserError(
            f"no such predictor: {source} is no folder and no GGUF file", "give the folder with model_0.pt and so on"
        )


def _open(source: Path) -> Stored:
    check_source(source)
    return partial(_from_folder, source) if source.is_dir() else _gguf(source)


def _from_folder(folder: Path, layer: int) -> dict[str, Tensor]:
    paths = (folder / f"model_{layer}{ending}" for ending in (".pt", ".safetensors"))
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return {}
    # Pickled code is never run.
    with foreign_reader(f"{path} is damaged, or holds more than tensors, which could run code", "do not use this file"):
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
            raise ValueError("no dictionary of tensors")
        return found


def _gguf(path: Path) -> Stored:
    try:
        import gguf
    except ImportError as error:
        raise UserError("reading GGUF needs the gguf package", "pip install 'shadowllm[gguf]'") from error

    class Reader(gguf.GGUFReader):
        """Reads PowerInfer's files, which begin with other four bytes, as those of GGUF."""

        def _get(self, offset: int, *arguments: Any, **keywords: Any) -> Any:
            found = super()._get(offset, *arguments, **keywords)
            return found.dtype.type([gguf.GGUF_MAGIC]) if offset == 0 and found.tobytes() == MAGIC else found

    with foreign_reader(f"{path} is damaged or truncated", "download the GGUF file again"):
        tensors = {tensor.name: tensor for tensor in Reader(path).tensors}

    def read(layer: int) -> dict[str, Tensor]:
        names = {name: f"blk.{layer}.{name}" for name in (FC1, FC2) if f"blk.{layer}.{name}" in tensors}
        arrays = {name: gguf.dequantize(tensors[n].data, tensors[n].tensor_type) for name, n in names.items()}
        return {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}

    return read
