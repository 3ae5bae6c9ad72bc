"""RoPE in a GGUF file, as the parameters that ``transformers`` has for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from shadowllm.errors import UserError
from shadowllm.models.files.gguf_keys import USE_SAFETENSORS, Keys
from shadowllm.models.rope import read_rope

# Tensors of factors that divide the frequencies.
FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
# GGUF files of Llama 3.1 and 3.2 store RoPE scaling as a table of factors, computed from these parameters.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192
TABLE_TOLERANCE = 1e-4
# llama.cpp's base for Gemma 3's layers with a window, if a file does not give one.
GEMMA3_WINDOW_BASE = 10000.0

Tables = Mapping[str, np.ndarray]


def one_rope(keys: Keys, head_dim: int, tables: Tables) -> dict[str, Any]:
    """Read the RoPE of most architectures: plain, linear or Llama 3's.

    Args:
        head_dim: number of dimensions of a head.
        tables: the tensors of factors that the file has.

    Raises:
        UserError: the scaling is another one, or the table is not Llama 3's.
    """
    theta, factor = keys.number("rope.freq_base", 10000.0), _linear_factor(keys, ("none", "linear"))
    factors = tables.get(FACTORS)
    if factors is None or bool((factors == 1).all()):
        linear = {"rope_type": "linear", "factor": factor, "rope_theta": theta}
        return linear if factor != 1.0 else {"rope_type": "default", "rope_theta": theta}
    if factor != 1.0:
        raise UserError("the GGUF file has both a linear RoPE scaling and a table of factors", USE_SAFETENSORS)
    return _llama3(theta, head_dim, factors, keys.size("rope.scaling.original_context_length", LLAMA3_CONTEXT))


def long_rope(keys: Keys, head_dim: int, tables: Tables) -> dict[str, Any]:
    """Read the RoPE of Phi-3: it can rotate a part of each head, and have factors for short and for long texts.

    The arguments are those of `one_rope`.

    Raises:
        UserError: there is another scaling, or one of the two tables is missing or has another length.
    """
    if _linear_factor(keys, ("none", "linear", "longrope")) != 1.0:
        raise UserError("a linear RoPE scaling of Phi-3 is not supported", USE_SAFETENSORS)
    rotated = keys.size("rope.dimension_count", head_dim)
    plain = {"rope_theta": keys.number("rope.freq_base", 10000.0), "partial_rotary_factor": rotated / head_dim}
    attention_factor = keys.factor("rope.scaling.attn_factor", 1.0)
    if not tables and keys.get("rope.scaling.type") != "longrope" and attention_factor == 1.0:
        return {"rope_type": "default"} | plain
    for name in (LONG_FACTORS, SHORT_FACTORS):
        if name not in tables or tables[name].shape != (rotated // 2,):
            raise UserError(f"the GGUF file has no {name} with {rotated // 2} factors", USE_SAFETENSORS)
    return plain | {
        "rope_type": "longrope",
        "long_factor": tables[LONG_FACTORS].tolist(),
        "short_factor": tables[SHORT_FACTORS].tolist(),
        "attention_factor": attention_factor,
        "original_max_position_embeddings": trained_context(keys),
    }


def trained_context(keys: Keys) -> int:
    """Return the longest text that a model was trained for before its RoPE was changed for longer ones."""
    return keys.size("rope.scaling.original_context_length", keys.size("context_length"))


def two_ropes(keys: Keys, head_dim: int, tables: Tables) -> dict[str, Any]:
    """Read the two RoPEs of Gemma 3. Only that of layers without a window is scaled. As `one_rope` otherwise."""
    window = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", GEMMA3_WINDOW_BASE)}
    return {"full_attention": one_rope(keys, head_dim, tables), "sliding_attention": window}


def _linear_factor(keys: Keys, kinds: tuple[str, ...]) -> float:
    """Return by what positions are divided.

    Args:
        kinds: types of scaling that the architecture can have.
    """
    # As in llama.cpp: a factor without a type is linear, and a factor of 0 means no scaling.
    kind = keys.get("rope.scaling.type") or "linear"
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    if kind not in kinds:
        raise UserError(f"RoPE scaling {kind!r} of the GGUF file is not supported", f"supported: {', '.join(kinds)}")
    return 1.0 if kind == "none" else factor


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
