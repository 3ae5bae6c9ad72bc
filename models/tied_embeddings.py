"""Decide from the stored tensors, as ``transformers`` 5 does, whether embeddings and output projection are tied."""

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
    """Correct a spec with tied embeddings if the checkpoint stores two different matrices.

    If only one of the two matrices is stored, it serves as both.

    Args:
        sources_of: the family's function that maps canonical names to checkpoint names.

    Returns:
        The spec with the actual ``tied_embeddings``, and the source of each of its tensors.
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
