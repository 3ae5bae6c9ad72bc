"""Find a model's weight files in a folder: exactly the files that ``transformers`` would load."""

from __future__ import annotations

import re
from pathlib import Path

from shadowllm.errors import UserError
from shadowllm.models.files.config import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
ORIGINAL = "consolidated."  # name prefix of files in Meta's and Mistral's own format
HUGGING_FACE_FORMAT = "this is the makers' own format: use the model in the format of Hugging Face"
SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


def safetensors_files(folder: Path, named: object = None) -> list[Path]:
    """Return the safetensors files of a model: ``model.safetensors``, or the shards of its index.

    Args:
        named: the file that the config names (``transformers_weights``); it takes precedence.

    Returns:
        The files; empty if the folder holds neither.

    Raises:
        UserError: the index cannot be read, or a file is missing.
    """
    for name in (SINGLE_FILE, INDEX):
        path = folder / name
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a link to {path.readlink()}, which is missing", "download the checkpoint again")
    if named is not None:
        path = folder / str(named)
        if not isinstance(named, str) or Path(named).name != named or not path.is_file():
            raise UserError(f"config.json names the weights {named!r}, which is no file of {folder}", "correct it")
        return _shards(path) if named.endswith(".index.json") else [path]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX)
    return []


def _shards(index: Path) -> list[Path]:
    for name in shard_names(index):
        if not (index.parent / name).is_file():
            raise UserError(
                f"the shard {name} named by {index} is missing", "the checkpoint is incomplete: download it again"
            )
    return [index.parent / name for name in shard_names(index)]


def shard_names(index: Path) -> list[str]:
    """Return the sorted names of the shards in an index, relative to its folder.

    Raises:
        UserError: the index cannot be read, or it names a file outside its folder.
    """
    where = read_json_object(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{index} has no readable weight_map", "download the file again")
    names = sorted(set(where.values()))
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{index} names {name!r}, which lies outside the folder", "do not use this checkpoint")
    return names


def gguf_file(folder: Path) -> str | None:
    """Return the only GGUF model in a folder (of a split model, its first part); None if there is none.

    Raises:
        UserError: there are several.
    """
    models = gguf_models(path.name for path in folder.glob("*.gguf"))
    if len(models) > 1:
        raise UserError(f"{folder} holds {len(models)} GGUF models", f"name one, for example {folder / models[0]}")
    return models[0] if models else None


def gguf_models(names: object) -> list[str]:
    """Return the sorted models among GGUF file names; a split model has the name of its first part present."""
    first: dict[str, str] = {}
    for name in sorted(names):  # type: ignore[call-overload]
        match = SPLIT.fullmatch(name)
        first.setdefault(f"{match['stem']}-of-{match['count']}" if match else name, name)
    return sorted(first.values())


def gguf_parts(path: Path) -> list[Path]:
    """Return all files of a GGUF model, given any one of them.

    Raises:
        UserError: a part is missing.
    """
    match = SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    parts = [path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise UserError(f"{part} is missing, one of {count} parts", "the model is incomplete: download all parts")
    return parts


def refuse_what_is_no_model(folder: Path) -> None:
    """Refuse a folder without weights; the message tells what it is.

    Raises:
        UserError: always.
    """
    if (folder / "manifest.json").is_file() and (folder / "model.onnx.data").is_file():
        raise UserError(f"{folder} is a bundle already", "run it, or export the model that it was made from")
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise UserError(
            f"{folder} is an adapter (LoRA or the like) of {base}, not a model",
            f"export that model with --adapter {folder}",
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise UserError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX}, but {others[0]}", _use_of(others[0]))
    pickled = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern))
    if pickled:
        convert = "convert them to safetensors: load the model with transformers and call save_pretrained"
        raise UserError(
            f"the weights in {folder} are pickled ({pickled[0]}), which is not read because it can run code",
            HUGGING_FACE_FORMAT if pickled[0].startswith(ORIGINAL) else convert,
        )
    raise UserError(f"no model weights in {folder}", f"a model folder holds {SINGLE_FILE} or one .gguf file")


def _use_of(name: str) -> str:
    """Return the remedy for a safetensors file whose name is not that of model weights."""
    if SHARD.fullmatch(name):
        return f"the index of the shards is missing: download {INDEX}"
    if name.startswith(ORIGINAL):
        return HUGGING_FACE_FORMAT
    if name.startswith("adapter_"):
        return "an adapter is no model: export its model with --adapter"
    return f"the weights of a model are called {SINGLE_FILE}: rename them if that is what these are"


def refuse_adapter(folder: Path, given: Path | None) -> None:
    """Refuse a model with an adapter beside its weights, which ``transformers`` applies if peft is installed.

    Args:
        given: the folder of the adapter that is merged.

    Raises:
        UserError: there is one, and it is not merged.
    """
    if (folder / ADAPTER_CONFIG).is_file() and (given is None or not given.samefile(folder)):
        raise UserError(
            f"{folder} holds an adapter beside the model's weights",
            f"export it with --adapter {folder}, or move {ADAPTER_CONFIG} away to leave the adapter out",
        )
