"""Bundles with an untrained predictor: shapes are right, scores mean nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shadowllm.bundle.manifest import Manifest
from shadowllm.bundle.predictor_file import Predictor
from shadowllm.bundle.weights import BundleWeights, read_weights
from shadowllm.exporter.write_bundle import write_bundle
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import Budget, SparseLayers, layer_units
from shadowllm.models.spec import ModelSpec
from shadowllm.predictor.networks import initial_tensors

BUDGET = Budget(heads=0.5, neurons=0.5)


def make_predictor(
    spec: ModelSpec, fingerprint: str, kind: str = "shadow", rank: int = 16, dense_layers: int = 1
) -> Predictor:
    """A predictor with random scores. They depend on the token if the kind allows it."""
    generator = torch.Generator().manual_seed(3)
    layers = SparseLayers(spec, dense_layers)
    tensors = {
        f"{unit}.scores": torch.randn(layers.count, width, generator=generator)
        for unit, width in layer_units(spec).items()
    }
    if kind in ("shadow", "layerwise"):
        biases = tensors["heads.scores"], tensors["neurons.scores"]
        tensors |= initial_tensors(kind, layers, rank, *biases, seed=3)
        for name in [name for name in tensors if name.endswith(("heads.weight", "neurons.weight"))]:
            tensors[name] = torch.randn(tensors[name].shape, generator=generator)
    if kind in ("layerwise", "quantized-shadow", "relu"):
        heads = layers.count * spec.n_heads
        tensors["layers.heads.weight"] = torch.randn(heads, spec.hidden_size, generator=generator)
        tensors["layers.heads.bias"] = torch.randn(heads, generator=generator)
    return Predictor(
        kind, layers.count, dense_layers, spec.n_heads, spec.intermediate_size, spec.hidden_size, tensors, fingerprint
    )


def make_bundle(
    model: Path,
    folder: Path,
    dtype: str = "float32",
    kind: str = "shadow",
    rank: int = 16,
    weight_dtype: str | None = None,
    head_unit: str = "query_head",
    rest: str = "drop",
    budget: Budget | None = None,
) -> Manifest:
    """Export ``model`` into ``folder``."""
    spec, weights, checkpoint = load_model(model)
    predictor = make_predictor(spec, weights.fingerprint(), kind, rank)
    return write_bundle(
        folder,
        model.name,
        weights,
        checkpoint,
        predictor,
        dtype=dtype,
        weight_dtype=weight_dtype,
        budget=budget or (Budget() if kind == "relu" else BUDGET),
        head_unit=head_unit,
        rest=rest,
    )


class Unread(Mapping):
    """Weights that no one may read: to keep them takes as much memory as the model in float32."""

    def __getitem__(self, name):
        pytest.fail(f"{name} is read")

    def __iter__(self):
        pytest.fail("the weights are read")

    def __len__(self):
        return 1


def read_only(*kept: str):
    """A function like `read_weights`, whose result has nothing but these of the weights `sparse`, `dense`, `copies`."""

    def read(folder: Path, manifest: Manifest) -> BundleWeights:
        others = {"sparse", "dense", "copies"}.difference(kept)
        return replace(read_weights(folder, manifest), **dict.fromkeys(others, Unread()))

    return read


def as_in_the_hub_cache(bundle: Path, cache: Path) -> Path:
    """A copy of a bundle in the layout of the ``huggingface_hub`` cache: every file is a relative link to a blob."""
    snapshot, blobs = cache / "snapshots" / "0123abc", cache / "blobs"
    blobs.mkdir(parents=True)
    for source in (path for path in bundle.rglob("*") if path.is_file()):
        blob = blobs / hashlib.sha256(source.read_bytes()).hexdigest()
        blob.write_bytes(source.read_bytes())
        link = snapshot / source.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot
