"""Validation of a bundle against the PyTorch reference. An export that fails it gets no bundle folder.

The reference reads the checkpoint, not the bundle, so a weight in the wrong place shows as an error. Its weights are
first rounded to the bundle's type, and both sides compute in float32. The remaining difference is the error of
the graphs.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shadowllm.bundle.manifest import BODY_ALL_HEADS, Manifest, read_manifest
from shadowllm.bundle.predictor_file import Predictor
from shadowllm.bundle.quantised_tensors import QuantisedTensors, dequantised_predictor, dequantised_weights
from shadowllm.bundle.weight_file import TORCH_DTYPES
from shadowllm.bundle.weights import PREDICTOR_FILE, BundleWeights
from shadowllm.child import Child, ChildError, Progress, call, module_command, serve
from shadowllm.errors import UserError
from shadowllm.evaluation.transformers_check import compare_with_transformers
from shadowllm.models.decoder import Decoder
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import Budget, Unit, layer_units
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import Weights
from shadowllm.predictor.low_bit_copy import low_bit_copies
from shadowllm.runtime.ort.session import OrtSession
from shadowllm.runtime.torch_session import Masks, TorchSession

# Relative to the largest reference value. The float32 noise of a deep model is about 1e-5 of it.
TOLERANCE = 1e-4
# The native ops may round the inputs of integer rows to 16 bits. (The error of quantisation is a hundred times as
# large, but it is the same on both sides.)
INTEGER_TOLERANCE = 5e-4
# Scores that differ in their last bits may swap two units at the limit of a budget.
SELECTION_AGREEMENT = 0.99
PROMPT, STEPS = 24, 16
SEED = 0
FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Error:
    """The difference of an output from its reference.

    Attributes:
        output: case and tensor, for example "dense: logits".
        max_abs: largest absolute difference.
        max_rel: ``max_abs`` divided by the largest reference value.
        greedy_agreement: share of steps with the same most probable token; None if the output is not logits.
    """

    output: str
    max_abs: float
    max_rel: float
    greedy_agreement: float | None = None


def validate_apart(
    bundle: Path,
    model: Path,
    tolerance: float = 0,
    trust_remote_code: bool = False,
    activation: tuple[str | None, float | None] = (None, None),
    adapter: Path | None = None,
) -> dict[str, Any]:
    """Run `validate` and `compare_with_transformers` in a child process, so that their memory is freed afterwards.

    Args:
        model: local folder or GGUF file from which the bundle was exported.
        tolerance: the argument of `validate`.
        trust_remote_code: let ``transformers`` run code from the checkpoint.
        activation: the activation and its threshold, as `load_model` takes them.
        adapter: folder of the LoRA adapter that was merged.

    Returns:
        The result of `validate`, plus that of `compare_with_transformers` under "transformers".

    Raises:
        UserError: raised by either of them, or the process was killed by a signal.
        ChildError: a bug, with its traceback.
    """
    command = module_command("shadowllm.evaluation.validation")
    merged = None if adapter is None else str(adapter)
    request = [str(bundle), str(model), tolerance, trust_remote_code, *activation, merged]
    quiet = os.environ | {"TQDM_DISABLE": "1"}  # transformers shows progress bars even without a terminal
    child = Child(command, "the validation process", environment=quiet, keep_output=False)
    try:
        return dict(call(child, request))
    except ChildError as death:
        if death.signal is None:
            raise
        raise UserError(
            f"the validation process died of {death.signal}",
            "on SIGKILL, memory ran out: validation holds the model in float32; --skip-validation leaves it out",
        ) from death


def _in_child(request: list[Any], _progress: Progress) -> dict[str, Any]:
    bundle, model, tolerance, trust_remote_code, activation, threshold, adapter = request
    warnings.simplefilter("ignore")  # the parent has already read the checkpoint and shown its warnings
    _, weights, checkpoint = load_model(
        model,
        trust_remote_code=trust_remote_code,
        activation=activation,
        activation_threshold=threshold,
        adapter=adapter,
    )
    compared = compare_with_transformers(checkpoint, weights)
    predictor = Predictor.load(Path(bundle) / PREDICTOR_FILE)
    return validate(Path(bundle), weights, predictor, tolerance) | {"transformers": compared}


def validate(bundle: Path, weights: Weights, predictor: Predictor, tolerance: float = 0) -> dict[str, Any]:
    """Compare dense steps, and sparse steps with everything active and at budgets that run all graphs of the bundle.

    Args:
        tolerance: largest relative error; 0 for the default of the bundle's type.

    Returns:
        For the manifest: the tolerance, one error per case and output, and the least share of the
        reference's own selection that the exported predictor also selects.

    Raises:
        UserError: an output differs by more than ``tolerance``, the predictor selects other units, or a float16
            bundle computes numbers beyond the range of float16.
    """
    manifest = read_manifest(bundle)
    tolerance = tolerance or (INTEGER_TOLERANCE if manifest.quantisation else TOLERANCE)
    reference = _reference(manifest, weights, predictor)
    # Integers of this matrix are rounded along its other axis where all heads are active.
    dense_attention = {name: reference.dense[name] for name in reference.dense if name.endswith("o_proj.weight")}
    errors, agreement = [], 1.0
    for name, budget in _cases(manifest).items():
        with OrtSession(bundle, "sparse" if budget else "dense", exact=True) as ours:
            selects = reference.predictor if budget else None
            copies = reference.copies if budget else None
            if budget:
                ours.set_budget(budget)
            attention = dense_attention if BODY_ALL_HEADS in ours.graphs else {}
            sparse: Mapping[str, Tensor] = ChainMap(attention, reference.sparse)  # type: ignore[arg-type]
            theirs = TorchSession(manifest.spec, sparse, selects, budget, reference.dense, copies)
            found, agreed = _compare(name, ours, theirs)
        errors += found
        agreement = min(agreement, agreed)
    _judge(errors, agreement, tolerance)
    if manifest.dtype == "float16":
        check_float16(manifest.spec, reference.dense)
    return {"tolerance": tolerance, "selection_agreement": agreement, "errors": [asdict(error) for error in errors]}


def _cases(manifest: Manifest) -> dict[str, Budget | None]:
    """The budgets to compare; None decodes dense."""
    # A shortlist of one row checks the logits of the copy. Rounding may swap rows at the end of a longer shortlist, and
    # an exact logit is far from that of the copy.
    own = replace(manifest.budget, shortlist=1) if manifest.rest == "shadow" else manifest.budget
    cases = {"dense": None, "all active": Budget(), "at budget": own}
    if not manifest.has_body_all_heads:
        return cases
    # One graph has all heads, the other one selects them.
    if np.min(own.heads) == 1 and np.min(own.neurons) < 1:
        return cases | {"half of the heads": replace(own, heads=0.5)}
    return cases | {"all heads": replace(own, heads=1.0, neurons=0.5)}


def _reference(manifest: Manifest, weights: Weights, predictor: Predictor) -> BundleWeights:
    """Return the checkpoint's weights, rounded like the bundle's."""
    q = manifest.quantisation
    if q:
        sparse, dense = dequantised_weights(manifest.spec, weights, QuantisedTensors(weights, q), q)
        copies = low_bit_copies(manifest.sparse_layers, sparse, rest=True, stored=q) if q.residual_bits else None
        return BundleWeights(sparse, dense, dequantised_predictor(predictor, q), copies)
    rounded = TORCH_DTYPES[manifest.dtype]
    reference = {name: weights[name].to(rounded).float().contiguous() for name in weights}
    copies = low_bit_copies(manifest.sparse_layers, reference, rest=True) if manifest.rest == "shadow" else None
    return BundleWeights(reference, reference, predictor.rounded(rounded), copies)


def _judge(errors: list[Error], agreement: float, tolerance: float) -> None:
    remedy = "this is a bug or an unsupported variant: do not use the bundle"
    worst = max(errors, key=lambda error: np.nan_to_num(error.max_rel, nan=np.inf))
    if not worst.max_rel <= tolerance:  # a NaN must fail too
        raise UserError(
            f"the exported graphs do not reproduce the model: {worst.output} is off by {worst.max_rel:.1e} "
            f"(relative; {tolerance:.0e} is allowed)",
            remedy,
        )
    if agreement < SELECTION_AGREEMENT:
        raise UserError(f"the exported predictor selects only {agreement:.2%} of what the reference selects", remedy)


@torch.no_grad()
def check_float16(spec: ModelSpec, weights: Mapping[str, Tensor]) -> None:
    """Raise an error if activations exceed the range of float16. On a GPU they would become infinite.

    Args:
        weights: canonical float32 tensors.

    Raises:
        UserError: a layer exceeds the range; the message names the first one.
    """
    peaks = torch.zeros(spec.n_layers)

    def see(layer: int, unit: Unit, activation: Tensor) -> Tensor:
        peaks[layer] = torch.maximum(peaks[layer], activation.abs().max())
        return activation

    decoder = Decoder(spec, weights, see)
    input_ids = torch.tensor([_prompt(spec)])
    positions = torch.arange(input_ids.shape[1])[None]
    x = decoder.embed(input_ids, positions)
    for layer in range(spec.n_layers):
        x = decoder.layer(layer, x, positions)
        see(layer, "neurons", x)
        if peaks[layer] > FLOAT16_MAX:
            raise UserError(
                f"layer {layer} computes numbers up to {float(peaks[layer]):.2g}, float16 ends at {FLOAT16_MAX:.0f}",
                "export with --dtype bf16",
            )


def _prompt(spec: ModelSpec) -> list[int]:
    ids = np.random.default_rng(SEED).integers(0, spec.vocab_size, min(PROMPT, spec.max_seqlen // 2))
    return list(ids.tolist())


def _compare(name: str, ours: OrtSession, theirs: TorchSession) -> tuple[list[Error], float]:
    """Prefill a random prompt, then decode the reference's greedy tokens on both sides, and compare."""
    spec = ours.spec
    prompt = _prompt(spec)
    logits = [(ours.prefill([prompt])[0].copy(), theirs.prefill([prompt])[0])]
    agreements = [1.0]
    for _ in range(min(STEPS, spec.max_seqlen - len(prompt))):
        token = logits[-1][1].argmax(keepdims=True)
        mine = ours.decode(token)[0].copy()
        if ours.selection:
            # Both sides use the same selection: a tie that is decided differently is not an error of the graphs.
            theirs.forced = selection_masks(ours.selection, spec)
        logits.append((mine, theirs.decode(token)[0]))
        if theirs.forced:
            agreements.append(_agreement(theirs.forced, theirs.chosen))
    pairs = {
        "logits": logits,
        "cache": [
            (ours.cache[f"{layer}.{part}"][:, :, : kept.shape[2]], kept.numpy())
            for part, tensors in (("key", theirs.cache.keys), ("value", theirs.cache.values))
            for layer, kept in enumerate(tensors)
        ],
    }
    greedy = float(np.mean([a.argmax() == b.argmax() for a, b in logits]))
    return [
        _error(f"{name}: {output}", found, greedy if output == "logits" else None) for output, found in pairs.items()
    ], min(agreements)


def _error(output: str, pairs: list[tuple[np.ndarray, np.ndarray]], greedy: float | None) -> Error:
    max_abs = float(max(np.abs(a - b).max() for a, b in pairs))
    return Error(output, max_abs, max_abs / float(max(np.abs(b).max() for _, b in pairs)), greedy)


def selection_masks(selection: Mapping[Unit, np.ndarray], spec: ModelSpec) -> Masks:
    """Convert padded indices ``(..., n_units)`` to bool masks ``(..., n_units)``."""
    masks: Masks = {}
    for unit, width in layer_units(spec).items():
        found = np.zeros((*selection[unit].shape[:-1], width), dtype=bool)
        for place in np.ndindex(found.shape[:-1]):
            indices = selection[unit][place]
            found[(*place, indices[indices >= 0])] = True
        masks[unit] = torch.from_numpy(found)
    return masks


def _agreement(found: Masks, wanted: Masks) -> float:
    wanted = {unit: mask for unit, mask in wanted.items() if mask.any()}  # it may be that no neuron fires
    return min(float((found[unit] & wanted[unit]).sum() / wanted[unit].sum()) for unit in wanted)


if __name__ == "__main__":
    sys.exit(serve(_in_child))
