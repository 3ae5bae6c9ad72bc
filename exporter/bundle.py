"""Write a bundle: weights once, four graphs over them, tokenizer, predictor and manifest."""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from shadowllm.errors import UserError
from shadowllm.exporter import graphs
from shadowllm.exporter.manifest import DATA_FILE, Manifest, file_hash, verify_files
from shadowllm.exporter.store import TORCH_DTYPES, Group, WeightStore, model_groups
from shadowllm.models import Budget, Checkpoint, ModelSpec, Weights
from shadowllm.plugins import schemas
from shadowllm.predictor.artefact import Predictor
from shadowllm.predictor.progress import progress

DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
PREDICTOR_FILE = "predictor.safetensors"
TOOLS = ("shadowllm", "onnx-ir", "torch", "transformers")


def write_bundle(
    folder: Path,
    name: str,
    weights: Weights,
    checkpoint: Checkpoint,
    predictor: Predictor,
    *,
    dtype: str = "float32",
    budget: Budget,
) -> Manifest:
    """Fill ``folder`` with a bundle; weights stream through memory one tensor at a time.

    Args:
        name: what the manifest calls the model.
        dtype: of weights and activations: "float32", "float16" or "bfloat16".
        budget: default fractions to keep; any other can be asked for at run time.

    Raises:
        UserError: an unknown dtype, a predictor of another model, or a damaged checkpoint.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported", f"use one of {', '.join(DTYPES)}")
    spec, kind = weights.spec, DTYPES[dtype]
    fingerprint = weights.fingerprint()
    predictor.check_base(spec, fingerprint)
    store = WeightStore(folder / DATA_FILE, _groups(spec, kind, predictor))
    with progress("Writing weights", store.size) as advance:
        hashes = {DATA_FILE: store.write(ChainMap(_predictor_tensors(predictor), weights), advance)}  # type: ignore[arg-type]
    for piece, model in _models(spec, store, kind, predictor):
        ir.save(model, folder / f"{piece}.onnx")
    predictor.save(folder / PREDICTOR_FILE)
    _write_companions(folder, spec, checkpoint)
    hashes |= {path.name: file_hash(path) for path in sorted(folder.iterdir()) if path.name not in hashes}
    manifest = Manifest(
        model=name,
        spec=spec,
        dtype=dtype,
        dense_layers=predictor.dense_layers,
        budgets={"neurons": budget.neurons, "heads": budget.heads},
        predictor={"kind": predictor.kind, "rank": predictor.rank, **predictor.record},
        base_fingerprint=fingerprint,
        op_domain_version=schemas.VERSION,
        tools={tool: version(tool) for tool in TOOLS},
        files=hashes,
    )
    manifest.write(folder)
    return manifest


def read_weights(folder: Path, manifest: Manifest) -> tuple[dict[str, Tensor], Predictor]:
    """Canonical weights in float32 and the predictor of a bundle.

    Raises:
        UserError: a file is damaged.
    """
    verify_files(folder, manifest.digests(DATA_FILE, PREDICTOR_FILE))
    predictor = Predictor.load(folder / PREDICTOR_FILE)
    store = WeightStore(folder / DATA_FILE, model_groups(manifest.spec, DTYPES[manifest.dtype]))
    data = np.memmap(store.path, dtype=np.uint8, mode="c")
    weights = {
        name: torch.from_numpy(data[e.offset : e.offset + e.length]).view(TORCH_DTYPES[e.dtype]).view(e.shape).float()
        for name, e in store.entries.items()
    }
    return weights, predictor


def _models(
    spec: ModelSpec, store: WeightStore, dtype: ir.DataType, predictor: Predictor
) -> Iterator[tuple[str, ir.Model]]:
    yield "dense", graphs.dense_graph(spec, store, dtype)
    yield "stem", graphs.stem_graph(spec, store, dtype, predictor.dense_layers)
    yield "predictor", graphs.predictor_graph(spec, store, dtype, predictor)
    yield "body", graphs.body_graph(spec, store, dtype, predictor.dense_layers)


def _groups(spec: ModelSpec, dtype: ir.DataType, predictor: Predictor) -> Iterator[Group]:
    yield from model_groups(spec, dtype)
    for name, tensor in _predictor_tensors(predictor).items():
        # A ranking is compared, not multiplied: it keeps its precision.
        yield [(name, tuple(tensor.shape), ir.DataType.FLOAT if name.endswith("scores") else dtype)]


def _predictor_tensors(predictor: Predictor) -> Mapping[str, Tensor]:
    """What the predictor's graph reads: a ranking, or a network without the ranking it started from."""
    return {
        f"predictor.{name}": tensor
        for name, tensor in predictor.tensors.items()
        if name.endswith("scores") == (predictor.kind == "static")
    }


def _write_companions(folder: Path, spec: ModelSpec, checkpoint: Checkpoint) -> None:
    """Tokenizer, config and generation config, as Hugging Face names them."""
    checkpoint.config.save_pretrained(folder)
    generation = {"bos_token_id": spec.bos_token_id, "eos_token_id": list(spec.eos_token_ids)}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    if checkpoint.has_tokenizer():
        checkpoint.tokenizer().save_pretrained(folder)
