"""The main steps as functions: calibrate, train, export, build. The command line and the API call these."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from shadowllm.bundle.engine_record import EngineRecord
from shadowllm.bundle.manifest import Manifest, read_manifest, verify_files
from shadowllm.bundle.predictor_file import Kind, Predictor
from shadowllm.bundle.quantised_tensors import INSTEAD_OF_PLAIN_INTEGERS
from shadowllm.bundle.sparse_pays import dense_reasons
from shadowllm.config import (
    DEFAULT_BUDGET,
    DEFAULT_TARGET,
    Calibration,
    EngineOptions,
    Export,
    Source,
    TrainConfig,
)
from shadowllm.errors import UserError
from shadowllm.export_checks import check_budget_layers, check_checkpoint, check_dense_layers, check_training
from shadowllm.exporter.engines.build import build_engine, check_options
from shadowllm.exporter.engines.graph import describe_onnx
from shadowllm.exporter.engines.profiles import profiles_for
from shadowllm.exporter.staging import staged
from shadowllm.exporter.write_bundle import check_dtypes, check_selector, write_bundle
from shadowllm.malloc import keep_freed_memory, return_freed_memory
from shadowllm.models.activations import stated_activation
from shadowllm.models.files.checkpoint import Checkpoint
from shadowllm.models.files.tokenizer import text_encoder
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import Budget, SparseLayers, check_neuron_budget
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import Weights
from shadowllm.predictor.calibration import calibration_windows
from shadowllm.predictor.network_options import check_calibration, check_given, check_network_options
from shadowllm.predictor.parallel import process_count
from shadowllm.predictor.silence import fired_shares
from shadowllm.predictor.tracefile import Traces, calibrate
from shadowllm.predictor.train import check_import, import_networks, random_predictor, train_network, train_static
from shadowllm.progress import progress
from shadowllm.runtime.ort_package import check_package

TRAINABLE: tuple[Kind, ...] = ("shadow", "layerwise", "quantized-shadow", "relu", "static")


def calibrate_model(source: Source, options: Calibration) -> Traces:
    """Trace a model over calibration text.

    Raises:
        UserError: the model, text or criterion does not exist.
    """
    spec, weights, checkpoint = _open(source)
    check_dense_layers(spec, options.dense_layers)
    return _calibrate(spec, weights, checkpoint, options)


def train_predictor(source: Source, traces: Traces, selector: str, train_config: TrainConfig) -> Predictor:
    """Train a predictor on traces of the same model.

    Raises:
        UserError: the traces are of another model, the selector cannot be trained, or an option does not suit it.
    """
    check_network_options(train_config, selector)
    spec, weights, _ = _open(source)
    if traces.base_fingerprint != weights.fingerprint():
        raise UserError(
            "the traces are of another model, or of another adapter or activation",
            "calibrate this model, or give the model, --adapter and --activation that they were made with",
        )
    return _train(spec, weights, traces, selector, train_config)


def export_model(
    source: Source,
    out: Path,
    options: Export,
    *,
    predictor: Predictor | None = None,
    calibration: Calibration | None = None,
    train_config: TrainConfig | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Make a bundle: train a predictor unless one is given, write, validate, build engines.

    The bundle appears under its name only when everything is done.

    Raises:
        UserError: an input cannot be used, or the bundle fails its validation.
    """
    if process_count() > 1:
        raise UserError("an export runs in one process", "train a predictor in several, then export with --predictor")
    for engine in options.engines:
        check_options(engine, options.dtype == "bfloat16")
    if options.validate or options.budget is None:
        check_package()
    with staged(out, overwrite) as folder:
        spec, weights, checkpoint = _open(source)
        check_checkpoint(spec, checkpoint, out)
        if predictor is not None:
            if train_config and train_config.powerinfer:
                raise UserError("a predictor and networks of PowerInfer are given", "leave one of them out")
            check_given(predictor.kind, options.selector)
            options = replace(options, selector=predictor.kind)
        elif train_config and train_config.powerinfer:
            options = replace(options, selector=options.selector or "layerwise")
            check_import(options.kind, train_config)
        _check_options(spec, options)
        check_network_options(train_config, options.kind, trains=predictor is None)
        check_calibration(calibration, options.kind, made=predictor is None)
        if predictor is not None:
            check_budget_layers(spec, options.budget, predictor.dense_layers)
        else:
            train_config = train_config or TrainConfig(budget=options.budget or DEFAULT_BUDGET)
            calibration = calibration or Calibration()
            check_training(spec, options.kind, calibration.dense_layers, train_config)
            check_budget_layers(spec, options.budget, calibration.dense_layers)
            predictor = _make_predictor(spec, weights, checkpoint, options.kind, calibration, train_config)
            return_freed_memory()  # that of weights and traces
        predictor.check_base(spec, weights.fingerprint())
        return _write(folder, source.name, weights, checkpoint, predictor, options)


def _check_options(spec: ModelSpec, options: Export) -> None:
    """Refuse options that do not go together, before any work is done."""
    check_selector(spec, options.kind, options.computes_rest)
    check_dtypes(spec, options.dtype, options.weight_dtype, options.computes_rest)
    if options.engines:
        _check_engine_weights(options.weight_dtype, options.computes_rest)
        _check_engine_spec(spec)
    if options.budget:
        options.budget.rest_with(options.computes_rest == "shadow")
        _warn_of_heads(spec, options.budget)
        check_neuron_budget(options.kind, options.budget)
    if options.target and options.kind == "relu":
        raise UserError("a target chooses budgets, but the selector relu is exact and has none", "leave it out")


def _open(source: Source) -> tuple[ModelSpec, Weights, Checkpoint]:
    return load_model(**vars(source))


def _write(
    folder: Path, name: str, weights: Weights, checkpoint: Checkpoint, predictor: Predictor, options: Export
) -> Manifest:
    """Write a bundle to a folder, then tune, validate and build engines as requested."""
    manifest = write_bundle(
        folder,
        name,
        weights,
        checkpoint,
        predictor,
        dtype=options.dtype,
        weight_dtype=options.weight_dtype,
        budget=options.budget or (Budget() if predictor.kind == "relu" else DEFAULT_BUDGET),
        head_unit=options.head_unit,
        rest=options.computes_rest,
    )
    manifest = replace(manifest, dense=dense_reasons(manifest, manifest.budget))
    manifest.write(folder)
    return_freed_memory()
    target = options.target
    measurable = "tokenizer.json" in manifest.files and not predictor.is_random
    if target is None and options.budget is None and manifest.rest == "shadow" and measurable:
        target = DEFAULT_TARGET
    if target:
        from shadowllm.evaluation.tuning import tune

        manifest = tune(folder, target)
    if options.validate:  # after tuning, because it must use the final budgets
        from shadowllm.evaluation.validation import validate_apart

        found = validate_apart(
            folder,
            checkpoint.folder / (checkpoint.gguf or ""),
            trust_remote_code=checkpoint.trust_remote_code,
            activation=stated_activation(checkpoint.config),
            adapter=checkpoint.adapter.folder if checkpoint.adapter else None,
        )
        manifest = replace(manifest, validation=found)
        manifest.write(folder)
    for engine in options.engines:
        build_engines(folder, engine)
    return manifest


