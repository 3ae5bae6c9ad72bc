"""Convert the metadata of a GGUF file to a Hugging Face config.

``transformers`` ignores some keys: it reads no RoPE scaling, no separate head size and only one stop token. Therefore
this module reads the metadata. The GGUF specification (ggml, docs/gguf.md) and llama.cpp's loader define the keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shadowllm.errors import UserError
from shadowllm.models.rope import read_rope

# Architecture in the file -> projections that have a bias: all of them in some files of Llama, always, or never.
ARCHITECTURES = {
    "llama": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "qwen2": ("attn_q", "attn_k", "attn_v"),
    "qwen3": (),
}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
USE_SAFETENSORS = "use the safetensors checkpoint of this model"
STOP_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Keys of the architecture. READ are used; HARMLESS do not change the computation.
READ = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
)
HARMLESS = ("rope.scaling.finetuned", "attention.causal", "tensor_data_layout", "use_parallel_residual")
# Keys that would change the model with any value except this neutral one.
NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.sliding_window": 0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
}
# GGUF files of Llama 3.1 and 3.2 store RoPE scaling as a table of factors, computed from these parameters.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192
TABLE_TOLERANCE = 1e-4


def gguf_config(metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], factors: np.ndarray | None) -> Any:
    """Build the config of a GGUF model.

    Args:
        metadata: keys and values of the file; the vocabulary is not needed.
        shapes: ``(rows, columns)`` of the tensors, by their names in the file.
        factors: the tensor ``rope_freqs.weight``, if there is one.

    Raises:
        UserError: the architecture or a key that changes the model is not supported, or a value is missing or invalid.
    """
    from transformers import AutoConfig

    architecture = _architecture(metadata)
    keys = _Keys(metadata, architecture)
    keys.refuse_unread()
    hidden, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    head_dim = _head_dim(keys, heads, shapes)
    biased = _biased(architecture, shapes)
    biases = {"attention_bias": biased, "mlp_bias": _has(shapes, "ffn_up")} if architecture == "llama" else {}
    return AutoConfig.for_model(
        architecture,
        vocab_size=_rows(shapes, "token_embd.weight"),
        hidden_size=hidden,
        intermediate_size=keys.size("feed_forward_length"),
        num_hidden_layers=keys.size("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=keys.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=keys.size("context_length"),
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_parameters=_rope(keys, head_dim, factors),
        **biases,
        tie_word_embeddings="output.weight" not in shapes,
        bos_token_id=_token(metadata, "bos_token_id"),
        eos_token_id=_stop_tokens(metadata),
        pad_token_id=_token(metadata, "padding_token_id"),
        architectures=[CLASSES[architecture]],
    )


def _architecture(metadata: Mapping[str, Any]) -> str:
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise UserError(
            f"the GGUF file holds no model but something of the type {kind!r}", "name the file of the model"
        )
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"the GGUF file holds a model of the family {architecture!r}, which is not supported",
            f"use a GGUF file of {', '.join(ARCHITECTURES)}, or the safetensors checkpoint of a supported family",
        )
    return str(architecture)


class _Keys:
    """The keys of the architecture, without its name as prefix."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        prefix = self.prefix = f"{architecture}."
        self._values = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def size(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(_says(f"{self.prefix}{key}", value), f"it must be one number; {USE_SAFETENSORS}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._values.get(key, default)
        if not isinstance(value, int | float) or not np.isfinite(value):
            raise UserError(_says(f"{self.prefix}{key}", value), USE_SAFETENSORS)
        return float(value)

    def refuse_unread(self) -> None:
        """Refuse keys that change the model; warn about unknown keys."""
        unknown = []
        for key, value in self._values.items():
            if key in NEUTRAL and value != NEUTRAL[key]:
                raise UserError(
                    f"the GGUF file sets {self.prefix}{key} to {value!r}, which is not supported", USE_SAFETENSORS
                )
            if key not in (*READ, *HARMLESS, *NEUTRAL):
                unknown.append(f"{self.prefix}{key}")
        if self._values.get("attention.causal") is False:
            raise UserError("the GGUF file holds a model without causal attention", "use a model that generates text")
        if unknown:
            warnings.warn(f"keys of the GGUF file that are not read: {', '.join(unknown)}", stacklevel=4)


def _head_dim(keys: _Keys, heads: int, shapes: Mapping[str, Sequence[int]]) -> int:
    """Return the head size, from the first query projection. The keys that give it must agree."""
    rows = _rows(shapes, "blk.0.attn_q.weight")
    if rows % heads:
        raise UserError(f"the GGUF file has {heads} heads and a query projection of {rows} rows", USE_SAFETENSORS)
    head_dim = rows // heads
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if keys.size(key, head_dim) != head_dim:
            raise UserError(
                f"the GGUF file gives {keys.prefix}{key} as {keys.get(key)} where heads have {head_dim} dimensions",
                "heads that are rotated in part, or whose values have another size, are not supported",
            )
    return head_dim


def _rows(shapes: Mapping[str, Sequence[int]], name: str) -> int:
    if name not in shapes:
        raise UserError(f"the GGUF file has no tensor {name}", "it is incomplete: download it again")
    return int(shapes[name][0])


def _biased(architecture: str, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether the projections of attention have biases. They must have those that the architecture can have."""
    expected = ARCHITECTURES[architecture]
    found = [part for part in ARCHITECTURES["llama"] if _has(shapes, part)]
    if found != list(expected) and (found or architecture != "llama"):
        raise UserError(
            f"the GGUF file has biases for {', '.join(found) or 'nothing'} alone, which is not supported",
            USE_SAFETENSORS,
        )
    return bool(found)


def _has(shapes: Mapping[str, Sequence[int]], part: str) -> bool:
    return any(name.endswith(f".{part}.bias") for name in shapes)


def _stop_tokens(metadata: Mapping[str, Any]) -> list[int] | None:
    found = [token for name in STOP_TOKENS if (token := _token(metadata, name)) is not None]
    return list(dict.fromkeys(found)) or None


def _token(metadata: Mapping[str, Any], name: str) -> int | None:
    found = metadata.get(f"tokenizer.ggml.{name}")
    if found is not None and type(found) is not int:
        raise UserError(_says(f"tokenizer.ggml.{name}", found), f"it must be a number; {USE_SAFETENSORS}")
    return found


def _says(key: str, value: object) -> str:
    return f"the GGUF file has no {key}" if value is None else f"the GGUF file gives {key} as {value!r}"


def _rope(keys: _Keys, head_dim: int, factors: np.ndarray | None) -> dict[str, Any]:
    """Return the RoPE parameters under the names that ``transformers`` uses."""
    theta = keys.number("rope.freq_base", 10000.0)
    # As in llama.cpp: a factor without a type is linear, and a factor of 0 means no scaling.
    kind = keys.get("rope.scaling.type") or "linear"
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    if kind not in ("none", "linear"):
        raise UserError(f"RoPE scaling {kind!r} of the GGUF file is not supported", "supported: none, linear, llama3")
    scaled = kind == "linear" and factor != 1.0
    if factors is None or bool((factors == 1).all()):
        linear = {"rope_type": "linear", "factor": factor, "rope_theta": theta}
        return linear if scaled else {"rope_type": "default", "rope_theta": theta}
    if scaled:
        raise UserError("the GGUF file has both a linear RoPE scaling and a table of factors", USE_SAFETENSORS)
    return _llama3(theta, head_dim, factors, keys.size("rope.scaling.original_context_length", LLAMA3_CONTEXT))


def _llama3(theta: float, head_dim: int, factors: np.ndarray, context: int) -> dict[str, Any]:
    """Return the parameters that give the table, which divides each frequency by its factor."""
    plain = {"rope_type": "default", "rope_theta": theta}
    scaled = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max()),
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": context,
    }
    frequencies, expected = (_frequencies(parameters, head_dim) for parameters in (plain, scaled))
    if factors.shape != frequencies.shape or not np.allclose(
        frequencies / factors, expected, rtol=TABLE_TOLERANCE, atol=0
    ):
        raise UserError("the RoPE factors of the GGUF file are not those of Llama 3.1", USE_SAFETENSORS)
    return scaled


def _frequencies(parameters: dict[str, Any], head_dim: int) -> np.ndarray:
    from transformers import LlamaConfig

    config = LlamaConfig(head_dim=head_dim, rope_parameters=dict(parameters))
    return read_rope(config).inverse_frequencies(head_dim)
