"""Read a bundle's weights and predictor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from torch import Tensor

from shadowllm.bundle.manifest import DATA_FILE, Manifest, verify_files
from shadowllm.bundle.predictor_file import Predictor
from shadowllm.bundle.quantisation import slices
from shadowllm.bundle.quantised_tensors import dequantised_copy, dequantised_predictor, dequantised_weights
from shadowllm.bundle.weight_file import TORCH_DTYPES, MappedTensors, WeightStore
from shadowllm.bundle.weight_layout import copy_groups, model_groups
from shadowllm.bundle.weight_names import (
    base,
    copied_names,
    copy_errors,
    copy_weighting,
    integers,
    low_bit_copy,
    scales,
)
from shadowllm.models.sparse_decoder import Certificate, ComputedCopies
from shadowllm.models.weights import Floats, tensor_shape

PREDICTOR_FILE = "predictor.safetensors"


@dataclass(frozen=True)
class BundleWeights:
    """A bundle's weights in float32, and its predictor.

    Floats and copies are read whenever they are used; see `kept`.

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

    def kept(self) -> BundleWeights:
        """Return the same, all in memory, for a session, each step of which reads all of it."""
        sparse = dict(self.sparse)
        dense = sparse if self.dense is self.sparse else dict(self.dense)
        return replace(self, sparse=sparse, dense=dense, copies=None if self.copies is None else dict(self.copies))


def read_weights(folder: Path, manifest: Manifest) -> BundleWeights:
    """Read the weights of a bundle.

    Raises:
        UserError: a file is damaged.
    """
    stored, predictor, spec, q = *map_weights(folder, manifest), manifest.spec, manifest.quantisation
    copied = manifest.rest == "shadow"
    rest = (StoredCopies(folder, manifest), _read_certificate(folder, manifest)) if copied else (None, None)
    if q is None:
        weights = Floats(stored)
        return BundleWeights(weights, weights, predictor.rounded(TORCH_DTYPES[manifest.dtype]), *rest)
    names = {base(name): None for name in stored}  # ordered, without duplicates
    sparse, dense = dequantised_weights(spec, names, stored, q)
    return BundleWeights(sparse, dense, dequantised_predictor(predictor, q), *rest)


class StoredCopies(ComputedCopies):
    """Float32 values of a bundle's low-bit copy, by canonical name.

    Each is computed from its integers whenever it is read, because all of them are as large as the model in float32.
    ``dict`` of this keeps them.

    Args:
        folder: a bundle with ``rest`` "shadow", whose data file was checked.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._spec, self._stored = manifest.spec, map_copies(folder, manifest)
        self._names = tuple(copied_names(manifest.sparse_layers, rest=True))

    def __getitem__(self, name: str) -> Tensor:
        return dequantised_copy(*self._integers(name), tensor_shape(self._spec, name)[1])

    def parts(self, name: str) -> Iterator[Tensor]:
        """See `ComputedCopies.parts`."""
        data, factors = self._integers(name)
        width = tensor_shape(self._spec, name)[1]
        for rows in slices(data.numpy()):
            yield dequantised_copy(data[rows], factors[rows], width)

    def _integers(self, name: str) -> tuple[Tensor, Tensor]:
        """The integers and scales of a matrix."""
        if name not in self._names:
            raise KeyError(name)
        data, factors = (self._stored[part(low_bit_copy(name))] for part in (integers, scales))
        return data, factors

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read_certificate(folder: Path, manifest: Manifest) -> Certificate:
    stored, table = map_copies(folder, manifest), manifest.spec.output_table
    return Certificate(stored[copy_errors(table)].clone(), stored[copy_weighting(table)].clone())


def map_weights(folder: Path, manifest: Manifest) -> tuple[Mapping[str, Tensor], Predictor]:
    """Map the model's stored tensors into memory without reading them, and load the predictor.

    Raises:
        UserError: a file is damaged.
    """
    verify_files(folder, manifest.digests(DATA_FILE, PREDICTOR_FILE))
    groups = model_groups(manifest.spec, manifest.dtype, manifest.quantisation)
    stored = MappedTensors(WeightStore(folder / DATA_FILE, groups))
    return stored, Predictor.load(folder / PREDICTOR_FILE)


def map_copies(folder: Path, manifest: Manifest) -> Mapping[str, Tensor]:
    """Map a low-bit copy's tensors like `map_weights`, which must have checked the file."""
    q = manifest.quantisation
    nested = q is not None and q.residual_bits > 0
    copies = copy_groups(manifest.sparse_layers, manifest.rest == "shadow", nested)
    groups = chain(model_groups(manifest.spec, manifest.dtype, q), copies)
    return MappedTensors(WeightStore(folder / DATA_FILE, groups))
