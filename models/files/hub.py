"""Download a model from the Hugging Face hub, without other files of its repository.

A name is ``owner/name``; ``owner/name/file.gguf`` or ``owner/name:Q4_K_M`` selects one of several GGUF files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from shadowllm.errors import UserError, in_one_line
from shadowllm.models.files.weight_files import ADAPTER_WEIGHTS, INDEX, SINGLE_FILE, SPLIT, gguf_models, shard_names

NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>.+\.gguf)|:(?P<tag>[\w.-]+))?")
# Files to download besides the weights. They exclude pickled files and copies for other frameworks.
COMPANIONS = [
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "tokenizer*",
    "*.py",
    "additional_chat_templates/*",
]


def download(model: str, cache_dir: Path | None) -> Path:
    """Download a model from the hub; return its local folder or its GGUF file.

    Raises:
        UserError: the name does not exist or has several GGUF models, or the hub is unreachable and the cache is empty.
    """
    match = NAME.fullmatch(model)
    if match is None or model.startswith((".", "/", "~")):
        raise UserError(
            f"no such model: {model}",
            "give a local folder, a .gguf file or a name on the Hugging Face hub: owner/name, owner/name/file.gguf "
            "or owner/name:Q4_K_M",
        )
    repo, file, tag = match["repo"], match["file"], match["tag"]
    names, online = _listing(repo, cache_dir)
    if file or tag or not {SINGLE_FILE, INDEX} & set(names):
        chosen = _chosen(repo, names, file, tag)
        if chosen is None:
            return _snapshot(repo, cache_dir, online, COMPANIONS)
        return _snapshot(repo, cache_dir, online, _parts(names, chosen)) / chosen
    # A repository may hold shards as well as a single file. `transformers` then reads the single file.
    if SINGLE_FILE in names:
        return _snapshot(repo, cache_dir, online, [*COMPANIONS, ADAPTER_WEIGHTS, SINGLE_FILE])
    folder = _snapshot(repo, cache_dir, online, [*COMPANIONS, ADAPTER_WEIGHTS, INDEX])
    return _snapshot(repo, cache_dir, online, shard_names(folder / INDEX))


def _listing(repo: str, cache_dir: Path | None) -> tuple[list[str], bool]:
    """Return the file names of a repository and True; if the hub is unreachable, those in the cache and False."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        info = HfApi().model_info(repo)
        return [sibling.rfilename for sibling in info.siblings or []], True
    except GatedRepoError as error:
        raise _gated(repo) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise _cannot(repo, error) from error
    except Exception as error:  # noqa: BLE001  (without a network, those of the hub's own HTTP client)
        try:
            folder = Path(snapshot_download(repo, cache_dir=cache_dir, local_files_only=True))
        except (OSError, ValueError) as missing:
            raise _cannot(repo, error) from missing
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()], False


def _snapshot(repo: str, cache_dir: Path | None, online: bool, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        folder = snapshot_download(
            repo, cache_dir=cache_dir, allow_patterns=list(patterns), local_files_only=not online
        )
    except GatedRepoError as error:
        raise _gated(repo) from error
    except Exception as error:
        raise _cannot(repo, error) from error
    return Path(folder)


def _gated(repo: str) -> UserError:
    return UserError(
        f"{repo} is gated, and you do not have access",
        f"ask for access on https://huggingface.co/{repo}, then log in with `hf auth login`",
    )


def _cannot(repo: str, error: Exception) -> UserError:
    from huggingface_hub.constants import ENDPOINT

    return UserError(
        f"no such model: {repo} is no local folder, and cannot be had from the hub, {ENDPOINT} ({in_one_line(error)})",
        "check the name and the network, or download it and give the folder",
    )


def _chosen(repo: str, names: Sequence[str], file: str | None, tag: str | None) -> str | None:
    """Return the requested GGUF file, or the only one; None if the repository has none."""
    models = gguf_models(name for name in names if name.endswith(".gguf"))
    if file is not None:
        found = [name for name in names if name == file]
    elif tag is not None:
        wanted = re.compile(rf"(?i)(^|[-._/]){re.escape(tag)}(?=[-._/])")
        found = [name for name in models if wanted.search(name)]
    else:
        found = models
    if len(found) == 1:
        return found[0]
    if not models and file is None and tag is None:
        return None
    listed = ", ".join(models[:8]) + (f" and {len(models) - 8} more" if len(models) > 8 else "")
    raise UserError(
        f"{repo} holds {len(models)} GGUF models ({listed or 'none'})"
        + (f", {len(found)} of them {file or tag}" if file or tag else ""),
        f"name one, as {repo}/{models[0] if models else 'file.gguf'}",
    )


def _parts(names: Sequence[str], chosen: str) -> list[str]:
    """Return the file, or all parts of a split model."""
    match = SPLIT.fullmatch(chosen)
    if match is None:
        return [chosen]
    return [
        name
        for name in names
        if (m := SPLIT.fullmatch(name)) and (m["stem"], m["count"]) == (match["stem"], match["count"])
    ]
