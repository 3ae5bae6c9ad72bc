"""Whether the output projection is the embedding table: the tensors that are there decide, as in ``transformers`` 5."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch

from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import Source, TensorFile

HEAD, TABLE = "lm_head.weight", "embed_tokens.weight"
Sources = dict[str, Source]


def resolve_tied_embeddings(
    spec: ModelSpec, tensors: TensorFile, sources_of: Callable[[ModelSpec], Sources]
) -> tuple[ModelSpec, Sources]:
    """Settle a config that says "tied" by what the checkpoint holds.

    One of the two matrices serves for both, whichever is there; two that differ stay two.

    Args:
        sources_of: the family's map from canonical names to those of the checkpoint.

    Returns:
        The spec with ``tied_embeddings`` as it is, and where each of its tensors lies.
    """
    sources = sources_of(spec)
    if not spec.tied_embeddings or HEAD not in tensors.names():
        return spec, sources
    table = sources[TABLE].name
    if table not in tensors.names():
        return spec, sources | {TABLE: Source(HEAD)}
    if torch.equal(tensors.read(table), tensors.read(HEAD)):
        return spec, sources
    warnings.warn(
        f"config.json says that {HEAD} is the embedding table, but the checkpoint holds another: both are used",
        stacklevel=3,
    )
    untied = replace(spec, tied_embeddings=False)
    return untied, sources_of(untied)
