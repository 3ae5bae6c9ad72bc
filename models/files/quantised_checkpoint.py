"""Read checkpoints that are already quantised: convert exact formats back to floats, refuse others by name.

Supported are the compressed-tensors formats with one integer or float8 per weight, packed or not, and FP8 as
published by DeepSeek and Qwen. Activations stay floats, even if the checkpoint would quantise them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shadowllm.errors import UserError
from shadowllm.models.files.config import read_json_object
from shadowllm.models.files.dequantise import ACTIVATION_SCALES, FLOATS, PACKED_BITS, DequantisedTensors, Layout
from shadowllm.models.files.safetensors_file import SafetensorsFiles
from shadowllm.models.weights import TensorFile

READABLE_FORMATS = ("dense", "float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
FP8_BLOCK = (128, 128)
ORDERED = ("group", "dynamic", "true")  # the values of actorder with which columns have an order of their own
USE_ORIGINAL = (
    "use the model it was quantised from; --weight-dtype int8 or int4 quantises it again at export, if that is wanted"
)
WAYS_OUT = {
    "bitsandbytes": "load it with transformers, call model.dequantize() and save_pretrained(), and export that",
    "mlx": "convert it back with mlx_lm.convert --dequantize, or use the model it was made from",
}
# Older tools store their settings in these files instead of config.json.
OLD_CONFIGS = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quantization_config.json": "quanto",
}
# How the names of tensors beside a weight end -> the method that adds them. The first match counts.
SIBLINGS = {
    "SCB": "bitsandbytes LLM.int8",
    "weight_format": "bitsandbytes LLM.int8",
    "absmax": "bitsandbytes 4 bit",
    "quant_map": "bitsandbytes 4 bit",
    "quant_state": "bitsandbytes 4 bit",
    "g_idx": "GPTQ",
    "qzeros": "GPTQ or AWQ",
    "qweight": "GPTQ or AWQ",
    "q_weight": "EXL2",
    "trellis": "EXL3",
    "weight_scale_2": "NVFP4 (ModelOpt)",
    "weight_global_scale": "NVFP4 (compressed-tensors)",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "FP8",
    "weight_scale": "FP8, W8A8 or the like",
    "W_q": "HQQ",
    "codebooks": "AQLM",
    "Qidxs": "QuIP#",
    "_data": "quanto",
    "biases": "MLX",
    "scales": "MLX or the like",
    "zero_point": "an integer method",
}


def plain_tensors(tensors: SafetensorsFiles, config: Any, folder: Path) -> TensorFile:
    """Return the tensors as floats; dequantise them if the config names a supported method.

    Raises:
        UserError: the method, or its format, is not supported.
    """
    method, settings = _method(config, folder, tensors)
    if method is None:
        return tensors
    if method == "compressed-tensors":
        _check_compressed(settings, folder)
        _check_final(settings, tensors)
        return DequantisedTensors(tensors, _layout(settings))
    if method == "fp8":
        return DequantisedTensors(tensors, Layout(block=_fp8_block(settings, tensors)))
    tool = next((name for name in WAYS_OUT if method.startswith(name)), "")
    raise UserError(f"{folder} is quantised by {method}, which is not read", WAYS_OUT.get(tool, USE_ORIGINAL))


def check_float(tensors: TensorFile, used: Iterable[str]) -> None:
    """Refuse weights that are not plain floats, and weights that another tensor would change.

    Args:
        used: names of the tensors that the model uses.

    Raises:
        UserError: a used tensor is integer or float8, or has a scale, zero point or adapter beside it.
    """
    used = set(used)
    modules = {name.rpartition(".")[0] for name in used}
    for name in sorted(tensors.names() - used):
        pieces = name.split(".")
        # Some methods add several parts to a name: q_proj.weight.quant_state.bitsandbytes__nf4.
        owner = next((m for i in range(1, len(pieces)) if (m := ".".join(pieces[:i])) in modules), None)
        part = name.removeprefix(f"{owner}.")
        if owner is not None and part not in ("bias", *ACTIVATION_SCALES):
            _refuse_sibling(owner, part)
    for name in sorted(used):
        if (dtype := tensors.dtypes.get(name, "F32")) not in FLOATS:
            raise UserError(f"tensor {name} is of type {dtype}, and nothing says what its numbers mean", USE_ORIGINAL)


def _refuse_sibling(owner: str, part: str) -> None:
    pieces = part.split(".")
    method = next((m for ending, m in SIBLINGS.items() if any(piece.endswith(ending) for piece in pieces)), None)
    if method is None:
        raise UserError(
            f"beside the weight of {owner} lies {part}, which is not read",
            "merge it into the weight with the tool that made it, and export the result",
        )
    raise UserError(
        f"beside the weight of {owner} lies {part}: the checkpoint is quantised ({method}), "
        "and config.json does not say how",
        USE_ORIGINAL,
    )


def _method(config: Any, folder: Path, tensors: SafetensorsFiles) -> tuple[str | None, Mapping[str, Any]]:
    """Return the method that quantised the checkpoint, if any, and its settings."""
    # MLX is checked first, because mlx_lm also writes a quantization_config without a method.
    if getattr(config, "quantization", None) or (tensors.format == "mlx" and _has(tensors, "scales")):
        return "mlx", {}
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        return _name(settings), settings
    for name, method in OLD_CONFIGS.items():
        if (folder / name).is_file():
            return method, read_json_object(folder / name)
    return None, {}


def _name(settings: Mapping[str, Any]) -> str:
    method = str(settings.get("quant_method") or "an unnamed method")
    if settings.get("load_in_8bit") or settings.get("load_in_4bit"):
        return f"bitsandbytes ({'LLM.int8' if settings.get('load_in_8bit') else '4 bit'})"
    return method


def _has(tensors: SafetensorsFiles, part: str) -> bool:
    return any(name.endswith(f".{part}") for name in tensors.names())


def _check_compressed(settings: Mapping[str, Any], folder: Path) -> None:
    formats = {str(group["format"]) for group in _groups(settings) if group.get("format")}
    unread = sorted((formats or {str(settings.get("format") or "dense")}) - set(READABLE_FORMATS))
    sparsity = _mapping(settings, "sparsity_config").get("format") or "dense"
    if sparsity != "dense":
        unread.append(str(sparsity))
    if settings.get("transform_config"):
        unread.append("transforms of the weights")
    bits = [each["num_bits"] for each in _weight_settings(settings) if each.get("num_bits") not in (None, *PACKED_BITS)]
    if bits and not unread:
        unread.append(f"numbers of {bits[0]} bits")
    if unread:
        raise UserError(f"{folder} is quantised by compressed-tensors as {unread[0]}, which is not read", USE_ORIGINAL)


def _check_final(settings: Mapping[str, Any], tensors: SafetensorsFiles) -> None:
    """Refuse floats that compressed-tensors rounds to the grid of their scales in each forward pass.

    It does so until a checkpoint is saved compressed.
    """
    status = settings.get("quantization_status")
    if status == "compressed" or not _weight_settings(settings):
        return
    for name in sorted(tensors.names()):
        if name.endswith(".weight") and f"{name}_scale" in tensors.names() and tensors.dtypes[name] in FLOATS:
            raise UserError(
                f"{name} is stored as floats with a weight_scale that they are still to be rounded to "
                f"(quantization_status {status!r} of compressed-tensors), which is not done",
                "save it compressed (save_pretrained with save_compressed=True in llm-compressor), or use the model "
                "it was made from",
            )


def _layout(settings: Mapping[str, Any]) -> Layout:
    """Return what the config says about the weights.

    The groups of a config can differ, and which modules they are for is not read: a weight must fit one of them.
    """
    weights = _weight_settings(settings)
    bits = frozenset(each["num_bits"] for each in weights if each.get("num_bits") is not None)
    return Layout(
        block=_block(settings),
        group_sizes=_group_sizes(weights),
        bits=bits or frozenset(PACKED_BITS),
        # compressed-tensors takes a weight without this key for symmetric, and ignores zero points of symmetric ones.
        zero_points=not weights or not all(each.get("symmetric", True) for each in weights),
        ordered=not weights or any(str(each.get("actorder")).lower() in ORDERED for each in weights),
        floats_are_final=True,
    )


def _group_sizes(weights: list[Mapping[str, Any]]) -> frozenset[int]:
    """Return how many columns share a scale, -1 for all; nothing if some weights have blocks."""
    if any(each.get("block_structure") or each.get("strategy") == "block" for each in weights):
        return frozenset()
    sizes = [each.get("group_size") or -1 for each in weights]
    if unusable := [size for size in sizes if type(size) is not int]:
        raise UserError(
            f"config.json says group_size is {unusable[0]!r}", "it must be a whole number: correct it there"
        )
    return frozenset(sizes)


def _weight_settings(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [weights for group in _groups(settings) if (weights := _mapping(group, "weights"))]


def _block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale, if the config gives them."""
    weights = (each.get("block_structure") for each in _weight_settings(settings))
    for size in (settings.get("weight_block_size"), *weights):
        if isinstance(size, str) and (written := re.fullmatch(r"(\d+)x(\d+)", size)):
            return int(written[1]), int(written[2])
        if isinstance(size, list) and len(size) == 2 and all(type(each) is int for each in size):
            return size[0], size[1]
        if size is not None:
            raise UserError(
                f"config.json says that blocks of weights have the size {size!r}",
                "it must be the number of rows and of columns: correct it there",
            )
    return None


def _fp8_block(settings: Mapping[str, Any], tensors: SafetensorsFiles) -> tuple[int, int] | None:
    """Return `_block`. Blocks whose size an FP8 config does not mention are 128 x 128, as in ``transformers``."""
    scales = (name for name in tensors.names() if name.endswith(".weight_scale_inv"))
    if "weight_block_size" in settings or all(tensors.read(name).numel() == 1 for name in scales):
        return _block(settings)
    return FP8_BLOCK


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [group for group in _mapping(settings, "config_groups").values() if isinstance(group, Mapping)]


def _mapping(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = settings.get(key)
    return value if isinstance(value, Mapping) else {}