def build_engines(bundle: Path, options: EngineOptions) -> dict[str, EngineRecord]:
    """Build the engines of one flavour from a bundle's graphs. They replace older ones when all are built.

    Raises:
        UserError: the package or GPU is missing, or a file of the bundle is damaged.
    """
    manifest = read_manifest(bundle)
    check_options(options, manifest.dtype == "bfloat16")
    _check_engine_weights(manifest.weight_dtype, manifest.rest)
    _check_engine_spec(manifest.spec)
    verify_files(bundle, {name: digest for name, digest in manifest.files.items() if "onnx" in name})
    target = bundle / "engines" / options.flavour
    partial = target.with_name(f".{options.flavour}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    capacity = min(options.capacity, manifest.spec.max_seqlen)
    try:
        records = {}
        for piece in manifest.sparse_pieces:
            onnx = bundle / f"{piece}.onnx"
            profiles = profiles_for(
                describe_onnx(onnx),
                capacity=capacity,
                max_batch=options.max_batch,
                max_seqlen=min(options.longest_prompt, capacity),
                max_kept=options.max_draft + 1,
            )
            records[piece] = build_engine(
                onnx,
                partial / f"{piece}.engine",
                flavour=options.flavour,
                profiles=profiles,
                sms=options.sms,
                timing_cache=options.timing_cache,
                workspace_bytes=options.workspace_bytes,
                profiling_verbosity=options.verbosity,
                plugin_library=options.plugin_library,
                programmatic_dependent_launch=options.programmatic_dependent_launch,
                file_hashes=manifest.files,
            )
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return records


def _check_engine_weights(weight_dtype: str | None, rest: str) -> None:
    if weight_dtype and rest == "drop":
        raise UserError(
            f"engines are not built of {weight_dtype} weights without a low-bit copy", INSTEAD_OF_PLAIN_INTEGERS
        )


def _check_engine_spec(spec: ModelSpec) -> None:
    if not spec.selects_heads:
        raise UserError(
            f"engines are not built of {spec.family} models, whose heads are not selected",
            "run the bundle with the backends ort, triton or torch",
        )


def _warn_of_heads(spec: ModelSpec, budget: Budget) -> None:
    if not spec.selects_heads and np.mean(budget.heads) < 1:
        warnings.warn(
            f"all heads of {spec.family} models are active, whatever the budget says: leave the head budget out",
            stacklevel=3,
        )


def _make_predictor(
    spec: ModelSpec,
    weights: Weights,
    checkpoint: Checkpoint,
    selector: str,
    calibration: Calibration,
    train_config: TrainConfig,
) -> Predictor:
    if selector == "random":
        return random_predictor(spec, weights.fingerprint(), calibration.dense_layers, calibration.seed)
    loaded = weights.load()
    traces = _calibrate(
        spec,
        weights,
        checkpoint,
        calibration,
        loaded,
        fit_heads=selector != "static",
        keep_train=selector == "shadow",  # layerwise networks trace again
    )
    return _train(spec, weights, traces, selector, train_config, loaded)


def _calibrate(
    spec: ModelSpec,
    weights: Weights,
    checkpoint: Checkpoint,
    options: Calibration,
    loaded: Mapping[str, Tensor] | None = None,
    fit_heads: bool = True,
    keep_train: bool = True,
) -> Traces:
    keep_freed_memory()
    encode, loaded = text_encoder(checkpoint.tokenizer(), spec.vocab_size), loaded or weights.load()
    with progress("Writing calibration text", options.tokens) as advance:
        windows = calibration_windows(
            spec,
            loaded,
            encode,
            texts=options.texts,
            tokens=options.tokens,
            seqlen=min(options.seqlen, spec.max_seqlen),
            seed=options.seed,
            advance=advance,
        )
    return_freed_memory()
    with progress("Tracing", windows.train.numel() + windows.held_out.numel()) as advance:
        return calibrate(
            spec,
            loaded,
            windows,
            weights.fingerprint(),
            criterion=options.criterion,
            dense_layers=options.dense_layers,
            fit_heads=fit_heads,
            keep_train=keep_train,
            advance=advance,
        )


def _train(
    spec: ModelSpec,
    weights: Weights,
    traces: Traces,
    selector: str,
    train_config: TrainConfig,
    loaded: Mapping[str, Tensor] | None = None,
) -> Predictor:
    if selector not in TRAINABLE:
        raise UserError(f"selector {selector!r} cannot be trained", f"use {', '.join(TRAINABLE)}")
    if train_config.powerinfer:
        return import_networks(spec, traces, train_config, selector, loaded or weights.load())
    # Training traces again if the traces were too large to store, or for layerwise, whose layer inputs are not stored.
    tracing_weights = (loaded or weights.load()) if selector == "layerwise" or not traces.stored else None
    if selector in ("static", "quantized-shadow", "relu"):
        made = train_static(spec, traces, kind=selector, budget=train_config.budget, weights=tracing_weights)
        if selector != "relu":
            return made
        fired = fired_shares(SparseLayers(spec, traces.dense_layers), loaded or weights.load(), traces.windows.train)
        return replace(made, record=made.record | {"fired": fired})
    with progress(
        "Training the predictor", train_config.passes(tracing_weights is not None) * traces.windows.train.numel()
    ) as advance:
        return train_network(spec, traces, train_config, kind=selector, weights=tracing_weights, advance=advance)
