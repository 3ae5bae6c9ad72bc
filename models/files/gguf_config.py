"""Convert the metadata of a GGUF file to a Hugging Face config.

``transformers`` ignores some keys: it reads no RoPE scaling, no separate head size and only one stop token. Therefore
this module reads the metadata. The GGUF specification (ggml, docs/gguf.md) and llama.cpp's loader define the keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shadowllm.errors import UserError, foreign_reader
from shadowllm.limits import MOST_LAYERS
from shadowllm.models.files.gguf_architectures import FUSED, Architecture
from shadowllm.models.files.gguf_keys import USE_SAFETENSORS, Keys, says
from shadowllm.models.files.gguf_rope import Tables

STOP_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Tokens that end a turn, whether a key says so or not. llama.cpp finds them by their texts too.
END_OF_TURN = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")

Shapes = Mapping[str, Sequence[int]]


def gguf_config(
    architecture: Architecture,
    metadata: Mapping[str, Any],
    shapes: Shapes,
    tables: Tables,
    end_of_turn: Sequence[int] = (),
) -> Any:
    """Build the config of a GGUF model.

    Args:
        metadata: keys and values of the file; the vocabulary is not needed.
        shapes: ``(rows, columns)`` of the tensors, by their names in the file.
        tables: those of the architecture's tables of RoPE factors that the file has.
        end_of_turn: ids of the tokens whose text is in `END_OF_TURN`.

    Raises:
        UserError: a key that changes the model is not supported, or a value is missing or invalid.
    """
    from transformers import AutoConfig

    keys = Keys(metadata, architecture.name)
    keys.refuse_unread(architecture.keys)
    heads = keys.size("attention.head_count")
    kv_heads = keys.size("attention.head_count_kv", heads)
    head_dim = _head_dim(keys, architecture, heads, kv_heads, shapes)
    fields = {
        "vocab_size": _rows(shapes, "token_embd.weight"),
        "hidden_size": keys.size("embedding_length"),
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": keys.size("block_count", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": architecture.rope(keys, head_dim, tables),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": _token(metadata, "bos_token_id"),
        "eos_token_id": _stop_tokens(metadata, end_of_turn),
        "pad_token_id": _token(metadata, "padding_token_id"),
        "architectures": [architecture.model_class],
    }
    fields |= _biases(architecture, shapes) | architecture.options(keys, head_dim)
    with foreign_reader("transformers refuses what the GGUF file says", USE_SAFETENSORS):
        return AutoConfig.for_model(architecture.family, **fields)


def _head_dim(keys: Keys, architecture: Architecture, heads: int, kv_heads: int, shapes: Shapes) -> int:
    """Return the head size, from the first query projection. The keys that give it must agree."""
    fused = FUSED[0] in architecture.layer
    name, parts = ("attn_qkv", heads + 2 * kv_heads) if fused else ("attn_q", heads)
    rows = _rows(shapes, f"blk.0.{name}.weight")
    if rows % parts:
        raise UserError(f"the GGUF file has {parts} heads in {name}, which has {rows} rows", USE_SAFETENSORS)
    head_dim = rows // parts
    sizes = ("attention.key_length", "attention.value_length")
    for key in sizes if architecture.partial_rotary else (*sizes, "rope.dimension_count"):
        if keys.size(key, head_dim) != head_dim:
            raise UserError(
                f"the GGUF file gives {keys.prefix}{key} as {keys.get(key)} where heads have {head_dim} dimensions",
                "heads that are rotated in part, or whose values have another size, are not supported",
            )
    return head_dim


def _rows(shapes: Shapes, name: str) -> int:
    if name not in shapes:
        raise UserError(f"the GGUF file has no tensor {name}", "it is incomplete: download it again")
    return int(shapes[name][0])


def _biases(architecture: Architecture, shapes: Shapes) -> dict[str, bool]:
    """Return what the config says about biases. The projections of attention have all that they can have, or none."""
    found = tuple(part for part in ATTENTION if _has(shapes, part))
    if found != architecture.biases and (found or not architecture.optional_biases):
        raise UserError(
            f"the GGUF file has biases for {', '.join(found) or 'nothing'} alone, which is not supported",
            USE_SAFETENSORS,
        )
    if not architecture.optional_biases:
        return {}
    return {"attention_bias": bool(found), "mlp_bias": _has(shapes, "ffn_up")}


def _has(shapes: Shapes, part: str) -> bool:
    return any(name.endswith(f".{part}.bias") for name in shapes)


def _stop_tokens(metadata: Mapping[str, Any], end_of_turn: Sequence[int]) -> list[int] | None:
    found = [token for name in STOP_TOKENS if (token := _token(metadata, name)) is not None]
    return list(dict.fromkeys([*found, *end_of_turn])) or None


def _token(metadata: Mapping[str, Any], name: str) -> int | None:
    found = metadata.get(f"tokenizer.ggml.{name}")
    if found is not None and type(found) is not int:
        raise UserError(says(f"tokenizer.ggml.{name}", found), f"it must be a number; {USE_SAFETENSORS}")
    return found
