"""Check a model's ``config.json`` and ``generation_config.json``, and read them with ``transformers``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from shadowllm.errors import UserError, foreign_reader, in_one_line
from shadowllm.limits import MOST_LAYERS
from shadowllm.models.files.lfs import refuse_pointers

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

# Sizes that must be positive whole numbers if a config has them. ``transformers`` checks only their type, and divides
# by some of them.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "ffn_dim",
    "word_embed_proj_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)

# Model types that transformers has no code for, and the one whose config has the same fields.
RELATIVES = {"bamboo": "mistral", "minicpm": "llama", "sparsellama": "llama"}
# What their configs mean without a key, where it is not what the relative's means. Bamboo has no default activation.
DEFAULTS: dict[str, dict[str, Any]] = {"bamboo": {"hidden_act": ""}, "minicpm": {"tie_word_embeddings": True}}


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """Read the Hugging Face config object of a folder.

    Raises:
        UserError: there is no config, it is not readable, a size is not positive, another value is not of
            its type, layers have configs of their own, or ``transformers`` refuses it.
    """
    from transformers import AutoConfig

    path = folder / CONFIG
    data = read_json_object(path)
    if not isinstance(data.get("model_type"), str) and "auto_map" not in data:
        raise UserError(f"{path} does not say which family the model is of", "it needs a model_type, such as llama")
    _check_values(data, path)
    remedy = "correct config.json, or download the model again"
    with foreign_reader(f"transformers cannot read {path}", remedy):
        if data.get("model_type") in RELATIVES and not trust_remote_code:
            config = _read_as_relative(data)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    old = data.get("compression_config")  # the first name of this key in compressed-tensors
    if isinstance(old, dict) and getattr(config, "quantization_config", None) is None:
        config.quantization_config = old
    return config


def _check_values(data: Mapping[str, Any], path: Path) -> None:
    for name in SIZES:
        size = data.get(name)
        if size is not None and (type(size) is not int or size < 1):
            raise UserError(f"{path} says {name} is {size!r}", "it must be a whole number above 0")
    layers = data.get("num_hidden_layers") or 0
    if layers > MOST_LAYERS:  # transformers would list them
        raise UserError(f"{path} says num_hidden_layers is {layers}", f"it must be at most {MOST_LAYERS}")
    tied = data.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        raise UserError(f"{path} says tie_word_embeddings is {tied!r}", "it must be true or false")
    if data.get("per_layer_config"):
        raise UserError(
            f"{path} gives single layers a config of their own (per_layer_config), which is not supported",
            "use a model whose layers are all alike",
        )


def _read_as_relative(data: dict[str, Any]) -> Any:
    """Read a config that transformers has no class for. The result has the fields of both families."""
    from transformers import AutoConfig

    fields = DEFAULTS.get(data["model_type"], {}) | {name: data[name] for name in data if name != "model_type"}
    config = AutoConfig.for_model(RELATIVES[data["model_type"]], **fields)
    setattr(config, "model_type", data["model_type"])  # noqa: B010  (mypy takes it for a constant of the class)
    return config


def read_generation_config(folder: Path, config: Any) -> Any:
    """Read the model's generation config; if there is none, derive it from the model config.

    Raises:
        UserError: the file is damaged.
    """
    from transformers import GenerationConfig

    path = folder / GENERATION_CONFIG
    if path.is_file():
        read_json_object(path)
        with foreign_reader(f"transformers cannot read {path}", "correct the file, or remove it"):
            return GenerationConfig.from_pretrained(folder)
    if not (folder / CONFIG).is_file():  # a GGUF file
        return GenerationConfig.from_model_config(config)
    # The file may have settings that the config's class does not keep.
    with foreign_reader(f"transformers cannot read {folder / CONFIG}", "correct the settings of generation in it"):
        return GenerationConfig.from_pretrained(folder, config_file_name=CONFIG, _from_model_config=True)


def declares(config: Any, option: str) -> bool:
    """Return whether the config's class has an option.

    A file may have others, which ``transformers`` keeps and ignores. Options are attributes of the class in recent
    versions of ``transformers``, and arguments in older ones.
    """
    return hasattr(type(config), option) or option in signature(type(config).__init__).parameters


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    """Return token ids that are given as one number, a list of them or null.

    Raises:
        UserError: the value is something else, or a number is negative.
    """
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    for item in ids:
        if type(item) is not int or item < 0:
            raise UserError(f"the model's {name} is {value!r}", "it must be a token id, a list of them, or null")
    return ids


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: the file is missing, is a Git LFS pointer or holds something else.
    """
    if not path.is_file():
        raise UserError(
            f"there is no {path.name} in {path.parent}", "name a folder that has it; it belongs beside the weights"
        )
    refuse_pointers([path])
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({in_one_line(error)})", "download the file again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} does not hold a JSON object", "download the file again")
    return data
