"""Comparison of our decoder with ``transformers`` on a checkpoint: the logits of a few tokens, both in float32.

The other validation compares with our own decoder. So it cannot find a config or a tensor that we read wrongly.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from torch import Tensor

from shadowllm.errors import UserError, foreign_reader
from shadowllm.models.activations import stated_activation
from shadowllm.models.decoder import Decoder
from shadowllm.models.files.checkpoint import Checkpoint
from shadowllm.models.files.config import RELATIVES
from shadowllm.models.files.dequantise import DequantisedTensors
from shadowllm.models.files.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import Floats, Weights

TOKENS = 24
SEED = 0
# Relative to the largest logit. Two orders of summation in float32 differ by about 1e-6 of it.
TOLERANCE = 1e-4
# Of compressed-tensors with scales of 16 bits. Loaded with `dequantize`, transformers multiplies by them in 16 bits (up
# to 1.3e-2 with bfloat16), and we in 32 bits, as it does without. But then it can also quantise the activations.
QUANTISED_TOLERANCE = 2e-2
# Loading needs memory for the weights in float32 and, for a moment, for one stored file of them.
MEMORY_FACTOR = 1.5
TABLES = frozenset({"embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"})


def compare_with_transformers(checkpoint: Checkpoint, weights: Weights) -> dict[str, Any]:
    """Run the checkpoint in ``transformers`` and in our decoder, and compare the logits.

    Returns:
        For the manifest: ``tokens``, ``max_rel`` (largest difference over the largest logit) and ``tolerance``. If
        ``transformers`` cannot load the checkpoint here: ``skipped``, the reason.

    Raises:
        UserError: the logits differ by more than the tolerance.
    """
    if reason := _unreadable(checkpoint, weights.spec):
        return {"skipped": reason}
    count = min(TOKENS, weights.spec.max_seqlen)
    input_ids = torch.randint(0, weights.spec.vocab_size, (1, count), generator=torch.Generator().manual_seed(SEED))
    try:
        with foreign_reader("transformers cannot load it here", ""):
            theirs = _logits(checkpoint, input_ids)
    except UserError as error:
        # The comparison is optional: a checkpoint that only transformers cannot load is still valid.
        return {"skipped": error.problem}
    if not theirs.isfinite().all():
        raise UserError("the logits of the checkpoint are NaN or infinite", "it is damaged, or its training diverged")
    with torch.no_grad():
        ours = Decoder(weights.spec, Floats(weights))(input_ids)
    max_rel = float((ours - theirs).abs().max() / theirs.abs().max())
    tolerance = QUANTISED_TOLERANCE if _rounds_products(checkpoint) else TOLERANCE
    if not max_rel <= tolerance:  # a NaN must fail too
        raise UserError(
            f"the checkpoint is not read as transformers reads it: logits are off by {max_rel:.1e} "
            f"(relative; {tolerance:.0e} is allowed)",
            "this is a bug or an unsupported variant of the family: do not use the bundle",
        )
    return {"tokens": count, "max_rel": max_rel, "tolerance": tolerance}


def _rounds_products(checkpoint: Checkpoint) -> bool:
    """Return whether ``transformers`` rounds the products of integers and scales to 16 bits."""
    if not isinstance(checkpoint.tensors, DequantisedTensors) or not checkpoint.tensors.short_scales:
        return False
    return str(checkpoint.config.quantization_config["quant_method"]) == "compressed-tensors"


def _unreadable(checkpoint: Checkpoint, spec: ModelSpec) -> str | None:
    """Return why ``transformers`` cannot run the checkpoint, if that is known before loading."""
    from transformers.activations import ACT2FN

    needed, free = MEMORY_FACTOR * 4 * spec.n_parameters, psutil.virtual_memory().available
    if needed > free:
        return f"it would take {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    activation, _ = stated_activation(checkpoint.config)
    if activation not in ACT2FN:
        return f"transformers has no activation {activation!r}"
    if len(getattr(checkpoint.tensors, "parts", ())) > 1:
        return "transformers does not read a GGUF model in several files"
    if spec.family in RELATIVES and not checkpoint.trust_remote_code:
        return f"transformers has no code for {spec.family} models"
    if isinstance(checkpoint.tensors, DequantisedTensors):
        # transformers computes the block size by a division, and so reads wrong scales if it leaves a remainder.
        block = checkpoint.tensors.block or ()
        heads, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        sizes = (spec.hidden_size, spec.intermediate_size, heads, kv)
        if any(size % step for size in sizes for step in block):
            return f"transformers does not read blocks of {list(block)} in matrices that they do not divide"
    return None


def _logits(checkpoint: Checkpoint, input_ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # Pass our config: transformers reads less of a GGUF file. The padding token may be outside the vocabulary.
    config = copy.deepcopy(checkpoint.config)
    config.pad_token_id, config.return_dict = None, True
    if checkpoint.adapter:
        # With the adapter, embeddings and output projection may differ, but the checkpoint may store them once.
        config.tie_word_embeddings = len(TABLES & checkpoint.tensors.names()) == 1
    # Eager attention: the implementation that the config names may not be installed.
    options: dict[str, Any] = {"config": config, "attn_implementation": "eager"}
    if checkpoint.gguf:
        options["gguf_file"] = checkpoint.gguf
    mapping = {f"^{re.escape(stored)}$": name for stored, name in checkpoint.renamed.items()}
    if checkpoint.quantised:
        options["quantization_config"] = _dequantising(config.quantization_config)
        if config.quantization_config["quant_method"] == "fp8":
            mapping[r"\.weight_scale$"] = ".weight_scale_inv"  # AutoFP8's name of the same scales
    if mapping:
        options["key_mapping"] = mapping
    with _without_adapter(checkpoint.folder) as folder:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=checkpoint.trust_remote_code, **options
        )
    if checkpoint.adapter:
        model = checkpoint.adapter.insert(model)
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids).logits
    return logits.float()


@contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """Yield the folder, or one of links to its files without an adapter, which ``transformers`` would load too."""
    if not (folder / ADAPTER_CONFIG).is_file():
        yield folder
        return
    with TemporaryDirectory() as name:
        for path in folder.iterdir():
            if path.name not in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                (Path(name) / path.name).symlink_to(path.resolve())
        yield Path(name)


def _dequantising(settings: Mapping[str, Any]) -> Any:
    """Return the config with which ``transformers`` converts quantised weights to floats while loading."""
    from transformers import CompressedTensorsConfig, FineGrainedFP8Config

    if settings["quant_method"] == "fp8":
        return FineGrainedFP8Config(dequantize=True)
    return CompressedTensorsConfig(dequantize=True)
