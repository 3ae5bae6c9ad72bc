"""Writes a bundle: one file of weights, the graphs that share it, tokenizer, predictor and manifest."""

from __future__ import annotations

import json
import shutil
import warnings
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

from shadowllm.bundle import op_domain
from shadowllm.bundle.manifest import BODY, BODY_ALL_HEADS, DATA_FILE, ITEMSIZE, Manifest, file_hash
from shadowllm.bundle.predictor_file import Predictor
from shadowllm.bundle.quantisation import Quantisation, bundle_format
from shadowllm.bundle.quantised_tensors import (
    CopyTensors,
    QuantisedTensors,
    check_quantisable,
)
from shadowllm.bundle.weight_file import TORCH_DTYPES, WeightStore
from shadowllm.bundle.weight_layout import Group, copy_groups, model_groups, quantised_groups
from shadowllm.bundle.weights import PREDICTOR_FILE
from shadowllm.errors import UserError
from shadowllm.exporter.graphs import bundle_graphs
from shadowllm.exporter.graphs.initializers import DTYPES
from shadowllm.models.activations import RELU_LIKE
from shadowllm.models.files.checkpoint import Checkpoint
from shadowllm.models.files.config import CONFIG, GENERATION_CONFIG, RELATIVES, read_json_object
from shadowllm.models.sparsity import Budget, Rest, SparseLayers
from shadowllm.models.spec import HeadUnit, ModelSpec
from shadowllm.models.weights import Weights
from shadowllm.progress import progress

TOOLS = ("shadowllm", "onnx-ir", "torch", "transformers")


def write_bundle(
    folder: Path,
    name: str,
    weights: Weights,
    checkpoint: Checkpoint,
    predictor: Predictor,
    *,
    dtype: str = "float32",
    weight_dtype: str | None = None,
    budget: Budget,
    head_unit: HeadUnit = "query_head",
    rest: Rest = "drop",
) -> Manifest:
    """Write a bundle into ``folder``; only one tensor of the weights is in memory at a time.

    Args:
        name: name of the model in the manifest.
        dtype: type of weights and activations: "float32", "float16" or "bfloat16".
        weight_dtype: "int8", "int6" or "int4" to store matrices as integers.
        budget: default fractions to keep; they can be changed at run time.
        head_unit: whether single query heads or whole KV groups are selected.
        rest: "shadow" to store a low-bit copy of all matrices, from which other units can be computed.

    Raises:
        UserError: an unknown or unsuitable dtype, a predictor of another model, or a damaged checkpoint.
    """
    check_dtypes(weights.spec, dtype, weight_dtype, rest)
    check_selector(weights.spec, predictor.kind, rest)
    spec = replace(weights.spec, head_unit=head_unit)
    q = bundle_format(weight_dtype, rest)
    fingerprint = weights.fingerprint()
    predictor.check_base(spec, fingerprint)
    store = WeightStore(folder / DATA_FILE, _groups(spec, dtype, predictor, q, rest))
    parts = {name: tensor for name, _, tensor in _predictor_parts(spec, predictor, rest)}
    tensors: Mapping[str, Tensor] = ChainMap(parts, weights)  # type: ignore[arg-type]
    stored = QuantisedTensors(tensors, q) if q else tensors
    copies = CopyTensors(weights, q, predictor.final_squares, TORCH_DTYPES[dtype])
    with progress("Writing weights", store.size) as advance:
        hashes = {DATA_FILE: store.write(ChainMap(copies, stored), advance)}  # type: ignore[arg-type]
    for piece, model in _models(spec, store, DTYPES[dtype], predictor, q, rest == "shadow"):
        ir.save(model, folder / f"{piece}.onnx")
    predictor.save(folder / PREDICTOR_FILE)
    _write_companions(folder, checkpoint)
    written = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    hashes |= {name: file_hash(path) for name, path in written.items() if name not in hashes}
    manifest = Manifest(
        model=name,
        spec=spec,
        dtype=dtype,
        weight_dtype=weight_dtype,
        dense_layers=predictor.dense_layers,
        budgets=asdict(budget),
        selector="per-layer" if predictor.per_layer else "upfront",
        rest=rest,
        predictor={"kind": predictor.kind, "rank": predictor.rank, **predictor.record},
        base_fingerprint=fingerprint,
        adapter_fingerprint=checkpoint.adapter.fingerprint() if checkpoint.adapter else None,
        op_domain_version=op_domain.VERSION,
        tools={tool: version(tool) for tool in TOOLS},
        files=hashes,
    )
    manifest.write(folder)
    return manifest


