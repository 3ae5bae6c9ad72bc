"""Model families by Hugging Face ``model_type``. A new family needs one module and one row in `FAMILIES`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shadowllm.errors import UserError
from shadowllm.models.activations import override_activation, stated_activation
from shadowllm.models.families import bamboo, gemma, gemma3, granite, llama, minicpm, opt, phi3, qwen2, qwen3, smollm3
from shadowllm.models.files.checkpoint import Checkpoint, open_checkpoint
from shadowllm.models.files.config import declares, token_ids
from shadowllm.models.files.lora_adapter import LoraAdapter, MergedTensors, open_adapter
from shadowllm.models.files.quantised_checkpoint import check_float
from shadowllm.models.files.weight_files import refuse_adapter
from shadowllm.models.spec import ModelSpec
from shadowllm.models.tied_embeddings import resolve_tied_embeddings
from shadowllm.models.weights import Source, TensorFile, Weights

# Stored tensors that need no warning: they follow from the config, or repeat a tied output projection.
DERIVED = ("rotary_emb.inv_freq", "lm_head.weight", "decoder.version")


@dataclass(frozen=True)
class Family:
    """An adapter, and what the table of families says about it.

    Attributes:
        spec: converts a config to a spec.
        sources: gives the source of each canonical tensor, from the spec and the config.
        models: well-known models.
        differences: how they differ from Llama.
        heads: whether heads can be selected, as in `ModelSpec.selects_heads`.
    """

    spec: Callable[[Any], ModelSpec]
    sources: Callable[[ModelSpec, Any], dict[str, Source]]
    models: str
    differences: str
    heads: bool = True


FAMILIES = {
    "bamboo": Family(bamboo.spec, llama.sources, "TurboSparse-Mistral, Bamboo", "sliding window, ReLU of gate and up"),
    "gemma": Family(gemma.spec, gemma.sources, "Gemma", "norms with 1 added, scaled embeddings"),
    "gemma3_text": Family(
        gemma3.spec,
        gemma3.sources,
        "Gemma 3 1B",
        "as Gemma; norms of q, k and outputs, sliding window, two RoPEs",
        heads=False,
    ),
    "granite": Family(granite.spec, granite.sources, "Granite 3", "constant factors, biases"),
    "llama": Family(llama.spec, llama.sources, "Llama 2 and 3, SmolLM2, TinyLlama, ReluLLaMA", "biases"),
    "minicpm": Family(minicpm.spec, minicpm.sources, "MiniCPM, MiniCPM-S", "constant factors"),
    "ministral": Family(llama.llama_like, llama.sources, "Ministral 8B", "sliding window in some layers"),
    "mistral": Family(llama.llama_like, llama.sources, "Mistral 7B, Mistral Nemo", "sliding window"),
    "opt": Family(opt.spec, opt.sources, "OPT", "LayerNorm (after the blocks in OPT-350m), learned positions, no gate"),
    "phi3": Family(
        phi3.spec, phi3.sources, "Phi-3, Phi-3.5, Phi-4-mini", "fused projections, partial RoPE, sliding window"
    ),
    "qwen2": Family(qwen2.spec, llama.sources, "Qwen2, Qwen2.5", "biases of q, k and v, sliding window"),
    "qwen3": Family(qwen3.spec, llama.sources, "Qwen3", "norms of q and k, sliding window", heads=False),
    "smollm3": Family(smollm3.spec, llama.sources, "SmolLM3", "layers without RoPE"),
    "sparsellama": Family(llama.spec, llama.sources, "ProSparse", "biases"),
}
# Families that are known and cannot be supported yet, with the reason.
REFUSED = {
    "gemma3": "it reads images too",
    "gemma2": "its attention scores are capped (attn_logit_softcapping), which no sparse op does",
    "mixtral": "its MLP is a mixture of experts",
    "qwen2_moe": "its MLP is a mixture of experts",
    "qwen3_moe": "its MLP is a mixture of experts",
}


def load_model(
    model: str | Path,
    *,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    activation: str | None = None,
    activation_threshold: float | None = None,
    adapter: str | Path | None = None,
) -> tuple[ModelSpec, Weights, Checkpoint]:
    """Open a model: its spec, its weights (read on demand) and its checkpoint.

    Args:
        model: local folder or ``.gguf`` file, or a Hugging Face id.
        cache_dir: folder for downloads; Hugging Face's default when None.
        trust_remote_code: passed to ``transformers``; never needed for the supported families.
        activation: the activation of the MLP, by its name in configs; None for what the checkpoint says. GGUF files
            do not say it.
        activation_threshold: of FATReLU.
        adapter: folder with a LoRA adapter to merge into the weights.

    Raises:
        UserError: there is no model or adapter; an adapter beside the model is not given; its family is not
            supported; or its files do not fit together.
    """
    checkpoint = open_checkpoint(model, cache_dir, trust_remote_code)
    config, tensors = checkpoint.config, checkpoint.tensors
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"model family {config.model_type!r} is not supported"
            + (f": {REFUSED[config.model_type]}" if config.model_type in REFUSED else ""),
            f"supported: {', '.join(sorted(FAMILIES))}",
        )
    if not getattr(config, "is_causal", True):
        raise UserError("config.json says that the model is not causal (is_causal)", "use a model that generates text")
    _warn_of_windows(config)
    opened = None if adapter is None else open_adapter(Path(adapter))
    refuse_adapter(checkpoint.folder, None if opened is None else opened.folder)
    stated = stated_activation(config)
    if activation is not None:
        _override(checkpoint, activation, activation_threshold)
    other = () if stated_activation(config) == stated else stated_activation(config)
    if opened is not None:
        checkpoint = replace(checkpoint, adapter=opened)
        tensors = _merged(str(model), checkpoint, opened)
    spec = replace(
        family.spec(config),
        bos_token_id=_bos(config),
        eos_token_ids=token_ids(checkpoint.generation_config.eos_token_id, "eos_token_id"),
    )
    said = spec.tied_embeddings
    spec, sources = resolve_tied_embeddings(spec, tensors, lambda spec: family.sources(spec, config))
    if spec.tied_embeddings != said:
        config.tie_word_embeddings = spec.tied_embeddings
    used = {name for source in sources.values() for name in source.names}
    check_float(tensors, used)
    weights = Weights(spec, tensors, sources, other)
    _warn_of_unused(tensors.names() - used)
    return spec, weights, checkpoint


def _merged(model: str, checkpoint: Checkpoint, adapter: LoraAdapter) -> TensorFile:
    """Return the tensors with the adapter merged, with a warning if it names another model."""
    if adapter.base and Path(str(adapter.base)).name.lower() not in model.lower():
        warnings.warn(
            f"the adapter in {adapter.folder} was trained on {adapter.base}, and is merged into {model}: only the "
            "shapes of the two could be compared",
            stacklevel=3,
        )
    return MergedTensors(checkpoint.tensors, adapter, checkpoint.config, checkpoint.trust_remote_code)


def _warn_of_windows(config: Any) -> None:
    """Warn of options that the model's code ignores, but not the cache of `generate` in transformers."""
    for name in ("sliding_window", "attention_chunk_size", "layer_types"):
        value = getattr(config, name, None)
        if value and not declares(config, name):
            warnings.warn(
                f"config.json has {name}, which {config.model_type} models do not: it is ignored, so a token sees all "
                "earlier ones",
                stacklevel=3,
            )


def _override(checkpoint: Checkpoint, activation: str, threshold: float | None) -> None:
    """Write the given activation into the config, with a warning if the checkpoint's own says another one."""
    said, _ = stated_activation(checkpoint.config)
    if checkpoint.gguf is None and said != activation:
        warnings.warn(
            f"config.json says that the activation is {said!r}, and {activation!r} is used instead", stacklevel=3
        )
    override_activation(checkpoint.config, activation, threshold)


def _bos(config: Any) -> int | None:
    if isinstance(config.bos_token_id, list | tuple):
        raise UserError(f"the model's bos_token_id is {config.bos_token_id!r}", "it must be a token id or null")
    ids = token_ids(config.bos_token_id, "bos_token_id")
    if ids and ids[0] >= config.vocab_size:
        warnings.warn(
            f"the model's bos_token_id {ids[0]} is outside its vocabulary of {config.vocab_size}: not used",
            stacklevel=3,
        )
        return None
    return ids[0] if ids else None


def _warn_of_unused(names: set[str]) -> None:
    unused = sorted(name for name in names if not name.endswith(DERIVED))
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        warnings.warn(
            f"tensors of the checkpoint that this family does not have are left out: {', '.join(unused[:3])}{more}",
            stacklevel=3,
        )
