"""Families by their Hugging Face ``model_type``; a new family is one module and one row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shadowllm.errors import UserError
from shadowllm.models import llama, opt
from shadowllm.models.checkpoint import Checkpoint, open_checkpoint
from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import Source, Weights


@dataclass(frozen=True)
class Family:
    """What an adapter provides: the spec of a config, and where each canonical tensor lies."""

    spec: Callable[[Any], ModelSpec]
    sources: Callable[[ModelSpec], dict[str, Source]]


FAMILIES = {
    "llama": Family(llama.spec, llama.sources),
    "opt": Family(opt.spec, opt.sources),
}


def load_model(
    model: str | Path, *, cache_dir: Path | None = None, trust_remote_code: bool = False
) -> tuple[ModelSpec, Weights, Checkpoint]:
    """Open a model: its description, its weights (read on demand) and the files it came from.

    Args:
        model: local folder or ``.gguf`` file, or a Hugging Face id.
        cache_dir: where downloads go; Hugging Face's own default when None.
        trust_remote_code: passed to ``transformers``; never needed for the supported families.

    Raises:
        UserError: nothing found there, an unsupported family, or files that do not fit the config.
    """
    checkpoint = open_checkpoint(model, cache_dir, trust_remote_code)
    family = FAMILIES.get(checkpoint.config.model_type)
    if family is None:
        raise UserError(
            f"model family {checkpoint.config.model_type!r} is not supported",
            f"supported: {', '.join(sorted(FAMILIES))}",
        )
    spec = replace(
        family.spec(checkpoint.config),
        bos_token_id=checkpoint.config.bos_token_id,
        eos_token_ids=_ids(checkpoint.config.eos_token_id),
    )
    return spec, Weights(spec, checkpoint.tensors, family.sources(spec)), checkpoint


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
