"""Read a bundle's weights and predictor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shadowllm.bundle.manifest import DATA_FILE, Manifest, verify_files
from shadowllm.bundle.predictor_file import Predictor
from shadowllm.bundle.quantisation import LOW_BIT_COPY, dequantise
from shadowllm.bundle.quantised_tensors import dequantised_predictor, dequantised_weights
from shadowllm.bundle.weight_file import TORCH_DTYPES, WeightStore
from shadowllm.bundle.weight_layout import Group, copy_groups, model_groups
from shadowllm.bundle.weight_names import (
    base,
    copied_names,
    copy_errors,
    copy_weighting,
    integers,
    low_bit_copy,
    output_table,
    scales,
)
from shadowllm.models.sparse_decoder import Certificate
from shadowllm.models.weights import tensor_shape

PREDICTOR_FILE = "predictor.safetensors"


@dataclass(frozen=True)
class BundleWeights:
    """A bundle's weights in float32, and its predictor.

    Attributes:
        sparse: canonical weights as in ``body``.
        dense: as in ``dense`` and ``stem``; they differ from ``sparse`` only in the rounding of integers.
        copies: values of the low-bit copy by canonical name; None if the bundle has no copy of all matrices.
        certificate: of the largest logit; None without copies.
    """

    sparse: Mapping[str, Tensor]
    dense: Mapping[str, Tensor]
    predictor: Predictor
    copies: Mapping[str, Tensor] | None = None
    certificate: Certificate | None = None


def read_weights(folder: Path, manifest: Manifest) -> BundleWeights:
    """Read the weights of a bundle.

    Raises:
        UserError: a file is damaged.
    """
    stored, predictor, spec, q = *map_weights(folder, manifest), manifest.spec, manifest.quantisation
    copied = manifest.rest == "shadow"
    rest = (_read_copies(folder, manifest), _read_certificate(folder, manifest)) if copied else (None, None)
    if q is None:
        weights = {name: tensor.float() for name, tensor in stored.items()}
        return BundleWeights(weights, weights, predictor, *rest)
    names = {base(name): None for name in stored}  # ordered, without duplicates
    sparse, dense = dequantised_weights(spec, names, stored, q)
    return BundleWeights(sparse, dense, dequantised_predictor(predictor, q), *rest)


def _read_copies(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    layers, stored = manifest.sparse_layers, map_copies(folder, manifest)

    def restored(name: str) -> Tensor:
        data, factors = (stored[part(low_bit_copy(name))].numpy() for part in (integers, scales))
        return torch.from_numpy(dequantise(data, factors, tensor_shape(layers.spec, name)[1], LOW_BIT_COPY).copy())

    return {name: restored(name) for name in copied_names(layers, rest=True)}


def _read_certificate(folder: Path, manifest: Manifest) -> Certificate:
    stored, table = map_copies(folder, manifest), output_table(manifest.spec)
    return Certificate(stored[copy_errors(table)].clone(), stored[copy_weighting(table)].clone())


def map_weights(folder: Path, manifest: Manifest) -> tuple[dict[str, Tensor], Predictor]:
    """Map the model's stored tensors into memory without reading them, and load the predictor.

    Raises:
        UserError: a file is damaged.
    """
    verify_files(folder, manifest.digests(DATA_FILE, PREDICTOR_FILE))
    stored = _mapped(folder, model_groups(manifest.spec, manifest.dtype, manifest.quantisation))
    return stored, Predictor.load(folder / PREDICTOR_FILE)


def map_copies(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Map a low-bit copy's tensors like `map_weights`, which must have checked the file."""
    q = manifest.quantisation
    nested = q is not None and q.residual_bits > 0
    copies = copy_groups(manifest.sparse_layers, manifest.rest == "shadow", nested)
    return _mapped(folder, chain(model_groups(manifest.spec, manifest.dtype, q), copies))


def _mapped(folder: Path, groups: Iterator[Group]) -> dict[str, Tensor]:
    """Map the tensors of the data file by name, without reading them."""
    store = WeightStore(folder / DATA_FILE, groups)
    data = np.memmap(store.path, dtype=np.uint8, mode="c")
    return {
        name: torch.from_numpy(data[e.offset : e.offset + e.length]).view(TORCH_DTYPES[e.dtype]).view(e.shape)
        for name, e in store.entries.items()
    }