def check_dtypes(spec: ModelSpec, dtype: str, weight_dtype: str | None, rest: Rest = "drop") -> None:
    """Refuse types that a bundle cannot have.

    Raises:
        UserError: an unknown type, or one that does not suit the model.
    """
    if dtype not in ITEMSIZE:
        raise UserError(f"dtype {dtype!r} is not supported", f"use one of {', '.join(ITEMSIZE)}")
    if q := bundle_format(weight_dtype, rest):
        check_quantisable(spec, dtype, q)


def check_selector(spec: ModelSpec, kind: str, rest: Rest) -> None:
    """Refuse the selector relu where it is not exact.

    Raises:
        UserError: the activation of the model is never zero, or other units would come from a low-bit copy.
    """
    if kind != "relu":
        return
    if spec.activation not in RELU_LIKE:
        raise UserError(
            f"the selector relu needs an activation that is zero for many inputs, and the model has {spec.activation}",
            "use another selector; or give --activation, if the checkpoint says the activation wrongly or not at all",
        )
    if rest == "shadow":
        raise UserError("the selector relu is exact, and needs no low-bit copy", "leave out --rest shadow")


def _models(
    spec: ModelSpec, store: WeightStore, dtype: ir.DataType, predictor: Predictor, q: Quantisation | None, rest: bool
) -> Iterator[tuple[str, ir.Model]]:
    yield "dense", bundle_graphs.dense_graph(spec, store, dtype, q)
    layers = SparseLayers(spec, predictor.dense_layers)
    yield "stem", bundle_graphs.stem_graph(layers, store, dtype, q)
    if not predictor.per_layer:
        yield "predictor", bundle_graphs.predictor_graph(spec, store, dtype, predictor, q)
    chooser = predictor if predictor.per_layer else None
    yield BODY, bundle_graphs.body_graph(layers, store, dtype, q, chooser, rest)
    if rest and spec.selects_heads:
        yield BODY_ALL_HEADS, bundle_graphs.body_graph(layers, store, dtype, q, chooser, rest, all_heads=True)


def _groups(spec: ModelSpec, dtype: str, predictor: Predictor, q: Quantisation | None, rest: Rest) -> Iterator[Group]:
    yield from model_groups(spec, dtype, q)
    if rest == "shadow" or predictor.kind == "quantized-shadow":
        nested = q is not None and q.residual_bits > 0
        yield from copy_groups(SparseLayers(spec, predictor.dense_layers), rest == "shadow", nested)
    for name, source, tensor in _predictor_parts(spec, predictor, rest):
        if q and source in predictor.learned and name.endswith(".weight"):
            yield from quantised_groups({name: tuple(tensor.shape)}, q)
        else:
            # Rankings and fits are small, so they stay float32.
            yield [(name, tuple(tensor.shape), dtype if source in predictor.learned else "float32")]


def _predictor_parts(spec: ModelSpec, predictor: Predictor, rest: Rest) -> Iterator[tuple[str, str, Tensor]]:
    """The predictor's tensors as the graphs read them: name in the graphs, name in the predictor, tensor.

    A per-layer predictor is split into the tensors of each layer.
    """
    if not predictor.per_layer:
        for name in predictor.learned or ("heads.scores", "neurons.scores"):
            yield f"predictor.{name}", name, predictor.tensors[name]
        return
    for name, tensor in predictor.tensors.items():
        if name.startswith("layers."):
            for layer, part in enumerate(tensor.chunk(predictor.n_sparse), predictor.dense_layers):
                if rest == "shadow" and name.startswith("layers.heads."):
                    # The op scores whole groups, and the score of a group is the sum of its heads' scores.
                    part = part.unflatten(0, (-1, spec.heads_together)).sum(dim=1)
                yield f"predictor.layers.{layer}.{name.removeprefix('layers.')}", name, part


def _write_companions(folder: Path, checkpoint: Checkpoint) -> None:
    """Write tokenizer, config and generation config under their Hugging Face names."""
    checkpoint.config.save_pretrained(folder)
    if checkpoint.config.model_type in RELATIVES:  # transformers wrote the type of the class
        written = read_json_object(folder / CONFIG) | {"model_type": checkpoint.config.model_type}
        (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n")
    own = checkpoint.folder / GENERATION_CONFIG
    if checkpoint.gguf is None and own.is_file():
        # A copy, because transformers refuses to save some generation configs and drops fields of others.
        shutil.copyfile(own, folder / GENERATION_CONFIG)
    else:
        checkpoint.generation_config.to_json_file(folder / GENERATION_CONFIG)  # does not refuse any
    if checkpoint.has_tokenizer():
        tokenizer = checkpoint.tokenizer()
        if tokenizer.is_fast:
            tokenizer.save_pretrained(folder)
        else:
            warnings.warn(
                f"the tokenizer of {checkpoint.folder}, {type(tokenizer).__name__}, cannot be written as "
                "tokenizer.json: the bundle has none, and takes token ids only",
                stacklevel=2,
            )
